"""How sure a mean over queries is: bootstrap intervals, a paired test of two runs, and its correction for many comparisons.

No result depends on the order of the queries. Letters: Q queries, R resamples at a time, M differences that are not zero.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

CHUNK_ELEMENTS = 2**20  # resampled values that exist at a time; our choice
MOST_ENUMERATED = 14  # differences whose 2^14 signs are all tried, more than which are drawn; our choice
ROUNDING = 1e-9  # share of Σ|difference| by which sums that are equal may differ as computed; our choice


class Paired(NamedTuple):
    """Mean difference to a baseline, its 95 % interval, and the two-sided p-value that there is none."""

    difference: float
    low: float
    high: float
    p_value: float


def bootstrap_interval(
    values_Q: np.ndarray, *, resamples: int = 2000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean over queries: the quantiles of the means of queries drawn with replacement.

    Values that are all equal, or one value, give an interval without width: the bootstrap knows only what it has seen.

    Source: Efron 1979, "Bootstrap methods: another look at the jackknife"; Efron and Tibshirani 1993, ch. 13.

    Args:
        values_Q: A measure of each query (Q,).
        resamples: How often Q queries are drawn.
        seed: Of the draws.
        level: Share of such intervals that hold the true mean.

    Raises:
        ValueError: No value, or one that is no number.
    """
    assert resamples >= 1
    assert 0 < level < 1
    values_Q = np.sort(_checked(values_Q, "a bootstrap interval"))
    means = np.concatenate([values_Q[draw_RQ].mean(1) for draw_RQ in _draws(len(values_Q), resamples, seed)])
    return _quantiles(means, level)


def paired(values_Q: np.ndarray, baseline_Q: np.ndarray, *, resamples: int = 10_000, seed: int = 0) -> Paired:
    """Whether two runs differ over the same queries: the mean difference, its bootstrap interval, a randomisation test.

    Were the runs alike, each query's difference could as well have the other sign. The p-value is the share of sign flips whose
    mean is at least as far from zero as the one observed: of all 2^M for at most 14 differences that are not zero, otherwise
    p = (1 + #{|flipped mean| ≥ |mean|}) / (1 + resamples). Means that differ by rounding only count as equal.

    Source: Smucker, Allan and Carterette 2007, "A comparison of statistical significance tests for information retrieval
    evaluation"; the added ones: Davison and Hinkley 1997, eq. 4.11.

    Args:
        values_Q: A measure of each query (Q,).
        baseline_Q: The same measure of the same queries in the same order, of the run that is compared with.
        resamples: Of the interval and of the test.
        seed: Of both.

    Raises:
        ValueError: No value, one that is no number, or values that are not of the same queries.
    """
    values_Q, baseline_Q = _checked(values_Q, "a paired test"), _checked(baseline_Q, "a paired test")
    _check_pairs(values_Q, baseline_Q, "a paired test")
    difference_Q = values_Q - baseline_Q
    low, high = bootstrap_interval(difference_Q, resamples=resamples, seed=seed)
    p_value = _sign_flip_p_value(difference_Q, resamples, seed)
    return Paired(math.fsum(difference_Q) / len(difference_Q), low, high, p_value)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected so that any of the comparisons being falsely called different is as improbable as it says.

    Of m comparisons the k-th smallest p is multiplied by m − k + 1, to at most 1 and no less than those before it.

    Source: Holm 1979, "A simple sequentially rejective multiple test procedure".

    Args:
        p_values: Of all comparisons that are looked at together.

    Raises:
        ValueError: None, or one that is not between 0 and 1.
    """
    p = _checked(np.array(p_values, np.float64), "Holm's correction")
    if ((p < 0) | (p > 1)).any():
        raise ValueError(f"Holm's correction needs p-values between 0 and 1 and met {p[(p < 0) | (p > 1)][0]:g}")
    order = np.argsort(p, kind="stable")
    corrected = np.empty_like(p)
    corrected[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1.0)
    return corrected.tolist()


def spearman_interval(
    cosine_Q: np.ndarray, gold_Q: np.ndarray, *, resamples: int = 500, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of Spearman's correlation over pairs drawn with replacement, equal values ranked the same.

    A draw in which all cosines or all gold scores are equal has no correlation and is left out.

    Source: Efron and Tibshirani 1993, ch. 13.

    Args:
        cosine_Q: Cosine of each pair (Q,).
        gold_Q: Gold score of each pair (Q,).
        resamples: How often Q pairs are drawn.
        seed: Of the draws.
        level: Share of such intervals that hold the true correlation.

    Raises:
        ValueError: No value, one that is no number, one side longer than the other, or a side all of whose values are equal.
    """
    assert resamples >= 1
    assert 0 < level < 1
    name = "an interval of Spearman's correlation"
    cosine_Q, gold_Q = _checked(cosine_Q, name), _checked(gold_Q, name)
    _check_pairs(cosine_Q, gold_Q, name)
    if np.ptp(cosine_Q) == 0 or np.ptp(gold_Q) == 0:
        side = "cosines" if np.ptp(cosine_Q) == 0 else "gold scores"
        raise ValueError(
            f"{name} needs values that differ, but all {side} are {(cosine_Q if side == 'cosines' else gold_Q)[0]:g}"
        )
    order = np.lexsort((gold_Q, cosine_Q))
    places = [np.unique(values[order], return_inverse=True)[1] for values in (cosine_Q, gold_Q)]
    found = []
    for draw_RQ in _draws(len(order), resamples, seed):
        weight_RQ = _counts(draw_RQ)
        left_RQ, right_RQ = (_centred_ranks(weight_RQ, place_Q) for place_Q in places)
        covariance_R = (weight_RQ * left_RQ * right_RQ).sum(1)
        scale_R = np.sqrt((weight_RQ * left_RQ**2).sum(1) * (weight_RQ * right_RQ**2).sum(1))
        found.append((covariance_R / np.where(scale_R > 0, scale_R, np.inf))[scale_R > 0])
    return _quantiles(np.concatenate(found), level)


