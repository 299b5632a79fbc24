"""What an implementation of the contrastive loss is given, what it gives back, and the small sums around its big product.

Letters: B rows of this rank, N passages of all ranks, M hard negatives, X columns that every row is scored against, D
embedding width, K prefixes, R any rows. The coordinates between two prefixes are a block; a prefix is a run of blocks, so what
holds for prefix k is the running sum over blocks, and what a block receives is the sum over the prefixes that contain it.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)
SAFE_RANGE = (2.0**-10, 2.0**10)  # of a row's largest entry
NEGLIGIBLE = 2.0**-50  # of a vector's length; in the safe range the inverse of more than that has a square within fp32


class Problem(NamedTuple):
    """One call of the loss, checked. Shapes and meaning as in `kernels.contrastive.contrastive_loss`."""

    query_BD: Tensor
    passage_ND: Tensor
    negative_MD: Tensor | None
    temperature: Tensor  # 0-d; on the CPU when it was given as a number
    query_id_N: Tensor | None
    passage_id_N: Tensor | None
    negative_row_M: Tensor | None
    negative_id_M: Tensor | None
    prefixes: tuple[int, ...]
    weights: tuple[float, ...]
    offset: int
    see_all: bool
    hardness: float
    margin: float | None

    @property
    def own_columns(self) -> slice:
        return slice(self.offset, self.offset + len(self.query_BD))

    def largest_exponent(self) -> float:
        """A bound on every exponent relative to a row's own passage; infinite where τ lies on a device, not to wait for it."""
        if self.temperature.device.type != "cpu":
            return float("inf")
        return 2.0 / self.temperature.item() + abs(self.hardness)

    def dropped_negatives(self) -> Tensor:
        """Which hard negatives equal their own row's passage in content (M,), bool."""
        assert self.negative_row_M is not None
        if self.negative_id_M is None or self.passage_id_N is None:
            return torch.zeros_like(self.negative_row_M, dtype=torch.bool)
        return self.passage_id_N[self.negative_row_M + self.offset] == self.negative_id_M

    def comparisons(self) -> "list[Comparison]":
        """Which columns a row does not see, beside its own passage: those that equal it in one of these.

        Columns are the passages and, where every row sees all hard negatives, those behind them. A row's own hard negatives are
        not seen as columns either: they enter by themselves.
        """
        found = [Comparison(ids[self.own_columns], ids, 0) for ids in (self.query_id_N, self.passage_id_N) if ids is not None]
        if self.see_all and self.negative_row_M is not None:
            row_B = torch.arange(len(self.query_BD), device=self.query_BD.device)
            found.append(Comparison(row_B, self.negative_row_M, len(self.passage_ND)))
            if self.passage_id_N is not None and self.negative_id_M is not None:
                found.append(Comparison(self.passage_id_N[self.own_columns], self.negative_id_M, len(self.passage_ND)))
        return found


class Comparison(NamedTuple):
    """Row i does not see column `first + j` where `row[i] == column[j]`."""

    row_B: Tensor
    column_J: Tensor
    first: int


class Needs(NamedTuple):
    """Which gradients are asked for."""

    query: bool
    passage: bool
    negative: bool
    temperature: bool


class Solution(NamedTuple):
    """The loss, its parts (K,), and the gradients of the loss; None where none was asked for."""

    loss: Tensor
    per_prefix_K: Tensor
    query_BD: Tensor | None
    passage_ND: Tensor | None
    negative_MD: Tensor | None
    temperature: Tensor | None


def row_scales(vectors: Sequence[Tensor]) -> list[Tensor | None]:
    """For each (R, D) the powers of two (R, 1) that bring its rows into the safe range; None where all rows lie in it.

    Raises:
        ValueError: A value is NaN or infinite; not where nobody may look, in a CUDA graph's capture and in traced code.
    """
    peaks = [torch.linalg.vector_norm(x.detach(), torch.inf, dim=1) for x in vectors]
    peaks = [peak.float() if peak.dtype in HALF else peak for peak in peaks]
    if not may_look(vectors[0]):
        return [_scale(x, peak) for x, peak in zip(vectors, peaks, strict=True)]
    bounds = torch.stack([torch.stack((peak.max(), torch.where(peak == 0, 1.0, peak).min())) for peak in peaks]).tolist()
    if not all(math.isfinite(largest) for largest, _ in bounds):
        raise ValueError("a vector holds NaN or infinity; look for the layer that made it before the loss")
    return [
        None if SAFE_RANGE[0] <= smallest and largest <= SAFE_RANGE[1] else _scale(x, peak)
        for x, peak, (largest, smallest) in zip(vectors, peaks, bounds, strict=True)
    ]


def may_look(x: Tensor) -> bool:
    """Whether the host may wait for values: not while a CUDA graph is captured or code is traced."""
    return not (torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing()))


def _scale(x_RD: Tensor, peak_R: Tensor) -> Tensor:
    largest = 1000 if x_RD.dtype == torch.float64 else 126  # keeps the power of two itself finite
    exponent_R = peak_R.frexp().exponent.clamp(-largest, largest).to(peak_R.dtype)
    return torch.exp2(-exponent_R).to(x_RD.dtype)[:, None]


@functools.cache
def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers as a tensor that is made once, since a CUDA graph may not capture a copy from the host; not to be written to."""
    return torch.tensor(values, dtype=dtype, device=device)


def blocks(prefixes: tuple[int, ...]) -> list[slice]:
    """The coordinates that each prefix adds to the one before."""
    return [slice(start, stop) for start, stop in itertools.pairwise((0, *prefixes))]


def prefix_dots(x_RD: Tensor, y_RD: Tensor, prefixes: tuple[int, ...]) -> Tensor:
    """Dot products of rows with rows at every prefix (K, R)."""
    return torch.stack([(x_RD[:, block] * y_RD[:, block]).sum(1) for block in blocks(prefixes)]).cumsum(0)


def inverse_norms(x_RD: Tensor, prefixes: tuple[int, ...]) -> Tensor:
    """1 / norm of every prefix (K, R); 0 for a prefix of zeros, whose cosine with everything is 0."""
    norm_KR = torch.stack([torch.linalg.vector_norm(x_RD[:, block], dim=1) for block in blocks(prefixes)])
    return inverse(norm_KR.square().cumsum(0).sqrt())


def inverse(norm_KR: Tensor) -> Tensor:
    """1 / norm; 0 where a prefix is as good as zeros beside the longest one, whose norm is the last."""
    return torch.where(norm_KR <= NEGLIGIBLE * norm_KR[-1], 0.0, 1.0 / norm_KR)


def add_at(to_KR: Tensor, row_M: Tensor, value_KM: Tensor) -> Tensor:
    """Adds values to the rows they belong to, in place; what fixes the order of the sums differs between CPU and GPU."""
    if to_KR.is_cuda:
        to_KR.T.index_put_((row_M,), value_KM.T, accumulate=True)
        return to_KR
    return to_KR.index_add_(1, row_M, value_KM)


def by_block(factor_KR: Tensor) -> Tensor:
    """What each block receives of a factor per prefix: the sum over the prefixes that contain it (K, R)."""
    return factor_KR.flip(0).cumsum(0).flip(0)


def add_scaled_rows(to_RD: Tensor, factor_KR: Tensor, rows_RD: Tensor, prefixes: tuple[int, ...]) -> None:
    """Adds `factor · row` to every prefix of `to`, in place."""
    for factor_R, block in zip(by_block(factor_KR), blocks(prefixes), strict=True):
        to_RD[:, block].addcmul_(rows_RD[:, block], factor_R[:, None])
