"""What is to be embedded, by position: the files of a folder, the records of a JSONL or Parquet file, a column of a split."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from datamodules.items import KINDS, file_part, item_of
from datamodules.record_files import Found, LinesSource, Source, TableSource, stamp
from datamodules.sample import MEDIA_KINDS, BadExampleError, Item
from datamodules.shards import Split

RECORD_FILES = {".jsonl": LinesSource, ".ndjson": LinesSource, ".parquet": TableSource}
Column = Literal["query", "target"]


def open_source(path: str, column: Column | None = None) -> Source:
    """The source that lies somewhere.

    Args:
        path: A split's folder, another folder, a JSONL (.jsonl, .ndjson) or Parquet file, or one file of text or a medium.
        column: Which items of a split; None for its targets.

    Raises:
        ValueError: Nothing lies there or nothing in it can be embedded, or a column is given for what is no split.
    """
    place = Path(path).absolute()
    if (place / "manifest.json").is_file():
        return SplitSource(path, column or "target")
    if column is not None:
        raise ValueError(f"column is {column}, but {path} is no split (manifest.json is missing); leave column out")
    if place.is_dir():
        source: Source = FilesSource(place)
    elif not place.is_file():
        raise ValueError(f"there is no file or folder {path}; name files, a folder, a JSONL or Parquet file, or a split")
    elif place.suffix.lower() not in RECORD_FILES:
        source = FilesSource(place)
    else:
        source = RECORD_FILES[place.suffix.lower()](place)
    if not len(source):
        told = ", ".join(f"{number} x {cause}" for cause, number in source.left_out.items())
        raise ValueError(f"{path} holds nothing that can be embedded" + (f"; left out: {told}" if told else ""))
    return source


class FilesSource(Source):
    """The files of a folder and those below it, in the order of their names; or one file.

    Left out are files and folders whose names begin with a dot, files whose extension is none of ours, and links that lead
    out of the folder.
    """

    def __init__(self, place: Path) -> None:
        self.folder = place if place.is_dir() else place.parent
        self.left_out = Counter()
        self._names = sorted(self._walk(self.folder.resolve())) if place.is_dir() else [place.name]
        if place.is_file() and _extension(place.name) not in KINDS:
            raise ValueError(f"{place}: the extension {place.suffix!r} is none of {', '.join(KINDS)}, jsonl or parquet")
        digest = hashlib.sha256()
        for name in self._names:
            digest.update(json.dumps([name, stamp(self.folder / name)]).encode())
        self.described = {"kind": "files", "path": str(place), "digest": digest.hexdigest()}
        self.has_media = np.array([KINDS[_extension(name)] in MEDIA_KINDS for name in self._names], bool)

    def name(self, position: int) -> str:
        return self._names[position]

    def read(self, position: int) -> tuple[str, Found]:
        path = self.folder / self._names[position]
        part = file_part(path)
        return self._names[position], Found(Item((part,)), str(path))

    def _walk(self, top: Path) -> Iterator[str]:
        for folder, folders, files in os.walk(top):
            hidden = [name for name in folders if name.startswith(".")]
            linked = [name for name in folders if name not in hidden and os.path.islink(os.path.join(folder, name))]
            self.left_out["hidden"] += len(hidden)
            self.left_out["a link to a folder"] += len(linked)
            folders[:] = [name for name in folders if name not in {*hidden, *linked}]
            for name in files:
                path = Path(folder, name)
                if cause := _why_left_out(path, top):
                    self.left_out[cause] += 1
                else:
                    yield path.relative_to(top).as_posix()
        self.left_out += Counter()  # without those that are zero


def _why_left_out(path: Path, top: Path) -> str | None:
    if path.name.startswith("."):
        return "hidden"
    if _extension(path.name) not in KINDS:
        return f"of extension {path.suffix.lower()!r}"
    if path.is_symlink() and not path.resolve().is_relative_to(top):
        return "a link that leads elsewhere"
    if not path.is_file():
        return "no plain file"
    return None if path.name.isprintable() else "of a name that cannot be printed"


class SplitSource(Source):
    """A column of a split of ours."""

    def __init__(self, folder: str, column: Column) -> None:
        self.split, self.column, self.left_out = Split(folder), column, Counter()
        extents = self.split.extents(np.arange(len(self.split)))[column]
        self.has_media = (extents["pictures"] > 0) | (extents["audio"] > 0) | (extents["video"] > 0)
        self.described = {
            "kind": "split",
            "path": os.path.abspath(folder) if self.split.folder.is_local else folder,
            "digest": self.split.digest,
            "column": column,
        }

    def name(self, position: int) -> str:
        return self.split.key(position)

    def read(self, position: int) -> tuple[str, Found]:
        example = self.split.read(position)
        item = getattr(example, self.column)
        if item is None:
            raise BadExampleError(f"this example has no {self.column}", f"no {self.column}")
        return example.key, Found(item_of(item), None)


def _extension(name: str) -> str:
    return Path(name).suffix.lower().removeprefix(".")
