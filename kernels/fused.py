# pyright: reportArgumentType=false
# Triton takes plain numbers for its constexpr parameters.
"""The contrastive loss and its gradients fused in Triton: `kernels.chunked` says the mathematics, this file the launches.

For each chunk of rows, with E standing for e^L and W for the weights of the gradient products:

    prologue: inverse norms of rows and columns, own scores
    scores: one product Q Xᵀ; at each prefix edge E, its largest exponent and its sum per row of a tile leave the registers
    close:  Z of every row from the tiles' sums; its loss and the factor that turns E into G
    weigh:  E becomes W in place, from the last prefix to the first; sums of G s per row and per column of a tile
    pull:   dQ = W X, dX = Wᵀ Q, one block of coordinates at a time, own passages and normalisation in the epilogue

Letters as in `kernels.problem`; R rows of a chunk. Not run on a GPU yet: tested through Triton's interpreter, and compiled
ahead of time for sm_80 and sm_90 (experiments/bench/aot.py).
"""

import bisect
import itertools
import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton import knobs

from kernels.own_negatives import OwnNegatives
from kernels.problem import Needs, Problem, Solution, blocks, by_block, constant, inverse
from kernels.tiles import BLOCK_K, BLOCK_M, BLOCK_N, HALF_N, close, prologue, pull_columns, pull_rows, scores, weigh

