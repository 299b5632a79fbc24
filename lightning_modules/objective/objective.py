"""The objective: a named sum, `a · contrastive + b · spread-out + c · matching` (`equations.md`), on any number of ranks.

The contrastive and the spread-out term are sums over the prefixes. Letters: B examples of this rank, G of all ranks, M hard
negatives, N columns that a row is scored against, D embedding width, T the teacher's.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.contrastive import check_prefixes, contrastive_loss
from kernels.spread_out import spread_out_loss
from lightning_modules.objective.gather import gathered, mean_over_ranks, num_ranks, require_equal, this_rank, told_by_all
from lightning_modules.objective.health import candidates, guarded_share, health
from lightning_modules.objective.matching import Matching, taught
from lightning_modules.objective.queue import Past, Queue


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is minimised.

    Args:
        contrastive: Weight of the contrastive term.
        spread_out: Weight of the spread-out term (EmbeddingGemma); 0 leaves it out (Gemini Embedding).
        matching: Weight of the distance to a teacher's vectors, which the data must hold (EmbeddingGemma); 0 leaves it out.
        temperature: τ of the contrastive term. Our choice: no paper publishes it.
        learn_temperature: Train τ with the encoder, from `temperature` on.
        hardness: α of EmbeddingGemma's hard-negative weights; 0 switches them off.
        negatives: Whether a query sees its `own` hard negatives (the papers) or `all`.
        directions: `query` finds the target for a query (the papers); `both` adds the query for a target.
        centring: Share of the run during which the batch mean is subtracted from both sides, its weight falling linearly
            from 1 to 0. Nothing of it is left afterwards. Our choice, for encoders that start from random weights; 0 switches
            it off, as for a pretrained backbone.
        margin: What is nearer to a query than its target by more than this difference of cosines is taken for a false negative
            and left out; None leaves nothing out (the papers).
        queue: Past targets of the same task that count as further in-batch negatives, without gradient; 0 for none (the
            papers).
        matching_distance: `cosine`, or `l2` for the squared length of the difference. Our choice: the paper publishes none.
        teacher_dim: Width of a teacher that a linear map from the embedding is learnt for, which is thrown away after training;
            None compares as it is.
        teacher_prefix: Whether a prefix of the teacher's vectors is a vector itself (MRL): the wider of the two is cut.
    """

    contrastive: float = 1.0
    spread_out: float = 1.0
    matching: float = 0.0
    temperature: float = 0.05
    learn_temperature: bool = False
    hardness: float = 0.0
    negatives: Literal["own", "all"] = "own"
    directions: Literal["query", "both"] = "query"
    centring: float = 0.0
    margin: float | None = None
    queue: int = 0
    matching_distance: Literal["cosine", "l2"] = "cosine"
    teacher_dim: int | None = None
    teacher_prefix: bool = False

    def __post_init__(self) -> None:
        weights = (self.contrastive, self.spread_out, self.matching)
        if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not any(weights):
            raise ValueError(
                f"objective.contrastive, spread_out and matching are {weights}; they must be at least 0, and one of them above"
            )
        if self.temperature <= 0:
            raise ValueError(f"objective.temperature is {self.temperature}; it must be above 0")
        if not 0 <= self.centring <= 1:
            raise ValueError(f"objective.centring is {self.centring}; it is a share of the run and must lie in [0, 1]")
        if self.margin is not None and not -2 <= self.margin <= 2:
            raise ValueError(f"objective.margin is {self.margin}; it must lie in [-2, 2], or be null to leave nothing out")
        if self.queue < 0:
            raise ValueError(f"objective.queue is {self.queue}; it must be at least 0")
        needs_contrastive = [name for name in ("learn_temperature", "queue") if getattr(self, name)]
        if not self.contrastive and needs_contrastive:
            raise ValueError(f"objective.{needs_contrastive[0]} belongs to the contrastive term, whose weight is 0")
        if self.teacher_dim is not None and (self.teacher_dim < 1 or self.teacher_prefix):
            raise ValueError(
                f"objective.teacher_dim is {self.teacher_dim}, teacher_prefix {self.teacher_prefix}; teacher_dim, at least 1, "
                "learns a map to a teacher that cannot be cut, teacher_prefix cuts one that can: give one of them"
            )


class ObjectiveLoss(NamedTuple):
    """`total`: this rank's scalar to minimise. `parts`: name to a detached scalar for the log, of all ranks together."""

    total: Tensor
    parts: dict[str, Tensor]


