"""Promises of the data side under faults: no sample lost in silence, none mixed with another, no process that hangs or stays.

Each begins with what plain webdataset 1.0.2 or Lightning 2.6.6 does there, where that is worse.
"""

import hashlib
import io
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from samples import Watched, keys_of, pairs, read_by_webdataset
from webdataset.handlers import ignore_and_continue

from datamodules.cache import Cache
from datamodules.files import sha256_of
from datamodules.index import index_tar, write_index
from datamodules.loader import loader_of
from datamodules.media.limits import DecodeLimits
from datamodules.order import Order
from datamodules.plan import Plan, PlannedTask, rows_of_rank
from datamodules.processors.composed import ProcessorConfig
from datamodules.record import Columns
from datamodules.sample import BadExampleError, Example, text_item
from datamodules.shards import Split, write_split
from datamodules.store import Store
from datamodules.stream import Source, StepStream
from datamodules.tasks import TaskSpec
from datamodules.training import TrainingData

FULL = pytest.mark.full
ROOT = Path(__file__).parents[1]
FIRST = "000000.tar"
Change = Callable[[Path], object]


def edited(path: Path, edit: Callable[[bytearray], object]) -> None:
    """Change a file's bytes where it lies: whoever holds it open sees the change."""
    data = bytearray(path.read_bytes())
    edit(data)
    with path.open("r+b") as file:
        file.write(data)
        file.truncate()


def flipped(where: bytes, name: str = FIRST, after: int = 0) -> Change:
    """Flips a bit of the byte that lies so far after the first place of `where` in a file of the split."""

    def flip(data: bytearray) -> None:
        data[data.index(where) + after] ^= 1

    return lambda folder: edited(folder / name, flip)


def outcomes(split: Split) -> dict[int, Example | BadExampleError]:
    """What reading gives at every position."""
    found: dict[int, Example | BadExampleError] = {}
    for position in range(len(split)):
        try:
            found[position] = split.read(position)
        except BadExampleError as error:
            found[position] = error
    return found


def bad_in(split: Split, examples: list[Example]) -> dict[str, str]:
    """Keys that are refused and why; everything else must be as it was written."""
    found = outcomes(split)
    bad = {examples[n].key: error for n, error in found.items() if isinstance(error, BadExampleError)}
    assert [found[n] for n, example in enumerate(examples) if example.key not in bad] == [
        example for example in examples if example.key not in bad
    ]
    assert all(f"{FIRST}: {split.key(int(key[1:]))}." in str(error) for key, error in bad.items())
    return {key: error.cause for key, error in bad.items()}


def stream_of(split: Split, *, batch_size: int = 6, num_steps: int = 5, rank: int = 0, ranks: int = 1, **more) -> StepStream:
    """A stream over one split whose batches are (task, step, keys, rows, faults)."""
    plan = Plan({"t": PlannedTask(Order(len(split)), batch_size, 1.0)}, seed=3)
    source = more.get("source", Source)(split, DecodeLimits())
    collate: Any = keys_of
    return StepStream(plan, {"t": source}, collate, first_step=0, num_steps=num_steps, rank=rank, world_size=ranks)


def test_a_flipped_header_byte_loses_no_sample(tmp_path):
    """webdataset reads the samples before it, and the 150 of 250 after it vanish without an error."""
    examples = [Example(f"k{n:03d}", text_item(f"q{n}"), text_item("t")) for n in range(250)]
    write_split(tmp_path / "s", examples)
    flipped(b"k100.json", after=3)(tmp_path / "s")
    assert len(read_by_webdataset(tmp_path / "s" / FIRST)) == 100
    with pytest.raises(ValueError, match=r"the checksum of a header is wrong.*\(at byte 102912\)"):
        index_tar(tmp_path / "s" / FIRST)
    split = Split(tmp_path / "s")  # indexed before: it needs no header
    assert bad_in(split, examples) == {}
    flipped(b'"q123"', after=2)(tmp_path / "s")
    assert bad_in(split, examples) == {"k123": "damaged bytes"}