LAUNCH = {"num_warps": 8, "num_stages": 3, "enable_fp_fusion": True}
WORKSPACE_BYTES = 2**30  # of E and W; our choice
LOG2_E = 1.0 / math.log(2.0)


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why the kernels cannot run on inputs like these; None when they can."""
    if dtype == torch.float64:
        return "fp64 has no tensor cores; cast to fp32 or take impl='chunked'"
    if knobs.runtime.interpret:
        return (
            None if device.type == "cpu" and dtype == torch.float32 else "Triton's interpreter is right for fp32 on a CPU only"
        )
    if dtype == torch.float32:
        return "its products are of half-precision vectors; take impl='chunked'"
    if device.type != "cuda":
        return f"the vectors are on {device}; Triton needs a CUDA device"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    return None


def contrastive_fused(problem: Problem, needs: Needs, workspace_bytes: int = WORKSPACE_BYTES) -> Solution:
    """Loss and gradients; those of queries and passages have the dtype of the inputs, or fp32 where that would lose digits.

    Args:
        problem: The checked arguments of the loss, vectors in bf16 or fp16, in the interpreter fp32.
        needs: Which gradients to make; without any, only the scores are computed.
        workspace_bytes: Bound on the memory of a chunk's E; at least BLOCK_M rows are taken at a time.
    """
    return _Fused(problem, needs, workspace_bytes).solve()


class _Fused:
    """The launches of one call, chunk after chunk, and the small tensors between them."""

    def __init__(self, problem: Problem, needs: Needs, workspace_bytes: int) -> None:
        self.problem, self.needs = problem, needs
        columns = problem.passage_ND
        self.needs_columns = needs.passage
        if problem.see_all and problem.negative_MD is not None:
            columns = torch.cat([columns, problem.negative_MD])
            self.needs_columns = needs.passage or needs.negative
        self.layout = _Layout.of(problem.prefixes)
        self.query, self.column = self.layout.pad(problem.query_BD), self.layout.pad(columns)
        self.num_rows, self.num_columns, self.num_prefixes = len(self.query), len(columns), len(problem.prefixes)
        self.columns_padded = _round_up(self.num_columns, BLOCK_N)
        self.dtype = torch.float32 if columns.dtype == torch.float32 else torch.bfloat16
        row_bytes = self.num_prefixes * self.columns_padded * self.dtype.itemsize
        self.chunk_rows = min(max(1, workspace_bytes // row_bytes // BLOCK_M) * BLOCK_M, _round_up(self.num_rows, BLOCK_M))

        device = columns.device
        self.edges = constant((*self.layout.edges, -1), torch.int32, device)
        self.weights = constant(problem.weights, torch.float32, device) / self.num_rows
        self.inverse_KB, dot_KB = self._prologue(self.query, self.column)  # 1 / |q|
        self.inverse_KX, _ = self._prologue(self.column, None)  # 1 / |x|
        self.scale_KB = (self.inverse_KB / problem.temperature).float()
        self.own_score_KB = dot_KB * self.scale_KB * self.inverse_KX[:, problem.own_columns]
        self.scale2_KB = self.scale_KB * LOG2_E  # exponents are to the base 2
        self.own2_KB = self.own_score_KB * LOG2_E
        self.limit2 = None  # of L, as an exponent (1,)
        if problem.margin is not None:
            self.limit2 = constant((problem.margin * LOG2_E,), torch.float32, device) / problem.temperature
        self.own_negatives = None
        if problem.negative_MD is not None:
            wide = problem._replace(query_BD=problem.query_BD.float(), negative_MD=problem.negative_MD.float())
            self.own_negatives = OwnNegatives.of(wide, self.scale_KB, self.own_score_KB)

        self.shift2_KB, self.sum_KB, self.factor_KB, self.row_sum_KB, self.own_weight_KB, self.share_KB = (
            torch.zeros_like(self.scale_KB) for _ in range(6)
        )
        self.column_sum_KX = torch.zeros_like(self.inverse_KX)

    def _prologue(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        norm_KR = torch.empty(self.num_prefixes, len(x), dtype=torch.float32, device=x.device)
        dot_KR = torch.empty_like(norm_KR) if y is not None else norm_KR
        prologue[(triton.cdiv(len(x), 16),)](
            x, x if y is None else y, norm_KR, dot_KR, self.edges,
            len(x), x.shape[1], self.num_prefixes, self.problem.offset,
            HAS_Y=y is not None, BLOCK_R=16, BLOCK_C=BLOCK_K, **LAUNCH | {"num_warps": 4},
        )  # fmt: skip
        return inverse(norm_KR), dot_KR

    def solve(self) -> Solution:
        problem, needs, shape = self.problem, self.needs, (self.num_columns, self.query.shape[1])
        empty = self.query.new_empty
        # fp16 would underflow; own hard negatives are still to be added
        exact = self.query.dtype == torch.float16
        grad_query = None
        if needs.query:
            dtype = torch.float32 if exact or self.own_negatives is not None else self.query.dtype
            grad_query = torch.empty_like(self.query, dtype=dtype)
        grad_column = empty(shape, dtype=torch.float32 if exact else self.query.dtype) if self.needs_columns else None
        several = self.chunk_rows < self.num_rows
        running = empty(shape, dtype=torch.float32) if self.needs_columns and several else self.inverse_KX
        weight = empty(self.num_prefixes, self.chunk_rows, self.columns_padded, dtype=self.dtype)
        for first in range(0, self.num_rows, self.chunk_rows):
            rows = slice(first, min(first + self.chunk_rows, self.num_rows))
            tile_max, factor = self._close(weight, rows)
            if not any(needs):
                continue
            self._weigh(weight, tile_max, factor, rows)
            if grad_query is not None:
                self._pull_rows(weight, grad_query, rows)
            if grad_column is not None:
                self._pull_columns(weight, grad_column, running, rows)

        shift_KB = self.shift2_KB / LOG2_E
        loss_KB = shift_KB + torch.log1p(self.sum_KB + torch.expm1(-shift_KB))
        loss, per_prefix_K = (self.weights[:, None] * loss_KB).sum(), loss_KB.mean(1)
        if not any(needs):
            return Solution(loss, per_prefix_K, None, None, None, None)
        width, num_passages = problem.query_BD.shape[1], len(problem.passage_ND)
        grad_query_BD = None if grad_query is None else self.layout.unpad(grad_query, width)
        grad_column_XD = None if grad_column is None else self.layout.unpad(grad_column, width)
        grad_negative_MD = None
        if self.own_negatives is not None:
            grad_KM = self.own_negatives.gradient(self.factor_KB, shift_KB)
            if grad_query_BD is not None:
                self.own_negatives.add_to_queries(grad_query_BD, grad_KM)
            if needs.negative:
                grad_negative_MD = self.own_negatives.own_gradient(grad_KM)
                if grad_column_XD is not None and problem.see_all:
                    grad_negative_MD = grad_negative_MD + grad_column_XD[num_passages:]
        grad_passage_ND = grad_column_XD[:num_passages] if grad_column_XD is not None and needs.passage else None
        grad_temperature = -self.row_sum_KB.sum() / problem.temperature if needs.temperature else None
        return Solution(loss, per_prefix_K, grad_query_BD, grad_passage_ND, grad_negative_MD, grad_temperature)

    def _close(self, weight: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """Scores of a chunk and what they sum to; leaves E in `weight`."""
        problem, chunk_rows = self.problem, rows.stop - rows.start
        num_tiles = self.columns_padded // HALF_N
        tile_max = torch.empty(self.num_prefixes, num_tiles, self.chunk_rows, dtype=torch.float32, device=weight.device)
        tile_sum = torch.empty_like(tile_max)
        factor = torch.empty(self.num_prefixes, self.chunk_rows, dtype=torch.float32, device=weight.device)
        see_all = problem.see_all and problem.negative_MD is not None
        scores[(self.chunk_rows // BLOCK_M * (self.columns_padded // BLOCK_N),)](
            self.query, self.column, weight, tile_max, tile_sum,
            self.scale2_KB, self.own2_KB, self.inverse_KX, self.limit2, self.edges,
            problem.query_id_N, problem.passage_id_N, problem.negative_row_M, problem.negative_id_M,
            rows.start, self.num_rows, chunk_rows, len(problem.passage_ND), self.num_columns, problem.offset,
            self.query.shape[1], num_tiles, self.chunk_rows, self.columns_padded,
            HAS_QUERY_ID=problem.query_id_N is not None, HAS_PASSAGE_ID=problem.passage_id_N is not None, SEE_ALL=see_all,
            HAS_NEGATIVE_ID=problem.negative_id_M is not None and problem.passage_id_N is not None,
            HAS_MARGIN=problem.margin is not None,
            BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, GROUP=8, **LAUNCH,
        )  # fmt: skip
        own = self.own_negatives
        close[(triton.cdiv(self.chunk_rows, 32), self.num_prefixes)](
            tile_max, tile_sum,
            self.shift2_KB if own is None else own.largest_KB * LOG2_E, self.sum_KB if own is None else own.sum_KB,
            self.weights, self.shift2_KB, self.sum_KB, factor,
            rows.start, self.num_rows, chunk_rows, num_tiles, self.chunk_rows,
            HAS_OWN=own is not None, BLOCK_R=32, **LAUNCH | {"num_warps": 1},
        )  # fmt: skip
        self.factor_KB[:, rows] = factor[:, :chunk_rows]
        return tile_max, factor

    def _weigh(self, weight: Tensor, tile_max: Tensor, factor: Tensor, rows: slice) -> None:
        """Turns E into W, and finishes what the chunk's rows need for their gradient."""
        num_tiles, tiles_m = self.columns_padded // HALF_N, self.chunk_rows // BLOCK_M
        row_part = torch.empty_like(tile_max)
        column_part = tile_max.new_empty(self.num_prefixes, tiles_m, self.columns_padded)
        weigh[(num_tiles, tiles_m)](
            weight, tile_max, factor, self.shift2_KB, self.own2_KB, self.scale_KB, self.inverse_KX, row_part, column_part,
            rows.start, self.num_rows, rows.stop - rows.start, self.num_columns, self.num_prefixes,
            num_tiles, self.chunk_rows, self.columns_padded,
            BLOCK_M=BLOCK_M, HALF=HALF_N, **LAUNCH,
        )  # fmt: skip
        own_columns = slice(self.problem.offset + rows.start, self.problem.offset + rows.stop)
        sum_KR = self.factor_KB[:, rows] * self.sum_KB[:, rows]
        own_KR = sum_KR * self.own_score_KB[:, rows]
        row_sum_KR = row_part.sum(1)[:, : rows.stop - rows.start] / LOG2_E - own_KR
        self.column_sum_KX += column_part.sum(1)[:, : self.num_columns] / LOG2_E
        self.column_sum_KX[:, own_columns] -= own_KR
        if self.own_negatives is not None:
            grad_KM = self.own_negatives.gradient(self.factor_KB, self.shift2_KB / LOG2_E)
            row_sum_KR += self.own_negatives.row_sum(grad_KM)[:, rows]
        self.row_sum_KB[:, rows] = row_sum_KR
        self.own_weight_KB[:, rows] = by_block(-sum_KR * self.scale_KB[:, rows] * self.inverse_KX[:, own_columns])
        self.share_KB[:, rows] = by_block(self.inverse_KB[:, rows].square() * row_sum_KR)

    def _pull_rows(self, weight: Tensor, grad_query: Tensor, rows: slice) -> None:
        block_n = self.layout.tile
        operand = self.column if self.column.dtype == self.dtype else self.column.to(self.dtype)
        pull_rows[(self.chunk_rows // BLOCK_M * (self.query.shape[1] // block_n),)](
            weight, operand, self.query, self.column, self.own_weight_KB, self.share_KB, grad_query,
            self.layout.tile_prefix(grad_query.device),
            rows.start, self.num_rows, rows.stop - rows.start, self.num_columns, self.problem.offset,
            self.query.shape[1], self.chunk_rows, self.columns_padded,
            BLOCK_M=BLOCK_M, BLOCK_N=block_n, BLOCK_K=BLOCK_K, **LAUNCH,
        )  # fmt: skip

    def _pull_columns(self, weight: Tensor, grad_column: Tensor, running: Tensor, rows: slice) -> None:
        block_n = self.layout.tile
        operand = self.query if self.query.dtype == self.dtype else self.query.to(self.dtype)
        last = rows.stop == self.num_rows
        share_KX = by_block(self.inverse_KX.square() * self.column_sum_KX) if last else self.column_sum_KX
        pull_columns[(self.columns_padded // BLOCK_M * (self.query.shape[1] // block_n),)](
            weight, operand, self.query, self.column, self.own_weight_KB, share_KX, grad_column, running,
            self.layout.tile_prefix(grad_column.device),
            rows.start, self.num_rows, rows.stop - rows.start, self.num_columns, self.problem.offset,
            self.query.shape[1], self.chunk_rows, self.columns_padded,
            FIRST=rows.start == 0, LAST=last,
            BLOCK_M=BLOCK_M, BLOCK_N=block_n, BLOCK_K=BLOCK_K, **LAUNCH,
        )  # fmt: skip


@dataclass(frozen=True)
class _Layout:
    """Blocks of coordinates at multiples of BLOCK_K, zeros between them where a prefix is none.

    Args:
        blocks: Where the blocks lie in the vectors as given.
        edges: Where they end in the padded vectors.
        tile: Coordinates of a gradient tile; divides every padded block.
    """

    blocks: tuple[slice, ...]
    edges: tuple[int, ...]
    tile: int

    @classmethod
    def of(cls, prefixes: tuple[int, ...]) -> "_Layout":
        parts = tuple(blocks(prefixes))
        widths = [_round_up(part.stop - part.start, BLOCK_K) for part in parts]
        return cls(parts, tuple(itertools.accumulate(widths)), BLOCK_N if all(w % BLOCK_N == 0 for w in widths) else BLOCK_K)

    @property
    def is_plain(self) -> bool:
        return all(part.stop == edge for part, edge in zip(self.blocks, self.edges, strict=True))

    def pad(self, x_RD: Tensor) -> Tensor:
        """The coordinates of the last prefix, every block padded (R, edges[-1]), contiguous."""
        if self.is_plain:
            return x_RD[:, : self.edges[-1]].contiguous()
        padded = x_RD.new_zeros(len(x_RD), self.edges[-1])
        for part, start in zip(self.blocks, (0, *self.edges), strict=False):
            padded[:, start : start + part.stop - part.start] = x_RD[:, part]
        return padded

    def unpad(self, x_RE: Tensor, width: int) -> Tensor:
        """The opposite, with zeros beyond the last prefix (R, width)."""
        if self.is_plain and width == self.edges[-1]:
            return x_RE
        x_RD = x_RE.new_zeros(len(x_RE), width)
        for part, start in zip(self.blocks, (0, *self.edges), strict=False):
            x_RD[:, part] = x_RE[:, start : start + part.stop - part.start]
        return x_RD

    def tile_prefix(self, device: torch.device) -> Tensor:
        """The first prefix that contains a gradient tile's coordinates (tiles,)."""
        starts = range(0, self.edges[-1], self.tile)
        return constant(tuple(bisect.bisect_right(self.edges, start) for start in starts), torch.int32, device)


def _round_up(number: int, to: int) -> int:
    return (number + to - 1) // to * to