class Vectors(NamedTuple):
    """All ranks' queries and targets (G, D) with their content ids (G,), and the hard negatives that this rank's rows see.

    `own` are this rank's rows. Hard negatives (M, D) are its own, their rows counted from its first one; or, where every row
    sees every one, those of all ranks, counted from the first of all; None where no rank has one.
    """

    query_GD: Tensor
    target_GD: Tensor
    query_id_G: Tensor
    target_id_G: Tensor
    own: slice
    negative_MD: Tensor | None
    negative_id_M: Tensor | None
    negative_row_M: Tensor | None


def as_multiplied(vector: Tensor | None) -> Any:
    """A matrix in the half precision that autocast on a GPU multiplies in, which Triton's kernel takes; else as it is."""
    if vector is None or vector.device.type != "cuda" or not torch.is_autocast_enabled("cuda"):
        return vector
    return vector.to(torch.get_autocast_dtype("cuda"))


class Objective(nn.Module):
    """The weighted sum of the terms, and what is learnt or kept for it beside the encoder.

    Args:
        config: Terms and their weights.
        prefixes: Widths that are trained.
        embedding_dim: Width D of the vectors.
    """

    def __init__(self, config: ObjectiveConfig, *, prefixes: tuple[int, ...], embedding_dim: int) -> None:
        super().__init__()
        check_prefixes(prefixes, embedding_dim)
        self.config, self.prefixes = config, prefixes
        self.log_temperature = None
        if config.learn_temperature:
            self.log_temperature = nn.Parameter(torch.tensor([config.temperature]).log())  # (1,): FSDP shards no scalar
        self.queue = Queue(config.queue) if config.queue else None
        self.matching = None
        if config.matching:
            self.matching = Matching(
                embedding_dim,
                distance=config.matching_distance,
                teacher_dim=config.teacher_dim,
                teacher_prefix=config.teacher_prefix,
            )

    def forward(
        self,
        query_BD: Tensor,
        target_BD: Tensor,
        negative_MD: Tensor | None = None,
        *,
        query_id: Tensor,
        target_id: Tensor,
        negative_id: Tensor | None = None,
        negative_row: Tensor | None = None,
        query_vector: Tensor | None = None,
        target_vector: Tensor | None = None,
        negative_vector: Tensor | None = None,
        task: str = "",
        progress: float = 0.0,
    ) -> ObjectiveLoss:
        """The loss of a batch; all ranks call it together.

        The mean of the ranks' totals is what one rank would get for the whole batch, and so are, under DDP or FSDP, the
        gradients. If a vector of any rank is not finite, every rank's total is NaN.

        Args:
            query_BD: Queries (B, D), any scale.
            target_BD: Positives (B, D), any scale.
            negative_MD: Hard negatives (M, D), any scale, any number for each row and rank, or None.
            query_id: Content ids (B,) int64.
            target_id: Content ids (B,) int64.
            negative_id: Content ids (M,) int64.
            negative_row: The row that each belongs to (M,) int64.
            query_vector: The teacher's vectors of the queries (B, T), rows of NaN where it has none; None if it has none.
            target_vector: The same of the targets (B, T).
            negative_vector: The same of the hard negatives (M, T).
            task: Name of the task, for the queue.
            progress: Share of the run that is over, in [0, 1].

        Raises:
            ValueError: On all ranks alike: their batches differ in size or width, or the teacher's width does not fit.
        """
        if negative_MD is None:  # of no rows, but with a gradient like that of other ranks
            negative_MD, negative_id, negative_row = query_BD[:0], query_id[:0], query_id[:0]
            negative_vector = None
        assert negative_id is not None
        assert negative_row is not None
        students = {"query": query_BD, "target": target_BD, "negative": negative_MD}
        teachers = {"query": query_vector, "target": target_vector, "negative": negative_vector}
        told = told_by_all(_sizes(students, teachers), query_BD.device)
        require_equal(told, "queries", "targets", "dimensions")
        if told["queries"] != told["targets"]:
            raise ValueError(
                f"there are {told['queries'][0]} queries for {told['targets'][0]} targets; every query needs its own"
            )
        if not all(told["is_finite"]):
            return self._lost([*students.values()])
        ids = {"query": query_id, "target": target_id, "negative": negative_id}
        vectors = self._of_all_ranks(students, ids, negative_row, told)
        parts = health(vectors.query_GD, vectors.target_GD, vectors.query_id_G, vectors.target_id_G)
        centred, past = self._centred(vectors, self.queue.of(task) if self.queue is not None else None, progress)
        total, terms = query_BD.new_zeros(()), {}
        if self.config.contrastive:
            loss, found = self._contrastive(centred, past)
            total, terms = total + self.config.contrastive * loss, terms | found
        if self.config.spread_out:
            loss, found = self._spread_out(centred)
            total, terms = total + self.config.spread_out * loss, terms | found
        if self.matching is not None:
            loss, found = self._matching(self.matching, students, teachers, told)
            total, terms = total + self.config.matching * loss, terms | found
        if self.log_temperature is not None:
            terms["temperature"] = self.temperature
        num_dropped = (target_id[negative_row] == negative_id).sum()
        if any(told["negatives"]):
            parts["dropped_negatives"] = num_dropped * num_ranks()
        num_seen = (len(negative_id) - num_dropped) * (num_ranks() if self.config.negatives == "all" else 1 / len(query_BD))
        num_past = 0 if past is None else len(past.target_QD)
        parts |= candidates(parts["masked_share"], len(vectors.query_GD), num_negatives=num_seen, num_past=num_past)
        if self.queue is not None and self.training and torch.is_grad_enabled():
            self.queue.push(task, vectors.target_GD, vectors.query_id_G, vectors.target_id_G)
        return ObjectiveLoss(total, mean_over_ranks({k: v.detach() for k, v in {"loss": total, **terms, **parts}.items()}))

    @property
    def temperature(self) -> float | Tensor:
        """τ, a scalar with gradient where it is learnt."""
        return self.config.temperature if self.log_temperature is None else self.log_temperature.exp()[0]

    def _lost(self, tensors: list[Tensor]) -> ObjectiveLoss:
        """NaN, with a gradient for every parameter, as DDP waits for each."""
        lost = torch.stack([x.sum() for x in (*tensors, *self.parameters())]).sum() * torch.nan
        return ObjectiveLoss(lost, {"loss": lost.detach()})

    def _of_all_ranks(
        self, students: dict[str, Tensor], ids: dict[str, Tensor], negative_row: Tensor, told: dict[str, list[int]]
    ) -> Vectors:
        num_rows = told["queries"][0]
        own = slice(this_rank() * num_rows, (this_rank() + 1) * num_rows)
        counts = [told["queries"], told["targets"]]
        if self.config.negatives == "own":
            query_GD, target_GD = gathered([students["query"], students["target"]], counts)
            query_id_G, target_id_G = gathered([ids["query"], ids["target"]], counts)
            negatives = (students["negative"], ids["negative"], negative_row)
        else:
            rows = told["negatives"]
            query_GD, target_GD, negative_MD = gathered([*students.values()], [*counts, rows])
            columns = [*ids.values(), negative_row + own.start]
            query_id_G, target_id_G, *id_and_row = gathered(columns, [*counts, rows, rows])
            negatives = (negative_MD, *id_and_row)
        if not any(told["negatives"]):
            negatives = (None, None, None)
        return Vectors(query_GD, target_GD, query_id_G, target_id_G, own, *negatives)

    def _centred(self, vectors: Vectors, past: Past | None, progress: float) -> tuple[Vectors, Past | None]:
        """Unit vectors less a share of their side's batch mean; hard negatives and past targets are on the targets' side."""
        share = max(0.0, 1.0 - progress / self.config.centring) if self.config.centring else 0.0
        if past is not None:
            past = Past(*(kept.to(like) for kept, like in zip(past, (vectors.target_GD, *vectors[2:4]), strict=True)))
        if not share:
            return vectors, past
        query_GD, target_GD = F.normalize(vectors.query_GD, dim=-1), F.normalize(vectors.target_GD, dim=-1)
        query_mean_D, target_mean_D = share * query_GD.mean(0), share * target_GD.mean(0)
        negative_MD = vectors.negative_MD
        if negative_MD is not None:
            negative_MD = F.normalize(negative_MD, dim=-1) - target_mean_D
        if past is not None:
            past = past._replace(target_QD=F.normalize(past.target_QD, dim=-1) - target_mean_D.detach())
        return vectors._replace(
            query_GD=query_GD - query_mean_D, target_GD=target_GD - target_mean_D, negative_MD=negative_MD
        ), past

    def _contrastive(self, vectors: Vectors, past: Past | None) -> tuple[Tensor, dict[str, Tensor]]:
        """This rank's rows against all columns; where they see all ranks' hard negatives, all rows, the same on every rank."""
        own = vectors.own if self.config.negatives == "own" else slice(0, len(vectors.query_GD))
        query_GD, target_GD, negative_MD = map(as_multiplied, (vectors.query_GD, vectors.target_GD, vectors.negative_MD))
        vectors = vectors._replace(query_GD=query_GD, target_GD=target_GD, negative_MD=negative_MD)
        if past is not None:
            past = past._replace(target_QD=as_multiplied(past.target_QD))
        columns = (vectors.target_GD, vectors.query_id_G, vectors.target_id_G)
        if past is not None:
            columns = tuple(torch.cat(pair) for pair in zip(columns, past, strict=True))
        target_ND, query_id_N, target_id_N = columns
        options: dict[str, Any] = {"prefixes": self.prefixes, "temperature": self.temperature}
        if self.config.margin is not None:
            options["margin"] = self.config.margin
        there = contrastive_loss(
            vectors.query_GD[own],
            target_ND,
            query_id=query_id_N,
            passage_id=target_id_N,
            offset=own.start,
            negative=vectors.negative_MD,
            negative_row=vectors.negative_row_M,
            negative_id=vectors.negative_id_M,
            negatives=self.config.negatives,
            hardness=self.config.hardness,
            **options,
        )
        loss, per_prefix_K, parts = there.loss, there.per_prefix, {}
        if self.config.directions == "both":
            back = contrastive_loss(
                vectors.target_GD[vectors.own],
                vectors.query_GD,
                query_id=vectors.target_id_G,
                passage_id=vectors.query_id_G,
                offset=vectors.own.start,
                **options,
            )
            loss, per_prefix_K = loss + back.loss, per_prefix_K + back.per_prefix
        if self.config.margin is not None:
            parts["guarded_share"] = guarded_share(
                vectors.query_GD[own], target_ND, query_id_N, target_id_N, offset=own.start, margin=self.config.margin
            )
        return loss, parts | {f"loss@{prefix}": part for prefix, part in zip(self.prefixes, per_prefix_K, strict=True)}

    def _spread_out(self, vectors: Vectors) -> tuple[Tensor, dict[str, Tensor]]:
        """Of all ranks' queries and targets, the same on every rank."""
        spread_K = spread_out_loss(vectors.query_GD, prefixes=self.prefixes, ids=vectors.query_id_G)
        spread_K = spread_K + spread_out_loss(vectors.target_GD, prefixes=self.prefixes, ids=vectors.target_id_G)
        return spread_K.sum(), {f"spread_out@{prefix}": part for prefix, part in zip(self.prefixes, spread_K, strict=True)}

    def _matching(
        self,
        matching: Matching,
        students: dict[str, Tensor],
        teachers: dict[str, Tensor | None],
        told: dict[str, list[int]],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of the columns' mean distances to the teacher; its parts, and the rows that it has no vector for."""
        teacher_dim = max(told["teacher_dim"])
        if {*told["teacher_dim"]} - {0, teacher_dim}:
            raise ValueError(
                f"the ranks' teacher vectors have widths {told['teacher_dim']}, in the order of the ranks; a task's data must "
                "hold one teacher's vectors"
            )
        num_taught = {name: sum(told[f"taught_{name}"]) for name in students}
        columns = {name: (student_RD, teachers[name]) for name, student_RD in students.items()}
        means = matching(columns, num_taught, teacher_dim)
        num_rows = sum(map(sum, (told["queries"], told["targets"], told["negatives"])))
        left_out = torch.tensor(float(num_rows - sum(num_taught.values())), device=students["query"].device)
        parts = {f"matching_{name}": mean for name, mean in means.items()} | {"matching_left_out": left_out}
        return torch.stack([*means.values()]).sum(), parts


def _sizes(students: dict[str, Tensor], teachers: dict[str, Tensor | None]) -> dict[str, int | Tensor]:
    """What the ranks tell each other of their batches."""
    widths = [teacher.shape[1] for teacher in teachers.values() if teacher is not None]
    return {
        "queries": len(students["query"]),
        "targets": len(students["target"]),
        "negatives": len(students["negative"]),
        "dimensions": students["query"].shape[1],
        "is_finite": torch.stack([student.isfinite().all() for student in students.values()]).all(),
        "teacher_dim": max(widths, default=0),
        **{f"taught_{name}": 0 if teacher is None else taught(teacher).sum() for name, teacher in teachers.items()},
    }
