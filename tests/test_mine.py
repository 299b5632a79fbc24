"""Promises of conf=mine: the nearest distinct targets in each query's meta, whoever did which block and was killed when."""

import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from changes import flipped, foreign
from samples import media_item, picture_bytes

from datamodules.collate import with_prompt
from datamodules.decode import decode_item
from datamodules.media.limits import DecodeLimits
from datamodules.recipes.tars import index
from datamodules.sample import Example, Item, text_item
from datamodules.shards import Split, write_split
from lightning_modules import mine as stage
from lightning_modules.encoder.checkpoint import read_provenance, save_encoder
from lightning_modules.encoder.embedder import cut
from lightning_modules.mine import mine

pytestmark = pytest.mark.usefixtures("one_thread")

QUERY, TARGET = "q: {text}", "title: {title} | {text}"
PROMPTS: dict[str, Any] = {"query_prompt": QUERY, "target_prompt": TARGET}
SMALL: dict[str, Any] = {**PROMPTS, "k": 5, "block_size": 4, "batch_size": 3, "num_workers": 0, "device": "cpu"}


@pytest.fixture(autouse=True)
def loaded(monkeypatch, tiny_encoder, processor) -> None:
    """The checkpoint's encoder without loading and probing it each time."""
    real = stage.load_encoder
    monkeypatch.setattr(
        stage, "load_encoder", lambda folder: (tiny_encoder, processor) if Path(folder).name == "encoder" else real(folder)
    )
    monkeypatch.setattr(stage, "probe", lambda encoder: None)


@pytest.fixture
def checkpoint(tiny_encoder, processor, tmp_path) -> str:
    save_encoder(tmp_path / "encoder", tiny_encoder, processor, provenance={})
    return str(tmp_path / "encoder")


def targets() -> list[Item]:
    """Eleven contents at 15 positions: texts, pictures, and one text that is also a query."""
    pictures = [media_item("image", picture_bytes(width=6, height=4, seed=n), "png") for n in range(3)]
    texts = [text_item(f"the mat {n} " * (n + 1), title="mat") for n in range(6)]
    return [
        *texts,
        *pictures,
        text_item("cat cat"),
        texts[2],
        pictures[0],
        texts[2],
        text_item("the end"),
        text_item(" the  end"),
    ]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """`corpus`, and `queries` of which one has no target, one has a target elsewhere, and one's text is in the corpus."""
    given, root = targets(), tmp_path_factory.mktemp("root")
    write_split(root / "corpus", [Example(f"t{n:02d}", target=item) for n, item in enumerate(given)])
    taught = text_item("no mat")
    taught = Item(taught.parts, teacher=np.ones(3, np.float32))
    queries = [
        Example("alone", text_item("the cat sat")),
        Example("own", text_item("cat cat"), given[12], meta={"language": "en", "candidates": "old", "seed": {"cosine": 2}}),
        *(Example(f"q{n}", text_item("dog " * (n + 1)), given[n], (taught,), label="x") for n in range(7)),
        Example("elsewhere", given[7], text_item("is nowhere else")),
    ]
    write_split(root / "queries", queries, examples_per_shard=3)
    return root


def mined(checkpoint: str, root: Path, out: Path, **more: Any) -> Path:
    mine(checkpoint, str(root / "queries"), str(root / "corpus"), str(out), **{**SMALL, **more})
    return out


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("whole") / "out"


@pytest.fixture
def whole(checkpoint, root, place) -> Path:
    """What one task makes of it all; to be left as it is."""
    return place if (place / "manifest.json").exists() else mined(checkpoint, root, place)


