"""The spread-out term (global orthogonal regulariser) of EmbeddingGemma (arXiv 2509.20354) over MRL prefixes."""

import torch
from torch import Tensor

from kernels.contrastive import check_prefixes
from kernels.reference import spread_out_per_prefix


def spread_out_loss(x: Tensor, *, prefixes: tuple[int, ...], ids: Tensor | None = None) -> Tensor:
    """Mean squared cosine between different rows, one value for each prefix; 1/d for random unit vectors.

    Args:
        x: Vectors of one side (B, D), B at least 2, any scale.
        prefixes: Increasing widths, the last at most D.
        ids: Content ids (B,) int64: pairs of equal content are left out. None means all distinct.

    Returns:
        Losses (K,), with gradient.

    Raises:
        ValueError: Shapes or prefixes do not fit.
    """
    if x.ndim != 2 or len(x) < 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; it must be (B, D) with B at least 2")
    check_prefixes(tuple(prefixes), x.shape[1])
    ids = torch.arange(len(x), device=x.device) if ids is None else ids
    if ids.shape != (len(x),):
        raise ValueError(f"ids has shape {tuple(ids.shape)}; it must be ({len(x)},)")
    if x.dtype in (torch.float16, torch.bfloat16):
        x = x.float()
    return spread_out_per_prefix(x, prefixes=tuple(prefixes), other_BB=ids[:, None] != ids)
