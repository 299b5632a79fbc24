"""The contrastive loss and its gradients in one pass over the prefixes, rows in chunks, plain torch on any device.

Prefixes are nested, so the dot product over the first k blocks of coordinates is that over k − 1 blocks plus one more: one
product of 2·B·X·D operations passes the scores of every prefix. With a the running dot product, |q| and |x| norms of prefixes:

    s = a / (|q| |x| τ),  L = s − s_own,  Z = Σ_x e^L,  loss = log(1 + Z)
    G_k = c_k / B · e^L / (1 + Z);  for the own passage −Σ_x G_k
    W_j = Σ_{k ≥ j} G_k / (|q| |x| τ)
    dQ[block j] = W_j X_j − (Σ_{k ≥ j} t_k / |q|²) Q_j with t_k = Σ_x G_k s_k;  dX with the sums over rows
    dτ = −Σ t / τ

With a margin, Σ_x leaves out what has L > margin / τ. The loss is a scalar, so its gradients are made with it and the backward
pass only scales them. No B × X matrix ever exists, and every sum has a fixed order. Letters as in `kernels.problem`; R rows of
a chunk, whose products are one call of the matrix library, S rows of a slab, whose scores at all prefixes stay in the cache
while they are worked on.
"""

import itertools

import torch
from torch import Tensor

from kernels.own_negatives import UNSEEN, OwnNegatives
from kernels.problem import Comparison, Needs, Problem, Solution, add_scaled_rows, blocks, constant, inverse_norms, prefix_dots

CHUNK_ROWS = (128, 256)  # our choice, measured on a CPU: fewer slow the matrix products down, more leave the cache
CHUNK_ELEMENTS = 2**22  # scores at all prefixes; between the two numbers of rows these decide
SLAB_ELEMENTS = 2**18  # per thread; our choice, measured: two slabs of fp32 fill 2 MiB of second-level cache
SAFE_EXPONENT = 60.0  # e^60 summed over a billion columns still fits into fp32
MAX_PAIRS = 2**20  # of one comparison; our choice: a list of 8 MiB


def contrastive_chunked(problem: Problem, needs: Needs, chunk_rows: int | None = None) -> Solution:
    """Loss and gradients, in the dtype of the inputs (fp32 or fp64).

    Args:
        problem: The checked arguments of the loss.
        needs: Which gradients to make; without any, only the scores are computed.
        chunk_rows: Rows whose scores exist at a time; None means as many as were fastest.
    """
    return _Pass(problem, needs, chunk_rows).solve()


