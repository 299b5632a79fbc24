"""Promises of ranks: those of a full sort, however candidates are cut, at every prefix and in every stored form."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lightning_modules import ranking
from lightning_modules.precision import BITS, asked, bytes_of, stored
from lightning_modules.ranking import SHORTLIST, Relevance, ranks
from lightning_modules.vectors import Chunk

pytestmark = pytest.mark.usefixtures("one_thread")


def case(num_queries: int, num_candidates: int, width: int, seed: int) -> tuple[torch.Tensor, np.ndarray, Relevance]:
    """Vectors around few centres, so that scores lie close, and grades from 1 to 3 of some of them."""
    random = torch.Generator().manual_seed(seed)
    centres = torch.randn(5, width, generator=random)
    queries, candidates = (
        F.normalize(centres[torch.randint(5, (n,), generator=random)] + torch.randn(n, width, generator=random), dim=-1)
        for n in (num_queries, num_candidates)
    )
    grades = torch.randint(-12, 4, (num_queries, num_candidates), generator=random).clamp(min=0)
    grades[torch.arange(num_queries), torch.randint(num_candidates, (num_queries,), generator=random)] = 2
    query, candidate = grades.nonzero(as_tuple=True)
    gain = grades[query, candidate].double().numpy()
    return queries, candidates.numpy(), Relevance(query.numpy(), candidate.numpy(), gain)


def chunked(vectors: np.ndarray, size: int):
    for first in range(0, len(vectors), size):
        yield Chunk(np.arange(first, min(len(vectors), first + size)), vectors[first : first + size])


def sorted_ranks(score_QC: np.ndarray, relevance: Relevance) -> np.ndarray:
    """By sorting whole rows: the highest score first, of equal ones the irrelevant, then the lower grade."""
    grade_QC = np.zeros_like(score_QC)
    grade_QC[relevance.query, relevance.candidate] = relevance.gain
    order_QC = np.lexsort((grade_QC, -score_QC))
    rank_QC = order_QC.argsort(1) + 1
    return rank_QC[relevance.query, relevance.candidate]


def agree(found: np.ndarray, expected: np.ndarray, depth: int) -> None:
    np.testing.assert_array_equal(np.minimum(found, depth + 1), np.minimum(expected, depth + 1))


@pytest.mark.parametrize("dtype", ["float32", "int8", "binary"])
@pytest.mark.parametrize(("chunk", "most"), [(100, 2**24), (7, 2**24), (7, 20), (1, 1)])
def test_ranks_are_those_of_a_full_sort(dtype, chunk, most, monkeypatch):
    monkeypatch.setattr(ranking, "MAX_SCORES", most)
    queries, candidates, relevance = case(12, 60, 16, 0)
    for width, depth in ((16, 10), (5, 10), (16, 60), (16, 1)):
        unit_QD, unit_CD = (F.normalize(vectors[:, :width], dim=-1) for vectors in (queries, torch.from_numpy(candidates)))
        score_QC = (asked(unit_QD, dtype) @ stored(unit_CD, dtype).T).numpy()
        found = ranks(queries, chunked(candidates, chunk), relevance, width=width, depth=depth, dtype=dtype)
        agree(found, sorted_ranks(score_QC, relevance), depth)


@pytest.mark.parametrize(
    ("width", "depth", "chunk", "most"),
    [(16, 5, 100, 2**24), (16, 5, 7, 20), (4, 5, 100, 2**24)],  # of 4 bits, many are as near as the last of a shortlist
)
def test_a_shortlist_by_bits_is_ordered_by_the_query_as_it_is(width, depth, chunk, most, monkeypatch):
    monkeypatch.setattr(ranking, "MAX_SCORES", most)
    queries, candidates, relevance = case(12, 90, width, 1)
    bits_CD = stored(torch.from_numpy(candidates), "binary")
    near_QC = (stored(queries, "binary") @ bits_CD.T).numpy()
    near_QC[relevance.query, relevance.candidate] -= 0.5
    place_QC = np.argsort(np.argsort(-near_QC, axis=1, kind="stable"), axis=1, kind="stable")
    score_QC = np.where(place_QC < SHORTLIST * depth, (queries @ bits_CD.T).numpy(), -np.inf)
    found = ranks(queries, chunked(candidates, chunk), relevance, width=width, depth=depth, dtype="binary_rescored")
    agree(found, sorted_ranks(score_QC, relevance), depth)
    assert not (found == sorted_ranks(near_QC, relevance)).all()


@pytest.mark.parametrize("dtype", list(BITS))
def test_an_encoder_that_tells_nothing_apart_finds_nothing(dtype):
    same = F.normalize(torch.ones(30, 8), dim=-1)
    own = np.arange(30)
    found = ranks(same, chunked(same.numpy(), 4), Relevance(own, own, np.ones(30)), width=8, depth=10, dtype=dtype)
    assert (found > 10).all()


def test_of_equal_scores_the_less_relevant_comes_first():
    unit = F.normalize(torch.ones(1, 8), dim=-1)
    relevance = Relevance(np.zeros(2, int), np.arange(2), np.array([3.0, 1.0]))
    assert ranks(unit, chunked(unit.expand(2, 8).numpy(), 2), relevance, width=8, depth=10).tolist() == [2, 1]


def test_stored_forms_are_what_they_say():
    vectors = F.normalize(torch.tensor([[0.5, -1.0, 0.0, 0.004], [3.0, 1.0, -2.0, 0.1]]), dim=-1)
    assert stored(vectors, "float32") is vectors
    assert stored(vectors, "binary").tolist() == [[1, -1, 1, 1], [1, 1, -1, 1]]
    codes = torch.tensor([[64.0, -127.0, 0.0, 1.0], [127.0, 42.0, -85.0, 4.0]])
    torch.testing.assert_close(stored(vectors, "int8"), F.normalize(codes, dim=-1))
    assert asked(vectors, "int8") is vectors
    assert asked(vectors, "binary_rescored") is vectors
    assert [bytes_of(100, dtype) for dtype in BITS] == [400, 100, 13, 13]


def test_int8_costs_next_to_nothing_and_bits_cost_more():
    queries, candidates, relevance = case(200, 400, 64, 2)
    lost = {}
    for dtype in BITS:
        found = ranks(queries, chunked(candidates, 50), relevance, width=64, depth=400 // SHORTLIST, dtype=dtype)
        exact = ranks(queries, chunked(candidates, 50), relevance, width=64, depth=400 // SHORTLIST)
        lost[dtype] = np.abs(found - exact).mean()
    assert lost["float32"] == 0 < lost["int8"] < 1 < lost["binary_rescored"] < lost["binary"]
