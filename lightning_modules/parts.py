"""One part of stored embeddings as files, with their vectors: a Parquet file, or an .npy beside a JSON line an item.

    part-000012.parquet     columns id, modality, text, path, position, vector
    part-000012.npy, part-000012.ids.jsonl     vectors (N, D), and the other columns

Shapes: N items of a part, W numbers that a vector is stored as.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from datamodules.files import sha256_of
from datamodules.record import parse_json

Layout = Literal["parquet", "npy"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
MAX_LINES_BYTES = 2**31 - 1  # of a part's items in JSON: our choice


class Described(NamedTuple):
    """What is kept of an item beside its vector.

    Args:
        id: Its name in its source.
        modality: The kind of its parts, `mixed` where they differ.
        text: Its text parts, joined by newlines; None where there is none.
        path: The file that it came from, or its first medium did; None for what lies in a file with others.
        position: Its place in the source, bad items counted too.
    """

    id: str
    modality: str
    text: str | None = None
    path: str | None = None
    position: int = 0


def files_of(number: int, layout: Layout) -> dict[str, str]:
    """Names of a part's files by what they hold: `vectors` and `items`, which may be one."""
    stem = f"part-{number:06d}"
    if layout == "parquet":
        return {"vectors": f"{stem}.parquet", "items": f"{stem}.parquet"}
    return {"vectors": f"{stem}.npy", "items": f"{stem}.ids.jsonl"}


def write_part(folder: Path, number: int, layout: Layout, items: Sequence[Described], stored: np.ndarray) -> dict[str, Any]:
    """Write a part's files, each whole or absent; stored (N, W).

    Returns:
        Name of each file to its bytes and SHA-256.

    Raises:
        OSError: The disk is full or the place not writable.
    """
    assert len(items) == len(stored)
    names = files_of(number, layout)
    write = (
        {names["vectors"]: _write_npy, names["items"]: _write_lines} if layout == "npy" else {names["items"]: _write_parquet}
    )
    described = {}
    for name, writer in write.items():
        path, beside = folder / name, folder / f".{name}.{os.getpid()}.partial"
        try:
            writer(beside, items, stored)
            described[name] = {"bytes": beside.stat().st_size, "sha256": sha256_of(beside)}
            os.replace(beside, path)
        except OSError as error:
            raise OSError(error.errno, f"could not write {path}: {error.strerror or error}") from error
        finally:
            beside.unlink(missing_ok=True)
    return described


def read_vectors(folder: Path, number: int, layout: Layout) -> np.ndarray:
    """What is stored of a part's vectors (N, W)."""
    path = folder / files_of(number, layout)["vectors"]
    if layout == "npy":
        return np.load(path, mmap_mode="r", allow_pickle=False)
    column = _parquet().read_table(path, columns=["vector"]).column("vector").combine_chunks()
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), column.type.list_size)


def read_items(folder: Path, number: int, layout: Layout, columns: Sequence[str]) -> list[dict[str, Any]]:
    """Some columns of a part's items, in order."""
    path = folder / files_of(number, layout)["items"]
    if layout == "parquet":
        return _parquet().read_table(path, columns=list(columns)).to_pylist()
    with path.open(encoding="utf-8") as lines:
        rows = [parse_json(line.encode(), MAX_LINES_BYTES) for line in lines]
    return [{name: row[name] for name in columns} for row in rows]


def _write_npy(path: Path, items: Sequence[Described], stored: np.ndarray) -> None:
    with path.open("wb") as file:
        np.save(file, stored, allow_pickle=False)


def _write_lines(path: Path, items: Sequence[Described], stored: np.ndarray) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(item._asdict(), ensure_ascii=False) + "\n" for item in items)


def _write_parquet(path: Path, items: Sequence[Described], stored: np.ndarray) -> None:
    parquet = _parquet()
    import pyarrow

    columns = dict(zip(Described._fields, zip(*items, strict=True), strict=True))
    types = dict.fromkeys(Described._fields, pyarrow.string()) | {"position": pyarrow.int64()}
    arrays = {name: pyarrow.array(columns[name], types[name]) for name in Described._fields}
    flat = pyarrow.array(np.ascontiguousarray(stored).reshape(-1))
    arrays["vector"] = pyarrow.FixedSizeListArray.from_arrays(flat, stored.shape[1])
    compression = dict.fromkeys(Described._fields, "zstd") | {"vector.list.element": "none"}
    # Parquet has no numbers below four bytes: what is a byte goes through a dictionary, whose indices take one
    in_dictionary = ["modality", *(["vector.list.element"] if stored.dtype.itemsize == 1 else [])]
    parquet.write_table(pyarrow.table(arrays), path, compression=compression, use_dictionary=in_dictionary)


def _parquet() -> Any:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ValueError("Parquet needs pyarrow: pip install pyarrow; or take layout=npy") from error
    return parquet