def files_of(folder: Path) -> dict[str, bytes]:
    """What a finished folder holds for whoever reads it."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }


def meta_of(example: Example) -> dict[str, Any]:
    assert example.meta is not None
    return dict(example.meta)


def id_of(item: Item | None) -> int | None:
    return None if item is None else item.content_id


@torch.no_grad()
def alone(encoder, processor, item: Item, prompt: str, prefix: int) -> np.ndarray:
    inputs = processor([with_prompt(decode_item(item, DecodeLimits()), prompt)])
    return cut(encoder(inputs), prefix)[0].numpy()


@pytest.mark.parametrize(("prefix", "num_workers"), [(None, 0), (8, 1)])
def test_each_query_gets_the_nearest_distinct_targets_best_first(
    checkpoint, root, tiny_encoder, processor, tmp_path, prefix, num_workers
):
    out = Split(mined(checkpoint, root, tmp_path / "out", prefix=prefix, num_workers=num_workers))
    queries, corpus = Split(root / "queries"), Split(root / "corpus")
    assert out.keys == queries.keys
    contents = [corpus.read(position).target for position in range(len(corpus))]
    first = [n for n, item in enumerate(contents) if id_of(item) not in [id_of(other) for other in contents[:n]]]
    assert first == [*range(10), 13]
    embed = lambda item, prompt: alone(tiny_encoder, processor, item, prompt, prefix or 16)  # noqa: E731
    vectors = {n: embed(contents[n], TARGET) for n in first}
    for position in range(len(queries)):
        given, found = queries.read(position), out.read(position)
        query = embed(given.query, QUERY)
        cosines = {n: float(query @ vectors[n]) for n in first if id_of(contents[n]) != id_of(given.query)}
        best = sorted(cosines, key=lambda n: -cosines[n])[:5]
        candidates = meta_of(found)["candidates"]
        assert [candidate["position"] for candidate in candidates] == best
        assert [candidate["key"] for candidate in candidates] == [f"t{n:02d}" for n in best]
        np.testing.assert_allclose([c["cosine"] for c in candidates], [cosines[n] for n in best], rtol=0, atol=1e-5)
        own = [n for n in best if given.target is not None and id_of(contents[n]) == id_of(given.target)]
        assert [c["position"] for c in candidates if c.get("is_target")] == own
        assert all("is_target" not in c or c["is_target"] is True for c in candidates)
        if given.target is None:
            assert "seed" not in meta_of(found)
        else:
            cosine = query @ embed(given.target, TARGET)
            np.testing.assert_allclose(meta_of(found)["seed"]["cosine"], cosine, rtol=0, atol=1e-5)


def test_all_else_of_an_example_stays_as_it_was(root, whole):
    queries, out = Split(root / "queries"), Split(whole)
    for position in range(len(queries)):
        given, found = queries.read(position), out.read(position)
        assert (found.query, found.target, found.negatives, found.label) == (
            given.query,
            given.target,
            given.negatives,
            given.label,
        )
        assert {name: value for name, value in meta_of(found).items() if name not in ("candidates", "seed")} == (
            {"language": "en"} if given.key == "own" else {}
        )
    teacher = out.read(3).negatives[0].teacher
    assert teacher is not None
    np.testing.assert_array_equal(teacher, np.ones(3, np.float32))


def test_own_text_and_targets_are_counted_and_the_making_is_told(checkpoint, root, tmp_path, capsys):
    out = Split(mined(checkpoint, root, tmp_path / "out", k=11))
    assert "of 9 targets 8 are among the 11 nearest; 2 queries met their own text" in capsys.readouterr().out
    about = out.manifest["about"]
    assert about["counts"] == {"with a target": 9, "target among the candidates": 8, "own text left out": 2}
    made_by, corpus = about["made_by"], Split(root / "corpus")
    wanted = {
        "checkpoint": read_provenance(checkpoint)["sha256"],
        "corpus": str(root / "corpus"),
        "corpus_digest": corpus.digest,
        "stage": "mine",
        "source": str(root / "queries"),
        "source_digest": Split(root / "queries").digest,
        "licence": None,
    }
    wanted |= {"k": 11, "index": "exact", "prefix": 16, "dtype": "float32"}
    assert made_by == wanted | PROMPTS | {"num_records": 10, "block_size": 4}
    sizes = [len(meta_of(out.read(position))["candidates"]) for position in range(len(out))]
    assert sizes == [11, 10, *[11] * 7, 10]  # eleven contents, without what is the query itself


def test_tasks_in_any_order_write_the_bytes_of_one(checkpoint, root, whole, tmp_path, capsys):
    one = files_of(whole)
    several = {"array_size": 3}
    mined(checkpoint, root, tmp_path / "three", array_index=2, **several)
    assert "3 of 4 blocks of the corpus are missing" in capsys.readouterr().out
    assert not list((tmp_path / "three").glob("*.tar"))
    for number in (0, 1, 2, 0):
        mined(checkpoint, root, tmp_path / "three", array_index=number, **several)
    assert files_of(tmp_path / "three") == one
    shutil.rmtree(tmp_path / "three" / "corpus" / "blocks")
    mined(checkpoint, root, tmp_path / "three")
    assert files_of(tmp_path / "three") == one


def test_a_run_killed_at_any_moment_goes_on_to_the_same_bytes(zygote, checkpoint, root, tmp_path):
    wanted = files_of(mined(checkpoint, root, tmp_path / "whole", block_size=1))
    out = tmp_path / "killed"
    given = {
        **SMALL,
        "block_size": 1,
        "checkpoint": checkpoint,
        "queries": root / "queries",
        "corpus": root / "corpus",
        "out": out,
    }
    arguments = ["conf=mine", *(f"{name}={value}" for name, value in given.items() if name not in PROMPTS)]
    arguments += [f'{name}="{value}"' for name, value in PROMPTS.items()]
    for done in ("corpus/blocks/000004.json", "blocks/000003.json"):
        run = zygote.ask(arguments=arguments, environment={}, log=str(tmp_path / "log"))
        deadline = time.monotonic() + 60
        while not (out / done).exists():
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.001)
        os.kill(run, signal.SIGKILL)
        assert zygote.ask(wait=run) == -signal.SIGKILL
        assert not (out / "manifest.json").exists()
    mined(checkpoint, root, out, block_size=1)
    assert files_of(out) == wanted


def test_a_block_whose_files_are_gone_is_made_again(checkpoint, root, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "out")
    for gone in ("corpus/000001.npy", "corpus/000002.ids.npy", "000001.tar", "blocks/000002.json"):
        (tmp_path / "out" / gone).unlink()
    mined(checkpoint, root, tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(whole)


def test_another_making_is_refused_before_anything_is_done(
    checkpoint, root, whole, tiny_encoder, processor, tmp_path, monkeypatch
):
    before = files_of(whole)
    with torch.no_grad():
        tiny_encoder.projection[0].weight.mul_(2)
    save_encoder(tmp_path / "other", tiny_encoder, processor, provenance={})
    changes: tuple[dict[str, Any], ...] = ({"prefix": 8}, {"query_prompt": None}, {"target_prompt": "{text}"}, {"k": 6})
    for change in (*changes, {"dtype": "float16"}, {"block_size": 5}, {"index": "hnsw"}):
        with pytest.raises(ValueError, match=f"was begun otherwise: {next(iter(change))} was .* Give another folder as out"):
            mined(checkpoint, root, whole, **change)
    with pytest.raises(ValueError, match="was begun otherwise: checkpoint was"):
        mined(str(tmp_path / "other"), root, whole)
    write_split(tmp_path / "corpus", [Example("t", target=text_item("another"))])
    monkeypatch.setattr(stage, "Split", lambda folder: Split(tmp_path / "corpus" if folder.endswith("corpus") else folder))
    with pytest.raises(ValueError, match="was begun otherwise: corpus_digest was"):
        mined(checkpoint, root, whole)
    assert files_of(whole) == before


def test_one_split_is_both_queries_and_corpus(checkpoint, world, tmp_path):
    folder = str(world / "world" / "text-image" / "train")
    mine(checkpoint, folder, folder, str(tmp_path / "out"), k=3, num_workers=0, device="cpu")
    out = Split(tmp_path / "out")
    assert len(out) == len(Split(folder))
    assert all(len(meta_of(out.read(position))["candidates"]) == 3 for position in range(9))


@pytest.mark.parametrize("kind", ["hnsw", "ivfsq8"])
def test_an_index_finds_what_comparing_all_finds_here(checkpoint, root, whole, tmp_path, kind):
    exact, found = Split(whole), Split(mined(checkpoint, root, tmp_path / kind, index=kind))
    for position in range(len(exact)):
        wanted, candidates = meta_of(exact.read(position))["candidates"], meta_of(found.read(position))["candidates"]
        assert [candidate["key"] for candidate in candidates] == [candidate["key"] for candidate in wanted]
        np.testing.assert_allclose([c["cosine"] for c in candidates], [c["cosine"] for c in wanted], rtol=0, atol=2e-6)
    assert (tmp_path / kind / "corpus" / f"{kind}.faiss").is_file()


def test_foreign_keys_are_made_fit_and_candidates_keep_theirs(checkpoint, root, tmp_path):
    (tmp_path / "far").mkdir()
    tar = foreign(tmp_path / "far" / "x.tar", *((f"a/{n}.{c}", b"cat %d" % n) for n in range(3) for c in ("txt", "cls")))
    index(str(tar.parent), query=("txt",), target=("cls",))
    mine(checkpoint, str(tmp_path / "far"), str(tmp_path / "far"), str(tmp_path / "out"), num_workers=0, device="cpu")
    out = Split(tmp_path / "out")
    assert out.keys == ["a_0", "a_1", "a_2"]
    assert {candidate["key"] for candidate in meta_of(out.read(0))["candidates"]} == {"a/1", "a/2"}


def test_what_cannot_be_mined_is_refused(checkpoint, root, tmp_path):
    write_split(tmp_path / "bad", [Example("k", media_item("image", picture_bytes(), "png"), text_item("t"))])
    flipped(b"IDAT")(tmp_path / "bad")
    bad = str(tmp_path / "bad")
    corpus, queries = str(root / "corpus"), str(root / "queries")
    for given, more, message in (
        ((queries, corpus), {"k": 0}, "k is 0, batch_size 3; both must be at least 1"),
        ((queries, corpus), {"prefix": 17}, "17"),
        ((queries, corpus), {"index": "ivfpq"}, "code_bytes of the index is 32, no divisor of the vectors' width 16"),
        ((corpus, corpus), {}, "corpus: example 't00' has no query"),
        ((queries, queries), {}, "queries: example 'alone' has no target"),
        ((queries, bad), {}, r"is damaged .*; conf=verify root=.* splits=\[bad\] leaves bad examples out"),
        ((bad, corpus), {}, r"is damaged .*; conf=verify root=.* splits=\[bad\] leaves bad examples out"),
    ):
        with pytest.raises(ValueError, match=message):
            mine(checkpoint, *given, str(tmp_path / message[:5]), **{**SMALL, **more})
        assert not list((tmp_path / message[:5]).glob("*.tar"))
        shutil.rmtree(tmp_path / message[:5], ignore_errors=True)


def test_a_vector_that_is_not_finite_is_named(checkpoint, root, tmp_path, monkeypatch):
    from lightning_modules.encoder import embedder

    real = embedder.Embedder.forward
    monkeypatch.setattr(embedder.Embedder, "forward", lambda self, inputs: real(self, inputs) * torch.nan)
    with pytest.raises(ValueError, match=r"not finite to one of the examples 't00' to 't02' of .*corpus"):
        mined(checkpoint, root, tmp_path / "out")


def test_the_stage_runs_from_the_command_line(zygote, checkpoint, root, tmp_path):
    words = ["conf=mine", f"checkpoint={checkpoint}", f"queries={root / 'queries'}", f"corpus={root / 'corpus'}"]
    words += [f"out={tmp_path / 'out'}", "num_workers=1", "k=5", "index_settings.oversampling=4"]
    status = zygote.ask(wait=zygote.ask(arguments=words, environment={}, log=str(tmp_path / "log")))
    shown = (tmp_path / "log").read_text()
    assert status == 0, shown
    assert "10 examples of 10 records in" in shown
    assert "are among the 5 nearest" in shown
    assert len(meta_of(Split(tmp_path / "out").read(0))["candidates"]) == 5
