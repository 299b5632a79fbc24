"""Embedded items on disk: their vectors, what they are, and where their media lie. Written by `conf=embed`, read by searches.

    embeddings.json             what all of it is, written last: a folder without it is not finished
    part-000012.parquet ..      the items, see `lightning_modules.parts`; one without items has no file
    quarantine.jsonl            items that could not be embedded: id, cause, message
    made_by.json, blocks/       how far it is, see `datamodules.job`

Shapes: N items, D width.
"""

import bisect
import json
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from datamodules.files import replace_file
from datamodules.items import medium_part
from datamodules.job import ArrayTask, Aside, Job, told
from datamodules.record import read_json
from datamodules.record_files import Source
from datamodules.sample import MEDIA_KINDS, Item
from datamodules.sources import open_source
from kernels.contrastive import check_prefixes
from lightning_modules.forms import DTYPES, FORMS, Form, decoded, encoded, numbers_of
from lightning_modules.parts import LAYOUTS, Described, Layout, read_items, read_vectors, write_part

FORMAT = "polyphony-embeddings/1"
DESCRIBED, QUARANTINE = "embeddings.json", "quarantine.jsonl"
OLD_SECONDS = 3600  # our choice
MAX_CACHED_BYTES = 2**29  # of parts that are kept in memory for the next question: our choice


class Embeddings:
    """Stored embeddings. Vectors, texts and media are read when they are asked for; ids and modalities are in memory.

    Args:
        folder: Where they lie.

    Attributes:
        about: What `embeddings.json` says: encoder, task, prefix, dtype, layout, source, counts.
        width: D of the stored vectors.
        dtype: The form they are stored in.
        ids: Names of the items, in order.
        modalities: The kind of each, `mixed` where an item has parts of several.

    Raises:
        ValueError: They are not finished, a file is missing or damaged, or another version wrote them.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.about = _read_about(self.folder)
        self.width: int = self.about["prefix"]
        self.dtype: Form = self.about["dtype"]
        self.layout: Layout = self.about["layout"]
        for block in self.about["blocks"]:
            for name, described in block["files"].items():
                file = self.folder / name
                if not file.is_file() or file.stat().st_size != described["bytes"]:
                    raise ValueError(f"{file} is missing or of another size than when it was written; embed again")
        self._cached: OrderedDict[tuple[str, int], tuple[Any, int]] = OrderedDict()
        self._source: Source | None = None
        self._numbers = [block["number"] for block in self.about["blocks"]]
        self._ends: list[int] = np.cumsum([block["num_items"] for block in self.about["blocks"]], dtype=np.int64).tolist()
        self.ids: list[str] = []
        self.modalities: list[str] = []
        for part, block in enumerate(self.about["blocks"]):
            rows = self._items(part, ("id", "modality"))
            if len(rows) != block["num_items"]:
                raise ValueError(f"part {block['number']} in {self.folder} has {len(rows)} items, not {block['num_items']}")
            self.ids += [row["id"] for row in rows]
            self.modalities += [row["modality"] for row in rows]

    def __len__(self) -> int:
        return len(self.ids)

    def described(self, row: int) -> dict[str, Any]:
        """An item's `id`, `modality`, `text` and `path` (None where it has none)."""
        item = self._described(row)
        return {name: item[name] for name in ("id", "modality", "text", "path")}

    def vectors(self, rows: np.ndarray | None = None, prefix: int | None = None) -> np.ndarray:
        """Unit vectors (N, prefix) float32 of some rows, in their order, or of all; a shorter prefix is renormalised.

        Raises:
            ValueError: The prefix is wider than the vectors, or a part is damaged.
        """
        prefix = self.width if prefix is None else prefix
        check_prefixes((prefix,), self.width)
        rows = np.arange(len(self)) if rows is None else np.asarray(rows, np.int64)
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(self):
            raise ValueError(f"rows go from {rows.min()} to {rows.max()}; there are {len(self)} items")
        found = np.empty((len(rows), prefix), np.float32)
        parts = np.searchsorted(self._ends, rows, side="right")
        for part in np.unique(parts).tolist():
            own = np.flatnonzero(parts == part)
            stored = self._stored(part)
            found[own] = decoded(stored[rows[own] - self._start(part)], self.dtype, self.width, prefix)
        return found

    def medium(self, row: int) -> tuple[bytes, str] | None:
        """Bytes and format (`jpg`, `ogg`, ..) of an item's first medium, read again from where it came from; None for text.

        Raises:
            ValueError: It is no longer there.
        """
        item = self._described(row)
        if item["modality"] != "mixed" and item["modality"] not in MEDIA_KINDS:
            return None
        if item["path"] is not None:
            try:
                part = medium_part(Path(item["path"]).read_bytes())
            except OSError as error:
                raise ValueError(f"the medium of {item['id']!r} is no longer at {item['path']} ({error.strerror})") from error
        else:
            part = next(part for part in self._item(item["position"]).parts if part.kind in MEDIA_KINDS)
        assert isinstance(part.data, bytes)
        return part.data, part.format

    def _item(self, position: int) -> Item:
        """The item at a position of the source, which must be as it was."""
        if self._source is None:
            about = self.about["source"]
            self._source = open_source(about["path"], about.get("column"))
            if self._source.described != about:
                self._source = None
                raise ValueError(f"{about['path']} has changed since its items were embedded; embed again")
        return self._source.read(position)[1].item

    def _described(self, row: int) -> dict[str, Any]:
        if not 0 <= row < len(self):
            raise ValueError(f"there is no item {row}; there are {len(self)}")
        part = bisect.bisect_right(self._ends, row)
        items = self._kept(("items", part), lambda: self._items(part, Described._fields), lambda found: 1000 * len(found))
        return items[row - self._start(part)]

    def _start(self, part: int) -> int:
        return self._ends[part - 1] if part else 0

    def _items(self, part: int, columns: Sequence[str]) -> list[dict[str, Any]]:
        try:
            return read_items(self.folder, self._numbers[part], self.layout, columns)
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"part {self._numbers[part]} in {self.folder} cannot be read ({error}); embed again") from error

    def _stored(self, part: int) -> np.ndarray:
        shape = (self.about["blocks"][part]["num_items"], numbers_of(self.width, self.dtype))

        def read() -> np.ndarray:
            try:
                found = read_vectors(self.folder, self._numbers[part], self.layout)
            except (OSError, KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    f"part {self._numbers[part]} in {self.folder} cannot be read ({error}); embed again"
                ) from error
            if found.shape != shape or found.dtype != DTYPES[self.dtype]:
                raise ValueError(f"part {self._numbers[part]} in {self.folder} holds {found.dtype} {found.shape}; embed again")
            return found

        return self._kept(("vectors", part), read, lambda found: 0 if self.layout == "npy" else found.nbytes)

    def _kept(self, key: tuple[str, int], read: Callable[[], Any], size: Callable[[Any], int]) -> Any:
        """What is in memory, or read now; what was not asked for the longest goes when there is too much."""
        if key not in self._cached:
            found = read()
            self._cached[key] = found, size(found)
            while len(self._cached) > 1 and sum(num_bytes for _, num_bytes in self._cached.values()) > MAX_CACHED_BYTES:
                self._cached.popitem(last=False)
        self._cached.move_to_end(key)
        return self._cached[key][0]


