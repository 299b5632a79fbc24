"""Promises of the search in stored embeddings: exact is exact, a shortlist finds most, and every cosine is the true one."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stores import of_numbers, of_world

from lightning_modules import search as module
from lightning_modules.embeddings import Embeddings
from lightning_modules.forms import FORMS
from lightning_modules.neighbours import Index, IndexSettings, Kind
from lightning_modules.search import Searcher, encoder_of, search

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = IndexSettings(num_training=2000, num_lists=16, num_probes=8, code_bytes=8)


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def nested(number: int, width: int = 32, *, seed: int = 0) -> np.ndarray:
    """Unit vectors around centres, the first dimensions larger than the last, as Matryoshka training leaves them."""
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(20, width))
    found = centres[random.integers(20, size=number)] + 0.3 * random.normal(size=(number, width))
    return unit(found * np.linspace(1.5, 0.2, width))


def by_numpy(queries: np.ndarray, vectors: np.ndarray, k: int, prefix: int) -> tuple[np.ndarray, np.ndarray]:
    cosines = unit(queries[:, :prefix]).astype(np.float64) @ unit(vectors[:, :prefix]).astype(np.float64).T
    order = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
    return order, np.take_along_axis(cosines, order, 1)


def recall(found: np.ndarray, wanted: np.ndarray) -> float:
    return float((found[:, :, None] == wanted[:, None]).any(2).mean())


@pytest.mark.parametrize("held", [0, 2**30])
@pytest.mark.parametrize("dtype", FORMS)
def test_exact_is_what_comparing_all_gives_at_every_prefix(tmp_path, monkeypatch, dtype, held):
    monkeypatch.setattr(module, "CHUNK", 64)
    monkeypatch.setattr(module, "HELD_BYTES", held)
    embeddings = of_numbers(tmp_path / "store", nested(500), dtype=dtype)
    queries, searcher = nested(70, seed=1), Searcher(embeddings)
    for prefix in (8, 16, 32):
        wanted, cosines = by_numpy(queries, embeddings.vectors(None, prefix), 10, prefix)
        found = searcher.search(queries, 10, prefix=prefix)
        np.testing.assert_allclose(found.cosines, cosines, rtol=0, atol=1e-6)  # products of 32 numbers in fp32
        assert recall(found.positions, wanted) > (0.9 if dtype == "binary" else 0.999)  # rounding orders bits' many ties


def test_of_equal_vectors_the_lower_row_comes_first(tmp_path):
    east, north = [1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]
    embeddings = of_numbers(tmp_path / "store", np.array([north, east, north, east, east], np.float32))
    for searcher in (Searcher(embeddings), Searcher(embeddings, shortlist=2, settings=IndexSettings(oversampling=1))):
        assert searcher.search(np.array([east]), 4).positions.tolist() == [[1, 3, 4, 0]]


def test_a_store_that_is_not_held_is_read_in_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 64)
    monkeypatch.setattr(module, "HELD_BYTES", 4 * 500 * 32 - 1)
    sizes, embeddings = [], of_numbers(tmp_path / "store", nested(500))
    read = embeddings.vectors
    monkeypatch.setattr(embeddings, "vectors", lambda rows, prefix: sizes.append(len(rows)) or read(rows, prefix))
    Searcher(embeddings).search(nested(3, seed=1), 5)
    assert (max(sizes), sum(sizes)) == (64, 500)


def test_a_modality_is_all_that_is_searched(tmp_path):
    modalities = [("text", "image", "audio")[n % 3] for n in range(300)]
    embeddings = of_numbers(tmp_path / "store", nested(300), modalities)
    queries = nested(9, seed=1)
    for searcher in (Searcher(embeddings), Searcher(embeddings, shortlist=16)):
        found = searcher.search(queries, 5, modality="image")
        assert (found.positions % 3 == 1).all()
        wanted, _ = by_numpy(queries, nested(300)[1::3], 5, 32)
        np.testing.assert_array_equal(found.positions, 3 * wanted + 1)


def test_a_shortlist_is_compared_again_at_full_width(tmp_path):
    embeddings = of_numbers(tmp_path / "store", nested(2000))
    queries = nested(50, seed=1)
    wanted, _ = by_numpy(queries, nested(2000), 10, 32)
    alone, _ = by_numpy(queries, nested(2000), 10, 8)
    found = Searcher(embeddings, shortlist=8, settings=SMALL).search(queries, 10)
    assert recall(alone, wanted) < 0.6 < 0.9 < recall(found.positions, wanted)
    true = np.einsum("qd,qkd->qk", queries.astype(np.float64), nested(2000)[found.positions].astype(np.float64))
    np.testing.assert_allclose(found.cosines, true, rtol=0, atol=1e-6)
    between = Searcher(embeddings, shortlist=8, settings=SMALL).search(queries, 10, prefix=16)
    assert recall(between.positions, by_numpy(queries, nested(2000), 10, 16)[0]) > 0.95


def test_what_the_shortlist_leaves_out_is_not_found(tmp_path):
    """So the candidates are those of the prefix, and not all."""
    far = unit(np.array([[-0.1, 0.0, 1.0, 0.0]], np.float32))
    near = unit(np.array([[1.0, 0.1 * n, 0.0, 0.0] for n in range(1, 6)], np.float32))
    embeddings, query = of_numbers(tmp_path / "store", np.concatenate([far, near])), unit(np.array([[0.1, 0.0, 1.0, 0.0]]))
    assert Searcher(embeddings).search(query, 1).positions.tolist() == [[0]]
    few, all_of_them = (Searcher(embeddings, shortlist=2, settings=IndexSettings(oversampling=n)) for n in (5, 6))
    assert few.search(query, 1).positions.tolist() != [[0]]
    assert all_of_them.search(query, 1).positions.tolist() == [[0]]


@pytest.mark.parametrize("shortlist", [None, 16])
@pytest.mark.parametrize("kind", ["hnsw", "ivfsq8", "ivfpq", "binary"])
def test_an_index_finds_most_and_says_true_cosines(tmp_path, kind: Kind, shortlist):
    embeddings = of_numbers(tmp_path / "store", nested(2000))
    queries = nested(50, seed=1)
    found = Searcher(embeddings, index=kind, shortlist=shortlist, settings=SMALL).search(queries, 10)
    assert recall(found.positions, by_numpy(queries, nested(2000), 10, 32)[0]) > (0.8 if kind == "binary" else 0.9)
    true = np.einsum("qd,qkd->qk", queries.astype(np.float64), nested(2000)[found.positions].astype(np.float64))
    np.testing.assert_allclose(found.cosines, true, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["hnsw", "ivfsq8", "binary"])
def test_an_index_finds_all_that_a_rare_modality_has(tmp_path, kind: Kind):
    modalities = ["image" if n % 200 == 7 else "text" for n in range(2000)]
    embeddings = of_numbers(tmp_path / "store", nested(2000), modalities)
    hasty = IndexSettings(num_probes=1, num_lists=16, oversampling=2, search_effort=8)
    searcher = Searcher(embeddings, index=kind, settings=hasty)
    queries = nested(20, seed=1)
    wanted, cosines = by_numpy(queries, nested(2000)[7::200], 4, 32)
    found = searcher.search(queries, 4, modality="image")
    assert ((found.positions - 7) % 200 == 0).all()
    assert np.isfinite(found.cosines).all()
    assert recall(found.positions, 200 * wanted + 7) > 0.7
    every = searcher.search(queries, 50, modality="image")
    assert every.positions.shape == (20, 10)
    np.testing.assert_allclose(every.cosines[:, :4], cosines, rtol=0, atol=1e-6)


def test_an_index_is_built_once_beside_the_vectors_and_anew_for_others(tmp_path, monkeypatch):
    builds, build = [], Index.build.__func__
    monkeypatch.setattr(Index, "build", classmethod(lambda cls, *given: builds.append(given[0]) or build(cls, *given)))
    first = of_numbers(tmp_path / "store", nested(400))
    for _ in range(2):
        Searcher(first, index="hnsw", settings=SMALL)
    assert builds == ["hnsw"]
    Searcher(first, index="hnsw", shortlist=16, settings=SMALL)
    assert len(builds) == 2
    Searcher(first, index="hnsw", settings=SMALL)
    assert len(builds) == 2
    other = of_numbers(tmp_path / "other", nested(400, seed=5))
    for file in (tmp_path / "store").glob("hnsw*"):
        (tmp_path / "other" / file.name).write_bytes(file.read_bytes())
    found = Searcher(other, index="hnsw", settings=SMALL).search(nested(400, seed=5)[:20], 1)
    assert len(builds) == 3
    assert found.positions[:, 0].tolist() == list(range(20))


def test_what_does_not_fit_is_refused_in_a_sentence(tmp_path):
    embeddings = of_numbers(tmp_path / "store", nested(40))
    query = nested(1, seed=1)
    cases: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({}, {"k": 0}, "k is 0; it must be at least 1"),
        ({}, {"prefix": 64}, "64"),
        ({"shortlist": 64}, {}, "64"),
        ({"shortlist": 16}, {"prefix": 8}, "the prefix is 8, but candidates are chosen by 16 dimensions"),
        ({"index": "hnsw"}, {"prefix": 8}, "the prefix is 8, but candidates are chosen by 32 dimensions; give shortlist=8"),
        ({}, {"modality": "video"}, "nothing here is of modality 'video'; there are: text"),
        ({"index": "ivfpq", "settings": SMALL}, {}, "too few to train index=ivfpq"),
    ]
    for given, more, message in cases:
        with pytest.raises(ValueError, match=message):
            Searcher(embeddings, **given).search(query, **{"k": 3, **more})


@pytest.fixture(scope="module")
def stored(tmp_path_factory, world, processor) -> Embeddings:
    return of_world(tmp_path_factory.mktemp("world-store"), world, processor)


def test_an_item_finds_itself_first_and_the_table_and_the_file_say_so(stored, tmp_path, capsys):
    row = stored.modalities.index("audio")
    path = stored.described(row)["path"]
    search(str(stored.folder), file=path, k=3, out=str(tmp_path / "found.jsonl"), device="cpu")
    (line,) = (tmp_path / "found.jsonl").read_text().splitlines()
    found = json.loads(line)["found"]
    assert [one["rank"] for one in found] == [1, 2, 3]
    assert found[0] == {"rank": 1, "cosine": found[0]["cosine"], "row": row, **stored.described(row)}
    assert found[0]["cosine"] == pytest.approx(1, abs=1e-5)
    printed = capsys.readouterr().out
    assert stored.ids[row] in printed
    assert "1.000" in printed


def test_a_text_is_asked_in_its_prompt_unless_told_otherwise(stored, tmp_path):
    encoder, finds = encoder_of(stored, None, "cpu"), {}
    for task in ("search result", None):
        search(str(stored.folder), text="a red circle", task=task, k=50, out=str(tmp_path / "found.jsonl"), device="cpu")
        finds[task] = json.loads((tmp_path / "found.jsonl").read_text())["found"]
    for task, text in (("search result", "task: search result | query: a red circle"), (None, "a red circle")):
        wanted, cosines = by_numpy(encoder.embed([text]), stored.vectors(), 43, 16)
        assert [one["row"] for one in finds[task]] == wanted[0].tolist()
        assert [one["cosine"] for one in finds[task]] == pytest.approx(cosines[0].tolist(), abs=1e-5)


def test_many_queries_are_answered_one_a_line(stored, tmp_path, capsys):
    lines = [{"id": f"query {n}", "text": f"[bold]{n} red"} for n in range(25)]
    (tmp_path / "queries.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "found.jsonl"
    search(str(stored.folder), queries=str(tmp_path / "queries.jsonl"), k=2, modality="page", out=str(out), device="cpu")
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [one["id"] for one in found] == [f"query {n}" for n in range(25)]
    assert {hit["modality"] for one in found for hit in one["found"]} == {"page"}
    printed = capsys.readouterr().out
    assert "the first 20 of 25 queries are shown" in printed
    assert printed.count("cosine") == 20


def test_a_wrong_query_or_encoder_is_refused_by_name(stored, tmp_path, processor):
    (tmp_path / "bad.jsonl").write_text('{"id": "a", "text": "x"}\n{"id": "b", "image": "none.png"}\n')
    (tmp_path / "bad.png").write_bytes(b"no picture")
    folder = str(stored.folder)
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "there is nothing to search for; give text"),
        ({"text": " "}, "there is nothing to search for; give text"),
        ({"text": "a", "queries": "b"}, "give either queries, or text and file"),
        ({"queries": str(tmp_path / "bad.jsonl")}, r"bad\.jsonl: b cannot be used"),
        ({"file": str(tmp_path / "bad.png")}, "does not decode"),
        ({"text": "a", "task": "searching"}, "unknown task 'searching'"),
    ]
    for given, message in cases:
        with pytest.raises(ValueError, match=message):
            search(folder, device="cpu", **given)
    other = Path(str(stored.about["encoder"]["path"])).parent / "other"
    described = json.loads((other.with_name("encoder") / "encoder.json").read_text()) | {"sha256": "ab" * 32}
    other.mkdir()
    (other / "encoder.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match=r"the encoder in .*other \(SHA-256 abababababab\.\.\) is not the one that made"):
        search(folder, checkpoint=str(other), text="a", device="cpu")