def foreign(path: Path, *members: tuple[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_the_picture_of_one_shard_never_meets_the_text_of_another(tmp_path):
    """webdataset, told to go on after errors, makes a pair of the cut shard's last picture and the next shard's first text."""
    whole = [(f"k{n}.{e}", f"{e} {n} of a".encode()) for n in range(4) for e in ("png", "txt")]
    a = foreign(tmp_path / "a.tar", *whole)
    b = foreign(tmp_path / "b.tar", ("k2.txt", b"txt 2 of b"), ("k7.png", b"png 7 of b"), ("k7.txt", b"txt 7 of b"))
    columns = Columns(query=("txt",), target=("png",))
    found = write_index(tmp_path / "s", Store(tmp_path), [a.name, b.name], columns=columns, at=Store(tmp_path))
    assert [line[2] for line in found["malformed"]] == ["k2"]
    split, before = Split(tmp_path / "s"), len(a.read_bytes())
    edited(a, lambda data: data.__delitem__(slice(data.index(b"txt 2 of a") + 4, None)))
    mixed = read_by_webdataset(a, b, handler=ignore_and_continue)
    assert (mixed[2]["png"], mixed[2]["txt"]) == (b"png 2 of a", b"txt 2 of b")
    with pytest.raises(ValueError, match=r"a\.tar: a member says it has 10 bytes, which are not there"):
        index_tar(a)
    with pytest.raises(ValueError, match=rf"a\.tar has \d+ bytes, its manifest says {before}"):
        Split(tmp_path / "s")
    split = _opened_before(split, a, before)
    read = [example for example in outcomes(split).values() if isinstance(example, Example)]
    assert [(e.key, _words(e)) for e in read] == [(k, (f"txt {k[1]} of {s}", f"png {k[1]} of {s}")) for k, s in KEPT]


KEPT = (("k0", "a"), ("k1", "a"), ("k7", "b"))


def _words(example: Example) -> tuple[str, str]:
    assert example.query is not None
    assert example.target is not None
    return str(example.query.parts[0].data), str(example.target.parts[0].data, "utf-8")  # pyright: ignore[reportArgumentType]


def _opened_before(split: Split, shard: Path, num_bytes: int) -> Split:
    """Let a split open a shard at the size it had, and cut it again."""
    short = shard.stat().st_size
    os.truncate(shard, num_bytes)
    outcomes(split)
    os.truncate(shard, short)
    return split


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


def test_shards_of_the_same_name_stay_apart_in_the_cache(tmp_path, monkeypatch):
    """webdataset's cache names files by their base name: taskB's shard is taskA's."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    examples = {task: pairs(5, text=task) for task in ("taskA", "taskB")}
    for task in examples:
        write_split(tmp_path / "far" / task, examples[task])
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path / "far"))) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        store = Store(f"http://127.0.0.1:{server.server_address[1]}", cache=Cache(tmp_path / "cache", 2**20))
        try:
            for _ in range(2):
                for task in examples:
                    assert list(outcomes(Split(store / task)).values()) == examples[task]
        finally:
            server.shutdown()
            thread.join()
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 2


def test_every_epoch_has_an_order_of_its_own():
    """webdataset with a fixed seed goes through the shards in the same order every epoch."""
    plan = Plan({"t": PlannedTask(Order(40), 8, 1.0)}, seed=0)
    epochs = [np.concatenate([plan.positions(step) for step in range(5 * n, 5 * n + 5)]).tolist() for n in range(20)]
    assert all(sorted(epoch) == list(range(40)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 20


def once(values: Any, seconds: float = 60.0) -> list[Any]:
    """All a loader gives; a test that hangs is one that fails."""
    began, found = time.monotonic(), []
    for value in values:
        assert time.monotonic() - began < seconds
        found.append(value)
    return found


@pytest.mark.parametrize("start_method", ["fork", "spawn", pytest.param("forkserver", marks=FULL)])
def test_every_rank_reads_its_own_rows_and_no_others(tmp_path, start_method):
    """webdataset's split_by_node reads everything on every rank when workers are spawned."""
    write_split(tmp_path / "s", pairs(20))
    split, log = Split(tmp_path / "s"), tmp_path / "s" / "read.txt"
    for rank in range(2) if start_method == "fork" else (1,):
        stream = stream_of(split, rank=rank, ranks=2, source=Watched)
        batches = once(loader_of(stream, 2 if start_method == "fork" else 1, start_method=start_method, max_wait_seconds=60))
        planned = [stream.plan.positions(step)[rows_of_rank(6, rank, 2)].tolist() for step in range(5)]
        assert [[int(key[1:]) for key in keys] for _, _, keys, _, _ in batches] == planned
        assert sorted(map(int, log.read_text().split())) == sorted(position for rows in planned for position in rows)
        log.unlink()


TASKS = {
    "world/text-image": TaskSpec("world/text-image/train", query_prompt="q: {text}", batch_size=8, negatives=1),
    "world/text-text": TaskSpec("world/text-text/train", batch_size=4, rate=2.0),
}


def data_of(world: Path, tmp_path: Path, *, num_steps: int = 6, rank: int = 0, ranks: int = 1, **more) -> TrainingData:
    """TrainingData with a stand-in for its trainer."""
    defaults = {"processor": ProcessorConfig(vocab_size=400), "steps_per_block": 9, "num_workers": 0, "max_wait_seconds": 60}
    data = TrainingData(str(world), TASKS, **{**defaults, **more})
    about = {"world_size": ranks, "global_rank": rank, "max_steps": num_steps, "max_epochs": 1, "accumulate_grad_batches": 1}
    data.trainer = SimpleNamespace(**about, default_root_dir=str(tmp_path))  # pyright: ignore[reportAttributeAccessIssue]
    data.prepare_data()
    data.setup("fit")
    return data


def told(inputs: Any) -> bytes:
    """Whatever a model would see of inputs."""
    tensors = [inputs.token_ids, inputs.lengths, *(views for _, views in sorted(inputs.media.items()))]
    return b"".join(tensor.numpy().tobytes() for tensor in tensors)


def same_global_batches(world: Path, tmp_path: Path, workers: int, start_method: Any, ranks: int) -> None:
    wholes = once(data_of(world, tmp_path).train_dataloader())
    assert {batch.task for batch in wholes} == set(TASKS)
    for rank in range(ranks):
        data = data_of(world, tmp_path, rank=rank, ranks=ranks, num_workers=workers, start_method=start_method)
        parts = once(data.train_dataloader())
        for whole, part in zip(wholes, parts, strict=True):
            rows = rows_of_rank(len(whole.keys), rank, ranks).tolist()
            assert (part.task, part.step, part.keys) == (whole.task, whole.step, [whole.keys[row] for row in rows])
            assert part.query_id.tolist() == whole.query_id[rows].tolist()
            assert part.target_id.tolist() == whole.target_id[rows].tolist()
            if ranks == 1:
                assert (told(part.query), told(part.target)) == (told(whole.query), told(whole.target))


ALL = [(w, m, r) for m in ("fork", "forkserver", "spawn") for w in (0, 1, 2, 4) for r in (1, 2) if w or m == "fork"]
SHARE = [(0, "fork", 2), (2, "fork", 2), (4, "fork", 1), (1, "forkserver", 1)]
TOO_MANY = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # for two cores


@TOO_MANY
@pytest.mark.parametrize(("workers", "start_method", "ranks"), SHARE)
def test_global_batches_are_the_same_for_any_workers_and_ranks(world, tmp_path, workers, start_method, ranks):
    same_global_batches(world, tmp_path, workers, start_method, ranks)


@FULL
@TOO_MANY
@pytest.mark.parametrize(("workers", "start_method", "ranks"), ALL)
def test_global_batches_are_the_same_over_the_whole_grid(world, tmp_path, workers, start_method, ranks):
    same_global_batches(world, tmp_path, workers, start_method, ranks)


def header(name: bytes, size: bytes, kind: bytes = b"0") -> bytes:
    """A ustar header with a right checksum, whatever its size says."""
    block = name.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + size.ljust(12, b"\0") + b"00000000000\0"
    block += b" " * 8 + kind.ljust(101, b"\0") + b"ustar\x0000"
    block = block.ljust(512, b"\0")
    return block[:148] + f"{sum(block):06o}\0 ".encode() + block[156:]


def member(name: bytes, data: bytes, kind: bytes = b"0") -> bytes:
    return header(name, f"{len(data):011o}".encode(), kind) + data + bytes(-len(data) % 512)


def pax(key: str, value: str) -> bytes:
    record = f" {key}={value}\n"
    length = len(record) + 2
    length += len(str(length)) - 2
    return member(b"pax", f"{len(record) + len(str(len(record) + 2))}{record}".encode(), b"x")


END = bytes(1024)
PACKED = {"gzip": b"\x1f\x8b\x08", "bzip2": b"BZh9", "xz": b"\xfd7zXZ\0", "zstd": b"\x28\xb5\x2f\xfd", "zip": b"PK\x03\x04"}
TARS: dict[str, tuple[bytes, str]] = {
    "2^60 bytes in base 256": (header(b"a.txt", b"\x80" + (2**60).to_bytes(11, "big")) + END, "octal number must be"),
    "2^60 bytes in a pax header": (pax("size", str(2**60)) + member(b"a.txt", b"x") + END, "sets 'size'"),
    "8 GiB that are not there": (header(b"a.txt", b"77777777777") + END, "which are not there"),
    "-1 bytes": (header(b"a.txt", b"-0000000001") + END, "octal number must be"),
    "-512 bytes in base 256": (header(b"a.txt", b"\xff" * 10 + b"\xfe\0") + END, "octal number must be"),
    "no size": (header(b"a.txt", b"") + END, "octal number must be"),
    "a symbolic link": (header(b"a.txt", b"0", b"2") + END, "only regular files"),
    "a hard link": (header(b"a.txt", b"0", b"1") + END, "only regular files"),
    "a sparse file": (header(b"a.txt", b"0", b"S") + END, "only regular files"),
    "a global header": (member(b"g", b"12 path=a.b\n", b"g") + END, "only regular files"),
    "the same file twice": (member(b"a.txt", b"1") + member(b"a.txt", b"2") + END, "comes twice"),
    "the same file in another case": (member(b"a.txt", b"1") + member(b"a.TXT", b"2") + END, "comes twice"),
    "a sample in two pieces": (b"".join(member(n, b"1") for n in (b"a.x", b"b.x", b"a.y")) + END, "do not follow each other"),
    "a name without a field": (member(b"README", b"1") + END, "not named <key>.<field>"),
    "a hidden file": (member(b"._a.txt", b"1") + END, "not named <key>.<field>"),
    "a pax bomb": (member(b"pax", b"7 uid=\n" * 9400, b"x") + END, "too large"),
    "pax headers without end": (pax("path", "a.txt") * 2000 + END, "follows another one"),
    "a pax record that says 10^9 bytes": (member(b"pax", b"1000000000 path=a\n", b"x") + END, "malformed"),
    "a pax path to the outside": (pax("path", "../../a.txt") + member(b"a.txt", b"x") + END, "does not lie below"),
    "a long name without its file": (member(b"L", b"n" * 200, b"L") + END, "belongs to no file"),
    "a tar after the tar": (member(b"a.txt", b"x") + END + member(b"b.txt", b"x") + END, "something follows the end"),
    "no end": (member(b"a.txt", b"x"), "cut off"),
    **{f"{name} instead of tar": (magic.ljust(10240, b"x"), "octal|checksum") for name, magic in PACKED.items()},
}


@pytest.mark.parametrize("name", TARS)
def test_a_hostile_tar_is_refused_with_its_reason(tmp_path, name):
    """webdataset hangs on the member of 2^60 bytes, unpacks what is packed, and leaves out what it does not know."""
    data, message = TARS[name]
    (tmp_path / "t.tar").write_bytes(data)
    began = time.monotonic()
    with pytest.raises(ValueError, match=message):
        index_tar(tmp_path / "t.tar")
    assert time.monotonic() - began < 1


def other_bytes(folder: Path) -> None:
    """Another shard of the same size in its place, header by header."""
    size = (folder / FIRST).stat().st_size
    write_split(folder.with_name("other"), pairs(12, text="ohno"))
    data = (folder.with_name("other") / FIRST).read_bytes()
    (folder / FIRST).write_bytes(data[:size].ljust(size, b"\0"))


def halved(folder: Path) -> None:
    os.truncate(folder / FIRST, (folder / FIRST).stat().st_size // 2)


def with_table(name: str, edit: Callable[[np.ndarray], object]) -> Change:
    def change(folder: Path) -> None:
        table = np.load(folder / name, allow_pickle=False)
        edit(table)
        np.save(folder / name, table)

    return change


def with_manifest(**values: Any) -> Change:
    """Sets fields of the manifest; a function is given the former value."""

    def change(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        for name, value in values.items():
            manifest[name] = value(manifest[name]) if callable(value) else value
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return change


def with_shard(**values: Any) -> Change:
    return with_manifest(shards=lambda shards: [{**shards[0], **values}, *shards[1:]])


def with_quarantine(text: str | bytes | None = None, **values: Any) -> Change:
    """A quarantine list of the second example, with other values; or any text."""

    def change(folder: Path) -> None:
        index = json.loads((folder / "manifest.json").read_text())["tables"]["examples.npy"]["sha256"]
        listed = {"format": "polyphony-quarantine/1", "index": index, "examples": [{"row": 1, "key": "k001"}], **values}
        data = json.dumps(listed) if text is None else text
        (folder / "quarantine.json").write_bytes(data if isinstance(data, bytes) else data.encode())

    return change


def of_other_shards(folder: Path) -> None:
    with_quarantine()(folder)
    write_split(folder.with_name("other"), pairs(9))
    (folder.with_name("other") / "manifest.json").replace(folder / "manifest.json")
    for table in ("examples.npy", "members.npy", FIRST):
        (folder.with_name("other") / table).replace(folder / table)


def _without(folder: Path, name: str) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest[name]
    (folder / "manifest.json").write_text(json.dumps(manifest))


REFUSED: dict[str, tuple[Change, str]] = {
    "shard truncated": (halved, r"000000.tar has \d+ bytes, its manifest says"),
    "shard longer": (lambda f: edited(f / FIRST, lambda d: d.extend(bytes(512))), "bytes, its manifest says"),
    "shard deleted": (lambda f: (f / FIRST).unlink(), "is missing though the manifest names it"),
    "shard a folder": (lambda f: ((f / FIRST).unlink(), (f / FIRST).mkdir()), "bytes, its manifest says"),
    "key edited": (with_table("examples.npy", lambda t: t["key"].__setitem__(3, b"k004")), "was changed after"),
    "rows swapped": (with_table("examples.npy", lambda t: t.__setitem__([1, 2], t[[2, 1]])), "was changed after"),
    "offset edited": (with_table("members.npy", lambda t: t["offset"].__setitem__(3, 512)), "was changed after"),
    "members missing": (lambda f: (f / "members.npy").unlink(), "members.npy is missing though"),
    "table truncated": (lambda f: os.truncate(f / "members.npy", 200), "was changed after it was indexed: expected"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "manifest.json is missing"),
    "manifest empty": (lambda f: (f / "manifest.json").write_text(""), r"manifest.json is damaged \("),
    "manifest a list": (lambda f: (f / "manifest.json").write_text("[]"), "has format None"),
    "manifest nested": (lambda f: (f / "manifest.json").write_text("[" * 10**5), "nested too deeply"),
    "manifest UTF-16": (lambda f: (f / "manifest.json").write_bytes("{}".encode("utf-16")), "is damaged"),
    "other format": (with_manifest(format="polyphony-shards/9"), "has format 'polyphony-shards/9', this version reads"),
    "shards a number": (with_manifest(shards=3), "a field is missing or of another type"),
    "shards empty": (with_manifest(shards=[]), "manifest.json is damaged"),
    "a shard twice": (with_manifest(shards=lambda s: s * 2), "manifest.json is damaged"),
    "tables a list": (with_manifest(tables=[]), "a field is missing or of another type"),
    "other hash": (
        with_manifest(tables=lambda t: {**t, "members.npy": {**t["members.npy"], "sha256": "0" * 64}}),
        "was changed",
    ),
    "no hash": (with_manifest(tables=lambda t: {**t, "members.npy": {**t["members.npy"], "sha256": "x"}}), "is no SHA-256"),
    "columns a list": (with_manifest(columns=[]), "a field is missing or of another type"),
    "columns of nothing": (with_manifest(columns={}), "manifest.json is damaged"),
    "no example": (with_manifest(num_examples=0), "manifest.json is damaged"),
    "counts of text": (with_shard(num_examples="12"), "a field is missing or of another type"),
    "counts of truth": (with_shard(num_examples=True), "a field is missing or of another type"),
    "a count too much": (with_shard(num_examples=13), "manifest.json is damaged"),
    "a huge count": (with_shard(num_examples=2**62), "manifest.json is damaged"),
    "huge bytes": (with_shard(bytes=10**30), "bytes, its manifest says"),
    "bytes below 0": (with_shard(bytes=-1), "manifest.json is damaged"),
    "shards outside": (with_shard(name="../s/000000.tar"), "cannot name a file below"),
    "shards at the root": (with_shard(name="/etc/passwd"), "cannot name a file below"),
    "a command for a shard": (with_shard(name="pipe:cat x |"), "cannot name a file below"),
    "a name that is no text": (with_shard(name="\ud800"), "manifest.json is damaged"),
    "shards of a command": (with_manifest(shards_at="pipe:cat /etc/passwd"), "the root"),
    "shards with a password": (with_manifest(shards_at="https://user:secret@host/x"), "the root"),
    "no count of examples": (lambda f: _without(f, "num_examples"), "a field is missing or of another type"),
    "a total that is wrong": (with_manifest(num_examples=13), "damaged|do not add up"),
    "a total of text": (with_manifest(num_examples="12"), "damaged|do not add up"),
    "10^30 examples": (with_shard(num_examples=10**30), "damaged|do not add up"),
    "a count below 0": (
        with_manifest(shards=lambda s: [{**s[0], "num_examples": -5}, {**s[0], "num_examples": 17}]),
        "damaged",
    ),
    "no fields": (with_manifest(fields=[]), "manifest.json is damaged"),
    "fields of one text": (with_manifest(fields="json"), "damaged"),
    "unknown columns": (with_manifest(columns={"smell": ["txt"]}), "damaged"),
    "columns of numbers": (with_manifest(columns={"query": 5}), "damaged"),
    "columns of lists of numbers": (with_manifest(columns={"query": [5]}), "damaged"),
    "row of another key": (with_quarantine(examples=[{"row": 7, "key": "k001"}]), "quarantine.json"),
    "row of a fraction": (with_quarantine(examples=[{"row": 1.7, "key": "k001"}]), "quarantine.json is damaged"),
    "row of truth": (with_quarantine(examples=[{"row": True, "key": "k001"}]), "quarantine.json is damaged"),
    "infinite row": (
        with_quarantine('{"format": "", "index": "", "examples": [{"row": 1e999}]}'),
        "quarantine.json is damaged",
    ),
    "quarantine empty": (with_quarantine(""), "quarantine.json is damaged"),
    "quarantine a list": (with_quarantine("[]"), "quarantine.json is damaged"),
    "quarantine cut off": (with_quarantine('{"format": "polyphony'), "quarantine.json is damaged"),
    "quarantine UTF-16": (with_quarantine("{}".encode("utf-16")), "quarantine.json is damaged"),
    "quarantine nested": (with_quarantine("[" * 10**5), "quarantine.json is damaged"),
    "rows of text": (with_quarantine(examples=[{"row": "two"}]), "quarantine.json is damaged"),
    "rows without number": (with_quarantine(examples=[{"key": "k001"}]), "quarantine.json is damaged"),
    "row below 0": (with_quarantine(examples=[{"row": -1}]), "names examples that the split does not have"),
    "row too large": (with_quarantine(examples=[{"row": 12}]), "names examples that the split does not have"),
    "every row": (with_quarantine(examples=[{"row": n, "key": f"k{n:03d}"} for n in range(12)]), "every example of"),
    "quarantine/9": (with_quarantine(format="polyphony-quarantine/9"), "was made for other shards"),
    "quarantine of other shards": (of_other_shards, "was made for other shards"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_changed_split_is_refused_at_the_door(tmp_path, name):
    change, message = REFUSED[name]
    write_split(tmp_path / "s", pairs(12))
    change(tmp_path / "s")
    with pytest.raises(ValueError, match=message) as caught:
        Split(tmp_path / "s")
    assert "secret" not in str(caught.value)


EVERY = {f"k{n:03d}": "damaged bytes" for n in range(12)}
REPLACED: dict[str, tuple[Change, dict[str, str]]] = {
    "nothing": (lambda f: None, {}),
    "byte in a text": (flipped(b'"text 3"', after=3), {"k003": "damaged bytes"}),
    "byte in a picture": (flipped(b"IDAT", after=9), {"k000": "damaged bytes"}),
    "byte in a header": (flipped(b"k003.json"), {}),
    "byte of padding": (lambda f: edited(f / FIRST, lambda d: d.__setitem__(-1, 7)), {}),
    "another shard of its size": (other_bytes, EVERY),
    "zeros of its size": (lambda f: edited(f / FIRST, lambda d: d.__setitem__(slice(None), bytes(len(d)))), EVERY),
}
WHILE_OPEN: dict[str, tuple[Change, dict[str, str]]] = {
    **REPLACED,
    "shard emptied": (lambda f: os.truncate(f / FIRST, 0), EVERY),
    "shard truncated": (halved, {key: cause for key, cause in EVERY.items() if key > "k006"}),
    "shard deleted": (lambda f: (f / FIRST).unlink(), {}),
    "tables deleted": (lambda f: [(f / t).unlink() for t in ("examples.npy", "members.npy", "manifest.json")], {}),
}


@pytest.mark.parametrize("name", REPLACED)
def test_a_shard_changed_after_indexing_costs_the_changed_examples_alone(tmp_path, name):
    change, bad = REPLACED[name]
    write_split(tmp_path / "s", pairs(12))
    change(tmp_path / "s")
    assert bad_in(Split(tmp_path / "s"), pairs(12)) == bad


@pytest.mark.parametrize("name", WHILE_OPEN)
def test_a_shard_changed_while_it_is_read_costs_the_changed_examples_alone(tmp_path, name):
    change, bad = WHILE_OPEN[name]
    write_split(tmp_path / "s", pairs(12))
    split = Split(tmp_path / "s")
    assert bad_in(split, pairs(12)) == {}
    change(tmp_path / "s")
    assert bad_in(split, pairs(12)) == bad


def test_an_index_that_points_to_another_examples_bytes_is_found_out(tmp_path):
    """Its hash is right, as if it had been written so; every file lies whole where it says."""
    write_split(tmp_path / "s", pairs(12))
    with_table("examples.npy", lambda t: t["key"].__setitem__([4, 5], t["key"][[5, 4]].copy()))(tmp_path / "s")
    about = {"bytes": (tmp_path / "s" / "examples.npy").stat().st_size, "sha256": sha256_of(tmp_path / "s" / "examples.npy")}
    with_manifest(tables=lambda tables: {**tables, "examples.npy": about})(tmp_path / "s")
    assert bad_in(Split(tmp_path / "s"), pairs(12)) == dict.fromkeys(("k004", "k005"), "damaged bytes")


def test_a_damaged_example_is_replaced_and_told_by_the_stream(tmp_path):
    write_split(tmp_path / "s", pairs(12))
    flipped(b'"text 3"', after=3)(tmp_path / "s")
    batches: list[Any] = list(stream_of(Split(tmp_path / "s"), num_steps=6))
    assert all(len(keys) == 6 and "k003" not in keys for _, _, keys, _, _ in batches)
    faults = [fault for *_, faults in batches for fault in faults]
    assert {(fault.task, fault.key, fault.cause) for fault in faults} == {("t", "k003", "damaged bytes")}
    assert [fault.step for fault in faults if fault.shard.endswith(f"s/{FIRST}")] == [fault.step for fault in faults]
    assert len(faults) >= 3  # once an epoch, and when it was drawn as another's replacement


def test_a_shard_that_is_all_bad_stops_the_stream_with_its_reason(tmp_path):
    write_split(tmp_path / "s", pairs(12))
    other_bytes(tmp_path / "s")
    with pytest.raises(ValueError, match=r"100 examples in a row cannot be used.*is damaged.*conf=verify"):
        list(stream_of(Split(tmp_path / "s")))


def killed(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hangs(*_: Any) -> None:
    time.sleep(100)


@pytest.mark.parametrize(
    ("what", "message"), [(hangs, "timed out after 1.5 seconds"), (killed, "(killed by signal: Killed|exited unexpectedly)")]
)
def test_a_worker_that_hangs_or_is_killed_ends_the_run_with_a_sentence(tmp_path, monkeypatch, what, message):
    write_split(tmp_path / "s", pairs(12))
    monkeypatch.setattr(Split, "read", what)
    batches = iter(loader_of(stream_of(Split(tmp_path / "s")), 2, max_wait_seconds=1.5))
    began = time.monotonic()
    with pytest.raises(
        ValueError, match=rf"a process that reads data hangs or died: .*{message}.*conf=verify finds it"
    ) as caught:
        next(batches)
    assert time.monotonic() - began < 4
    assert "\n" not in str(caught.value)
    with suppress(RuntimeError):  # torch tells of the end of workers that a loader still waits for
        for child in multiprocessing.active_children():
            child.kill()
            child.join()
    del batches, caught


def raises(*_: Any) -> None:
    raise RuntimeError("stack expects each tensor to be equal size")


def test_an_error_in_a_worker_is_told_as_what_it_is(tmp_path, monkeypatch):
    write_split(tmp_path / "s", pairs(12))
    monkeypatch.setattr(Split, "read", raises)
    batches = iter(loader_of(stream_of(Split(tmp_path / "s")), 1, max_wait_seconds=10))
    with pytest.raises(Exception, match="stack expects each tensor") as caught:
        next(batches)
    assert "hangs or died" not in str(caught.value)
    del batches, caught


EXITS = """
import os
from torch.utils.data import IterableDataset
from datamodules.loader import loader_of

class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield os.getpid()

batches = iter(loader_of(Endless(), 1))
next(batches)
"""


def test_a_program_ends_though_it_holds_a_loader(tmp_path):
    (tmp_path / "exits.py").write_text(EXITS)
    subprocess.run(
        [sys.executable, str(tmp_path / "exits.py")], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, timeout=30
    )


@pytest.mark.parametrize("left", [b"", b"PK\3\4xx"])
def test_a_half_written_piece_of_an_index_is_made_again(tmp_path, left):
    write_split(tmp_path / "a", pairs(3))
    (tmp_path / "s" / ".indexing").mkdir(parents=True)
    (tmp_path / "s" / ".indexing" / "00000000.npz").write_bytes(left)
    write_index(tmp_path / "s", Store(tmp_path / "a"), [FIRST], at=Store(tmp_path / "a"))
    assert len(Split(tmp_path / "s")) == 3


def test_one_surrogate_does_not_refuse_a_whole_shard(tmp_path):
    text = b'{"query": {"parts": [{"kind": "text", "text": "\\ud800"}]}}'
    foreign(tmp_path / "a.tar", ("a.json", text), ("b.json", text.replace(b"\\ud800", b"ok")))
    assert [line[0] for line in write_index(tmp_path / "s", Store(tmp_path), ["a.tar"], at=Store(tmp_path))["malformed"]] == [0]


def test_seventy_thousand_fields_are_refused(tmp_path):
    foreign(tmp_path / "a.tar", *((f"frame.{n:06d}.jpg", b"") for n in range(66_000)))
    with pytest.raises(ValueError, match="fields"):
        index_tar(tmp_path / "a.tar")


def test_pax_headers_cost_time_in_proportion(tmp_path):
    header = member(b"p", b"7 uid=\n" * 9362, b"x")
    (tmp_path / "a.tar").write_bytes(b"".join(header + member(b"%d.txt" % n, b"") for n in range(40)) + END)
    began = time.process_time()
    index_tar(tmp_path / "a.tar")
    assert time.process_time() - began < 0.5


VICTIM = """
import os, sys, time
from torch.utils.data import IterableDataset
from datamodules.loader import loader_of

class Stuck(IterableDataset):
    def __iter__(self):
        yield os.getpid()
        time.sleep(100)  # stuck in an example: it sees nothing of what happens around it

if __name__ == "__main__":
    batches = iter(loader_of(Stuck(), 2, start_method=sys.argv[1]))
    print(next(batches), next(batches), flush=True)
    time.sleep(100)
"""


@pytest.mark.parametrize("start_method", ["fork", "spawn", "forkserver"])
def test_no_worker_outlives_a_killed_run(tmp_path, start_method):
    (tmp_path / "victim.py").write_text(VICTIM)
    command = [sys.executable, str(tmp_path / "victim.py"), start_method]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment) as run:
        assert run.stdout is not None
        workers = [int(word) for word in run.stdout.readline().split()]
        assert len(set(workers)) == 2
        run.kill()
    deadline = time.monotonic() + 2.0
    while left := [pid for pid in workers if runs(pid)]:
        if time.monotonic() > deadline:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            pytest.fail(f"{len(left)} of 2 workers outlived the run by 2 s")
        time.sleep(0.02)


def runs(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


class AsksForSteps(L.LightningModule):
    """Reads `estimated_stepping_batches` where the optimiser is made, as schedules do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.keys = torch.nn.Parameter(torch.zeros(1)), {}

    def configure_optimizers(self) -> Any:
        assert self.trainer.estimated_stepping_batches == self.trainer.max_steps
        return torch.optim.SGD([self.weight], 0.1)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch.step == 4:
            self.trainer.save_checkpoint(f"{self.trainer.default_root_dir}/5.ckpt")

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.keys[batch.step] = batch.keys
        return self.weight.sum()

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        return batch


@pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore:.*LeafSpec.*:FutureWarning", "ignore:.*LeafSpec.*:DeprecationWarning"
)
def test_a_schedule_that_asks_for_the_number_of_steps_keeps_the_streams_place(world, tmp_path):
    """Lightning 2.6.6 then drops a loader's state (Lightning#20550)."""

    def fit(num_steps: int, ckpt_path: str | None = None) -> dict[int, list[str]]:
        data = TrainingData(str(world), TASKS, processor=ProcessorConfig(vocab_size=400), steps_per_block=9, num_workers=1)
        off = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
        quiet: dict[str, Any] = dict.fromkeys(off, False)
        trainer = L.Trainer(accelerator="cpu", max_epochs=1, max_steps=num_steps, default_root_dir=tmp_path, **quiet)
        module = AsksForSteps()
        trainer.fit(module, data, ckpt_path=ckpt_path)
        return module.keys

    straight = fit(9)
    assert list(straight) == list(range(9))
    resumed = fit(9, str(tmp_path / "5.ckpt"))
    assert resumed == {step: straight[step] for step in range(5, 9)}


def reads_checked(split: Split, examples: list[Example]) -> tuple[int, int]:
    """Reads that gave what was written, and reads that were refused; anything else fails."""
    right = 0
    for position, example in enumerate(examples):
        try:
            read = split.read(position)
        except ValueError:
            continue
        assert read == example, f"position {position} gave something else"
        right += 1
    return right, len(examples) - right


def mutate(data: bytearray, chance: random.Random, *, same_size: bool) -> None:
    """Flip, overwrite, duplicate, move, insert or delete, at random."""
    at, other = chance.randrange(len(data)), chance.randrange(len(data))
    length = min(chance.choice((1, 8, 512, 1024)), len(data) - max(at, other))
    match chance.randrange(4 if same_size else 6):
        case 0:
            data[at] ^= 1 << chance.randrange(8)
        case 1:
            data[at : at + length] = chance.randbytes(length)
        case 2:
            data[at : at + length] = data[other : other + length]
        case 3:
            data[at : at + length], data[other : other + length] = data[other : other + length], data[at : at + length]
            del data[len(data) :]
        case 4:
            data[at:at] = data[other : other + length]
        case 5:
            del data[at : at + length]


class Fuzz:
    """A split in memory, changed and put right again over and over."""

    def __init__(self, folder: Path, number: int) -> None:
        self.folder, self.examples = folder, pairs(number)
        write_split(folder, self.examples, examples_per_shard=number // 2)
        self.whole = {path.name: path.read_bytes() for path in folder.iterdir()}
        self.open = Split(folder)
        self.counts = {"mutants": 0, "refused at the door": 0, "reads verified": 0, "reads refused": 0}
        assert reads_checked(self.open, self.examples) == (number, 0)

    def shard(self, chance: random.Random) -> None:
        """Change a shard that is held open, its size kept."""
        name = f"{chance.randrange(2):06d}.tar"
        data = bytearray(self.whole[name])
        mutate(data, chance, same_size=True)
        data = data[: len(self.whole[name])].ljust(len(self.whole[name]), b"\0")
        with (self.folder / name).open("r+b") as file:
            file.write(data)
        self.count(self.open)
        with (self.folder / name).open("r+b") as file:
            file.write(self.whole[name])

    def opened(self, name: str, chance: random.Random) -> None:
        """Change a file and open the split."""
        data = bytearray(self.whole[name])
        while data == self.whole[name]:
            mutate(data, chance, same_size=False)
        (self.folder / name).write_bytes(data)
        try:
            self.count(Split(self.folder))
        except ValueError:
            self.counts["mutants"] += 1
            self.counts["refused at the door"] += 1
        (self.folder / name).write_bytes(self.whole[name])

    def count(self, split: Split) -> None:
        right, refused = reads_checked(split, self.examples)
        self.counts["mutants"] += 1
        self.counts["reads verified"] += right
        self.counts["reads refused"] += refused


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder in memory where there is one."""
    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
    yield folder
    shutil.rmtree(folder)


def fuzzed(memory: Path, num_examples: int, num_mutants: int) -> dict[str, int]:
    """Counts of a run: of ten mutants seven change a shard in place, and each other file is changed once."""
    fuzz, chance = Fuzz(memory / "s", num_examples), random.Random(0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(num_mutants):
        if number % 10 < 7:
            fuzz.shard(chance)
        else:
            fuzz.opened((FIRST, "examples.npy", "members.npy")[number % 10 - 7], chance)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 256 * 2**20
    print(f"{fuzz.counts}")
    return fuzz.counts


def test_a_mutated_split_gives_its_own_examples_or_none(memory):
    counts = fuzzed(memory, 30, 600)
    assert counts["mutants"] == 600
    assert counts["refused at the door"] >= 120
    assert counts["reads verified"] > 10_000
    assert counts["reads refused"] > 100


@pytest.mark.parametrize("name", ["manifest.json", "examples.npy", "members.npy"])
def test_a_mutated_index_gives_its_own_examples_or_none(memory, name):
    """The tables with their hashes made right: someone else may have written them."""
    fuzz, chance, wrong = Fuzz(memory / "s", 30), random.Random(1), {}
    manifest = fuzz.whole["manifest.json"]
    for _ in range(300):
        data = bytearray(fuzz.whole[name])
        mutate(data, chance, same_size=False)
        (fuzz.folder / name).write_bytes(data)
        if name != "manifest.json":
            values = json.loads(manifest)
            values["tables"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            (fuzz.folder / "manifest.json").write_text(json.dumps(values))
        try:
            split = Split(fuzz.folder)
            assert all(example in fuzz.examples for example in outcomes(split).values() if isinstance(example, Example))
        except ValueError:
            pass
        except Exception as error:
            wrong.setdefault(f"{type(error).__name__}: {error}"[:80], bytes(data))
        (fuzz.folder / name).write_bytes(fuzz.whole[name])
        (fuzz.folder / "manifest.json").write_bytes(manifest)
    assert not list(wrong)


@FULL
@pytest.mark.timeout(3600)
def test_a_hundred_thousand_mutated_splits(memory):
    counts = fuzzed(memory, 48, 100_000)
    assert counts["mutants"] == 100_000
    assert counts["reads verified"] >= 3_000_000
