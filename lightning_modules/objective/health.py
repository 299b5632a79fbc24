"""What the log says of a batch, so that silent failures show: cosines, repeated contents, pairs left out, vectors all alike.

Everything is made of sums over groups of equal content; a matrix of rows by rows never exists. Letters: G examples on all
ranks, B rows of one, N columns that they are scored against, D embedding width.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_ELEMENTS = 2**20  # cosines that exist at a time; our choice
COLLAPSED_COSINE = 0.99  # our choice: a random start may pass through it, a run that learns leaves it
COLLAPSED_STEPS = 100  # in a row; our choice


@torch.no_grad()
def health(query_GD: Tensor, target_GD: Tensor, query_id_G: Tensor, target_id_G: Tensor) -> dict[str, Tensor]:
    """Scalars of a batch, before any centring.

    Args:
        query_GD: Queries (G, D), any scale.
        target_GD: Targets (G, D), any scale.
        query_id_G: Content ids (G,).
        target_id_G: Content ids (G,).

    Returns:
        positive_cosine: Mean cosine of a query and its target.
        negative_cosine: Mean cosine of a query and another's target, of the pairs that the mask leaves; 0 if there are none.
        masked_share: Share of those pairs that the mask leaves out.
        duplicate_share: Share of rows whose target's content is not theirs alone.
        pairwise_cosine: Mean cosine of targets of different content; 0 if there are none.
        query_pairwise_cosine: The same of queries.
    """
    query_GD, target_GD = F.normalize(query_GD.float(), dim=-1), F.normalize(target_GD.float(), dim=-1)
    num_rows = len(query_GD)
    query_group_G, target_group_G = (torch.unique(ids, return_inverse=True)[1] for ids in (query_id_G, target_id_G))
    both_group_G = torch.unique(query_group_G * num_rows + target_group_G, return_inverse=True)[1]
    # of all pairs, those in a group of equal queries or of equal targets are masked; those in both were taken twice
    cosine, count = query_GD.sum(0) @ target_GD.sum(0), torch.tensor(float(num_rows**2), device=query_GD.device)
    for sign, group_G in ((-1, query_group_G), (-1, target_group_G), (1, both_group_G)):
        cosine = cosine + sign * (query_GD * _sums(target_GD, group_G)[group_G]).sum()
        count = count + sign * torch.bincount(group_G).square().sum()
    return {
        "positive_cosine": (query_GD * target_GD).sum(1).mean(),
        "negative_cosine": torch.where(count > 0, cosine / count.clamp(min=1), 0.0),
        "masked_share": 1.0 - count / max(num_rows * (num_rows - 1), 1),
        "duplicate_share": (torch.bincount(target_group_G)[target_group_G] > 1).float().mean(),
        "pairwise_cosine": _pairwise_cosine(target_GD, target_group_G),
        "query_pairwise_cosine": _pairwise_cosine(query_GD, query_group_G),
    }


def candidates(
    masked_share: Tensor, num_rows: int, *, num_negatives: Tensor | float = 0.0, num_past: int = 0
) -> dict[str, Tensor]:
    """How many a row chooses from, on average; `candidates_back` is what a target chooses from where both directions count.

    Args:
        masked_share: See `health`.
        num_rows: Examples G on all ranks.
        num_negatives: Hard negatives that a row sees, on average.
        num_past: Past targets, which all count here though the mask may leave some of them out.
    """
    in_batch = 1.0 + (1.0 - masked_share) * (num_rows - 1)
    return {"candidates": in_batch + num_negatives + num_past, "candidates_back": in_batch}


@torch.no_grad()
def guarded_share(
    query_BD: Tensor,
    column_ND: Tensor,
    query_id_N: Tensor,
    column_id_N: Tensor,
    *,
    offset: int,
    margin: float,
) -> Tensor:
    """Share of a row's other columns that are nearer to it than its own by more than the margin, and that the mask would leave.

    Args:
        query_BD: Rows (B, D), any scale.
        column_ND: Columns (N, D), any scale; row i's own is offset + i.
        query_id_N: Content ids of the columns' queries (N,).
        column_id_N: Content ids of the columns (N,).
        offset: Column of row 0's own.
        margin: Difference of cosines.
    """
    query_BD, column_ND = F.normalize(query_BD.float(), dim=-1), F.normalize(column_ND.float(), dim=-1)
    own = slice(offset, offset + len(query_BD))
    limit_B = (query_BD * column_ND[own]).sum(1) + margin
    num_guarded = torch.zeros((), device=query_BD.device)
    for rows in torch.arange(len(query_BD), device=query_BD.device).split(max(1, CHUNK_ELEMENTS // len(column_ND))):
        is_near = query_BD[rows] @ column_ND.T > limit_B[rows, None]
        is_near &= query_id_N[own][rows, None] != query_id_N
        is_near &= column_id_N[own][rows, None] != column_id_N
        num_guarded += is_near.sum()
    return num_guarded / max(1, len(query_BD) * (len(column_ND) - 1))


def first_line(parts: Mapping[str, float], prefix: int, *, both: bool, centred: bool = False) -> str:
    """A run's first loss beside what it would be if all candidates were alike.

    Far above it something is wrong, but for centred vectors: they point in all directions, and may be far above it.

    Args:
        parts: The log's parts of the first step.
        prefix: The smallest prefix.
        both: Whether the loss holds both directions.
        centred: Whether the batch mean was subtracted.
    """
    num_candidates = parts["candidates"]
    chance = math.log(num_candidates) + (math.log(parts["candidates_back"]) if both else 0.0)
    ways, how = ", both ways," if both else "", " of centred vectors" if centred else ""
    return (
        f"first loss {parts[f'loss@{prefix}']:.2f} at prefix {prefix}{how}; "
        f"log of {num_candidates:.0f} candidates{ways} is {chance:.2f}"
    )


class CollapseWatch:
    """Counts the steps in a row whose queries and targets have a mean pairwise cosine above 0.99: embeddings have collapsed."""

    def __init__(self) -> None:
        self.num_steps = 0

    def see(self, parts: Mapping[str, float]) -> str | None:
        """What to say, after every hundredth such step; None otherwise."""
        cosines = [parts.get("pairwise_cosine", 0.0), parts.get("query_pairwise_cosine", 0.0)]
        self.num_steps = self.num_steps + 1 if min(cosines) > COLLAPSED_COSINE else 0
        if not self.num_steps or self.num_steps % COLLAPSED_STEPS:
            return None
        return (
            f"embeddings have collapsed: for {self.num_steps} steps different targets, and different queries, have had a mean "
            f"cosine above {COLLAPSED_COSINE} (now {cosines[0]:.4f}, {cosines[1]:.4f}). Lower the learning rate, raise the "
            "temperature or set objective.centring"
        )

    @property
    def is_collapsed(self) -> bool:
        """Whether it has lasted for a hundred steps."""
        return self.num_steps >= COLLAPSED_STEPS


def _sums(x_GD: Tensor, group_G: Tensor) -> Tensor:
    """Sum of each group's rows, at the group's number (G, D)."""
    return torch.zeros_like(x_GD).index_put_((group_G,), x_GD, accumulate=True)


def _pairwise_cosine(unit_GD: Tensor, group_G: Tensor) -> Tensor:
    """Σ over pairs of different groups: that of all pairs less that within the groups."""
    total = unit_GD.sum(0).square().sum() - _sums(unit_GD, group_G).square().sum()
    count = len(unit_GD) ** 2 - torch.bincount(group_G).square().sum()
    return torch.where(count > 0, total / count.clamp(min=1), 0.0)
