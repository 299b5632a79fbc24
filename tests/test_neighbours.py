"""Promises of the search: exact is what comparing all gives whatever the chunks, an index finds most and says true cosines."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lightning_modules import neighbours
from lightning_modules.neighbours import Index, IndexSettings, Kind, Neighbours, built_once, exact
from lightning_modules.vectors import Chunk

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = IndexSettings(num_training=2000, num_lists=16, num_probes=8, code_bytes=8)


def in_chunks(vectors: np.ndarray, *sizes: int) -> Callable[[], Iterator[Chunk]]:
    """The vectors in chunks of these sizes, the last of which comes again and again."""

    def chunks() -> Iterator[Chunk]:
        first, left = 0, list(sizes)
        while first < len(vectors):
            size = left.pop(0) if len(left) > 1 else left[0]
            yield Chunk(np.arange(first, min(len(vectors), first + size)), vectors[first : first + size])
            first += size

    return chunks


def clustered(number: int, width: int = 32, *, clusters: int = 20, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(clusters, width))
    found = centres[random.integers(clusters, size=number)] + 0.3 * random.normal(size=(number, width))
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


def by_numpy(queries: np.ndarray, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    cosines = queries.astype(np.float64) @ vectors.astype(np.float64).T
    order = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
    return order, np.take_along_axis(cosines, order, 1)


def recall(found: Neighbours, queries: np.ndarray, vectors: np.ndarray) -> float:
    wanted, _ = by_numpy(queries, vectors, found.positions.shape[1])
    return float((found.positions[:, :, None] == wanted[:, None]).any(2).mean())


def test_the_nearest_come_first_and_of_equal_ones_the_lower_position():
    east, north, between = [1.0, 0.0], [0.0, 1.0], [0.6, 0.8]
    vectors = np.array([north, between, east, between, north, east, between], np.float32)
    for sizes in ([7], [1], [2], [3, 4], [6, 1]):
        found = exact(torch.tensor([east, [-1.0, 0.0]]), in_chunks(vectors, *sizes)(), 4)
        assert found.positions.tolist() == [[2, 5, 1, 3], [0, 4, 1, 3]]
        np.testing.assert_array_equal(found.cosines, np.array([[1, 1, 0.6, 0.6], [0, 0, -0.6, -0.6]], np.float32))
    assert (found.positions.dtype, found.cosines.dtype) == (np.int64, np.float32)


@pytest.mark.parametrize("seed", range(6))
def test_exact_is_what_comparing_all_gives_whatever_the_chunks(seed):
    random = np.random.default_rng(seed)
    vectors, queries = (random.integers(-3, 4, (number, 5)).astype(np.float32) for number in (200, 9))  # many ties, no rounding
    k = int(random.integers(1, 60))
    wanted, cosines = by_numpy(queries, vectors, k)
    sizes = random.integers(1, 80, 9).tolist()
    found = exact(torch.from_numpy(queries), in_chunks(vectors, *sizes)(), k)
    np.testing.assert_array_equal(found.positions, wanted)
    np.testing.assert_array_equal(found.cosines, cosines)


def test_fewer_vectors_than_neighbours_are_all_of_them():
    vectors = clustered(3)
    for chunks in (in_chunks(vectors, 3)(), in_chunks(vectors, 1)()):
        found = exact(torch.from_numpy(vectors[:2]), chunks, 10)
        assert found.positions.shape == found.cosines.shape == (2, 3)
        assert found.positions[:, 0].tolist() == [0, 1]
    assert exact(torch.zeros(2, 4), iter(()), 10).positions.shape == (2, 0)


def test_exact_holds_one_chunk_at_a_time():
    alive, most = 0, 0

    class Counted(np.ndarray):
        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    def chunks() -> Iterator[Chunk]:
        nonlocal alive, most
        for number in range(20):
            alive += 1
            most = max(most, alive)
            yield Chunk(np.arange(5) + 5 * number, clustered(5).view(Counted))

    exact(torch.zeros(2, 32), chunks(), 3)
    assert most <= 2  # one is let go when the next is there


@pytest.mark.parametrize(("kind", "floor"), [("ivfpq", 0.9), ("ivfsq8", 0.9), ("hnsw", 0.95)])
def test_an_index_finds_most_and_says_their_true_cosines(kind: Kind, floor: float):
    vectors, queries = clustered(4000), clustered(100, seed=1)
    index = Index.build(kind, in_chunks(vectors, 700), np.arange(4000), 32, SMALL)
    assert index.index.metric_type == 0  # the inner product, as faiss/MetricType.h has it
    found = index.search(torch.from_numpy(queries), 10, lambda positions: vectors[positions])
    assert recall(found, queries, vectors) >= floor
    true = np.einsum("qd,qkd->qk", queries.astype(np.float64), vectors[found.positions].astype(np.float64))
    np.testing.assert_allclose(found.cosines, true, rtol=0, atol=1e-6)  # 32 products in fp32
    assert (np.diff(found.cosines) <= 0).all()


def test_comparing_again_is_what_finds_them_by_product_quantisation():
    vectors, queries = clustered(4000), clustered(100, seed=1)
    index = Index.build("ivfpq", in_chunks(vectors, 700), np.arange(4000), 32, SMALL)
    _, alone = index.index.search(queries, 10)
    found = index.search(torch.from_numpy(queries), 10, lambda positions: vectors[positions])
    assert recall(Neighbours(alone, alone), queries, vectors) < 0.7 < recall(found, queries, vectors)


def test_positions_are_those_of_the_split_though_some_are_left_out():
    vectors, wanted = clustered(1000), np.arange(1000) % 3 > 0
    positions = np.flatnonzero(wanted)

    def chunks() -> Iterator[Chunk]:
        for at, some in in_chunks(vectors, 90)():
            yield Chunk(at[wanted[at]], some[wanted[at]])

    index = Index.build("hnsw", chunks, positions, 32, SMALL)
    queries = torch.from_numpy(vectors[positions[:40]])
    found = index.search(queries, 3, lambda at: vectors[at])
    np.testing.assert_array_equal(found.positions, exact(queries, chunks(), 3).positions)
    assert found.positions[:, 0].tolist() == positions[:40].tolist()


def test_what_an_index_does_not_find_is_marked():
    vectors = clustered(2000)
    settings = IndexSettings(num_training=2000, num_lists=16, num_probes=1)
    index = Index.build("ivfsq8", in_chunks(vectors, 500), np.arange(2000), 32, settings)
    found = index.search(torch.from_numpy(vectors[:5]), 1500, lambda positions: vectors[positions])
    lost = found.positions < 0
    assert lost.any(1).all()
    assert not lost[:, 0].any()
    assert (found.cosines[lost] == -np.inf).all()
    assert np.isfinite(found.cosines[~lost]).all()


def test_an_index_is_built_once_and_again_when_it_is_for_something_else(tmp_path, monkeypatch):
    vectors, builds = clustered(600), []
    build = Index.build.__func__
    monkeypatch.setattr(Index, "build", classmethod(lambda cls, *given: builds.append(given[0]) or build(cls, *given)))
    file, queries = tmp_path / "hnsw.faiss", torch.from_numpy(clustered(20, seed=2))

    def search(made_by: str = "a", settings: IndexSettings = SMALL) -> np.ndarray:
        index = built_once(file, "hnsw", in_chunks(vectors, 90), np.arange(600), 32, settings, made_by=made_by)
        return index.search(queries, 5, lambda positions: vectors[positions]).positions

    first = search()
    np.testing.assert_array_equal(search(), first)
    assert len(builds) == 1
    search("b")
    search("b", IndexSettings(num_links=8))
    assert len(builds) == 3
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    search("b", IndexSettings(num_links=8))
    assert len(builds) == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hnsw.faiss.lock", "hnsw.faiss", "hnsw.faiss.json"]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    index = Index.build("hnsw", in_chunks(clustered(50), 50), np.arange(50), 32, SMALL)
    with pytest.raises(OSError, match=r"could not write .*missing/a\.faiss"):
        index.save(Path(tmp_path, "missing", "a.faiss"), "x")


def test_what_does_not_fit_is_refused(monkeypatch):
    vectors = clustered(300)
    for settings, number, message in (
        (IndexSettings(code_bytes=7), 300, "code_bytes of the index is 7, no divisor of the vectors' width 32"),
        (SMALL, 200, "200 vectors are too few to train index=ivfpq, it needs 256"),
    ):
        with pytest.raises(ValueError, match=message):
            Index.build("ivfpq", in_chunks(vectors[:number], 50), np.arange(number), 32, settings)
    with pytest.raises(ValueError, match="num_probes of the index is 0"):
        IndexSettings(num_probes=0)
    monkeypatch.setitem(sys.modules, "faiss", None)  # as if it were not installed
    with pytest.raises(ValueError, match=r"an index needs FAISS .*pip install -e '\.\[mine\]'"):
        neighbours.require_faiss()


@pytest.mark.parametrize("number", [2, 1])
def test_faiss_takes_as_many_threads_as_torch(number):
    torch.set_num_threads(number)
    assert neighbours.require_faiss().omp_get_max_threads() == number


def test_half_precision_vectors_are_compared_in_single():
    vectors = clustered(50).astype(np.float16)
    found = exact(F.normalize(torch.from_numpy(clustered(4, seed=3)), dim=-1), in_chunks(vectors, 20)(), 5)
    _, cosines = by_numpy(clustered(4, seed=3), vectors.astype(np.float32), 5)
    np.testing.assert_allclose(found.cosines, cosines, rtol=0, atol=1e-6)
