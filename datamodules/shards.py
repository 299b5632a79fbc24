"""Shards: the tar layout of an Example, its writer, and a checked reader.

A split is a folder:

    <set>/<split>/000000.tar          a plain WebDataset tar
    <set>/<split>/000000.index.json   key, field, offset, size and CRC-32 of every member
    <set>/<split>/manifest.json       counts, SHA-256 of every file, licence and source

In a tar an example is `<key>.json` followed by its media, named by the place they fill:
`<key>.query.0.jpg` is part 0 of the query, `<key>.negative1.0.ogg` part 0 of the second hard negative. The JSON is

    {"query": {"parts": [{"kind": "text", "text": ".."}, {"kind": "image", "file": "query.1.jpg"}], "title": ".."},
     "target": {..}, "negatives": [{..}], "label": "..", "score": 1.0, "relevant": {"<key>": 1.0}, "meta": {..}}

with absent fields left out. Any WebDataset reader can read it. A split is written beside its place and renamed into it,
so that a half-written one never has the name of a whole one.
"""

import hashlib
import json
import os
import shutil
import tarfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from webdataset.writer import TarWriter

from datamodules.sample import TEXT_KINDS, Example, Item, Part

FORMAT = "polyphony-shards/1"


@dataclass(frozen=True, slots=True)
class Member:
    """Where one file of an example lies inside its tar."""

    field: str
    offset: int
    size: int
    crc32: int


def write_split(
    folder: str | Path, examples: Iterable[Example], *, about: Mapping[str, Any] | None = None, examples_per_shard: int = 1000
) -> int:
    """Write a split and rename it into place, replacing a former one.

    Args:
        folder: Where the split will be.
        examples: What it holds, in order. Keys must be unique.
        about: Goes into the manifest (licence, source, description).
        examples_per_shard: How many examples a tar holds at most.

    Returns:
        The number of examples written.

    Raises:
        ValueError: No example came, or a key came twice.
        OSError: The disk is full or the place is not writable; what was begun is removed, a former split stays.
    """
    folder = Path(folder)
    beside = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        num_examples = _write_tars(beside, examples, examples_per_shard)
        if not num_examples:
            raise ValueError(f"nothing to write to {folder}: the source gave no example")
        _write_indexes(beside, num_examples, dict(about or {}))
        replace_folder(folder, beside)
    except OSError as error:
        raise OSError(error.errno, f"could not write {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return num_examples


def _write_tars(folder: Path, examples: Iterable[Example], examples_per_shard: int) -> int:
    keys: set[str] = set()
    writer = None
    try:
        for number, example in enumerate(examples):
            if example.key in keys:
                raise ValueError(f"the key {example.key!r} came twice; keys must be unique within a split")
            keys.add(example.key)
            if number % examples_per_shard == 0:
                if writer is not None:
                    writer.close()
                writer = TarWriter(str(folder / f"{number // examples_per_shard:06d}.tar"), mtime=0)
            assert writer is not None
            writer.write(to_record(example))
    finally:
        if writer is not None:
            writer.close()
    return len(keys)


def _write_indexes(folder: Path, num_examples: int, about: dict[str, Any]) -> None:
    shards = []
    for tar in sorted(folder.glob("*.tar")):
        index = index_tar(tar)
        index_file = tar.with_suffix(".index.json")
        rows = [[key, m.field, m.offset, m.size, m.crc32] for key, members in index.items() for m in members]
        index_file.write_text(json.dumps({"columns": ["key", "field", "offset", "size", "crc32"], "members": rows}))
        shards.append(
            {
                "name": tar.name,
                "num_examples": len(index),
                "bytes": tar.stat().st_size,
                "sha256": sha256_of(tar),
                "index_sha256": sha256_of(index_file),
            }
        )
    assert sum(shard["num_examples"] for shard in shards) == num_examples
    manifest = {"format": FORMAT, "num_examples": num_examples, "about": about, "shards": shards}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1, ensure_ascii=False))


def index_tar(path: Path) -> dict[str, list[Member]]:
    """Read a tar once and say where everything lies: key to members, in order.

    Raises:
        ValueError: A member is no regular file, has no dot in its name, or its key is not contiguous.
    """
    index: dict[str, list[Member]] = {}
    last = None
    with tarfile.open(path) as tar:
        for info in tar:
            key, dot, field = info.name.partition(".")
            if not info.isreg() or not dot or (key in index and key != last):
                raise ValueError(f"{path}: member {info.name!r} does not belong in a shard")
            file = tar.extractfile(info)
            assert file is not None
            index.setdefault(key, []).append(Member(field, info.offset_data, info.size, zlib.crc32(file.read())))
            last = key
    return index


