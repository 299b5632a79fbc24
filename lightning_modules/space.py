"""The health of an embedding space from its unit vectors: spread, mean cosine, isotropy, hubness and the gap between two sides.

What a measure cannot say of the vectors given is NaN, which `health_rows` makes null with a note. Letters: N vectors, Q
queries, C candidates, D width, R rows at a time, K nearest and one more.
"""

import math
from typing import Any

import numpy as np
import scipy.stats
import torch
from torch import Tensor

from datamodules.tasks import modalities_of
from kernels.spread_out import spread_out_loss

NEIGHBOURS = 10  # k of the k-occurrence (Radovanović et al. 2010)
MOST_ROWS = 10_000  # of a side that are measured; our choice
CHUNK_ELEMENTS = 2**22  # cosines that exist at a time; our choice
EQUAL_COSINES = 1e-6  # cosines in fp32 that lie this near may differ by rounding only; our choice
LEAST_VARIANCE = 1e-12  # of vectors that are not the same but for rounding; our choice
UNDEFINED = {
    "spread": "undefined for fewer than two vectors",
    "mean_cosine": "undefined for fewer than two vectors",
    "isotropy": "undefined for fewer than two different vectors, or one dimension",
    "hubness": f"undefined where all are neighbours equally often, as {NEIGHBOURS} or fewer or all equal vectors are",
    "modality_gap": "undefined where a side has fewer than two vectors",
}


def evenly(number: int) -> np.ndarray:
    """Which of so many rows are measured: all, or as many as `MOST_ROWS`, evenly spaced."""
    return np.arange(min(number, MOST_ROWS)) * number // min(number, MOST_ROWS)


def health_rows(
    benchmark: str, prefix: int, query_QD: Tensor, candidate_CD: Tensor, *, numbers: tuple[int, int] | None = None
) -> list[dict[str, Any]]:
    """Rows of space.json for one benchmark at one prefix, each beside what vectors in random directions would give.

    Of a side of more than 10,000 vectors as many, evenly spaced, are measured, which the row's note says.

    Args:
        benchmark: `<set>/<query modality>-<target modality>`.
        prefix: Width D of the vectors.
        query_QD: Unit vectors of distinct queries.
        candidate_CD: Unit vectors of distinct candidates.
        numbers: How many queries and candidates there are, where these are those of `evenly` already.

    Raises:
        ValueError: A vector is not of length 1 (NaN, infinite or zero).
    """
    sides = {"queries": query_QD, "candidates": candidate_CD}
    sampled, notes = {}, {}
    for (side, vectors), number in zip(sides.items(), numbers or map(len, sides.values()), strict=True):
        assert vectors.ndim == 2
        assert vectors.shape[1] == prefix
        _check_units(benchmark, side, vectors)
        sampled[side], notes[side] = vectors[torch.from_numpy(evenly(len(vectors)))].float(), []
        if number > MOST_ROWS:
            notes[side].append(f"{MOST_ROWS:,} of {number:,} {side}, evenly spaced")
    query_QD, candidate_CD = sampled.values()
    found: list[tuple[str, str, float, float]] = []  # side, measure, value, reference
    for side, unit_ND in sampled.items():
        number = len(unit_ND)
        found.append((side, "spread", spread(unit_ND), 1 / prefix))
        found.append((side, "mean_cosine", mean_cosine(unit_ND), 0.0))
        found.append((side, "isotropy", isotropy(unit_ND), isotropy_of_random(number, prefix)))
        found.append((side, "hubness", hubness(unit_ND), hubness_of_random(number - 1, number - 1)))
    found.append(("both", "spread", sum(value for _, measure, value, _ in found if measure == "spread"), 2 / prefix))
    found.append(("both", "hubness", hubness(candidate_CD, query_QD), hubness_of_random(len(query_QD), len(candidate_CD))))
    found.append(("both", "modality_gap", modality_gap(query_QD, candidate_CD), gap_of_one(query_QD, candidate_CD)))
    rows = []
    for side, measure, value, reference in found:
        said = [note for name in sides if side in (name, "both") for note in notes[name]]
        if measure == "modality_gap" and len({*modalities_of(benchmark)}) == 1:
            said.append("both sides are of one modality")
        said += [UNDEFINED[measure]] * math.isnan(value)
        row = {"benchmark": benchmark, "prefix": prefix, "side": side, "measure": measure}
        row |= {"value": _or_null(value), "reference": _or_null(reference), "note": "; ".join(said) or None}
        rows.append(row)
    return rows