class EmbeddingsJob(Job):
    """Embeddings that are being made, block by block, by the tasks of an array.

    Args:
        folder: Where they go.
        made_by: All that decides what they are: must have `encoder`, `task`, `prefix`, `dtype`, `layout` and `source`.
        num_records: Items of the source.
        block_size: Items of a part.
        task: Which blocks are made here.

    Raises:
        ValueError: The folder holds what was made otherwise; says what differs.
    """

    def __init__(
        self, folder: str | Path, made_by: Mapping[str, Any], num_records: int, block_size: int, task: ArrayTask
    ) -> None:
        super().__init__(folder, made_by, num_records, block_size, task)
        self.dtype: Form = made_by["dtype"]
        self.layout: Layout = made_by["layout"]

    def is_done(self, block: int) -> bool:
        """Whether a block's files are there as they were written."""
        try:
            files = self._read(block)["files"]
        except FileNotFoundError:
            return False
        paths = {name: self.out / name for name in files}
        return all(path.is_file() and path.stat().st_size == files[name]["bytes"] for name, path in paths.items())

    def store(self, block: int, items: Sequence[Described], unit_ND: np.ndarray, aside: Sequence[Aside]) -> None:
        """Write a block's items with their unit vectors (N, D), and then that it is done.

        Raises:
            OSError: The disk is full or the place not writable; the block is then not done.
        """
        assert len(items) + len(aside) == len(self.positions(block))
        files = write_part(self.out, block, self.layout, items, encoded(unit_ND, self.dtype)) if items else {}
        kinds = dict(sorted(Counter(item.modality for item in items).items()))
        done = {"num_examples": len(items), "files": files, "counts": kinds, "aside": [found._asdict() for found in aside]}
        replace_file(self._described(block), json.dumps(done, ensure_ascii=False))

    def finish(self, console: Console) -> dict[str, Any] | None:
        """Write `embeddings.json` if no block is missing; what it says, None while blocks are missing.

        Raises:
            ValueError: Not one item was embedded.
        """
        missing = [block for block in range(self.num_blocks) if not self.is_done(block)]
        if missing:
            console.print(f"{len(missing)} of {self.num_blocks} blocks are missing (of other tasks), the first is {missing[0]}")
            return None
        found = [(block, self._read(block)) for block in range(self.num_blocks)]
        kinds, causes = Counter[str](), Counter[str]()
        for _, done in found:
            kinds.update(done["counts"])
            causes.update(record["cause"] for record in done["aside"])
        bad = [Aside(**record) for _, done in found for record in done["aside"]]
        lines = [json.dumps({"id": key, "cause": cause, "message": why}, ensure_ascii=False) for key, cause, why in bad]
        replace_file(self.out / QUARANTINE, "".join(f"{line}\n" for line in lines))
        if not kinds:
            raise ValueError(f"nothing was embedded of {self.num_records:,} items: {told(causes)}; see {self.out / QUARANTINE}")
        blocks = [
            {"number": block, "num_items": done["num_examples"], "files": done["files"]}
            for block, done in found
            if done["files"]
        ]
        about = {"format": FORMAT, **self.made_by, "num_items": kinds.total(), "modalities": dict(sorted(kinds.items()))}
        about |= {"quarantined": dict(causes.most_common()), "blocks": blocks}
        _remove_old(self.out)
        replace_file(self.out / DESCRIBED, json.dumps(about, indent=1, ensure_ascii=False, sort_keys=True))
        return about


