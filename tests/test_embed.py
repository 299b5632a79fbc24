"""Promises of conf=embed: every item once, the same bytes whoever did what and was killed when, bad items told."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from samples import picture_bytes, sound_bytes

from datamodules import record_files
from datamodules.sample import Example, Item, Part, media_item, text_item
from datamodules.shards import Split, write_split
from lightning_modules import embed as stage
from lightning_modules.embed import embed
from lightning_modules.embeddings import Embeddings
from lightning_modules.encoder.checkpoint import read_provenance, save_encoder
from lightning_modules.encoder.embedder import Embedder
from lightning_modules.encoder.embedding import load_embedder

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL: dict[str, Any] = {"block_size": 4, "batch_size": 3, "num_workers": 0, "device": "cpu"}


@pytest.fixture
def checkpoint(tiny_encoder, processor, tmp_path) -> str:
    save_encoder(tmp_path / "encoder", tiny_encoder, processor, provenance={})
    return str(tmp_path / "encoder")


@pytest.fixture
def embedder(checkpoint) -> Embedder:
    return load_embedder(checkpoint, "cpu")


@pytest.fixture
def folder(tmp_path) -> Path:
    """Thirteen items below a folder, two of them bad, and what is no item."""
    place = tmp_path / "files"
    for name, data in {
        **{f"b/text {n}.txt": f"the mat {n} ".encode() * (n + 1) for n in range(7)},
        "a.png": picture_bytes(),
        "b/c.py": b"def f(): pass",
        "b/d/e.ogg": sound_bytes("OGG"),
        "c.jpg": picture_bytes()[:80],
        "z.txt": b"\xff\xfe",
        "z.md": "größer".encode(),
        ".hidden/x.txt": b"x",
        "b/.x.txt": b"x",
        "b/x.json": b"{}",
    }.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(data)
    (tmp_path / "outside.txt").write_text("not to be read")
    (place / "b" / "out.txt").symlink_to(tmp_path / "outside.txt")
    (place / "loop").symlink_to(place)
    return place


NAMES = ["a.png", "b/c.py", "b/d/e.ogg", *(f"b/text {n}.txt" for n in range(7)), "z.md"]
BAD = {"c.jpg": "does not decode", "z.txt": "not UTF-8"}


def made(checkpoint: str, source: Path | str, out: Path, **more: Any) -> Embeddings:
    embed(checkpoint, str(source), str(out), **{**SMALL, **more})
    return Embeddings(out)


def files_of(folder: Path) -> dict[str, bytes]:
    """What a finished folder holds for whoever reads it."""
    paths = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def quarantined(out: Path) -> dict[str, str]:
    found = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    assert all(row["message"] for row in found)
    return {row["id"]: row["cause"] for row in found}


def equal(found: Embeddings, embedder: Embedder, things: list, task: str | None = None) -> None:
    np.testing.assert_allclose(found.vectors(), embedder.embed(things, found.width, task), rtol=0, atol=1e-6)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_folder_is_embedded_in_the_order_of_its_names(checkpoint, embedder, folder, tmp_path, num_workers, capsys):
    found = made(checkpoint, folder, tmp_path / "out", num_workers=num_workers, prefix=8, task="document")
    assert found.ids == NAMES
    assert found.modalities == ["image", "code", "audio", *["text"] * 8]
    equal(found, embedder, [folder / name for name in NAMES], "document")
    assert found.described(3) == {
        "id": "b/text 0.txt",
        "modality": "text",
        "text": "the mat 0 ",
        "path": str(folder / NAMES[3]),
    }
    assert found.medium(0) == (picture_bytes(), "png")
    assert found.medium(2) == ((folder / NAMES[2]).read_bytes(), "ogg")
    assert quarantined(tmp_path / "out") == BAD
    assert found.about["encoder"] == {"path": checkpoint, "sha256": read_provenance(checkpoint)["sha256"]}
    assert (found.about["task"], found.about["prefix"], found.about["num_items"]) == ("document", 8, 11)
    told = capsys.readouterr().out
    assert "11 items (1 audio, 1 code, 1 image, 8 text) in" in told
    assert "2 set aside in quarantine.jsonl: 1 x does not decode, 1 x not UTF-8" in told
    assert "5 left out: 2 x hidden, 1 x a link to a folder, 1 x of extension '.json', 1 x a link that leads elsewhere" in told
    assert f"{sum(path.stat().st_size for path in (tmp_path / 'out').glob('part-*')):,} bytes" in told
    assert "items/s" in told


def test_one_file_is_a_source(checkpoint, embedder, folder, tmp_path):
    found = made(checkpoint, folder / "z.md", tmp_path / "out")
    assert found.ids == ["z.md"]
    equal(found, embedder, ["größer"])


def records() -> tuple[list[dict], list]:
    """Records with their media in the folder `media`, and what they are to Embedder.embed."""
    picture, sound = picture_bytes(seed=4), sound_bytes(pitch=300)
    given: list[tuple[dict, Any]] = [
        ({"id": "one", "text": "cat", "label": 3}, "cat"),
        ({"id": 2, "title": "mat", "text": "dog"}, {"title": "mat", "text": "dog"}),
        ({"image": "media/p.png", "text": "see"}, ["see", picture]),
        ({"id": "both", "audio": "media/s.wav", "image": "media/p.png"}, [picture, sound]),
        ({"id": "order", "parts": ["see", {"audio": "media/s.wav"}, {"image": "media/p.png"}]}, ["see", sound, picture]),
        ({"id": "page", "page": "media/p.png"}, Item((Part("page", picture, "png"),))),
        ({"id": "code", "code": "f()"}, {"code": "f()"}),
    ]
    return [record for record, _ in given], [thing for _, thing in given]


@pytest.fixture
def media(tmp_path) -> Path:
    (tmp_path / "set" / "media").mkdir(parents=True)
    (tmp_path / "set" / "media" / "p.png").write_bytes(picture_bytes(seed=4))
    (tmp_path / "set" / "media" / "s.wav").write_bytes(sound_bytes(pitch=300))
    (tmp_path / "secret.png").write_bytes(picture_bytes())
    return tmp_path / "set"


def test_records_of_json_lines_are_embedded(checkpoint, embedder, media, tmp_path):
    given, things = records()
    (media / "x.jsonl").write_text("\n\n".join(json.dumps(record) for record in given) + "\n")
    found = made(checkpoint, media / "x.jsonl", tmp_path / "out", task="document")
    assert found.ids == ["one", "2", "2", "both", "order", "page", "code"]
    assert found.modalities == ["text", "text", "mixed", "mixed", "mixed", "page", "code"]
    equal(found, embedder, things, "document")
    assert found.described(2) == {"id": "2", "modality": "mixed", "text": "see", "path": str(media / "media" / "p.png")}
    assert [found.medium(row) for row in range(3)] == [None, None, (picture_bytes(seed=4), "png")]
    assert found.medium(3) == (picture_bytes(seed=4), "png")  # the first of the item's parts
    assert found.medium(4) == (sound_bytes(pitch=300), "wav")


def test_bad_records_are_set_aside_with_their_cause(checkpoint, media, tmp_path):
    lines = {
        '{"text": "good"}': None,
        "no json": "no JSON",
        "[1]": "malformed record",
        '{"id": "e"}': "empty",
        '{"id": "u", "image": "../secret.png"}': "outside its folder",
        f'{{"id": "a", "image": "{tmp_path / "secret.png"}"}}': "outside its folder",
        '{"id": "l", "image": "media/link.png"}': "outside its folder",
        '{"id": "h", "image": "https://example.org/x.png"}': "no such file",
        '{"id": "z", "image": "a\\u0000b"}': "no such file",
        '{"id": "t", "text": 3}': "malformed record",
        '{"id": "s", "text": "\\ud800"}': "no JSON",  # half a character
        '{"id": "i", "image": ["media/p.png", "media/p.png", "media/p.png", "media/p.png", "media/p.png", "media/p.png", '
        '"media/p.png"]}': "too many images",
        '{"id": "w", "image": "media/s.wav"}': "unknown type",
        '{"id": "last", "text": "good"}': None,
    }
    (media / "media" / "link.png").symlink_to(tmp_path / "secret.png")
    (media / "x.jsonl").write_text("\n".join(lines))
    found = made(checkpoint, media / "x.jsonl", tmp_path / "out")
    assert found.ids == ["0", "last"]
    assert list(quarantined(tmp_path / "out").values()) == [cause for cause in lines.values() if cause]
    assert list(quarantined(tmp_path / "out"))[:5] == ["1", "2", "e", "u", "a"]


@pytest.mark.parametrize("as_bytes", [False, True])
def test_rows_of_parquet_are_embedded(checkpoint, embedder, media, tmp_path, as_bytes, monkeypatch):
    monkeypatch.setattr(record_files, "ROWS_AT_ONCE", 2)
    given, things = records()
    keep = [record for record in given if "parts" not in record]
    columns = {name: [record.get(name) for record in keep] for name in ("title", "text", "image", "audio", "page", "code")}
    if as_bytes:
        for name in ("image", "audio", "page"):
            columns[name] = [None if path is None else (media / path).read_bytes() for path in columns[name]]
        columns["image"] = [None if data is None else {"bytes": data, "path": "p.png"} for data in columns["image"]]
    table = pyarrow.table({"id": [str(n) for n in range(len(keep))], "other": [1] * len(keep), **columns})
    pyarrow.parquet.write_table(table, media / "x.parquet", row_group_size=4)
    found = made(checkpoint, media / "x.parquet", tmp_path / "out", task="document", num_workers=1)
    assert found.ids == [str(n) for n in range(len(keep))]
    equal(found, embedder, [thing for record, thing in zip(given, things, strict=True) if record in keep], "document")
    assert found.medium(3) == (picture_bytes(seed=4), "png")
    assert found.medium(2) == (picture_bytes(seed=4), "png")
    assert (found.described(2)["path"] is None) == as_bytes
    if as_bytes:
        pyarrow.parquet.write_table(table.slice(0, 5), media / "x.parquet")
        with pytest.raises(ValueError, match=r"x.parquet has changed since its items were embedded"):
            Embeddings(tmp_path / "out").medium(3)


def test_a_column_of_a_split_is_embedded(checkpoint, embedder, tmp_path):
    items = [text_item(f"t {n}") if n % 2 else media_item("image", picture_bytes(seed=n), "png") for n in range(9)]
    examples = [Example(f"k{n}", text_item(f"q {n}"), item) for n, item in enumerate(items)]
    examples[5] = Example("k5", text_item("q 5"))
    write_split(tmp_path / "split", examples, examples_per_shard=2)
    targets = made(checkpoint, tmp_path / "split", tmp_path / "targets")
    assert targets.ids == [f"k{n}" for n in range(9) if n != 5]
    equal(targets, embedder, items[:5] + items[6:])
    assert quarantined(tmp_path / "targets") == {"k5": "no target"}
    assert targets.medium(5) == (picture_bytes(seed=6), "png")  # after the bad one
    assert targets.medium(1) is None
    queries = made(checkpoint, tmp_path / "split", tmp_path / "queries", column="query", task="search result")
    equal(queries, embedder, [f"q {n}" for n in range(9)], "search result")


def test_every_kind_of_media_in_the_world_is_embedded(checkpoint, embedder, world, tmp_path):
    split = Split(world / "world" / "text-video" / "test")
    found = made(checkpoint, str(split.folder), tmp_path / "out", batch_size=32, block_size=10)
    targets = [split.read(position).target for position in range(len(split))]
    equal(found, embedder, targets)
    assert set(found.modalities) == {"video"}


@pytest.mark.parametrize("dtype", ["float16", "int8", "binary"])
@pytest.mark.parametrize("layout", ["parquet", "npy"])
def test_forms_and_layouts_are_those_of_the_vectors(checkpoint, folder, tmp_path, dtype, layout):
    exact = made(checkpoint, folder, tmp_path / "exact").vectors()
    found = made(checkpoint, folder, tmp_path / "out", dtype=dtype, layout=layout)
    near = found.vectors()
    np.testing.assert_allclose(np.linalg.norm(near, axis=1), 1, atol=1e-6)
    if dtype == "binary":
        assert ((near > 0) == (exact >= 0)).all()
    else:
        np.testing.assert_allclose(near, exact, rtol=0, atol=1e-3 if dtype == "float16" else 1e-2)


def test_three_tasks_in_any_order_make_what_one_makes(checkpoint, folder, tmp_path, capsys):
    whole = made(checkpoint, folder, tmp_path / "one", block_size=2)
    for index in (2, 0, 1):
        assert not (tmp_path / "three" / "embeddings.json").exists()
        embed(checkpoint, str(folder), str(tmp_path / "three"), **{**SMALL, "block_size": 2}, array_index=index, array_size=3)
    assert "blocks are missing (of other tasks)" in capsys.readouterr().out
    assert files_of(tmp_path / "three") == files_of(whole.folder)


def test_the_array_of_slurm_is_heeded(checkpoint, folder, tmp_path, monkeypatch):
    for name, value in {"ID": "4", "COUNT": "2", "MIN": "3"}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
    embed(checkpoint, str(folder), str(tmp_path / "out"), **{**SMALL, "block_size": 2})
    assert sorted(path.name for path in (tmp_path / "out").glob("part-*")) == [f"part-00000{n}.parquet" for n in (1, 3, 5)]


@pytest.mark.parametrize("layout", ["parquet", "npy"])
def test_a_run_killed_at_random_moments_goes_on_to_the_same_bytes(zygote, checkpoint, folder, tmp_path, layout):
    more = {"block_size": 1, "batch_size": 1, "num_workers": 1, "layout": layout}
    wanted = files_of(made(checkpoint, folder, tmp_path / "whole", **more).folder)
    out, chance = tmp_path / "killed", random.Random(layout)
    words = [f"checkpoint={checkpoint}", f"source={folder}", f"out={out}", "device=cpu", "compute={}"]
    words += [f"{name}={value}" for name, value in more.items()]
    num_done = []
    for wait in range(4):
        run = zygote.ask(arguments=["conf=embed", *words], environment={}, log=str(tmp_path / "log"))
        deadline, before = time.monotonic() + 60, len(list(out.glob("blocks/*.json")))
        while len(list(out.glob("blocks/*.json"))) < before + wait % 2 + 1:
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.0005)
        time.sleep(chance.random() * 0.02)
        os.kill(run, signal.SIGKILL)
        zygote.ask(wait=run)
        num_done.append(len(list(out.glob("blocks/*.json"))))
    assert 0 < num_done[0] < 13
    assert num_done == sorted(num_done)
    made(checkpoint, folder, out, **more)
    assert files_of(out) == wanted


def test_a_block_whose_files_are_gone_is_made_again_and_no_other(checkpoint, folder, tmp_path, monkeypatch):
    whole = made(checkpoint, folder, tmp_path / "one", layout="npy").folder
    shutil.copytree(whole, tmp_path / "two")
    for gone in ("part-000000.npy", "part-000001.ids.jsonl", "embeddings.json"):
        (tmp_path / "two" / gone).unlink()
    stored: list[int] = []
    store = stage.EmbeddingsJob.store
    monkeypatch.setattr(
        stage.EmbeddingsJob, "store", lambda job, block, *more: stored.append(block) or store(job, block, *more)
    )
    made(checkpoint, folder, tmp_path / "two", layout="npy")
    assert stored == [0, 1]
    assert files_of(tmp_path / "two") == files_of(whole)


def test_what_killed_tasks_left_goes_when_it_is_old(checkpoint, folder, tmp_path):
    (tmp_path / "out" / "blocks").mkdir(parents=True)
    for name, age in (("old", 7200), ("young", 0)):
        for left in (tmp_path / "out" / f".{name}.1.partial", tmp_path / "out" / "blocks" / f".{name}.1.partial"):
            left.touch()
            os.utime(left, (time.time() - age,) * 2)
    made(checkpoint, folder, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").rglob("*.partial")} == {".young.1.partial"}


def test_another_making_is_refused_in_one_sentence(checkpoint, folder, tiny_encoder, processor, tmp_path):
    before = files_of(made(checkpoint, folder, tmp_path / "out").folder)
    with torch.no_grad():
        tiny_encoder.projection[0].weight.mul_(2)
    changes = ({"prefix": 8}, {"task": "document"}, {"dtype": "int8"}, {"layout": "npy"}, {"block_size": 5})
    for change in changes:
        with pytest.raises(ValueError, match=f"was begun otherwise: {next(iter(change))} was .* Give another folder as out"):
            made(checkpoint, folder, tmp_path / "out", **change)
    save_encoder(tmp_path / "encoder", tiny_encoder, processor, provenance={})
    with pytest.raises(ValueError, match="was begun otherwise: encoder was"):
        made(checkpoint, folder, tmp_path / "out")
    (folder / "b" / "c.py").write_text("def g(): pass")  # of the same size
    with pytest.raises(ValueError, match=r"was begun otherwise: .*source was"):
        made(checkpoint, folder, tmp_path / "out")
    assert files_of(tmp_path / "out") == before


def test_a_changed_medium_of_a_record_is_another_source(checkpoint, media, tmp_path):
    (media / "x.jsonl").write_text('{"image": "media/p.png"}')
    made(checkpoint, media / "x.jsonl", tmp_path / "out")
    (media / "media" / "p.png").write_bytes(picture_bytes(seed=5))
    with pytest.raises(ValueError, match="was begun otherwise: source was"):
        made(checkpoint, media / "x.jsonl", tmp_path / "out")


def test_a_hundred_bad_items_in_a_row_end_it(checkpoint, tmp_path):
    lines = ['{"text": "a"}', *["bad"] * 99, '{"text": "b"}', *["bad"] * 99]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    assert made(checkpoint, tmp_path / "x.jsonl", tmp_path / "out", block_size=30).ids == ["0", "100"]
    (tmp_path / "y.jsonl").write_text("\n".join([*lines, "bad", '{"text": "c"}']))
    with pytest.raises(
        ValueError, match=r"100 items in a row cannot be embedded, the last of them '\d+': this line is no JSON"
    ):
        made(checkpoint, tmp_path / "y.jsonl", tmp_path / "two", block_size=30)
    (tmp_path / "z.jsonl").write_text("bad\nbad")
    with pytest.raises(ValueError, match=r"nothing was embedded of 2 items: 2 x no JSON; see .*quarantine"):
        made(checkpoint, tmp_path / "z.jsonl", tmp_path / "three")


def test_what_an_encoder_does_not_take_is_set_aside_one_by_one(checkpoint, folder, tmp_path, monkeypatch):
    """Also where it says so only after the whole batch was made ready, as a text model with a picture does."""

    class Deaf(torch.nn.Module):
        def __init__(self, encoder: Embedder) -> None:
            super().__init__()
            self.encoder, self.config, self.processor, self.use = encoder, encoder.config, encoder.processor, encoder.use
            self.device = encoder.device

        def forward(self, inputs: Any) -> torch.Tensor:
            if "audio" in inputs.media:
                raise ValueError("this encoder hears nothing")
            vectors = self.encoder(inputs)
            vectors[(inputs.num_views.get("image", torch.zeros(len(inputs))) > 0)] = float("nan")
            return vectors

    monkeypatch.setattr(stage, "load_embedder", lambda *given: Deaf(load_embedder(*given)))
    found = made(checkpoint, folder, tmp_path / "out", batch_size=100)
    assert found.ids == [name for name in NAMES if name not in ("a.png", "b/d/e.ogg")]
    wanted = {"a.png": "vector not finite", "b/d/e.ogg": "cannot be embedded", **BAD}
    assert list(quarantined(tmp_path / "out").items()) == list(wanted.items())  # in the order of the source


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"source": "nowhere"}, "there is no file or folder nowhere"),
        ({"source": "https://example.org/x.jsonl"}, "there is no file or folder https"),
        ({"source": "empty"}, "empty holds nothing that can be embedded; left out: 1 x hidden"),
        ({"source": "empty/.x"}, "the extension '' is none of md"),
        ({"source": "bad.parquet"}, "bad.parquet is no Parquet file that can be read"),
        ({"source": "other.parquet"}, "other.parquet has the columns a; an item needs one of text, code"),
        ({"source": "files", "column": "query"}, "files is no split"),
        ({"source": "files", "prefix": 17}, "prefix 17 is wider"),
        ({"source": "files", "task": "search"}, "unknown task 'search'"),
        ({"source": "files", "batch_size": 0}, "batch_size is 0"),
        ({"source": "files", "block_size": 0}, "block_size is 0"),
        ({"source": "files", "array_index": 3, "array_size": 3}, "array_index is 3"),
    ],
)
def test_what_does_not_fit_is_refused(checkpoint, folder, given, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".x").touch()
    (tmp_path / "bad.parquet").write_text("no")
    pyarrow.parquet.write_table(pyarrow.table({"a": [1]}), "other.parquet")
    with pytest.raises(ValueError, match=message):
        made(checkpoint, given.pop("source"), tmp_path / "out", **given)
