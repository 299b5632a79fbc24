"""Promises of the intervals and tests: what hand and scipy give, the coverage and the uniform p-values that their names say."""

import time
import tracemalloc

import numpy as np
import pytest
import scipy.stats

from lightning_modules import statistics
from lightning_modules.statistics import bootstrap_interval, holm, paired, spearman_interval


def normal(number: int, seed: int, *, mean: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, size=number)


def test_the_interval_of_three_queries_is_that_of_all_their_draws():
    # 27 draws of (0, 0, 3): the mean is 0 in 8 of them, 1 in 12, 2 in 6 and 3 in 1
    for level, expected in ((0.98, (0.0, 3.0)), (0.6, (0.0, 2.0)), (0.3, (1.0, 1.0))):
        assert bootstrap_interval(np.array([0.0, 0.0, 3.0]), resamples=20_000, level=level) == expected


def test_an_interval_equals_that_of_scipy():
    values = np.random.default_rng(5).gamma(1.5, size=60)
    for level in (0.95, 0.6):
        expected = scipy.stats.bootstrap(
            (values,), np.mean, n_resamples=40_000, confidence_level=level, method="percentile", rng=1
        ).confidence_interval
        # the outer quantiles of 40,000 draws have a standard error of .013 of the means' own .15, and two are compared
        np.testing.assert_allclose(bootstrap_interval(values, resamples=40_000, level=level), expected, rtol=0, atol=4 * 0.0029)


def test_a_95_percent_interval_holds_the_truth_in_95_percent_of_sets():
    held = 0
    for seed in range(500):
        low, high = bootstrap_interval(normal(200, seed, mean=0.3), resamples=500, seed=seed)
        held += low <= 0.3 <= high
    assert scipy.stats.binomtest(held, 500, 0.95).pvalue > 0.01


def test_half_of_the_half_intervals_hold_the_truth():
    held = sum(
        low <= 0.0 <= high for low, high in (bootstrap_interval(normal(200, s), level=0.5, resamples=300) for s in range(400))
    )
    assert scipy.stats.binomtest(held, 400, 0.5).pvalue > 0.01


def test_a_hundred_thousand_queries_take_little_memory_and_seconds():
    values = np.random.default_rng(0).random(100_000)
    began = time.perf_counter()
    bootstrap_interval(values, resamples=200)
    assert time.perf_counter() - began < 3  # a tenth of the resamples: about .15 s on one core
    tracemalloc.start()
    for measure in (
        bootstrap_interval,
        lambda x, **given: paired(x, x[::-1], **given),
        lambda x, **g: spearman_interval(x, x, **g),
    ):
        tracemalloc.reset_peak()
        measure(values, resamples=30)
        assert tracemalloc.get_traced_memory()[1] < 120 * 2**20
    tracemalloc.stop()


def test_chunks_do_not_change_the_draws(monkeypatch):
    values, gold = normal(37, 0), np.arange(37) % 4
    whole = bootstrap_interval(values, resamples=100), spearman_interval(values, gold, resamples=100)
    for elements in (37, 100, 1):
        monkeypatch.setattr(statistics, "CHUNK_ELEMENTS", elements)
        assert (bootstrap_interval(values, resamples=100), spearman_interval(values, gold, resamples=100)) == whole


@pytest.mark.parametrize(
    ("differences", "p_value"),
    [
        ([1, 2, 3], 2 / 8),  # only ±6 is as far as 6
        ([3, -1, 2], 4 / 8),  # ±6 and, with −1 as it is, ±4
        ([1, -1], 1.0),  # 0 is as near as can be
        ([1, 1, 1, -1], 10 / 16),  # ±4 once each, ±2 four times each
        ([0, 2, 0, 0], 1.0),  # zeros flip nothing: ±2
        ([0, 0], 1.0),
        ([5], 1.0),
        ([1, 1, 1, 1, 1, 1], 2 / 64),
    ],
)
def test_few_differences_are_flipped_in_every_way(differences, p_value):
    baseline = np.arange(len(differences)) / 7.0
    found = paired(baseline + differences, baseline, resamples=50)
    assert found.p_value == p_value
    assert found.difference == pytest.approx(np.mean(differences))


def test_sums_that_differ_by_rounding_are_equally_far():
    # .1 + .2 − .3 is not 0 in floating point: all of ±.1 ±.2 ±.3 that are 0 count as equal to the .0 observed
    assert paired(np.array([0.1, 0.2, 0.0]), np.array([0.0, 0.0, 0.3])).p_value == 1.0
    thirds = np.full(40, 0.1)
    thirds[:20] = -0.1  # the mean is zero but for rounding, so every flip is at least as far
    assert paired(thirds, np.zeros(40), resamples=200).p_value == 1.0


@pytest.mark.parametrize(("number", "shift"), [(12, 0.5), (40, 0.2), (40, 0.0), (25, 0.6)])
def test_p_values_equal_those_of_scipy(number, shift):
    values, baseline = normal(number, 1, mean=shift), 0.5 * normal(number, 2)
    expected = scipy.stats.permutation_test(
        (values, baseline), lambda a, b: (a - b).mean(), permutation_type="samples", n_resamples=20_000, vectorized=False, rng=3
    )
    found = paired(values, baseline, resamples=20_000)
    # both are shares of 20,000 flips (of all 4,096 for 12); scipy doubles one side, which is the same for a symmetric null
    assert found.p_value == pytest.approx(expected.pvalue, abs=4 * np.sqrt(2 * 0.25 / 20_000) if number > 14 else 1e-12)
    assert found.difference == pytest.approx(expected.statistic)


