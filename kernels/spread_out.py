"""The spread-out term (global orthogonal regulariser) of EmbeddingGemma (arXiv 2509.20354) over MRL prefixes.

Σ_ij (x_i · x_j)² = ‖XᵀX‖²: where a batch is longer than its vectors are wide, a D × D matrix says it; else chunks of rows do. A
B × B matrix never exists.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.contrastive import FLOATS, check_prefixes
from kernels.problem import HALF, may_look, row_scales
from kernels.reference import unit

CHUNK_ELEMENTS = 2**20  # scores that exist at a time; our choice


def spread_out_loss(x: Tensor, *, prefixes: Sequence[int], ids: Tensor | None = None) -> Tensor:
    """Mean squared cosine between different rows, one value for each prefix; 1/d for random unit vectors.

    Args:
        x: Vectors of one side (B, D), B at least 2, any finite scale. Rows of zeros have cosine 0 with everything.
        prefixes: Increasing widths, the last at most D.
        ids: Content ids (B,) int64: pairs of equal content are left out. None means all distinct.

    Returns:
        Losses (K,) in fp32 (fp64 for fp64 vectors), with gradient.

    Raises:
        ValueError: Shapes, ids or prefixes do not fit; a value is NaN or infinite.
    """
    if x.ndim != 2 or len(x) < 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; it must be (B, D) with B at least 2")
    check_prefixes(prefixes, x.shape[1])
    if x.dtype not in FLOATS:
        raise ValueError(f"x is {x.dtype}; it must be fp16, bf16, fp32 or fp64")
    if ids is not None and (ids.shape != (len(x),) or ids.device != x.device):
        raise ValueError(f"ids has shape {tuple(ids.shape)} on {ids.device}; it must be ({len(x)},) on {x.device}")
    with torch.autocast(x.device.type, enabled=False):
        x_BD = x.float() if x.dtype in HALF else x
        x_BD = x_BD[:, : prefixes[-1]]
        (scale,) = row_scales([x_BD])
        x_BD = x_BD if scale is None else x_BD * scale
        gram_is_cheaper = sum(width * width for width in prefixes) < len(x) * sum(prefixes)
        pairs = _equal_pairs(ids, x) if gram_is_cheaper else None
        units = [unit(x_BD, width) for width in prefixes]
        if pairs is not None:
            sums = [_sum_by_gram(unit_BC, pairs) for unit_BC in units]
        else:
            ids_B = torch.arange(len(x), device=x.device) if ids is None else ids
            sums = [_SumByChunks.apply(unit_BC, ids_B) for unit_BC in units]
        return torch.stack(sums) / (len(x) * (len(x) - 1))


def _equal_pairs(ids: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor] | None:
    """Rows i < j of equal content, two (P,); None when they are more than the rows, or nobody may count them."""
    if ids is None:
        return torch.empty(0, dtype=torch.int64, device=x.device), torch.empty(0, dtype=torch.int64, device=x.device)
    if not may_look(x):
        return None
    sorted_B, order_B = ids.sort(stable=True)
    rows, columns, distance = [], [], 1
    while distance < len(ids):
        at = (sorted_B[distance:] == sorted_B[:-distance]).nonzero()[:, 0]
        if not len(at):
            break
        rows.append(order_B[at])
        columns.append(order_B[at + distance])
        if sum(map(len, rows)) > len(ids):
            return None
        distance += 1
    empty = order_B[:0]
    return torch.cat([empty, *rows]), torch.cat([empty, *columns])


def _sum_by_gram(unit_BC: Tensor, pairs: tuple[Tensor, Tensor]) -> Tensor:
    """Σ (x_i · x_j)² over the pairs i ≠ j of different content: all pairs, less every row with itself, less equal pairs."""
    square_B = unit_BC.square().sum(1)
    equal_P = (unit_BC[pairs[0]] * unit_BC[pairs[1]]).sum(1)
    return (unit_BC.T @ unit_BC).square().sum() - square_B.square().sum() - 2 * equal_P.square().sum()


class _SumByChunks(torch.autograd.Function):
    """The same, chunk by chunk of rows, the gradient made with it: 4 Σ_j (x_i · x_j) x_j."""

    @staticmethod
    def forward(ctx, unit_BC: Tensor, ids_B: Tensor) -> Tensor:
        num_rows = min(len(unit_BC), max(1, CHUNK_ELEMENTS // len(unit_BC)))
        score_RB = unit_BC.new_empty(num_rows, len(unit_BC))
        gradient_BC = torch.empty_like(unit_BC)
        total = unit_BC.new_zeros(())
        for start in range(0, len(unit_BC), num_rows):
            rows = slice(start, min(start + num_rows, len(unit_BC)))
            cosine_RB = torch.mm(unit_BC[rows], unit_BC.T, out=score_RB[: rows.stop - start])
            cosine_RB.masked_fill_(ids_B[rows, None] == ids_B, 0.0)
            total += torch.linalg.vector_norm(cosine_RB).square()
            torch.mm(cosine_RB, unit_BC, out=gradient_BC[rows])
        ctx.save_for_backward(gradient_BC.mul_(4.0))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (gradient_BC,) = ctx.saved_tensors
        return grad * gradient_BC, None
