"""The index of a split: where every file of every example lies, with checksums and extents; for our shards and for others'.

    manifest.json   counts, SHA-256 of every shard and of the two tables, columns, licence and source
    examples.npy    per example its key, where its members end, and the extent of query and target
    members.npy     per file its field, offset, size, and the CRC-32 of "<key>.<field>" followed by its bytes

The tables are mapped into memory. Opening a split hashes them once, which takes 6 to 10 seconds for a hundred million examples.
"""

import dataclasses
import json
import multiprocessing
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from datamodules.extent import EXTENT, extent_of
from datamodules.files import replace_file, sha256_of
from datamodules.record import Columns, from_record
from datamodules.store import Store
from datamodules.tar import TarReader

FORMAT = "polyphony-shards/2"
MEMBER = np.dtype([("field", "<u2"), ("offset", "<i8"), ("size", "<i8"), ("crc32", "<u4")])
MAX_FIELDS = 1000  # our choice
TABLES = ("examples.npy", "members.npy")


def example_dtype(key_bytes: int) -> np.dtype:
    """The rows of examples.npy, for keys of at most so many bytes."""
    return np.dtype([("key", f"S{key_bytes}"), ("end", "<i8"), ("query", EXTENT), ("target", EXTENT)])


def crc32_of(key: str, name: str, data: bytes) -> int:
    """The checksum of a member: it covers the name, so that an index that points to another example's bytes is found out."""
    return zlib.crc32(data, zlib.crc32(f"{key}.{name}".encode()))


@dataclass
class ShardIndex:
    """What one tar adds to the tables.

    Args:
        examples: Rows of examples.npy, `end` counted within the shard.
        members: Rows of members.npy, `field` a position in `fields`.
        fields: Names of fields.
        num_bytes: Size of the tar.
        sha256: Its hash.
        malformed: Row to why it makes no example.
    """

    examples: np.ndarray
    members: np.ndarray
    fields: list[str]
    num_bytes: int
    sha256: str
    malformed: dict[int, str] = field(default_factory=dict)


def index_tar(path: Path, columns: Columns | None = None) -> ShardIndex:
    """Read a tar once and say what lies where.

    Raises:
        ValueError: It is no tar of samples: see `datamodules.tar`, or a sample's files do not follow each other.
    """
    keys, ends, extents, members, malformed = [], [], [], [], {}
    fields: dict[str, int] = {}
    wanted = None if columns is None else columns.fields
    reader = TarReader(path)
    for key, files in _samples(reader):
        if wanted is not None:
            files = {name: found for name, found in files.items() if name in wanted}
        for name, (offset, data) in files.items():
            members.append((fields.setdefault(name, len(fields)), offset, len(data), crc32_of(key, name, data)))
        if len(fields) > MAX_FIELDS:
            raise ValueError(
                f"{path}: it has more than {MAX_FIELDS} different fields; a key ends at the first dot of a file's name"
            )
        query = target = None
        try:
            example = from_record(key, {name: data for name, (_, data) in files.items()}, columns)
            query, target = example.query, example.target
        except ValueError as error:
            malformed[len(keys)] = str(error)
        keys.append(key.encode())
        ends.append(len(members))
        extents.append((extent_of(query), extent_of(target)))
    examples = np.zeros(len(keys), example_dtype(max(map(len, keys), default=1)))
    examples["key"], examples["end"] = keys, ends
    for column, name in enumerate(("query", "target")):
        examples[name] = np.array([extent[column] for extent in extents], EXTENT)
    return ShardIndex(examples, np.array(members, MEMBER), list(fields), path.stat().st_size, reader.sha256, malformed)


def _samples(reader: TarReader) -> Iterator[tuple[str, dict[str, tuple[int, bytes]]]]:
    """Successive files of one key, as WebDataset groups them: key, and field to offset and bytes."""
    key, files, seen = None, {}, set()
    for member in reader:
        folder, slash, name = member.name.rpartition("/")
        stem, dot, extension = name.partition(".")
        own = f"{folder}{slash}{stem}"
        if not stem or not dot or not extension:
            raise ValueError(f"{reader.path}: the file {member.name!r} is not named <key>.<field>")
        if own != key:
            if own in seen:
                raise ValueError(f"{reader.path}: the files of {own!r} do not follow each other")
            if key is not None:
                yield key, files
            key, files = own, {}
            seen.add(own)
        if extension.lower() in files:
            raise ValueError(f"{reader.path}: the file {member.name!r} comes twice")
        files[extension.lower()] = (member.offset, member.data)
    if key is not None:
        yield key, files


