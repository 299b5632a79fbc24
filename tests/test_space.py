"""Promises of the space's health: closed forms, what random directions give, what is made to be found is found."""

import json
import math

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.reference import spread_out_per_prefix
from lightning_modules import space
from lightning_modules.space import gap_of_one, health_rows, hubness, isotropy, mean_cosine, modality_gap, spread


def directions(number: int, width: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(number, width, generator=torch.Generator().manual_seed(seed)), dim=1)


def by_name(rows: list[dict]) -> dict[tuple[str, str], dict]:
    return {(row["side"], row["measure"]): row for row in rows}


def occurrences(candidates: np.ndarray, queries: np.ndarray, own: bool) -> np.ndarray:
    """k-occurrence by sorting everything, for cosines without ties."""
    cosines = queries.astype(np.float64) @ candidates.astype(np.float64).T
    if own:
        np.fill_diagonal(cosines, -np.inf)
    nearest = np.argsort(-cosines, axis=1)[:, :10]
    return np.bincount(nearest.ravel(), minlength=len(candidates))


def test_an_orthonormal_basis_has_no_spread_and_its_closed_forms():
    basis = torch.eye(6)
    assert spread(basis) == pytest.approx(0, abs=1e-12)
    assert mean_cosine(basis) == pytest.approx(0, abs=1e-12)
    # the covariance is a multiple of the projection onto 5 of the 6 dimensions
    assert isotropy(basis) == pytest.approx((5 - 1) / (6 - 1))
    assert isotropy(torch.cat([basis, -basis])) == pytest.approx(1)


def test_vectors_that_are_all_one_are_spread_by_one_and_have_no_isotropy():
    one = directions(1, 7).expand(30, 7)
    assert spread(one) == pytest.approx(1, abs=1e-6)
    assert mean_cosine(one) == pytest.approx(1, abs=1e-6)
    assert math.isnan(isotropy(one))
    assert math.isnan(hubness(one))
    assert math.isnan(hubness(one, directions(20, 7, seed=1)))


def test_two_antipodal_clusters_lie_on_a_line():
    east = torch.tensor([1.0, 0.0, 0.0, 0.0])
    both = torch.cat([east.expand(8, 4), -east.expand(8, 4)])
    assert spread(both) == pytest.approx(1)
    assert mean_cosine(both) == pytest.approx((16 * 0 - 16) / (16 * 15))  # the sum is zero
    assert isotropy(both) == pytest.approx(0, abs=1e-12)
    assert modality_gap(east.expand(8, 4), -east.expand(5, 4)) == pytest.approx(2)
    assert modality_gap(both, both.roll(3, 0)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("number", "width"), [(40, 8), (5, 8)])
def test_spread_and_mean_cosine_are_the_means_over_pairs(number, width):
    unit = directions(number, width, seed=3)
    off = ~torch.eye(number, dtype=torch.bool)
    cosine = (unit.double() @ unit.double().T)[off]
    assert spread(unit) == pytest.approx(cosine.square().mean().item(), rel=1e-6)
    assert spread(unit) == pytest.approx(spread_out_per_prefix(unit.double(), prefixes=(width,), ids_B=None).item(), rel=1e-6)
    assert mean_cosine(unit) == pytest.approx(cosine.mean().item(), rel=1e-5, abs=1e-9)


@pytest.mark.parametrize(("number", "width"), [(50, 12), (9, 30), (2, 5)])
def test_isotropy_equals_the_steps_of_the_paper(number, width):
    unit = directions(number, width, seed=1) * torch.linspace(1, 0.2, width)
    eigenvalues = np.linalg.eigvalsh(np.cov(unit.double().numpy(), rowvar=False)).clip(0)
    normed = np.sqrt(width) * eigenvalues / np.linalg.norm(eigenvalues)
    defect = np.linalg.norm(normed - 1) / np.sqrt(2 * (width - np.sqrt(width)))
    share = (width - defect**2 * (width - np.sqrt(width))) ** 2 / width**2
    assert isotropy(unit) == pytest.approx((width * share - 1) / (width - 1), abs=1e-9)


@pytest.mark.parametrize("num_equal", [1, 2, 5, 10])
def test_isotropy_counts_directions_of_equal_variance(num_equal):
    axes = torch.eye(10)[:num_equal]
    assert isotropy(torch.cat([axes, -axes])) == pytest.approx((num_equal - 1) / 9, abs=1e-9)