def write_embeddings(
    folder: str | Path,
    items: Sequence[Described],
    unit_ND: np.ndarray,
    *,
    encoder: Mapping[str, str],
    task: str | None = None,
    dtype: Form = "float32",
    layout: Layout = "parquet",
    source: Mapping[str, Any] | None = None,
    block_size: int = 4096,
) -> None:
    """Store vectors (N, D) of unit length that were made elsewhere, each with what it is of.

    Args:
        folder: Where they go.
        items: What they are of (N); those with media have a `path`.
        unit_ND: The vectors.
        encoder: `path` and `sha256` of what made them.
        task: The task string that texts had.
        dtype: The form they are stored in.
        layout: The files they are stored in.
        source: Where they came from.
        block_size: Items of a file.

    Raises:
        ValueError: The folder holds what was made otherwise.
    """
    made_by = {"encoder": dict(encoder), "task": task, "prefix": unit_ND.shape[1], "dtype": dtype, "layout": layout}
    job = EmbeddingsJob(folder, made_by | {"source": dict(source or {})}, len(items), block_size, ArrayTask(0, 1))
    for block in job.todo():
        own = job.positions(block)
        job.store(block, items[own.start : own.stop], unit_ND[own.start : own.stop], [])
    job.finish(Console(quiet=True))


def _remove_old(folder: Path) -> None:
    """Remove what killed tasks had begun to write; what is young may be another's who still writes."""
    for partial in (*folder.glob(".*.partial"), *folder.glob("blocks/.*.partial")):
        with suppress(FileNotFoundError):
            if time.time() - partial.stat().st_mtime > OLD_SECONDS:
                partial.unlink()


def _read_about(folder: Path) -> dict[str, Any]:
    file = folder / DESCRIBED
    if not file.is_file():
        begun = "not finished: run conf=embed again" if (folder / "made_by.json").exists() else "no embeddings: name another"
        raise ValueError(f"{folder} holds {begun} ({DESCRIBED} is missing)")
    try:
        about = read_json(file)
        if about.get("format") != FORMAT:
            raise ValueError(f"its format is {about.get('format')!r}, this version reads {FORMAT!r}")
        if about["dtype"] not in FORMS or about["layout"] not in LAYOUTS or type(about["prefix"]) is not int:
            raise ValueError("a field is of another type")
        for block in about["blocks"]:
            if any(Path(name).name != name or type(file["bytes"]) is not int for name, file in block["files"].items()):
                raise ValueError("a part's file lies elsewhere")
            if type(block["number"]) is not int or type(block["num_items"]) is not int:
                raise ValueError("a part's number is none")
        if sum(block["num_items"] for block in about["blocks"]) != about["num_items"]:
            raise ValueError("its parts do not add up")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} cannot be used ({error}); embed again") from error
    return about
