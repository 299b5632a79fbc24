"""Shards: a split is written once, opened in the same time whatever its size, and checked on every read.

    <set>/<split>/000000.tar       a plain WebDataset tar, see `datamodules.record`
    <set>/<split>/manifest.json    with examples.npy and members.npy the index, see `datamodules.index`
    <set>/<split>/quarantine.json  examples that are left out, see `datamodules.verify`; absent where none is

A split is written beside its place and renamed into it, so that a half-written one never has the name of a whole one.
"""

import hashlib
import itertools
import json
import os
import shutil
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
from webdataset.writer import TarWriter

from datamodules.files import replace_file, replace_folder, sha256_of
from datamodules.index import FORMAT, MEMBER, TABLES, crc32_of, example_dtype, write_index
from datamodules.record import Columns, from_record, parse_json, to_record
from datamodules.sample import BadExampleError, Example
from datamodules.store import Store
from datamodules.tar import MAX_MEMBER_BYTES

MAX_MANIFEST_BYTES = 2**28
MAX_OPEN_FILES = 64
QUARANTINE = "quarantine.json"
QUARANTINE_FORMAT = "polyphony-quarantine/1"


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
        ValueError: No example came, a key came twice or cannot be a file's name.
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
        manifest = write_index(beside, Store(beside), sorted(path.name for path in beside.glob("*.tar")), about=about)
        assert manifest["num_examples"] == num_examples
        replace_folder(folder, beside)
    except OSError as error:
        raise OSError(error.errno, f"could not write {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return num_examples


def is_written(folder: str | Path, about: Mapping[str, Any]) -> bool:
    """Whether a whole split lies there whose manifest says the same about it."""
    try:
        return Split(folder).manifest["about"] == about
    except ValueError:
        return False


def _write_tars(folder: Path, examples: Iterable[Example], examples_per_shard: int) -> int:
    keys: set[str] = set()
    examples = iter(examples)
    numbers = itertools.count()
    while write_tar(folder / f"{next(numbers):06d}.tar", itertools.islice(examples, examples_per_shard), keys):
        pass
    return len(keys)


def write_tar(path: Path, examples: Iterable[Example], keys: set[str] | None = None) -> int:
    """Write a tar, or nothing where no example comes.

    Args:
        path: Its file.
        examples: What it holds, in order.
        keys: Those that may not come again; what is written adds its own.

    Returns:
        The number of examples written.

    Raises:
        ValueError: A key came twice or cannot be a file's name.
    """
    keys, writer = set() if keys is None else keys, None
    num_before = len(keys)
    try:
        for example in examples:
            if example.key in keys:
                raise ValueError(f"the key {example.key!r} came twice; keys must be unique within a split")
            keys.add(example.key)
            writer = writer or TarWriter(str(path), mtime=0)
            writer.write(to_record(example))
    finally:
        if writer is not None:
            writer.close()
    return len(keys) - num_before


class NoSplitError(ValueError):
    """There is no split in a folder."""


class Split:
    """A split, read by position: every read is checked against the index's CRC-32, which covers the example's name too.

    Opening checks that the tables are what the manifest says (SHA-256) and, of local shards, that all are there with their
    sizes. Examples in the quarantine list have no position, unless `quarantine` is False.

    Args:
        folder: The split's folder, local or remote.
        quarantine: Whether the quarantine list is heeded.

    Raises:
        ValueError: No split lies there, it is empty, a shard is missing or has another size, or the index was changed.
    """

    def __init__(self, folder: str | Path | Store, *, quarantine: bool = True) -> None:
        self.folder = folder if isinstance(folder, Store) else Store(folder)
        self.manifest = _read_manifest(self.folder)
        columns = self.manifest["columns"]
        self._columns = None if columns is None else columns_from_json(columns)
        at = self.manifest["shards_at"]
        self.shards = self.folder if at is None else Store(at, cache=self.folder.cache)
        if self.folder.is_local:  # what comes from a remote store was hashed when it was fetched
            _check_tables(self.folder, self.manifest["tables"])
        self._files: OrderedDict[int, int] = OrderedDict()
        self._row_ends = np.cumsum([shard["num_examples"] for shard in self.manifest["shards"]], dtype=np.int64)
        if not self.manifest["num_examples"]:
            raise ValueError(
                f"the split {self.folder} is empty; prepare it again from a source that has examples, or leave it out"
            )
        self._map_tables()
        if not len(self._row_ends) or self._row_ends[-1] != len(self._examples):
            raise ValueError(f"{self.folder}: the manifest's shards do not add up to its table of examples; index it again")
        self._check_shards()
        rows = read_quarantine(self.folder, self.manifest, self._examples["key"]) if quarantine else []
        self._left_out = np.array(rows, np.int64)
        self._before = self._left_out - np.arange(len(rows))  # how many positions lie before each row that is left out
        if len(self) < 1:
            raise ValueError(f"every example of {self.folder} is in its quarantine list; prepare it again or leave it out")

    def __len__(self) -> int:
        return len(self._examples) - len(self._left_out)

    @property
    def digest(self) -> str:
        """Changes when any example, its place, or what is left out does."""
        described = [self.manifest["tables"], [shard["sha256"] for shard in self.manifest["shards"]], self._left_out.tolist()]
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()

    @property
    def shard_ends(self) -> np.ndarray:
        """Position after the last example of each shard."""
        return self._row_ends - np.searchsorted(self._left_out, self._row_ends)

    @property
    def keys(self) -> list[str]:
        """All keys, in order."""
        return [key.decode("utf-8") for key in np.delete(self._examples["key"], self._left_out)]

    def key(self, position: int) -> str:
        """The key of the example at a position."""
        return self._examples["key"][self._row(position)].decode("utf-8")

    def shard(self, position: int) -> str:
        """Where the shard lies that holds the example at a position."""
        return f"{self.shards}/{self.manifest['shards'][self._shard_of(self._row(position))]['name']}"

    def extents(self, positions: np.ndarray) -> dict[str, np.ndarray]:
        """Extents of the queries and targets at positions (P,): `query` and `target` to rows of `EXTENT`."""
        rows = self._examples[self._row(positions)]
        return {name: rows[name] for name in ("query", "target")}

    def read(self, position: int) -> Example:
        """The example at a position, its media still encoded.

        Raises:
            BadExampleError: A byte differs from what was indexed, or the record is malformed; names shard and key.
        """
        row = int(self._row(position))
        first = int(self._examples["end"][row - 1]) if row else 0
        name, end, *_ = self._examples[row]
        key, shard, files = name.decode("utf-8", "replace"), self._shard_of(row), {}
        descriptor = self._descriptor(shard)
        for number, offset, size, crc32 in self._members[first:end].tolist():
            if number >= len(self.manifest["fields"]) or offset < 0 or not 0 <= size <= MAX_MEMBER_BYTES:
                raise ValueError(f"{self.folder}: the index of example {key!r} is damaged; write or index the split again")
            field = self.manifest["fields"][number]
            data = os.pread(descriptor, size, offset)
            if crc32_of(key, field, data) != crc32:
                raise BadExampleError(
                    f"{self.shard(position)}: {key}.{field} is damaged (its CRC-32 differs from the index)", "damaged bytes"
                )
            files[field] = data
        try:
            return from_record(key, files, self._columns)
        except ValueError as error:
            raise BadExampleError(
                f"{self.shard(position)}: example {key!r} is malformed: {error}", "malformed record"
            ) from error

    def _row(self, position: Any) -> Any:
        """Row of the table; positions skip what is left out."""
        return position + np.searchsorted(self._before, position, side="right") if len(self._before) else position

    def _shard_of(self, row: int) -> int:
        return int(np.searchsorted(self._row_ends, row, side="right"))

    def _descriptor(self, number: int) -> int:
        """An open file of a shard; the longest unused is closed when there are too many."""
        if number not in self._files:
            shard = self.manifest["shards"][number]
            while len(self._files) >= MAX_OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
            try:
                self._files[number] = os.open(self.shards.fetch(shard["name"], **_expected(shard)), os.O_RDONLY)
            except FileNotFoundError:  # another process may have evicted it from the cache before it was open
                self._files[number] = os.open(self.shards.fetch(shard["name"], **_expected(shard)), os.O_RDONLY)
        self._files.move_to_end(number)
        return self._files[number]

    def _map_tables(self) -> None:
        tables = [self.folder.fetch(name, **_expected(self.manifest["tables"][name])) for name in TABLES]
        try:
            examples, members = (np.load(path, mmap_mode="r", allow_pickle=False) for path in tables)
        except Exception as error:  # a header may be anything
            raise ValueError(f"the tables of {self.folder} cannot be read ({error}); index it again") from error
        key = examples.dtype["key"] if "key" in (examples.dtype.names or ()) else examples.dtype
        are_ours = examples.dtype == example_dtype(key.itemsize) and members.dtype == MEMBER
        if not are_ours or (examples.ndim, members.ndim) != (1, 1):
            raise ValueError(f"the tables of {self.folder} have other columns than this version reads; index it again")
        self._examples, self._members = examples, members

    def _check_shards(self) -> None:
        if not self.shards.is_local:
            return
        for shard in self.manifest["shards"]:
            name = shard["name"]
            if not self.shards.exists(name):
                raise ValueError(f"{self.shards}/{name} is missing though the manifest names it; write the split again")
            if self.shards.size(name) != shard["bytes"]:
                raise ValueError(
                    f"{self.shards}/{name} has {self.shards.size(name)} bytes, its manifest says {shard['bytes']}; "
                    "write the split again"
                )

    def __getstate__(self) -> dict[str, Any]:
        """What goes to another process: neither open files nor the tables, which it maps for itself."""
        return {**self.__dict__, "_files": OrderedDict(), "_examples": None, "_members": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._map_tables()

    def __del__(self) -> None:
        for descriptor in getattr(self, "_files", {}).values():
            os.close(descriptor)


def _expected(described: Mapping[str, Any]) -> dict[str, Any]:
    return {"sha256": described["sha256"], "size": described["bytes"]}


def _check_tables(folder: Store, tables: Mapping[str, Any]) -> None:
    for name in TABLES:
        if not folder.exists(name):
            raise ValueError(f"{folder}/{name} is missing though the manifest names it; write or index the split again")
        if sha256_of(folder.fetch(name, **_expected(tables[name]))) != tables[name]["sha256"]:
            raise ValueError(f"{folder}/{name} was changed after it was written; write or index the split again")


def _read_manifest(folder: Store) -> dict[str, Any]:
    """The manifest, its types checked: it may come from anywhere."""
    if not folder.exists("manifest.json"):
        raise NoSplitError(_no_split(folder))
    where = f"{folder}/manifest.json"
    try:
        manifest = parse_json(folder.read_bytes("manifest.json", MAX_MANIFEST_BYTES), MAX_MANIFEST_BYTES)
    except ValueError as error:
        raise ValueError(f"{where} is damaged ({error}); write the split again") from error
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise ValueError(f"{where} has format {found!r}, this version reads {FORMAT!r}; write or index the split again")
    try:
        files = [*manifest["shards"], *(manifest["tables"][name] for name in TABLES)]
        whole = all(type(file["bytes"]) is int and type(file["sha256"]) is str for file in files)
        whole &= all(type(shard["num_examples"]) is int and type(shard["name"]) is str for shard in manifest["shards"])
        whole &= all(type(name) is str for name in manifest["fields"]) and isinstance(manifest["about"], dict)
        whole &= (
            isinstance(manifest["fields"], list)
            and bool(manifest["fields"])
            and isinstance(manifest["shards_at"], str | NoneType)
        )
        whole &= min((number for file in files for number in (file["bytes"], file.get("num_examples", 0))), default=0) >= 0
        whole &= manifest["num_examples"] == sum(shard["num_examples"] for shard in manifest["shards"]) < 2**62
        if manifest["columns"] is not None:
            columns_from_json(manifest["columns"])
    except (AttributeError, KeyError, TypeError, ValueError):
        whole = False
    if not whole:
        raise ValueError(f"{where} is damaged (a field is missing or of another type); write the split again")
    return manifest


def _no_split(folder: Store) -> str:
    message = f"no shards in {folder}: manifest.json is missing. "
    if folder.is_local:
        found = sorted(path.parent.name for path in Path(str(folder)).parent.glob("*/manifest.json"))
        if found:
            return message + f"Splits found beside it: {', '.join(found)}."
    return message + "Write them with conf=prepare or conf=world, or index tars that you have with conf=index."


def columns_from_json(values: Mapping[str, Any]) -> Columns:
    """`Columns` from what `dataclasses.asdict` and JSON made of it."""
    plain: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return Columns(**plain)


def read_quarantine(folder: Store, manifest: Mapping[str, Any], keys: np.ndarray) -> list[int]:
    """Rows of a split that are left out, ascending; `keys` are those of all rows.

    Raises:
        ValueError: The list is damaged or was made for other shards.
    """
    listed = quarantined(folder, manifest)
    for example in listed:
        if keys[example["row"]] != str(example.get("key")).encode():
            raise ValueError(f"{folder}/{QUARANTINE} is damaged (row {example['row']} has another key); run conf=verify again")
    return sorted({example["row"] for example in listed})


def quarantined(folder: Store, manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a split's quarantine list says: of each example its row, shard, key, cause and message, as they were found.

    Raises:
        ValueError: The list is damaged or was made for other shards.
    """
    if not folder.exists(QUARANTINE):
        return []
    where = f"{folder}/{QUARANTINE}"
    try:
        listed = parse_json(folder.read_bytes(QUARANTINE, MAX_MANIFEST_BYTES), MAX_MANIFEST_BYTES)
        examples = [{**example} for example in listed["examples"]]
        if not all(type(example["row"]) is int for example in examples):
            raise TypeError("a row is no whole number")
        made_for, version = listed["index"], listed["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{where} is damaged ({error!r}); delete it and run conf=verify again") from error
    if made_for != manifest["tables"]["examples.npy"]["sha256"] or version != QUARANTINE_FORMAT:
        raise ValueError(f"{where} was made for other shards than lie here; delete it and run conf=verify again")
    if not all(0 <= example["row"] < manifest["num_examples"] for example in examples):
        raise ValueError(f"{where} names examples that the split does not have; delete it and run conf=verify again")
    return examples


def write_quarantine(folder: Path, manifest: Mapping[str, Any], bad: Iterable[tuple[int, str, str, str, str]]) -> None:
    """Write the list of a split's bad examples (row, shard, key, cause, message); none removes the list."""
    examples = [dict(zip(("row", "shard", "key", "cause", "message"), found, strict=True)) for found in sorted(bad)]
    if not examples:
        (folder / QUARANTINE).unlink(missing_ok=True)
        return
    listed = {"format": QUARANTINE_FORMAT, "index": manifest["tables"]["examples.npy"]["sha256"], "examples": examples}
    replace_file(folder / QUARANTINE, json.dumps(listed, indent=1, ensure_ascii=False))