@pytest.mark.parametrize(("queries", "candidates", "width"), [(400, 900, 64), (300, 700, 256), (900, 1200, 16)])
def test_random_directions_give_the_references(queries, candidates, width):
    rows = by_name(health_rows("a/text-image", width, directions(queries, width), directions(candidates, width, seed=1)))
    for side, number in (("queries", queries), ("candidates", candidates)):
        # Cosines of different pairs are uncorrelated, with mean square 1/d and variance of the square below 2/d²
        pairs = number * (number - 1) / 2
        assert rows[side, "spread"]["value"] == pytest.approx(1 / width, abs=4 * math.sqrt(2 / pairs) / width)
        assert rows[side, "mean_cosine"]["value"] == pytest.approx(0, abs=4 / math.sqrt(pairs * width))
        assert rows[side, "isotropy"]["value"] == pytest.approx(rows[side, "isotropy"]["reference"], rel=0.01)
    assert rows["both", "spread"]["reference"] == 2 / width
    assert rows["both", "spread"]["value"] == pytest.approx(2 / width, rel=0.02)
    assert rows["both", "modality_gap"]["value"] == pytest.approx(rows["both", "modality_gap"]["reference"], rel=0.5)
    assert rows["queries", "isotropy"]["reference"] == (queries - 2) / (queries + width - 2)


def test_neighbours_drawn_at_random_are_as_skewed_as_the_reference():
    random = np.random.default_rng(0)
    skews = []
    for _ in range(60):
        drawn = np.concatenate([random.permutation(300)[:10] for _ in range(200)])
        skews.append(scipy.stats.skew(np.bincount(drawn, minlength=300)))
    # the skewness of 300 counts has a standard error of about √(6/300), the mean of 60 an eighth of it
    assert np.mean(skews) == pytest.approx(space.hubness_of_random(200, 300), abs=4 * math.sqrt(6 / 300 / 60))


@pytest.mark.parametrize("elements", [1, 500, 2**22])
def test_hubness_is_the_skewness_of_the_counts_whatever_the_chunks(elements, monkeypatch):
    monkeypatch.setattr(space, "CHUNK_ELEMENTS", elements)
    candidates, queries = directions(150, 20), directions(70, 20, seed=2)
    rectangular = occurrences(candidates.numpy(), queries.numpy(), own=False)
    assert hubness(candidates, queries) == pytest.approx(scipy.stats.skew(rectangular), abs=1e-9)
    own = occurrences(candidates.numpy(), candidates.numpy(), own=True)
    assert hubness(candidates) == pytest.approx(scipy.stats.skew(own), abs=1e-9)


def test_a_hub_is_found():
    middle = torch.eye(64)[0]
    candidates, queries = directions(300, 64), F.normalize(directions(200, 64, seed=1) + 0.4 * middle, dim=1)
    before = hubness(candidates, queries)
    candidates[7] = middle
    assert occurrences(candidates.numpy(), queries.numpy(), own=False)[7] > 150
    assert hubness(candidates, queries) > before + 3


def test_candidates_that_are_equally_near_share_the_places():
    # Every query is e₀: the first of 30 candidates is nearest, 12 are equally near, 17 are farther. 1 + 12 × 9/12 = 10.
    near = math.sqrt(0.5)
    candidates = torch.zeros(30, 40)
    candidates[0, 0] = 1
    for number in range(1, 30):
        candidates[number, 0] = near + 6e-8 * number if number <= 12 else 0.1  # equal but for rounding
        candidates[number, number] = math.sqrt(1 - candidates[number, 0] ** 2)
    queries = torch.eye(40)[:1].repeat(3, 1)
    expected = scipy.stats.skew([3.0] + [3 * 9 / 12] * 12 + [0.0] * 17)
    for order in (torch.arange(30), torch.arange(29, -1, -1), torch.randperm(30, generator=torch.Generator().manual_seed(0))):
        assert hubness(candidates[order], queries) == pytest.approx(expected, abs=1e-9)


def test_a_made_gap_is_found_beside_what_chance_leaves():
    image, text = directions(200, 32), directions(300, 32, seed=1)
    shift = torch.eye(32)[0]
    gap = modality_gap(F.normalize(image + 0.5 * shift, dim=1), F.normalize(text - 0.5 * shift, dim=1))
    chance = gap_of_one(image, text)
    assert modality_gap(image, text) < 1.5 * chance < 0.2
    assert gap > 0.8
    assert chance == pytest.approx(math.sqrt(1 / 200 + 1 / 300), rel=0.01)