def _checked(values: np.ndarray, name: str) -> np.ndarray:
    values = np.asarray(values, np.float64)
    assert values.ndim == 1
    if not len(values):
        raise ValueError(f"{name} needs at least one value and got none")
    if not np.isfinite(values).all():
        first = int(np.flatnonzero(~np.isfinite(values))[0])
        raise ValueError(f"{name} needs finite values, but value {first} of {len(values)} is {values[first]}")
    return values


def _check_pairs(left_Q: np.ndarray, right_Q: np.ndarray, name: str) -> None:
    if len(left_Q) != len(right_Q):
        raise ValueError(f"{name} needs values of the same queries on both sides and got {len(left_Q)} and {len(right_Q)}")


def _draws(num_queries: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Positions drawn with replacement (R, Q), as many rows at once as memory should hold; the rows are the same whatever R."""
    random, at_once = np.random.default_rng([seed, 0]), max(1, CHUNK_ELEMENTS // num_queries)
    for first in range(0, resamples, at_once):
        yield random.integers(num_queries, size=(min(at_once, resamples - first), num_queries))


def _quantiles(found: np.ndarray, level: float) -> tuple[float, float]:
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _sign_flip_p_value(difference_Q: np.ndarray, resamples: int, seed: int) -> float:
    size_M = np.sort(np.abs(difference_Q[difference_Q != 0]))
    total = size_M.sum()
    least = abs(math.fsum(difference_Q)) - ROUNDING * total
    if len(size_M) <= MOST_ENUMERATED:
        flip_RM = np.arange(2 ** len(size_M))[:, None] >> np.arange(len(size_M)) & 1
        return float((np.abs(total - 2 * (flip_RM @ size_M)) >= least).mean())
    random, at_once = np.random.default_rng([seed, 1]), max(1, CHUNK_ELEMENTS // len(size_M))
    num_bytes, num_far = -(-len(size_M) // 8), 0
    for first in range(0, resamples, at_once):
        rows = min(at_once, resamples - first)
        byte_RB = np.frombuffer(random.bytes(rows * num_bytes), np.uint8).reshape(rows, num_bytes)
        flip_RM = np.unpackbits(byte_RB, axis=1, count=len(size_M)).astype(np.float64)
        num_far += int((np.abs(total - 2 * (flip_RM @ size_M)) >= least).sum())
    return (1 + num_far) / (1 + resamples)


def _counts(draw_RQ: np.ndarray) -> np.ndarray:
    """How often each position was drawn (R, Q)."""
    rows, num_queries = draw_RQ.shape
    flat = (draw_RQ + np.arange(rows)[:, None] * num_queries).ravel()
    return np.bincount(flat, minlength=rows * num_queries).reshape(rows, num_queries)


def _centred_ranks(weight_RQ: np.ndarray, place_Q: np.ndarray) -> np.ndarray:
    """Mean rank of each position among what was drawn, less the mean of all ranks, from its place among the distinct values."""
    by_place = np.argsort(place_Q, kind="stable")
    first_of_place = np.flatnonzero(np.diff(place_Q[by_place], prepend=-1))
    count_RV = np.add.reduceat(weight_RQ[:, by_place], first_of_place, axis=1)  # V distinct values
    rank_RV = count_RV.cumsum(1) - (count_RV - 1) / 2
    return (rank_RV - (weight_RQ.shape[1] + 1) / 2)[:, place_Q]
