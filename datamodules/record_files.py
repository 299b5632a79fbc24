"""Records of a JSONL or Parquet file as items, by position.

A record has `id` (its position where it has none) and what `datamodules.items.item_of` takes: `title`, `text`, `code`, `image`,
`page`, `video`, `audio`, or `parts`. Its media are files named relative to the record file's folder, which they may not leave;
in Parquet also bytes, or {"bytes", "path"} as `datasets` writes them. Other fields are not looked at.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from datamodules.items import KEYS, file_part, item_of, medium_part, whole_text
from datamodules.record import MAX_JSON_BYTES, parse_json
from datamodules.sample import MEDIA_KINDS, TEXT_KINDS, BadExampleError, Item

FIELDS = ("title", *KEYS, "parts")
MEDIA_FIELDS = tuple(f'"{name}"'.encode() for name in (*MEDIA_KINDS, "parts"))
ROWS_AT_ONCE = 64  # of a Parquet file that are in memory: our choice


class Found(NamedTuple):
    """An item, and the file that it came from, or its first medium did; None for what lies in a file with others."""

    item: Item
    path: str | None


class Source(ABC):
    """Items by position.

    Attributes:
        described: What it is, in JSON values: `kind`, `path`, `digest` (another one when a record or the size or time of a
            file changes) and, of a split, its `column`.
        has_media: Whether the item at each position may hold media (N,).
        left_out: What of the source makes no item, by cause.
    """

    described: dict[str, Any]
    has_media: np.ndarray
    left_out: Counter[str]

    def __len__(self) -> int:
        return len(self.has_media)

    @abstractmethod
    def name(self, position: int) -> str:
        """What an item is called.

        Raises:
            ValueError: It cannot be told.
        """

    @abstractmethod
    def read(self, position: int) -> tuple[str, Found]:
        """An item with its id.

        Raises:
            ValueError: It cannot be used; says why.
        """


class LinesSource(Source):
    """The records of a JSONL file, one a line; empty lines are left out."""

    def __init__(self, place: Path) -> None:
        self.place, self.left_out = place, Counter()
        offsets, has_media, digest, stamps, end = [], [], hashlib.sha256(), hashlib.sha256(), 0
        with place.open("rb") as lines:
            for line in lines:
                digest.update(line)
                offset, end = end, end + len(line)
                if not line.strip():
                    self.left_out["an empty line"] += 1
                    continue
                offsets.append((offset, len(line)))
                has_media.append(any(name in line for name in MEDIA_FIELDS))
                if has_media[-1]:
                    stamps.update(json.dumps([stamp(place.parent / name) for name in _named_files(line)]).encode())
        self._offsets = np.array(offsets, np.int64).reshape(-1, 2)
        self.has_media = np.array(has_media, bool)
        whole = hashlib.sha256(digest.digest() + stamps.digest()).hexdigest()
        self.described = {"kind": "jsonl", "path": str(place), "digest": whole}

    def name(self, position: int) -> str:
        return _name(self._record(position), position)

    def read(self, position: int) -> tuple[str, Found]:
        return _read_record(self._record(position), self.place.parent, position)

    def _record(self, position: int) -> Any:
        offset, size = self._offsets[position].tolist()
        if size > MAX_JSON_BYTES:
            raise BadExampleError(f"this line has {size} bytes; allowed: {MAX_JSON_BYTES}", "too large")
        with self.place.open("rb") as file:
            file.seek(offset)
            line = file.read(size)
        try:
            return parse_json(line)
        except ValueError as error:
            raise BadExampleError(f"this line is no JSON: {error}", "no JSON") from error


class TableSource(Source):
    """The rows of a Parquet file."""

    def __init__(self, place: Path) -> None:
        self.place, self.left_out = place, Counter()
        file = self._open()
        names = file.schema_arrow.names
        self._columns = [name for name in ("id", *FIELDS) if name in names]
        if not set(self._columns) - {"id", "title"}:
            raise ValueError(f"{place} has the columns {', '.join(names)}; an item needs one of {', '.join(KEYS)} or parts")
        media = [name for name in self._columns if name in (*MEDIA_KINDS, "parts")]
        self.has_media = np.full(file.metadata.num_rows, bool(media))
        counts = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
        self._starts = np.cumsum([0, *counts])
        with place.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256")
        named = [name for name in media if not _is_binary(file.schema_arrow.field(name).type)]
        for batch in file.iter_batches(ROWS_AT_ONCE, columns=named) if named else ():
            for row in batch.to_pylist():
                digest.update(json.dumps([stamp(place.parent / name) for name in _files_of(row)]).encode())
        self.described = {"kind": "parquet", "path": str(place), "digest": digest.hexdigest()}
        self._rows: Iterator[Any] = iter(())  # batches of the row group that is read
        self._batch: Any = None
        self._group, self._first = -1, 0

    def name(self, position: int) -> str:
        return _name(self._row(position), position)

    def read(self, position: int) -> tuple[str, Found]:
        return _read_record(self._row(position), self.place.parent, position)

    def _row(self, position: int) -> dict[str, Any]:
        """A row; those after it in its group are quick to follow, one before it begins the group anew."""
        if self._group < 0 or not self._first <= position < self._starts[self._group + 1]:
            self._group = int(np.searchsorted(self._starts, position, side="right")) - 1
            self._rows = self._open().iter_batches(
                ROWS_AT_ONCE, row_groups=[self._group], columns=self._columns, use_threads=False
            )
            self._first, self._batch = int(self._starts[self._group]), next(self._rows)
        while position >= self._first + len(self._batch):
            self._first, self._batch = self._first + len(self._batch), next(self._rows)
        return self._batch.slice(position - self._first, 1).to_pylist()[0]

    def _open(self) -> Any:
        import pyarrow
        import pyarrow.parquet as parquet

        try:
            return parquet.ParquetFile(self.place)
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{self.place} is no Parquet file that can be read ({error})") from error

    def __getstate__(self) -> dict[str, Any]:
        """What goes to another process: without what is read."""
        return {**self.__dict__, "_rows": iter(()), "_group": -1, "_batch": None}


def _read_record(record: Any, folder: Path, position: int) -> tuple[str, Found]:
    if not isinstance(record, dict):
        raise BadExampleError(f"a record is a {type(record).__name__}, not an object", "malformed record")
    name = _name(record, position)
    paths: list[str | None] = []

    def opened(value: Any, kind: str) -> Any:
        """A medium's value with its bytes in place of its file's name."""
        if isinstance(value, list):
            return [opened(one, kind) for one in value]
        if isinstance(value, Mapping) and {"bytes", "path"} & value.keys():
            value = value["path"] if value.get("bytes") is None else value["bytes"]
        if isinstance(value, str):
            path = _inside(folder, value)
            paths.append(str(path))
            return file_part(path, kind)
        paths.append(None)
        return medium_part(value, kind) if isinstance(value, bytes) else value

    def with_media(values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        given = [(key, values[key]) for key in FIELDS if values.get(key) is not None]  # in the order of the item's parts
        return {key: opened(value, key) if key in MEDIA_KINDS else value for key, value in given}

    record = with_media(record)
    if isinstance(record.get("parts"), list):
        record["parts"] = [with_media(part) for part in record["parts"]]
    for part in (record, *(record["parts"] if isinstance(record.get("parts"), list) else ())):
        for key in TEXT_KINDS:
            if isinstance(part, Mapping) and part.get(key) is not None and not isinstance(part[key], str):
                raise BadExampleError(f"`{key}` is a {type(part[key]).__name__}; it must be a string", "malformed record")
    return name, Found(item_of(record), paths[0] if paths else None)


def _name(record: Any, position: int) -> str:
    name = record.get("id") if isinstance(record, Mapping) else None
    if name is not None and not isinstance(name, str | int):
        raise BadExampleError(f"`id` is a {type(name).__name__}; it must be a string or whole number", "malformed record")
    return whole_text(str(position if name is None else name))


def _inside(folder: Path, name: str) -> Path:
    """The file that a record names.

    Raises:
        BadExampleError: It lies outside of the folder, or is no plain file.
    """
    try:
        path, top = (folder / name).resolve(), folder.resolve()
        is_file = path.is_file()
    except (OSError, ValueError) as error:  # too long, or with a zero byte
        raise BadExampleError(f"{name[:99]!r} can be no file's name ({error})", "no such file") from error
    if not path.is_relative_to(top):
        raise BadExampleError(f"{name[:99]!r} lies outside of {folder}", "outside its folder")
    if not is_file:
        raise BadExampleError(f"there is no file {name[:99]!r} in {folder}", "no such file")
    return path


def _named_files(line: bytes) -> list[str]:
    try:
        return _files_of(parse_json(line))
    except ValueError:
        return []  # whoever reads it says so


def _files_of(record: Any) -> list[str]:
    """Names of files in a record, wherever a medium may be."""
    if not isinstance(record, Mapping):
        return []
    parts = record.get("parts")
    found = [name for part in (parts if isinstance(parts, list) else ()) for name in _files_of(part)]
    for key in MEDIA_KINDS:
        values = record.get(key)
        for value in values if isinstance(values, list) else [values]:
            value = value.get("path") if isinstance(value, Mapping) and value.get("bytes") is None else value
            found += [value] if isinstance(value, str) else []
    return found


def _is_binary(kind: Any) -> bool:
    import pyarrow

    return pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)


def stamp(path: Path) -> list[int] | None:
    """A file's size and time, which change when it does; None where there is none."""
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    return [found.st_size, found.st_mtime_ns]
