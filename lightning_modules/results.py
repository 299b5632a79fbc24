"""What an evaluation leaves: the rows of results.json as scores, and the values of each query in values.npz."""

import math
import os
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from datamodules.record import read_json

MAX_VALUES_BYTES = 2**30  # of the arrays that are read of a values.npz: our choice
BYTES = {"float32": 4.0, "int8": 1.0, "binary": 1 / 8}  # of a stored dimension, for rows that do not say
NUMBER, COUNT, TEXT = (int, float), int, str
REQUIRED = {"benchmark": TEXT}
OPTIONAL = {"metric": TEXT, "prefix": COUNT, "dtype": TEXT, "prompts": bool, "value": NUMBER, "low": NUMBER, "high": NUMBER}
OPTIONAL |= {"chance": NUMBER, "num_queries": COUNT, "num_candidates": COUNT, "bytes": COUNT}
OPTIONAL |= {"group": TEXT, "language": TEXT, "note": TEXT}


def name_of_values(benchmark: str, metric: str, prefix: int, dtype: str, has_prompts: bool) -> str:
    """What the values of each query are called in values.npz."""
    return f"{benchmark}|{metric}|{prefix}|{dtype}|{str(has_prompts).lower()}"


def write_values(file: Path, values: Mapping[str, np.ndarray]) -> None:
    """Arrays by name, compressed; at `file` there is afterwards a whole file or what was there before.

    Raises:
        OSError: The disk is full or the place is not writable.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        with beside.open("wb") as opened:
            np.savez_compressed(opened, **values)  # pyright: ignore[reportArgumentType]
        os.replace(beside, file)
    finally:
        beside.unlink(missing_ok=True)


class Number(NamedTuple):
    """A value, its interval where it has one, and the bytes of a stored vector where they are known."""

    value: float
    low: float | None = None
    high: float | None = None
    num_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Score:
    """The values of one metric in one dtype, with or without prompts, by prefix; `notes` say why there is none."""

    benchmark: str
    metric: str
    dtype: str
    has_prompts: bool
    is_headline: bool
    chance: float | None
    size: str
    group: str | None
    language: str | None
    numbers: dict[int, Number] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The metric and in what it departs from float32 with prompts."""
        parts = [self.metric, *([self.dtype] if self.dtype != "float32" else []), *([] if self.has_prompts else ["no prompts"])]
        return " · ".join(filter(None, parts))

    @property
    def is_plain(self) -> bool:
        """Whether it is of float32 vectors with prompts."""
        return self.dtype == "float32" and self.has_prompts

    @property
    def widest(self) -> Number | None:
        """The number at the largest prefix that has one."""
        return self.numbers[max(self.numbers)] if self.numbers else None


def scores_of(rows: Iterable[dict[str, Any]]) -> list[Score]:
    """The rows of results.json, of today or of old, as scores, in the order in which their benchmarks come first.

    The first metric met for a benchmark is its headline. A value that is not finite becomes a note.

    Raises:
        ValueError: There are no rows or two rows give the same score.
    """
    headlines: dict[str, str] = {}
    scores: dict[tuple[str, str, str, bool], Score] = {}
    for row in rows:
        benchmark, metric = row["benchmark"], row.get("metric") or ""
        dtype, has_prompts = row.get("dtype") or "float32", row.get("prompts") is not False
        is_headline = headlines.setdefault(benchmark, metric) == metric
        size = ", ".join(f"{row[f'num_{n}']:,} {n}" for n in ("queries", "candidates") if row.get(f"num_{n}") is not None)
        new = Score(
            *(benchmark, metric, dtype, has_prompts, is_headline),
            *(row.get("chance"), size, row.get("group"), row.get("language")),
        )
        score = scores.setdefault((benchmark, metric, dtype, has_prompts), new)
        prefix, value, note = row.get("prefix"), row.get("value"), row.get("note")
        if value is None or prefix is None or not math.isfinite(value):
            told = note or ("there is no value" if value is None else f"the value is {value:g}" if prefix else "no prefix")
            score.notes.extend([told] if told not in score.notes else [])
            continue
        if prefix in score.numbers:
            raise ValueError(f"two rows give {score.name} of {benchmark} at prefix {prefix}; keep one of them")
        score.numbers[prefix] = Number(value, row.get("low"), row.get("high"), _bytes(row, dtype, prefix))
    if not scores:
        raise ValueError("there are no results to report: rows is empty; evaluate at least one benchmark first")
    order = {benchmark: place for place, benchmark in enumerate(headlines)}
    return sorted(scores.values(), key=lambda score: order[score.benchmark])