def test_a_rotation_changes_nothing():
    queries, candidates = directions(60, 24) * torch.linspace(1, 0.1, 24), directions(80, 24, seed=1) + 0.1
    queries, candidates = F.normalize(queries, dim=1), F.normalize(candidates, dim=1)
    rotation = torch.linalg.qr(torch.randn(24, 24, generator=torch.Generator().manual_seed(5)))[0]
    before = health_rows("a/text-text", 24, queries, candidates)
    after = health_rows("a/text-text", 24, queries @ rotation, candidates @ rotation)
    for left, right in zip(before, after, strict=True):
        assert left["value"] == pytest.approx(right["value"], rel=1e-4, abs=1e-6), left


def test_every_measure_has_its_row_and_json_takes_them():
    rows = health_rows("a/text-text", 16, directions(20, 16), directions(30, 16, seed=1))
    sides = [(row["side"], row["measure"]) for row in rows]
    each = ["spread", "mean_cosine", "isotropy", "hubness"]
    assert sorted(sides) == sorted(
        [(side, name) for side in ("queries", "candidates") for name in each]
        + [("both", name) for name in ("spread", "hubness", "modality_gap")]
    )
    assert all(list(row) == ["benchmark", "prefix", "side", "measure", "value", "reference", "note"] for row in rows)
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    named = by_name(rows)
    assert named["both", "spread"]["value"] == pytest.approx(
        named["queries", "spread"]["value"] + named["candidates", "spread"]["value"]
    )
    assert named["both", "modality_gap"]["note"] == "both sides are of one modality"
    assert (
        by_name(health_rows("a/text-page", 16, directions(20, 16), directions(30, 16)))["both", "modality_gap"]["note"] is None
    )


def test_one_query_among_few_candidates_has_no_numbers_but_notes():
    rows = by_name(health_rows("a/text-image", 8, directions(1, 8), directions(10, 8)))
    numbers = {key for key, row in rows.items() if row["value"] is not None}
    assert numbers == {("candidates", "spread"), ("candidates", "mean_cosine"), ("candidates", "isotropy")}
    for key, row in rows.items():
        assert (row["note"] is None) == (key in numbers)
    assert rows["queries", "isotropy"]["note"].startswith("undefined for fewer than two different vectors")
    assert rows["both", "hubness"]["note"].startswith("undefined where all are neighbours equally often")
    line = by_name(health_rows("a/text-image", 1, torch.ones(12, 1), torch.ones(12, 1)))
    assert line["queries", "isotropy"]["value"] is None


def test_equal_vectors_have_no_isotropy_or_hubness_but_notes():
    one = directions(1, 8).repeat(40, 1)
    rows = by_name(health_rows("a/text-image", 8, one, one))
    for side, measure in (("queries", "isotropy"), ("queries", "hubness"), ("both", "hubness")):
        assert rows[side, measure]["value"] is None
        assert rows[side, measure]["note"]
    assert rows["queries", "mean_cosine"]["value"] == pytest.approx(1, abs=1e-6)
    assert rows["both", "modality_gap"]["value"] == pytest.approx(0, abs=1e-6)


def test_a_large_side_is_sampled_evenly_and_says_so(monkeypatch):
    monkeypatch.setattr(space, "MOST_ROWS", 20)
    queries, candidates = directions(15, 8), directions(50, 8, seed=1)
    rows = by_name(health_rows("a/text-image", 8, queries, candidates))
    taken = candidates[[0, 2, 5, 7, 10, 12, 15, 17, 20, 22, 25, 27, 30, 32, 35, 37, 40, 42, 45, 47]]
    assert rows["candidates", "mean_cosine"]["value"] == mean_cosine(taken)
    assert rows["both", "hubness"]["value"] == hubness(taken, queries)
    for (side, _), row in rows.items():
        assert row["note"] == (None if side == "queries" else "20 of 50 candidates, evenly spaced")


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0])
def test_vectors_that_are_not_of_length_one_are_refused(bad):
    good, broken = directions(5, 4), directions(5, 4)
    broken[3] *= bad
    with pytest.raises(
        ValueError, match="benchmark 'a/text-text': 1 of 5 vectors of the queries are not of length 1, number 3"
    ):
        health_rows("a/text-text", 4, broken, good)
    with pytest.raises(ValueError, match="vectors of the candidates are not of length 1"):
        health_rows("a/text-text", 4, good, broken)