def write_index(
    folder: Path,
    store: Store,
    names: Sequence[str],
    *,
    columns: Columns | None = None,
    about: Mapping[str, Any] | None = None,
    at: Store | None = None,
    num_workers: int = 1,
    console: Console | None = None,
) -> dict[str, Any]:
    """Index tars and write tables and manifest, the manifest last; what was indexed before a stop is not indexed again.

    Args:
        folder: Where the tables go.
        store: Where the tars lie.
        names: Their names there, in order.
        columns: How samples become examples; None for our own layout.
        about: Goes into the manifest.
        at: Where readers of the split find the tars, if not in `folder`.
        num_workers: Processes that read.
        console: Where a progress bar is drawn; None draws none.

    Returns:
        The manifest, and under "malformed" what does not make an example: [row, shard, key, cause].

    Raises:
        ValueError: A tar holds what a shard may not.
    """
    pieces = folder / ".indexing"
    pieces.mkdir(parents=True, exist_ok=True)
    work = [(store, name, pieces / f"{number:08d}.npz", columns) for number, name in enumerate(names)]
    with multiprocessing.get_context("fork").Pool(num_workers) if num_workers > 1 else _NoPool() as pool:
        done = pool.imap(_index_piece, work)
        for _ in done if console is None else track(done, "indexing", total=len(work), console=console, transient=True):
            pass
    manifest, malformed = _merge(folder, [(name, piece) for _, name, piece, _ in work])
    manifest["about"] = dict(about or {})
    manifest["shards_at"] = None if at is None else str(Path(at.root).resolve()) if at.is_local else at.root
    manifest["columns"] = None if columns is None else dataclasses.asdict(columns)
    replace_file(folder / "manifest.json", json.dumps(manifest, indent=1, ensure_ascii=False))
    shutil.rmtree(pieces)
    return {**manifest, "malformed": malformed}


class _NoPool:
    """`multiprocessing.Pool` of no process: the work is done here."""

    imap = staticmethod(map)

    def __enter__(self) -> "_NoPool":
        return self

    def __exit__(self, *error: object) -> None:
        pass


def _index_piece(work: tuple[Store, str, Path, Columns | None]) -> None:
    """Index one tar into a file of its own, unless that was done and the tar is as it was."""
    store, name, piece, columns = work
    changed = Path(store.root, name).stat().st_mtime_ns if store.is_local else None
    stamp = json.dumps([store.root, name, store.size(name), changed, columns and dataclasses.asdict(columns)])
    with suppress(Exception):  # whatever is wrong with it, it is made again
        if _read_piece(piece)[0] == stamp:
            return
    if store.is_local:
        found = index_tar(Path(store.root, name), columns)
    else:
        with tempfile.NamedTemporaryFile(dir=piece.parent, suffix=".tar") as copy:
            store.copy(name, copy)
            found = index_tar(Path(copy.name), columns)
    described = {name: getattr(found, name) for name in ("fields", "num_bytes", "sha256", "malformed")}
    texts = [np.frombuffer(text.encode(), np.uint8) for text in (stamp, json.dumps(described))]
    beside = piece.with_suffix(".partial")
    with beside.open("wb") as file:
        np.savez(file, examples=found.examples, members=found.members, stamp=texts[0], described=texts[1])
    os.replace(beside, piece)


def _read_piece(piece: Path) -> tuple[str, ShardIndex]:
    with piece.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        described = json.loads(arrays["described"].tobytes())
        described["malformed"] = {int(row): why for row, why in described["malformed"].items()}
        return arrays["stamp"].tobytes().decode(), ShardIndex(arrays["examples"], arrays["members"], **described)


def _merge(folder: Path, pieces: Sequence[tuple[str, Path]]) -> tuple[dict[str, Any], list[list[Any]]]:
    """Write both tables from the pieces, holding one at a time; the manifest and what is malformed."""
    shards, malformed, fields = [], [], {}
    num_members = num_examples = 0
    key_bytes = 1
    for name, piece in pieces:
        found = _read_piece(piece)[1]
        shards.append({"name": name, "num_examples": len(found.examples), "bytes": found.num_bytes, "sha256": found.sha256})
        key_bytes = max(key_bytes, found.examples.dtype["key"].itemsize)
        malformed += [[num_examples + r, name, found.examples["key"][r].decode(), why] for r, why in found.malformed.items()]
        num_examples, num_members = num_examples + len(found.examples), num_members + len(found.members)
        for extension in found.fields:
            fields.setdefault(extension, len(fields))
    beside = [folder / f".{table}.{os.getpid()}.partial" for table in TABLES]
    shapes = ((example_dtype(key_bytes), num_examples), (MEMBER, num_members))
    tables = [
        np.lib.format.open_memmap(path, "w+", dtype, (length,)) if length else np.zeros(0, dtype)
        for path, (dtype, length) in zip(beside, shapes, strict=True)
    ]
    row = member = 0
    for _, piece in pieces:
        found = _read_piece(piece)[1]
        found.examples["end"] += member
        found.members["field"] = np.array([fields[name] for name in found.fields] or [0], "<u2")[found.members["field"]]
        tables[0][row : row + len(found.examples)] = found.examples.astype(tables[0].dtype)
        tables[1][member : member + len(found.members)] = found.members
        row, member = row + len(found.examples), member + len(found.members)
    for table, path, final in zip(tables, beside, TABLES, strict=True):
        if isinstance(table, np.memmap):
            table.flush()
        else:
            with path.open("wb") as file:
                np.save(file, table)
        os.replace(path, folder / final)
    digests = {table: {"bytes": (folder / table).stat().st_size, "sha256": sha256_of(folder / table)} for table in TABLES}
    manifest = {"format": FORMAT, "num_examples": num_examples, "fields": list(fields), "tables": digests, "shards": shards}
    return manifest, malformed