def _bytes(row: dict[str, Any], dtype: str, prefix: int) -> int | None:
    if row.get("bytes"):
        return row["bytes"]
    return math.ceil(BYTES[dtype] * prefix) if dtype in BYTES else None


def prefixes_of(scores: Iterable[Score]) -> list[int]:
    """All prefixes that have a number, ascending."""
    return sorted({prefix for score in scores for prefix in score.numbers})


def read_results(folder: Path) -> list[dict[str, Any]]:
    """The rows of a folder's results.json.

    Raises:
        ValueError: It is missing, broken or says something else.
    """
    path = folder / "results.json"
    try:
        rows = read_json(path)
    except OSError as error:
        raise ValueError(f"no results in {folder}: {path} {_why(error)}; name folders that conf=evaluate wrote") from error
    except ValueError as error:
        raise ValueError(f"{path} is broken ({error}); evaluate again") from error
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{path} must hold a list of at least one row; evaluate again")
    for number, row in enumerate(rows):
        wrong = _wrong(row)
        if wrong:
            raise ValueError(f"{path}: row {number} {wrong}; evaluate again")
    return rows


def _wrong(row: Any) -> str | None:
    if not isinstance(row, dict):
        return "is no mapping"
    for name, kind in (REQUIRED | OPTIONAL).items():
        value = row.get(name)
        if value is None and name in OPTIONAL:
            continue
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            return f"has {value!r:.40} for `{name}`"
        if isinstance(value, int) and name in ("prefix", "bytes") and not 0 < value <= 2**31:
            return f"has {value!r:.40} for `{name}`"
    if row.get("value") is not None and not (row.get("metric") and row.get("prefix")):
        return "has a value without a metric or a prefix"
    return None


class Values:
    """Per-query values of a folder's values.npz, of float32 vectors with prompts; without the file there are none.

    Raises:
        ValueError: The file is broken.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "values.npz"
        self.is_there = self.path.exists()
        self._arrays: dict[str, np.ndarray] = {}
        try:
            if self.is_there:
                self._arrays = _arrays(self.path)
        except (OSError, ValueError, EOFError, KeyError, MemoryError, zipfile.BadZipFile, zlib.error, RuntimeError) as error:
            raise ValueError(f"{self.path} is broken ({_why(error)}); evaluate again") from error

    def of(self, score: Score, prefix: int) -> dict[int, float] | None:
        """Content id of a query to its value; None where only the mean is known.

        Raises:
            ValueError: Values and queries do not fit each other.
        """
        key = name_of_values(score.benchmark, score.metric, prefix, score.dtype, score.has_prompts)
        ids, values = self._arrays.get(f"{score.benchmark}|queries"), self._arrays.get(key)
        if ids is None or values is None:
            return None
        if ids.dtype.kind not in "iu" or values.dtype.kind != "f" or ids.ndim != 1 or ids.shape != values.shape:
            raise ValueError(f"{self.path}: {key} is no list of one number for each query; evaluate again")
        if len(np.unique(ids)) < len(ids) or not np.isfinite(values).all():
            raise ValueError(f"{self.path}: {key} has a query twice or a value that is no number; evaluate again")
        return dict(zip(ids.tolist(), values.tolist(), strict=True))


def _arrays(path: Path) -> dict[str, np.ndarray]:
    with path.open("rb") as file, np.lib.npyio.NpzFile(file, allow_pickle=False) as archive:
        names = [name for name in archive.files if name.endswith(("|float32|true", "|queries"))]
        assert archive.zip is not None
        size = sum(archive.zip.getinfo(f"{name}.npy").file_size for name in names)
        if size > MAX_VALUES_BYTES:
            raise ValueError(f"it takes {size} bytes, more than {MAX_VALUES_BYTES}")
        return {name: archive[name] for name in names}


def _why(error: BaseException) -> str:
    if isinstance(error, FileNotFoundError):
        return "does not exist"
    return str(getattr(error, "strerror", None) or error or type(error).__name__)[:200]
