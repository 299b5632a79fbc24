"""`conf=search`: the nearest of stored embeddings to a query: all compared, or a shortlist.

A shortlist is made by fewer dimensions, by signs or by an index. Whatever made it, its candidates are compared again in the
width that is asked for, so that cosines are true ones.
Source of the shortlist by a prefix: Matryoshka representations, arXiv 2205.13147, section 4.3 (adaptive retrieval).

Letters: Q queries, N vectors, D width of a query, k neighbours, C candidates.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from datamodules.files import replace_file
from datamodules.items import file_part, item_of
from datamodules.sample import KINDS, Item
from datamodules.sources import open_source
from kernels.contrastive import check_prefixes
from lightning_modules.embeddings import Embeddings
from lightning_modules.encoder.checkpoint import read_provenance
from lightning_modules.encoder.embedder import Embedder, cut
from lightning_modules.forms import unit
from lightning_modules.listing import printable
from lightning_modules.neighbours import Index, IndexSettings, Kind, Neighbours, built_once, compared, exact, require_faiss
from lightning_modules.vectors import Chunk

# Our choice.
HELD_BYTES = 2**31  # of vectors in memory; of more, each search reads the store (npy is mapped)
CHUNK = 8192  # vectors that are compared at a time
QUERIES_AT_ONCE = 64  # whose candidates are compared again together
PRINTED = 20  # queries whose finds are shown in the terminal
EXCERPT = 200  # letters of a text that are shown there


def search(
    embeddings: str,
    *,
    checkpoint: str | None = None,
    text: str | None = None,
    file: str | None = None,
    kind: str | None = None,
    queries: str | None = None,
    task: str | None = "search result",
    k: int = 10,
    prefix: int | None = None,
    modality: str | None = None,
    shortlist: int | None = None,
    index: Kind = "exact",
    index_settings: IndexSettings = IndexSettings(),  # noqa: B008 (frozen)
    out: str | None = None,
    device: str = "auto",
) -> None:
    """Print the nearest of stored embeddings to a query, or to many.

    Args:
        embeddings: Folder that `conf=embed` wrote.
        checkpoint: The encoder that made them; null for where it lay then.
        text: A query; with `file` the text before it, as one item.
        file: A query: a picture, sound, clip, document or text.
        kind: What the file is, where its extension does not say: `page` for a picture of a document's page, which is cut into
            tiles; null for what the extension says.
        queries: Many: a folder of files, a JSONL or Parquet file, or a split, whose queries are taken.
        task: Of the prompt around queries of text alone; null for none.
        k: Items that are wanted.
        prefix: Width of the comparison; null for all that is stored.
        modality: Of the items; null for all.
        shortlist: Dimensions that candidates are chosen by, to be compared again in full; null for all.
        index: `exact` compares all; from some 1e6 items on an index is faster, and finds most: `hnsw` (all of it in memory),
            `ivfsq8` (a byte a number), `ivfpq` (small), `binary` (a bit a number). It is built once, beside the embeddings.
        index_settings: How an index is built and searched; `oversampling` is for a shortlist too.
        out: File for what was found, a JSON line a query; null for none.
        device: `cpu`, `cuda`, or `auto` for the best there is; the queries are embedded there.

    Raises:
        ValueError: The embeddings are unfinished or another encoder's, there is no query or one cannot be used, or a number,
            prefix or modality does not fit.
    """
    if k < 1:
        raise ValueError(f"k is {k}; it must be at least 1")
    console, stored = Console(), Embeddings(embeddings)
    asked = _asked(text, file, kind, queries)
    encoder = encoder_of(stored, checkpoint, device)
    narrow = shortlist if shortlist is not None or index == "exact" else prefix  # an index is over what will be compared
    with console.status(f"{index} of {len(stored):,} vectors"):
        searcher = Searcher(stored, index=index, shortlist=narrow, settings=index_settings)
        vectors = encoder.embed([item for _, item in asked], task=task)
        found = searcher.search(vectors, k, prefix=prefix, modality=modality)
    rows = [_told(stored, *pair) for pair in zip(*found, strict=True)]
    for (name, _), own in list(zip(asked, rows, strict=True))[:PRINTED]:
        console.print(_table(name, own))
    if len(asked) > PRINTED:
        console.print(f"the first {PRINTED} of {len(asked):,} queries are shown")
    if out is not None:
        lines = (json.dumps({"id": name, "found": own}, ensure_ascii=False) for (name, _), own in zip(asked, rows, strict=True))
        replace_file(Path(out), "".join(f"{line}\n" for line in lines))
        console.print(f"what was found is in {out}", soft_wrap=True)


def _asked(text: str | None, file: str | None, kind: str | None, queries: str | None) -> list[tuple[str, Item]]:
    """The queries with their names."""
    if queries is None:
        item = query_item(text, file, kind)
        return [(" ".join(filter(None, (text, file))), item)]
    if (text, file, kind) != (None, None, None):
        raise ValueError("give either queries, or text and file, which are one query together")
    source, found = open_source(queries, "query" if (Path(queries) / "manifest.json").is_file() else None), []
    for position in range(len(source)):
        try:
            name, (item, _) = source.read(position)
        except ValueError as error:
            raise ValueError(f"{queries}: {source.name(position)} cannot be used: {error}") from error
        found.append((name, item))
    return found


def query_item(text: str | None, file: str | Path | None, kind: str | None = None) -> Item:
    """The item that is asked for: a text, a file, or the text before the file.

    Args:
        text: None or empty for none.
        file: None for none.
        kind: What the file is; None for what its extension says.

    Raises:
        ValueError: There is neither, or the file is none that is read as such.
    """
    parts: list[Any] = [text] if text and text.strip() else []
    parts += [] if file is None else [file_part(Path(file), kind)]
    if kind is not None and kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(KINDS)}")
    if not parts:
        raise ValueError("there is nothing to search for; give text=.., file=.. or queries=..")
    return item_of(parts)


def encoder_of(embeddings: Embeddings, checkpoint: str | None, device: str = "auto") -> Embedder:
    """The encoder that made embeddings, ready to embed queries.

    Args:
        embeddings: What will be searched.
        checkpoint: Its folder; None for where it lay when they were made.
        device: `cpu`, `cuda`, or `auto`.

    Raises:
        ValueError: No encoder lies there, or another one.
    """
    made_by = embeddings.about["encoder"]
    checkpoint = str(made_by["path"]) if checkpoint is None else checkpoint
    if (found := read_provenance(checkpoint)["sha256"]) != made_by["sha256"]:
        raise ValueError(
            f"the encoder in {checkpoint} (SHA-256 {found[:12]}..) is not the one that made {embeddings.folder} "
            f"({made_by['path']}, {made_by['sha256'][:12]}..), whose vectors lie elsewhere; give checkpoint=<that one>"
        )
    return Embedder.from_checkpoint(checkpoint, device=device)


def _told(embeddings: Embeddings, rows_K: np.ndarray, cosine_K: np.ndarray) -> list[dict[str, Any]]:
    """What was found, best first."""
    found = zip(rows_K.tolist(), cosine_K.tolist(), strict=True)
    return [{"rank": n, "cosine": cosine, "row": row, **embeddings.described(row)} for n, (row, cosine) in enumerate(found, 1)]


def _table(query: str, rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), title=Text(printable(query), "bold"), title_justify="left")
    for column in ("rank", "cosine"):
        table.add_column(column, justify="right", no_wrap=True)
    for column in ("modality", "id", "text or file"):
        table.add_column(column, overflow="fold")
    for row in rows:
        text = printable(row["text"] or row["path"] or "")
        shown = text[:EXCERPT] + "…" * (len(text) > EXCERPT)
        table.add_row(str(row["rank"]), f"{row['cosine']:.3f}", *map(Text, (row["modality"], printable(row["id"]), shown)))
    return table


class Searcher:
    """Searches stored embeddings.

    Args:
        embeddings: What is searched.
        index: `exact` compares all; `hnsw`, `ivfpq` and `ivfsq8` are FAISS's, which find most; `binary` compares the signs of
            all by Hamming distance. An index lies beside the vectors, where the first search builds it.
        shortlist: Dimensions that candidates are chosen by; None for all that are stored.
        settings: `oversampling` is for any shortlist, the rest for an index.

    Raises:
        ValueError: The shortlist is no width, FAISS is missing for an index, or the index does not fit.
    """

    def __init__(
        self,
        embeddings: Embeddings,
        *,
        index: Kind = "exact",
        shortlist: int | None = None,
        settings: IndexSettings = IndexSettings(),  # noqa: B008 (frozen)
    ) -> None:
        self.embeddings, self.settings, self.kind = embeddings, settings, index
        self.first = embeddings.width if shortlist is None else shortlist
        check_prefixes((self.first,), embeddings.width)
        self.modalities = np.array(embeddings.modalities)
        self._held: dict[int, np.ndarray] = {}
        self._index = None if index == "exact" else self._built(index)

    def search(
        self, query_QD: Tensor | np.ndarray, k: int, *, prefix: int | None = None, modality: str | None = None
    ) -> Neighbours:
        """The k nearest rows, or all where there are fewer; of equal ones the lower row.

        Where an index finds fewer than there are (a rare modality, say), all are compared for that query.

        Args:
            query_QD: Of any length, at least as wide as the prefix.
            k: How many.
            prefix: Width of the comparison; None for all that is stored.
            modality: Of the rows; None for all.

        Raises:
            ValueError: k is below 1, the prefix is narrower than what the shortlist is made by, or wider than a vector, or
                nothing is of the modality.
        """
        width = self.embeddings.width if prefix is None else prefix
        check_prefixes((width,), self.embeddings.width)
        if k < 1:
            raise ValueError(f"k is {k}; it must be at least 1")
        if width < self.first and (self._index is not None or self.first < self.embeddings.width):
            raise ValueError(
                f"the prefix is {width}, but candidates are chosen by {self.first} dimensions; give shortlist={width}"
            )
        wanted = None if modality is None else self._of(modality)
        query_QD = torch.as_tensor(query_QD, dtype=torch.float32)
        found = [self._nearest(part_QD, k, width, wanted) for part_QD in query_QD.split(QUERIES_AT_ONCE)]
        return Neighbours(*(np.concatenate(column) for column in zip(*found, strict=True)))

    def _nearest(self, query_QD: Tensor, k: int, width: int, wanted: np.ndarray | None) -> Neighbours:
        unit_QD = cut(query_QD, width)
        num = len(self.embeddings) if wanted is None else int(wanted.sum())
        num_candidates = min(k * self.settings.oversampling, num)
        by_signs = self.kind == "binary" and wanted is not None  # FAISS selects nothing there
        if (self._index is None and self.first >= width) or num_candidates == num or by_signs:
            return exact(unit_QD, self._chunks(width, wanted), k)
        short_QD = cut(query_QD, self.first)
        if self._index is None:
            position_QC = np.sort(exact(short_QD, self._chunks(self.first, wanted), num_candidates).positions, axis=1)
        else:
            position_QC = self._index.candidates(short_QD, num_candidates, wanted)
        found = compared(unit_QD, position_QC, min(k, num), lambda rows: self._rows(rows, width))
        if (lacking_Q := found.positions[:, -1] < 0).any():
            for column, whole in zip(
                found, exact(unit_QD[torch.from_numpy(lacking_Q)], self._chunks(width, wanted), k), strict=True
            ):
                column[lacking_Q] = whole
        return found

    def _of(self, modality: str) -> np.ndarray:
        """Which rows (N,) are of a modality."""
        wanted = self.modalities == modality
        if not wanted.any():
            raise ValueError(f"nothing here is of modality {modality!r}; there are: {', '.join(sorted(set(self.modalities)))}")
        return wanted

    def _built(self, kind: Kind) -> Index:
        require_faiss()
        self.settings.check(kind, self.first)
        name = f"{kind}.faiss" if self.first == self.embeddings.width else f"{kind}-{self.first}.faiss"
        return built_once(
            self.embeddings.folder / name,
            kind,
            lambda: self._chunks(self.first),
            np.arange(len(self.embeddings)),
            self.first,
            self.settings,
            made_by=[self.embeddings.about, self.first],
        )

    def _chunks(self, width: int, wanted: np.ndarray | None = None) -> Iterator[Chunk]:
        rows = np.arange(len(self.embeddings)) if wanted is None else np.flatnonzero(wanted)
        for first in range(0, len(rows), CHUNK):
            own = rows[first : first + CHUNK]
            yield Chunk(own, self._rows(own, width))

    def _rows(self, rows: np.ndarray, width: int) -> np.ndarray:
        """Unit vectors (C, width), from memory where they are held."""
        if (held := self._in_memory(width)) is None:
            wider = next((held for held in self._held.values() if held.shape[1] > width), None)
            return self.embeddings.vectors(rows, width) if wider is None else unit(wider[rows, :width])
        is_run = len(rows) and rows[-1] - rows[0] == len(rows) - 1 and (np.diff(rows) == 1).all()
        return held[rows[0] : rows[-1] + 1] if is_run else held[rows]

    def _in_memory(self, width: int) -> np.ndarray | None:
        """All vectors (N, width), where they and those held before take no more than `HELD_BYTES`."""
        if width not in self._held:
            num_bytes = 4 * len(self.embeddings) * (width + sum(self._held))
            if num_bytes > HELD_BYTES:
                return None
            self._held[width] = self.embeddings.vectors(None, width)
        return self._held[width]
