"""Promises of a split whose files were changed: refused at the door, or the changed examples alone are lost, and told."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from changes import END, FIRST, Change, bad_in, edited, flipped, foreign, header, member, other_bytes, pax
from samples import pairs

from datamodules.files import sha256_of
from datamodules.index import index_tar, write_index
from datamodules.shards import Split, write_split
from datamodules.store import Store

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
    def seconds(name: str, num_headers: int, num_records: int) -> float:
        header = member(b"p", b"7 uid=\n" * num_records, b"x")
        (tmp_path / name).write_bytes(b"".join(header + member(b"%d.txt" % n, b"") for n in range(num_headers)) + END)
        began = time.process_time()
        index_tar(tmp_path / name)
        return time.process_time() - began

    longer, shorter = zip(*((seconds("a.tar", 10, 9360), seconds("b.tar", 80, 1170)) for _ in range(5)), strict=True)
    assert min(longer) < 1.5 * min(shorter)  # as many records; copying what is left at each takes twice as long