def spread(unit_ND: Tensor) -> float:
    """Mean squared cosine between different vectors, 1/(N(N−1)) Σ_{i≠j} (x_i·x_j)²: 1/D in random directions, 1 if all are one.

    The spread-out term of the objective is the sum of it for queries and for targets (`equations.md`, L_S), whose expectation
    is 2/D.

    Source: Zhang et al. 2017, "Learning spread-out local feature descriptors"; EmbeddingGemma (arXiv 2509.20354).
    """
    if len(unit_ND) < 2:
        return math.nan
    return spread_out_loss(unit_ND.double(), prefixes=(unit_ND.shape[1],)).item()


def mean_cosine(unit_ND: Tensor) -> float:
    """Mean cosine between different vectors, (‖Σx‖² − Σ‖x‖²) / (N(N−1)), in O(N·D): 0 in random directions, 1 if all are one.

    Source: Ethayarajh 2019, "How contextual are contextualized word representations?", who calls it anisotropy.
    """
    number, unit_ND = len(unit_ND), unit_ND.double()
    if number < 2:
        return math.nan
    return ((unit_ND.sum(0).square().sum() - unit_ND.square().sum()) / (number * (number - 1))).item()


def isotropy(unit_ND: Tensor) -> float:
    """IsoScore: 1 where the variance is the same in all D directions, 0 where there is one; k equal ones give (k−1)/(D−1).

    (PR − 1) / (D − 1) with the participation ratio PR = (Σλ)² / Σλ² of the covariance's eigenvalues λ: what the paper's steps
    come to, ‖√D·λ/‖λ‖ − 1‖² being 2D − 2√(D·PR). Its sums are the covariance's trace and squared Frobenius norm, so nothing is
    decomposed. Chosen of its kind because its value says the same in every D, and because it leaves the mean to `mean_cosine`.

    Source: Rudman et al. 2022, "IsoScore: measuring the uniformity of embedding space utilization" (arXiv 2108.07344).
    """
    number, width = unit_ND.shape
    if number < 2 or width < 2:
        return math.nan
    centred_ND = unit_ND.double() - unit_ND.double().mean(0)
    if centred_ND.square().sum() < LEAST_VARIANCE * number:
        return math.nan
    gram = centred_ND.T @ centred_ND if width < number else centred_ND @ centred_ND.T  # of the same eigenvalues but for zeros
    ratio = gram.trace().square() / gram.square().sum()
    return ((ratio - 1) / (width - 1)).item()


def isotropy_of_random(number: int, width: int) -> float:
    """IsoScore that so many vectors in random directions have about, (N − 2) / (N + D − 2): 1 only where they are many.

    With N − 1 degrees of freedom Σλ is 1 and E[Σλ²] = 1/(N−1) + (1 − 1/(N−1))/D: `spread` with each vector's own 1.
    """
    return (number - 2) / (number + width - 2) if number > 1 and width > 1 else math.nan


