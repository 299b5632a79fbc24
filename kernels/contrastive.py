"""The masked cosine-softmax loss over all MRL prefixes: one function, whatever computes it.

Source: Gemini Embedding 2 (arXiv 2605.27295) eq. 2 for the mask and the own positive, EmbeddingGemma (arXiv 2509.20354) for the
hardness weight and the plain sum over prefixes.
"""

import itertools
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kernels.reference import contrastive_per_prefix


class ContrastiveLoss(NamedTuple):
    """`loss`: scalar, fp32 or wider, weighted sum over prefixes. `per_prefix`: (K,), detached, unweighted."""

    loss: Tensor
    per_prefix: Tensor


def contrastive_loss(
    query: Tensor,
    passage: Tensor,
    *,
    prefixes: tuple[int, ...],
    temperature: float | Tensor,
    query_id: Tensor | None = None,
    passage_id: Tensor | None = None,
    offset: int = 0,
    negative: Tensor | None = None,
    negative_row: Tensor | None = None,
    negative_id: Tensor | None = None,
    negatives: Literal["own", "all"] = "own",
    hardness: float = 0.0,
    weights: tuple[float, ...] | None = None,
    impl: Literal["auto", "reference"] = "auto",
) -> ContrastiveLoss:
    """Mean over the rows of −log softmax at the own passage, summed over prefixes.

    Args:
        query: This rank's queries (B, D), any scale.
        passage: Positives of all ranks (N, D), N ≥ B; row i's own is column offset + i.
        prefixes: Increasing widths, the last at most D.
        temperature: τ > 0, a float or a 0-d tensor (which then gets a gradient).
        query_id: Content ids of all ranks' queries (N,) int64; None means all distinct.
        passage_id: Content ids of the passages (N,) int64; None means all distinct.
        offset: Column of row 0's own passage.
        negative: Hard negatives (M, D), any number for each row, or None.
        negative_row: The row each belongs to (M,) int64.
        negative_id: Their content ids (M,) int64; None means distinct from everything.
        negatives: `own`: a row sees its own hard negatives (the papers). `all`: every row sees every one, less those equal in
            content to the row's positive. In both an own one that equals the own positive is dropped.
        hardness: α; 0 switches it off. It weights a row's own hard negatives.
        weights: One weight for each prefix; None means 1.
        impl: Which implementation; `auto` takes the best there is.

    Returns:
        The loss and its parts. A row that sees nothing but its own passage adds 0.

    Raises:
        ValueError: Shapes, prefixes, temperature or ids do not fit.
    """
    _check(query, passage, prefixes, temperature, offset, negative, negative_row, weights)
    for name, ids, length in (
        ("query_id", query_id, len(passage)),
        ("passage_id", passage_id, len(passage)),
        ("negative_id", negative_id, 0 if negative is None else len(negative)),
    ):
        if ids is not None and ids.shape != (length,):
            raise ValueError(f"{name} has shape {tuple(ids.shape)}; it must be ({length},)")
    if query.dtype in (torch.float16, torch.bfloat16):
        query, passage = query.float(), passage.float()
        negative = None if negative is None else negative.float()
    seen_BM = own_BM = None
    if negative is not None:
        assert negative_row is not None
        seen_BM, own_BM = seen_negatives(negative_row, negative_id, passage_id, len(query), offset, negatives)
    per_prefix = contrastive_per_prefix(
        query,
        passage,
        prefixes=tuple(prefixes),
        temperature=temperature,
        other_BN=other_passages(len(query), len(passage), query_id, passage_id, offset, query.device),
        negative_MD=negative,
        seen_BM=seen_BM,
        own_BM=own_BM,
        offset=offset,
        hardness=hardness,
    )
    weight = per_prefix.new_tensor(weights if weights is not None else [1.0] * len(prefixes))
    return ContrastiveLoss((per_prefix * weight).sum(), per_prefix.detach())


def other_passages(
    num_rows: int, num_passages: int, query_id: Tensor | None, passage_id: Tensor | None, offset: int, device: torch.device
) -> Tensor:
    """mask(i, j) of the equations (B, N), bool: passage j counts against row i unless query or passage are equal in content."""
    column_N = torch.arange(num_passages, device=device)
    row_B = column_N[offset : offset + num_rows]
    other_BN = row_B[:, None] != column_N
    for ids in (query_id, passage_id):
        if ids is not None:
            other_BN &= ids[row_B][:, None] != ids
    return other_BN


def seen_negatives(
    negative_row: Tensor, negative_id: Tensor | None, passage_id: Tensor | None, num_rows: int, offset: int, negatives: str
) -> tuple[Tensor, Tensor]:
    """Which hard negatives a row sees, and which of them are its own: two (B, M) bool."""
    row_B = torch.arange(num_rows, device=negative_row.device)
    own_BM = row_B[:, None] == negative_row
    seen_BM = own_BM if negatives == "own" else torch.ones_like(own_BM)
    if negative_id is not None and passage_id is not None:
        seen_BM = seen_BM & (passage_id[row_B + offset][:, None] != negative_id)
    return seen_BM, own_BM


def check_prefixes(prefixes: tuple[int, ...], width: int) -> None:
    """Raises ValueError unless the prefixes increase and fit into `width`."""
    if not prefixes or prefixes[0] < 1 or any(a >= b for a, b in itertools.pairwise(prefixes)):
        raise ValueError(f"prefixes are {list(prefixes)}; they must be positive and increase")
    if prefixes[-1] > width:
        raise ValueError(f"prefix {prefixes[-1]} is wider than the embedding, which has {width} dimensions")


def _check(
    query: Tensor,
    passage: Tensor,
    prefixes: tuple[int, ...],
    temperature: float | Tensor,
    offset: int,
    negative: Tensor | None,
    negative_row: Tensor | None,
    weights: tuple[float, ...] | None,
) -> None:
    if query.ndim != 2 or passage.ndim != 2 or query.shape[1] != passage.shape[1] or not len(query):
        raise ValueError(
            f"query has shape {tuple(query.shape)} and passage {tuple(passage.shape)}; "
            "they must be (B, D) and (N, D), B at least 1"
        )
    if offset < 0 or offset + len(query) > len(passage):
        raise ValueError(f"offset {offset} with {len(query)} queries does not fit into {len(passage)} passages")
    check_prefixes(tuple(prefixes), query.shape[1])
    heat = float(temperature.detach()) if isinstance(temperature, Tensor) else temperature
    if heat <= 0:
        raise ValueError(f"temperature is {heat}; it must be above 0")
    if weights is not None and len(weights) != len(prefixes):
        raise ValueError(f"{len(weights)} weights for {len(prefixes)} prefixes; there must be one for each")
    if (negative is None) != (negative_row is None):
        raise ValueError("negative and negative_row must be given together")
    if (
        negative is not None
        and negative_row is not None
        and (negative.shape[1:], len(negative)) != (query.shape[1:], len(negative_row))
    ):
        raise ValueError(
            f"negative has shape {tuple(negative.shape)}; it must be (M, {query.shape[1]}) with a row for each of M"
        )