def test_p_values_are_uniform_where_the_runs_are_alike():
    p = [paired(normal(40, 2 * s), normal(40, 2 * s + 1), resamples=400, seed=s).p_value for s in range(400)]
    assert scipy.stats.kstest(p, "uniform").pvalue > 0.01


def test_a_p_value_is_never_zero():
    assert paired(np.arange(1.0, 101.0), np.zeros(100), resamples=999).p_value == 1 / 1000


def test_the_interval_of_a_difference_is_that_of_the_differences():
    values, baseline = normal(50, 0, mean=0.4), normal(50, 1)
    found = paired(values, baseline, resamples=700, seed=4)
    assert (found.low, found.high) == bootstrap_interval(values - baseline, resamples=700, seed=4)
    assert found.low < found.difference < found.high


def test_the_order_of_queries_changes_nothing():
    values, baseline, gold = normal(60, 0), normal(60, 1), np.arange(60) % 5
    order = np.random.default_rng(0).permutation(60)
    assert paired(values, baseline, resamples=300) == paired(values[order], baseline[order], resamples=300)
    assert bootstrap_interval(values, resamples=300) == bootstrap_interval(values[order], resamples=300)
    assert spearman_interval(values, gold) == spearman_interval(values[order], gold[order])


def test_a_seed_gives_the_same_and_another_seed_other_draws():
    values, baseline = normal(60, 0), normal(60, 1)
    for measure in (
        bootstrap_interval,
        lambda x, seed: paired(x, baseline, seed=seed),
        lambda x, seed: spearman_interval(x, baseline, seed=seed),
    ):
        assert measure(values, seed=3) == measure(values, seed=3)
        assert measure(values, seed=3) != measure(values, seed=4)


def test_holm_gives_the_worked_example():
    # .005 × 4, .01 × 3, .03 × 2 and .04 × 1, which may not be less than the .06 before it
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.4, 0.9, 0.5]) == pytest.approx([1.0, 1.0, 1.0])
    assert holm([0.2]) == [0.2]


def test_an_interval_of_spearman_is_that_of_the_correlations_of_the_draws():
    random = np.random.default_rng(0)
    gold = random.integers(0, 5, 30).astype(float)  # ties
    cosine = np.round(gold / 5 + random.normal(size=30), 1)
    draws = np.concatenate(list(statistics._draws(30, 200, 7)))
    order = np.lexsort((gold, cosine))
    expected = [scipy.stats.spearmanr(cosine[order][draw], gold[order][draw])[0] for draw in draws]
    np.testing.assert_allclose(
        spearman_interval(cosine, gold, resamples=200, seed=7, level=0.9),
        np.quantile(expected, [0.05, 0.95]),
        rtol=0,
        atol=1e-12,
    )


def test_draws_without_a_correlation_are_left_out():
    # of two pairs half of the draws are one pair twice; the others are in order
    assert spearman_interval(np.array([0.1, 0.2]), np.array([1.0, 2.0]), resamples=50) == pytest.approx((1.0, 1.0))


def test_95_percent_intervals_hold_spearmans_truth():
    truth, held = 6 / np.pi * np.arcsin(0.6 / 2), 0  # of two normal variables of correlation .6
    for seed in range(300):
        x, noise = normal(150, seed), normal(150, 10_000 + seed)
        low, high = spearman_interval(x, 0.6 * x + 0.8 * noise, resamples=300, seed=seed)
        held += low <= truth <= high
    assert scipy.stats.binomtest(held, 300, 0.95).pvalue > 0.01


def test_one_value_has_an_interval_without_width():
    assert bootstrap_interval(np.array([0.4])) == (0.4, 0.4)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_no_number_is_refused(bad):
    good, broken = np.ones(3), np.array([0.0, bad, 1.0])
    with pytest.raises(ValueError, match=r"a bootstrap interval needs finite values, but value 1 of 3 is (nan|inf)"):
        bootstrap_interval(broken)
    for given in ((broken, good), (good, broken)):
        with pytest.raises(ValueError, match="a paired test needs finite values"):
            paired(*given)
        with pytest.raises(ValueError, match="Spearman's correlation needs finite values"):
            spearman_interval(*given)
    with pytest.raises(ValueError, match="Holm's correction needs finite values"):
        holm([0.1, bad])


def test_nothing_or_what_does_not_belong_together_is_refused():
    none = np.empty(0)
    for measure in (bootstrap_interval, lambda x: paired(x, x), lambda x: spearman_interval(x, x), lambda x: holm(x.tolist())):
        with pytest.raises(ValueError, match="needs at least one value and got none"):
            measure(none)
    for measure in (paired, spearman_interval):
        with pytest.raises(ValueError, match="values of the same queries on both sides and got 3 and 2"):
            measure(np.arange(3), np.arange(2))
    with pytest.raises(ValueError, match=r"p-values between 0 and 1 and met 1\.5"):
        holm([0.1, 1.5])
    with pytest.raises(ValueError, match="all gold scores are 2"):
        spearman_interval(np.arange(3), np.full(3, 2.0))
    with pytest.raises(ValueError, match=r"all cosines are 0\.5"):
        spearman_interval(np.full(3, 0.5), np.arange(3))