class _Pass:
    """One pass over the rows; what it leaves behind per row, column and prefix, and the buffers that chunks share."""

    def __init__(self, problem: Problem, needs: Needs, chunk_rows: int | None) -> None:
        self.problem, self.needs = problem, needs
        self.blocks = blocks(problem.prefixes)
        self.column_XD, self.needs_columns = problem.passage_ND, needs.passage
        if problem.see_all and problem.negative_MD is not None:
            self.column_XD = torch.cat([problem.passage_ND, problem.negative_MD])
            self.needs_columns = needs.passage or needs.negative
        fitting_rows = CHUNK_ELEMENTS // (len(self.blocks) * len(self.column_XD))
        self.chunk_rows = min(chunk_rows or max(CHUNK_ROWS[0], min(CHUNK_ROWS[1], fitting_rows)), len(problem.query_BD))
        self.bounded = problem.largest_exponent() <= SAFE_EXPONENT
        self.unseen = _Unseen(problem, len(self.column_XD))

        query_BD, prefixes = problem.query_BD, problem.prefixes
        self.query_KB = inverse_norms(query_BD, prefixes)  # 1 / |q|
        self.column_KX = inverse_norms(self.column_XD, prefixes)  # 1 / |x|
        self.scale_KB = self.query_KB / problem.temperature
        own_score_KB = prefix_dots(query_BD, problem.passage_ND[problem.own_columns], prefixes)
        self.own_score_KB = own_score_KB * self.scale_KB * self.column_KX[:, problem.own_columns]
        self.own_negatives = None if problem.negative_MD is None else OwnNegatives.of(problem, self.scale_KB, self.own_score_KB)
        self.weights_K1 = constant(problem.weights, query_BD.dtype, query_BD.device)[:, None] / len(query_BD)

        self.shift_KB = torch.zeros_like(self.scale_KB)  # max(0, largest L) where L could overflow, else 0
        self.sum_KB = torch.empty_like(self.scale_KB)  # Σ e^(L − shift)
        self.row_sum_KB = torch.empty_like(self.scale_KB)  # Σ_x G s
        self.column_sum_KX = torch.zeros_like(self.column_KX)  # Σ_rows G s
        self.grad_query_BD = torch.zeros_like(query_BD) if needs.query else None
        self.grad_column_XD = torch.zeros_like(self.column_XD) if self.needs_columns else None

    def solve(self) -> Solution:
        num_rows, num_columns, num_prefixes = len(self.problem.query_BD), len(self.column_XD), len(self.blocks)
        slab_rows = self.chunk_rows
        if self.column_XD.device.type == "cpu":
            slab_rows = min(slab_rows, max(1, SLAB_ELEMENTS * torch.get_num_threads() // (num_prefixes * num_columns)))
        weight_KRX = self.column_XD.new_empty(num_prefixes, self.chunk_rows, num_columns)
        score_KSX = self.column_XD.new_empty(num_prefixes, slab_rows, num_columns)
        for top in range(0, num_rows, self.chunk_rows):
            rows = slice(top, min(top + self.chunk_rows, num_rows))
            chunk_KRX = weight_KRX[:, : rows.stop - top]
            for dot_RX, block in zip(chunk_KRX, self.blocks, strict=True):
                torch.mm(self.problem.query_BD[rows, block], self.column_XD[:, block].T, out=dot_RX)
            for slab_KSX, start in zip(chunk_KRX.split(slab_rows, dim=1), range(top, rows.stop, slab_rows), strict=True):
                self._score(slab_KSX, score_KSX[:, : slab_KSX.shape[1]], start)
            self._spread(chunk_KRX, rows)
        return self._close()

    def _score(self, slab_KSX: Tensor, score_KSX: Tensor, start: int) -> None:
        """What the rows from `start` sum to at every prefix; turns their block products into W where gradients are asked for.

        In place, and a pass over the slab a line: this is where the time beside the matrix products goes.
        """
        rows = slice(start, start + slab_KSX.shape[1])
        layers = slab_KSX.unbind(0)
        for previous_SX, layer_SX in itertools.pairwise(layers):
            layer_SX.add_(previous_SX)
        torch.mul(slab_KSX, self.column_KX[:, None], out=score_KSX)  # s |q| τ
        excess_KSX = torch.mul(score_KSX, self.scale_KB[:, rows, None], out=slab_KSX)
        excess_KSX.sub_(self.own_score_KB[:, rows, None])
        self.unseen.fill(excess_KSX, start)
        if self.problem.margin is not None:
            excess_KSX.masked_fill_(excess_KSX > self.problem.margin / self.problem.temperature, UNSEEN)
        if not self.bounded:
            self._shift(excess_KSX, rows)
        weight_KSX = excess_KSX.exp_()
        torch.sum(weight_KSX, 2, out=self.sum_KB[:, rows])
        if self.own_negatives is not None:
            self.sum_KB[:, rows] += self.own_negatives.sum_of(rows, self.shift_KB)
        if not any(self.needs):
            return
        weight_KSX.mul_((self._factor(rows) * self.scale_KB[:, rows])[:, :, None])  # G / (|q| τ)
        score_KSX.mul_(weight_KSX)  # G s
        torch.sum(score_KSX, 2, out=self.row_sum_KB[:, rows])
        self.column_sum_KX[:, None].baddbmm_(score_KSX.new_ones(len(layers), 1, score_KSX.shape[1]), score_KSX)
        layers[-1].mul_(self.column_KX[-1])
        for k in range(len(layers) - 2, -1, -1):
            torch.addcmul(layers[k + 1], layers[k], self.column_KX[k], out=layers[k])

    def _shift(self, excess_KSX: Tensor, rows: slice) -> None:
        """Subtracts from each row the largest L, hard negatives included, where that is above 0."""
        shift_KS = excess_KSX.amax(2).clamp_(min=0)
        if self.own_negatives is not None:
            shift_KS = torch.maximum(shift_KS, self.own_negatives.largest_KB[:, rows])
        self.shift_KB[:, rows] = shift_KS
        excess_KSX.sub_(shift_KS[:, :, None])

    def _factor(self, rows: slice) -> Tensor:
        """What turns e^(L − shift) into G (K, S)."""
        return self.weights_K1 / (torch.exp(-self.shift_KB[:, rows]) + self.sum_KB[:, rows])

    def _spread(self, weight_KRX: Tensor, rows: slice) -> None:
        """Adds W_j X_j and W_jᵀ Q_j of a chunk of rows to the gradients."""
        for weight_RX, block in zip(weight_KRX, self.blocks, strict=True):
            if self.grad_query_BD is not None:
                torch.mm(weight_RX, self.column_XD[:, block], out=self.grad_query_BD[rows, block])
            if self.grad_column_XD is not None:
                self.grad_column_XD[:, block].addmm_(weight_RX.T, self.problem.query_BD[rows, block])

    def _close(self) -> Solution:
        """The losses, and to the gradients what is not dense: own passages, own hard negatives, the normalisation's share.

        log(1 + Z) = shift + log1p(Σ e^(L − shift) + e^(−shift) − 1): a nearly solved row, whose shift is 0, keeps its digits.
        """
        problem, needs, own_columns = self.problem, self.needs, self.problem.own_columns
        loss_KB = self.shift_KB + torch.log1p(self.sum_KB + torch.expm1(-self.shift_KB))
        loss, per_prefix_K = (self.weights_K1 * loss_KB).sum(), loss_KB.mean(1)
        if not any(needs):
            return Solution(loss, per_prefix_K, None, None, None, None)

        pull_KB = self._factor(slice(None)) * self.sum_KB  # Σ_x G
        own_sum_KB = pull_KB * self.own_score_KB
        self.row_sum_KB -= own_sum_KB
        self.column_sum_KX[:, own_columns] -= own_sum_KB
        grad_negative_MD = None
        if self.own_negatives is not None:
            grad_KM = self.own_negatives.gradient(self._factor(slice(None)), self.shift_KB)
            self.row_sum_KB += self.own_negatives.row_sum(grad_KM)
            if self.grad_query_BD is not None:
                self.own_negatives.add_to_queries(self.grad_query_BD, grad_KM)
            if needs.negative:
                grad_negative_MD = self.own_negatives.own_gradient(grad_KM)
        weight_KB = -pull_KB * self.scale_KB * self.column_KX[:, own_columns]
        if self.grad_query_BD is not None:
            add_scaled_rows(self.grad_query_BD, weight_KB, problem.passage_ND[own_columns], problem.prefixes)
            share_KB = -self.query_KB.square() * self.row_sum_KB
            add_scaled_rows(self.grad_query_BD, share_KB, problem.query_BD, problem.prefixes)
        grad_passage_ND = None
        if self.grad_column_XD is not None:
            add_scaled_rows(self.grad_column_XD[own_columns], weight_KB, problem.query_BD, problem.prefixes)
            share_KX = -self.column_KX.square() * self.column_sum_KX
            add_scaled_rows(self.grad_column_XD, share_KX, self.column_XD, problem.prefixes)
            num_passages = len(problem.passage_ND)
            grad_passage_ND = self.grad_column_XD[:num_passages] if needs.passage else None
            if grad_negative_MD is not None and problem.see_all:
                grad_negative_MD += self.grad_column_XD[num_passages:]
        grad_temperature = -self.row_sum_KB.sum() / problem.temperature if needs.temperature else None
        return Solution(loss, per_prefix_K, self.grad_query_BD, grad_passage_ND, grad_negative_MD, grad_temperature)


class _Unseen:
    """Hides from rows their own passage and what a comparison finds equal to it.

    Comparing every row with every column costs as much as the loss of one more prefix. On a CPU equal pairs are therefore
    listed once, from sorted keys, unless there are very many; on a GPU, where counting would wait for it, all are compared.
    """

    def __init__(self, problem: Problem, num_columns: int) -> None:
        num_rows = len(problem.query_BD)
        self.first = problem.offset
        self.compared, places = [], []
        for comparison in problem.comparisons():
            place_P = _places(comparison, num_columns) if problem.query_BD.device.type == "cpu" else None
            self.compared.append(comparison) if place_P is None else places.append(place_P)
        self.place_P, self.num_before = torch.empty(0), [0] * (num_rows + 1)
        if places:
            self.place_P = torch.cat(places).sort().values
            self.num_before = torch.searchsorted(self.place_P, torch.arange(num_rows + 1) * num_columns).tolist()

    def fill(self, excess_KSX: Tensor, start: int) -> None:
        """Sets what the rows from `start` do not see to UNSEEN."""
        _, num_rows, num_columns = excess_KSX.shape
        stop = start + num_rows
        excess_KSX.diagonal(self.first + start, 1, 2).fill_(UNSEEN)
        if self.num_before[start] < self.num_before[stop]:
            place_P = self.place_P[self.num_before[start] : self.num_before[stop]] - start * num_columns
            excess_KSX.flatten(1).index_fill_(1, place_P, UNSEEN)
        for row_B, column_J, first in self.compared:
            equal_SJ = row_B[start:stop, None] == column_J
            excess_KSX[:, :, first : first + len(column_J)].masked_fill_(equal_SJ, UNSEEN)


def _places(comparison: Comparison, num_columns: int) -> Tensor | None:
    """The pairs that a comparison finds, each as row · columns + column; None if there are more than MAX_PAIRS."""
    sorted_J, order_J = comparison.column_J.sort(stable=True)
    first_B = torch.searchsorted(sorted_J, comparison.row_B)
    count_B = torch.searchsorted(sorted_J, comparison.row_B, right=True) - first_B
    if int(count_B.sum()) > MAX_PAIRS:
        return None
    row_P = torch.arange(len(count_B)).repeat_interleave(count_B)
    place_B = first_B - (count_B.cumsum(0) - count_B)
    return row_P * num_columns + order_J[torch.arange(len(row_P)) + place_B[row_P]] + comparison.first