class Split:
    """A written split, read by position: every read is checked against the index's CRC-32.

    Opening checks that all shards are there with the sizes that the manifest names and that the indexes are whole.

    Args:
        folder: The split's folder.

    Raises:
        ValueError: No split lies there, it is empty, a shard is missing or has another size, or an index was changed.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        manifest_file = self.folder / "manifest.json"
        if not manifest_file.is_file():
            found = sorted(p.parent.name for p in self.folder.parent.glob("*/manifest.json"))
            raise ValueError(
                f"no shards in {self.folder}: manifest.json is missing. "
                + (f"Splits found beside it: {', '.join(found)}." if found else "Write them with conf=prepare or conf=world.")
            )
        self.manifest = _read_manifest(manifest_file)
        self.keys: list[str] = []
        self._members: list[tuple[str, list[Member]]] = []
        self._files: dict[str, int] = {}
        for shard in self.manifest["shards"]:
            self._open_index(shard)
        if not self.keys:
            raise ValueError(
                f"the split {self.folder} is empty; prepare it again from a source that has examples, or leave it out"
            )

    def _open_index(self, shard: Mapping[str, Any]) -> None:
        tar, index_file = self.folder / shard["name"], (self.folder / shard["name"]).with_suffix(".index.json")
        if not tar.is_file() or not index_file.is_file():
            missing = index_file if tar.is_file() else tar
            raise ValueError(f"{missing} is missing though {self.folder / 'manifest.json'} names it; write the split again")
        if tar.stat().st_size != shard["bytes"]:
            raise ValueError(f"{tar} has {tar.stat().st_size} bytes, its manifest says {shard['bytes']}; write the split again")
        if sha256_of(index_file) != shard["index_sha256"]:
            raise ValueError(f"{index_file} was changed after it was written; write the split again")
        members: dict[str, list[Member]] = {}
        for key, *rest in json.loads(index_file.read_text())["members"]:
            members.setdefault(key, []).append(Member(*rest))
        self.keys.extend(members)
        self._members.extend((shard["name"], found) for found in members.values())

    def __len__(self) -> int:
        return len(self.keys)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}  # file descriptors do not travel to another process

    def read(self, position: int) -> Example:
        """The example at a position, its media still encoded.

        Raises:
            ValueError: A byte differs from what was indexed, or the record is malformed; names shard and key.
        """
        shard, members = self._members[position]
        key = self.keys[position]
        files = {}
        for member in members:
            data = os.pread(self._descriptor(shard), member.size, member.offset)
            if zlib.crc32(data) != member.crc32:
                raise ValueError(f"{self.folder / shard}: {key}.{member.field} is damaged (its CRC-32 differs from the index)")
            files[member.field] = data
        try:
            return from_record(key, files)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{self.folder / shard}: example {key!r} is malformed: {error}") from error

    def _descriptor(self, shard: str) -> int:
        if shard not in self._files:
            self._files[shard] = os.open(self.folder / shard, os.O_RDONLY)
        return self._files[shard]

    def __del__(self) -> None:
        for descriptor in getattr(self, "_files", {}).values():
            os.close(descriptor)


def _read_manifest(file: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}); write the split again") from error
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT or not isinstance(manifest.get("shards"), list):
        raise ValueError(
            f"{file} has format {found!r}, this version reads {FORMAT!r} with a list of shards; write the split again"
        )
    return manifest


def to_record(example: Example) -> dict[str, Any]:
    """An example as WebDataset writes it: `__key__`, `json`, and one entry per media file."""
    files: dict[str, bytes] = {}

    def item(name: str, value: Item) -> dict[str, Any]:
        parts = []
        for number, part in enumerate(value.parts):
            if part.kind in TEXT_KINDS:
                parts.append({"kind": part.kind, "text": part.data})
            else:
                file = f"{name}.{number}.{part.format}"
                assert isinstance(part.data, bytes)
                files[file] = part.data
                parts.append({"kind": part.kind, "file": file})
        return {"parts": parts} if value.title is None else {"parts": parts, "title": value.title}

    record: dict[str, Any] = {}
    if example.query is not None:
        record["query"] = item("query", example.query)
    if example.target is not None:
        record["target"] = item("target", example.target)
    if example.negatives:
        record["negatives"] = [item(f"negative{m}", negative) for m, negative in enumerate(example.negatives)]
    for name in ("label", "score", "relevant", "meta"):
        if getattr(example, name) is not None:
            record[name] = getattr(example, name)
    payload = json.dumps(record, ensure_ascii=False, allow_nan=False).encode()
    return {"__key__": example.key, "json": payload, **files}


def from_record(key: str, files: Mapping[str, bytes]) -> Example:
    """The inverse of `to_record`, from field name to bytes."""
    record = json.loads(files["json"].decode("utf-8"))

    def item(value: Mapping[str, Any]) -> Item:
        parts = []
        for part in value["parts"]:
            if part["kind"] in TEXT_KINDS:
                parts.append(Part(part["kind"], part["text"]))
            else:
                parts.append(Part(part["kind"], files[part["file"]], part["file"].rpartition(".")[2]))
        return Item(tuple(parts), value.get("title"))

    return Example(
        key,
        item(record["query"]) if "query" in record else None,
        item(record["target"]) if "target" in record else None,
        tuple(item(negative) for negative in record.get("negatives", ())),
        **{name: record.get(name) for name in ("label", "score", "relevant", "meta")},
    )


def replace_folder(folder: Path, beside: Path) -> None:
    """Put a whole folder in the place of a former one, which is removed only once the new one has its name."""
    former = folder.with_name(f".{folder.name}.{os.getpid()}.former")
    if folder.exists():
        folder.rename(former)
    try:
        beside.rename(folder)
    except OSError:
        if former.exists():
            former.rename(folder)
        raise
    shutil.rmtree(former, ignore_errors=True)


def replace_file(path: Path, text: str) -> None:
    """Write a text file beside its place and rename it there; a former one stays until the new one is whole.

    Raises:
        OSError: The disk is full or the place not writable; names the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)
    except OSError as error:
        raise OSError(error.errno, f"could not write {path}: {error.strerror}") from error
    finally:
        beside.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