def hubness(candidate_CD: Tensor, query_QD: Tensor | None = None) -> float:
    """Skewness of how often each candidate is among the 10 nearest of a query: high where a few are near to very many.

    Candidates whose cosines are equal to that of the tenth (within 1e-6) share the places that are left.

    Source: Radovanović, Nanopoulos and Ivanović 2010, "Hubs in space", eq. 1 and sect. 3.

    Args:
        candidate_CD: Unit vectors.
        query_QD: Unit vectors that seek them; None for the candidates, each of which does not find itself.
    """
    seeking_QD = candidate_CD if query_QD is None else query_QD
    if not len(seeking_QD) or len(candidate_CD) - (query_QD is None) <= NEIGHBOURS:
        return math.nan
    count_C = torch.zeros(len(candidate_CD), dtype=torch.float64, device=candidate_CD.device)
    for row_R in torch.arange(len(seeking_QD), device=candidate_CD.device).split(max(1, CHUNK_ELEMENTS // len(candidate_CD))):
        cosine_RC = seeking_QD[row_R] @ candidate_CD.T
        if query_QD is None:
            cosine_RC[torch.arange(len(row_R), device=row_R.device), row_R] = -math.inf
        best_RK, column_RK = cosine_RC.topk(NEIGHBOURS + 1)
        is_sure_R = best_RK[:, -1] < best_RK[:, -2] - EQUAL_COSINES
        count_C += column_RK[is_sure_R, :-1].flatten().bincount(minlength=len(candidate_CD))
        tied_RC, tenth_R1 = cosine_RC[~is_sure_R], best_RK[~is_sure_R, -2:-1]
        is_nearer_RC = tied_RC > tenth_R1 + EQUAL_COSINES
        is_equal_RC = (tied_RC >= tenth_R1 - EQUAL_COSINES) & ~is_nearer_RC
        share_R = (NEIGHBOURS - is_nearer_RC.sum(1)).double() / is_equal_RC.sum(1)
        count_C += is_nearer_RC.sum(0) + share_R @ is_equal_RC.double()
    if count_C.std(unbiased=False) < 1e-9 * NEIGHBOURS:
        return math.nan
    return float(scipy.stats.skew(count_C.cpu().numpy()))


def hubness_of_random(num_queries: int, num_candidates: int) -> float:
    """Skewness where each query draws its 10 at random: that of the binomial distribution with Q trials of chance 10/C."""
    if not num_queries or num_candidates <= NEIGHBOURS:
        return math.nan
    chance = NEIGHBOURS / num_candidates
    return (1 - 2 * chance) / math.sqrt(num_queries * chance * (1 - chance))


def modality_gap(query_QD: Tensor, candidate_CD: Tensor) -> float:
    """Euclidean distance between the mean query and the mean candidate: 0 where both fill one region, at most 2.

    Source: Liang et al. 2022, "Mind the gap: understanding the modality gap in multi-modal contrastive representation
    learning" (arXiv 2203.02053).
    """
    if min(len(query_QD), len(candidate_CD)) < 2:
        return math.nan
    return (query_QD.double().mean(0) - candidate_CD.double().mean(0)).norm().item()


def gap_of_one(query_QD: Tensor, candidate_CD: Tensor) -> float:
    """Gap that chance alone leaves where both sides are drawn from one distribution: √(Σ_q/Q + Σ_c/C), Σ their variances."""
    if min(len(query_QD), len(candidate_CD)) < 2:
        return math.nan
    return math.sqrt(sum(unit_ND.double().var(0).sum().item() / len(unit_ND) for unit_ND in (query_QD, candidate_CD)))


def _check_units(benchmark: str, side: str, vectors_ND: Tensor) -> None:
    is_off_N = ~((vectors_ND.float().norm(dim=1) - 1).abs() < 1e-3)  # NaN is off too
    if is_off_N.any():
        first = int(is_off_N.nonzero()[0])
        raise ValueError(
            f"benchmark {benchmark!r}: {int(is_off_N.sum())} of {len(vectors_ND)} vectors of the {side} are not of length 1, "
            f"number {first}, the first, is of {vectors_ND[first].float().norm():g}; look at what the encoder makes of it"
        )


def _or_null(value: float) -> float | None:
    return None if math.isnan(value) else value
