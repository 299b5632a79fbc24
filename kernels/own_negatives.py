"""Hard negatives against their own row: one score for each instead of a column against all rows.

Letters as in `kernels.problem`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.problem import Problem, add_at, add_scaled_rows, inverse_norms, prefix_dots

UNSEEN = -1e30  # finite: e^(UNSEEN − largest) is 0, or 1 in a row that has nothing else and is left out by its largest


@dataclass(frozen=True)
class OwnNegatives:
    """Scores of the hard negatives, in the units of s = cosine / τ.

    Args:
        problem: With vectors in fp32 or wider.
        row_M: The row that each belongs to.
        negative_MD: Their vectors.
        scale_KB: 1 / (|q| τ) of every row and prefix.
        inverse_KM: 1 / |n|.
        score_KM: s.
        excess_KM: s − s_own + α · cosine; UNSEEN where the negative equals the row's own passage or passes the margin.
        largest_KB: The largest excess of a row; UNSEEN where it has none.
        sum_KB: Σ_m e^(excess − largest).
    """

    problem: Problem
    row_M: Tensor
    negative_MD: Tensor
    scale_KB: Tensor
    inverse_KM: Tensor
    score_KM: Tensor
    excess_KM: Tensor
    largest_KB: Tensor
    sum_KB: Tensor

    @classmethod
    def of(cls, problem: Problem, scale_KB: Tensor, own_score_KB: Tensor) -> "OwnNegatives":
        row_M, negative_MD = problem.negative_row_M, problem.negative_MD
        assert row_M is not None
        assert negative_MD is not None
        inverse_KM = inverse_norms(negative_MD, problem.prefixes)
        score_KM = prefix_dots(problem.query_BD[row_M], negative_MD, problem.prefixes)
        score_KM = score_KM * scale_KB[:, row_M] * inverse_KM
        excess_KM = score_KM - own_score_KB[:, row_M]
        unseen_KM = problem.dropped_negatives().expand_as(excess_KM)
        if problem.margin is not None:
            unseen_KM = unseen_KM | (excess_KM > problem.margin / problem.temperature)
        excess_KM = (excess_KM + problem.hardness * problem.temperature * score_KM).masked_fill(unseen_KM, UNSEEN)
        largest_KB = torch.full_like(own_score_KB, UNSEEN)
        largest_KB.scatter_reduce_(1, row_M.expand_as(excess_KM), excess_KM, "amax")
        sum_KB = add_at(torch.zeros_like(own_score_KB), row_M, torch.exp(excess_KM - largest_KB[:, row_M]))
        return cls(problem, row_M, negative_MD, scale_KB, inverse_KM, score_KM, excess_KM, largest_KB, sum_KB)

    def sum_of(self, rows: slice, shift_KB: Tensor) -> Tensor:
        """Σ_m e^(excess − shift) of some rows (K, S)."""
        return self.sum_KB[:, rows] * torch.exp(self.largest_KB[:, rows] - shift_KB[:, rows])

    def gradient(self, factor_KB: Tensor, shift_KB: Tensor) -> Tensor:
        """G of every hard negative (K, M); `factor` turns e^(excess − shift) into G."""
        return factor_KB[:, self.row_M] * torch.exp(self.excess_KM - shift_KB[:, self.row_M])

    def row_sum(self, grad_KM: Tensor) -> Tensor:
        """Σ_m G s of every row (K, B)."""
        return add_at(torch.zeros_like(self.sum_KB), self.row_M, grad_KM * self.score_KM)

    def add_to_queries(self, grad_query_BD: Tensor, grad_KM: Tensor) -> None:
        """Adds to the gradient of the queries, in place, without the share of their normalisation."""
        pull_MD = torch.zeros_like(self.negative_MD)
        weight_KM = grad_KM * self.scale_KB[:, self.row_M] * self.inverse_KM
        add_scaled_rows(pull_MD, weight_KM, self.negative_MD, self.problem.prefixes)
        add_at(grad_query_BD.T, self.row_M, pull_MD.T)

    def own_gradient(self, grad_KM: Tensor) -> Tensor:
        """The gradient of the hard negatives (M, D)."""
        grad_MD = torch.zeros_like(self.negative_MD)
        weight_KM = grad_KM * self.scale_KB[:, self.row_M] * self.inverse_KM
        add_scaled_rows(grad_MD, weight_KM, self.problem.query_BD[self.row_M], self.problem.prefixes)
        share_KM = -self.inverse_KM.square() * grad_KM * self.score_KM
        add_scaled_rows(grad_MD, share_KM, self.negative_MD, self.problem.prefixes)
        return grad_MD
