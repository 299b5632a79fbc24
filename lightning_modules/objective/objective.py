"""The objective: a named sum over terms and prefixes, `a · contrastive + b · spread-out` (`equations.md`).

Letters: B examples, M hard negatives, D embedding width.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.contrastive import contrastive_loss
from kernels.spread_out import spread_out_loss


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is minimised.

    Args:
        contrastive: Weight of the contrastive term.
        spread_out: Weight of the spread-out term (EmbeddingGemma); 0 leaves it out (Gemini Embedding).
        temperature: τ of the contrastive term. Our choice: no paper publishes it.
        learn_temperature: Train τ with the encoder, from `temperature` on.
        hardness: α of EmbeddingGemma's hard-negative weights; 0 switches them off.
        negatives: Whether a query sees its `own` hard negatives (the papers) or `all`.
        directions: `query` finds the target for a query (the papers); `both` adds the query for a target.
        centring: Share of the run during which the batch mean is subtracted from both sides, its weight falling linearly
            from 1 to 0. Nothing of it is left afterwards. Our choice, for encoders that start from random weights; 0 switches
            it off, as for a pretrained backbone.
    """

    contrastive: float = 1.0
    spread_out: float = 1.0
    temperature: float = 0.05
    learn_temperature: bool = False
    hardness: float = 0.0
    negatives: Literal["own", "all"] = "own"
    directions: Literal["query", "both"] = "query"
    centring: float = 0.0

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"objective.temperature is {self.temperature}; it must be above 0")
        if not 0 <= self.centring <= 1:
            raise ValueError(f"objective.centring is {self.centring}; it is a share of the run and must lie in [0, 1]")


class Objective(NamedTuple):
    """`total`: scalar to minimise. `parts`: name to a detached scalar, for the log."""

    total: Tensor
    parts: dict[str, Tensor]


def objective(
    config: ObjectiveConfig,
    query_BD: Tensor,
    target_BD: Tensor,
    *,
    query_id: Tensor,
    target_id: Tensor,
    prefixes: tuple[int, ...],
    progress: float,
    temperature: Tensor | None = None,
    negative_MD: Tensor | None = None,
    negative_id: Tensor | None = None,
    negative_row: Tensor | None = None,
) -> Objective:
    """The weighted sum of the terms over all prefixes.

    Args:
        config: Terms and their weights.
        query_BD: Queries (B, D), any scale.
        target_BD: Positives (B, D), any scale.
        query_id: Content ids (B,).
        target_id: Content ids (B,).
        prefixes: Widths that are trained.
        progress: Share of the run that is over, in [0, 1].
        temperature: The learnt τ, a scalar; None takes that of `config`.
        negative_MD: Hard negatives (M, D), any scale, or None.
        negative_id: Their content ids (M,).
        negative_row: The row each belongs to (M,).
    """
    vectors = [query_BD, target_BD] if negative_MD is None else [query_BD, target_BD, negative_MD]
    if not all(bool(vector.isfinite().all()) for vector in vectors):
        lost = torch.stack([vector.sum() for vector in vectors]).sum() * torch.nan
        return Objective(lost, {"loss": lost.detach()})
    parts = _health(query_BD, target_BD, query_id, target_id, negative_id, negative_row)
    heat = config.temperature if temperature is None else temperature
    centring = max(0.0, 1.0 - progress / config.centring) if config.centring else 0.0
    if centring:
        query_BD, target_BD, negative_MD = _centre(query_BD, target_BD, negative_MD, centring)
    contrastive = contrastive_loss(
        query_BD,
        target_BD,
        prefixes=prefixes,
        temperature=heat,
        query_id=query_id,
        passage_id=target_id,
        negative=negative_MD,
        negative_row=negative_row,
        negative_id=negative_id,
        negatives=config.negatives,
        hardness=config.hardness,
        directions=config.directions,
    )
    total = config.contrastive * contrastive.loss
    parts |= {f"loss@{prefix}": loss for prefix, loss in zip(prefixes, contrastive.per_prefix, strict=True)}
    if config.spread_out:
        spread_K = spread_out_loss(query_BD, prefixes=prefixes, ids=query_id)
        spread_K = spread_K + spread_out_loss(target_BD, prefixes=prefixes, ids=target_id)
        total = total + config.spread_out * spread_K.sum()
        parts |= {f"spread_out@{prefix}": loss for prefix, loss in zip(prefixes, spread_K.detach(), strict=True)}
    if temperature is not None:
        parts["temperature"] = temperature.detach()
    return Objective(total, {"loss": total.detach(), **parts})


def _centre(
    query_BD: Tensor, target_BD: Tensor, negative_MD: Tensor | None, weight: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Unit vectors less `weight` times their side's batch mean; hard negatives are on the targets' side."""
    query_BD, target_BD = F.normalize(query_BD, dim=-1), F.normalize(target_BD, dim=-1)
    target_mean_D = target_BD.mean(0)
    if negative_MD is not None:
        negative_MD = F.normalize(negative_MD, dim=-1) - weight * target_mean_D
    return query_BD - weight * query_BD.mean(0), target_BD - weight * target_mean_D, negative_MD


@torch.no_grad()
def _health(
    query_BD: Tensor,
    target_BD: Tensor,
    query_id: Tensor,
    target_id: Tensor,
    negative_id: Tensor | None,
    negative_row: Tensor | None,
) -> dict[str, Tensor]:
    """What the log shows of a batch before any centring.

    Cosine of positives, mean cosine of the in-batch negatives that count, the share of other pairs that the mask leaves out,
    and how many hard negatives were dropped because they equal their own positive.
    """
    query_BD, target_BD = F.normalize(query_BD.float(), dim=-1), F.normalize(target_BD.float(), dim=-1)
    num_rows = len(query_BD)
    query_group, target_group = (torch.unique(ids, return_inverse=True)[1] for ids in (query_id, target_id))
    both_group = torch.unique(query_group * num_rows + target_group, return_inverse=True)[1]
    # of all pairs, those in a group of equal queries or of equal targets are masked; those in both were taken twice
    cosine, count = query_BD.sum(0) @ target_BD.sum(0), torch.tensor(float(num_rows**2), device=query_BD.device)
    for sign, group_B in ((-1, query_group), (-1, target_group), (1, both_group)):
        sum_BD = torch.zeros_like(target_BD).index_put_((group_B,), target_BD, accumulate=True)
        cosine = cosine + sign * (query_BD * sum_BD[group_B]).sum()
        count = count + sign * torch.bincount(group_B).square().sum()
    parts = {
        "positive_cosine": (query_BD * target_BD).sum(1).mean(),
        "negative_cosine": torch.where(count > 0, cosine / count.clamp(min=1), 0.0),
        "masked_share": 1.0 - count / max(num_rows * (num_rows - 1), 1),
    }
    if negative_id is not None and negative_row is not None:
        parts["dropped_negatives"] = (target_id[negative_row] == negative_id).sum()
    return parts
