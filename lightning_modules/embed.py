"""`conf=embed`: the vectors of whatever people have (files, records, shards), stored for search; see `embeddings.py`."""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from torch.utils.data import Dataset

from datamodules.collate import with_prompt
from datamodules.job import Aside, array_task, told
from datamodules.loader import loader_of
from datamodules.processors.inputs import Inputs
from datamodules.processors.processor import Processor
from datamodules.record_files import Source
from datamodules.sample import TEXT_KINDS, Item
from datamodules.sources import Column, open_source
from kernels.contrastive import check_prefixes
from lightning_modules.embeddings import EmbeddingsJob
from lightning_modules.encoder.checkpoint import read_provenance
from lightning_modules.encoder.embedder import ComputeConfig, Embedder
from lightning_modules.encoder.embedding import MEDIA_COST, load_embedder, prepared, template_of, unit_vectors
from lightning_modules.forms import Form
from lightning_modules.parts import Described, Layout
from lightning_modules.progress import bar_of

MAX_IN_A_ROW = 100  # items that cannot be embedded, as in training's streams


def embed(
    checkpoint: str,
    source: str,
    out: str,
    *,
    column: Column | None = None,
    prefix: int | None = None,
    task: str | None = None,
    dtype: Form = "float32",
    layout: Layout = "parquet",
    block_size: int = 4096,
    batch_size: int = 256,
    compute: ComputeConfig = ComputeConfig(),  # noqa: B008 (frozen)
    num_workers: int = 1,
    device: str = "auto",
    array_index: int | None = None,
    array_size: int | None = None,
) -> None:
    """Embed every item of a source and store the vectors with what they are of.

    May be stopped at any moment and begun again; the tasks of an array share the work. Items that cannot be embedded are set
    aside in `quarantine.jsonl`; a hundred of them in a row end it.

    Args:
        checkpoint: An encoder's folder, or one of sentence-transformers.
        source: A folder of files, one file, a JSONL or Parquet file of records (`id`, `title`, `text`, `code`, `image`, `page`,
            `video`, `audio`, or `parts`; media are files beside it or below), or a split of shards.
        out: Folder for the vectors.
        column: Of a split, `query` or `target`; null for its targets.
        prefix: Width of the vectors; null for all of it.
        task: What texts are embedded for: `document` puts titles before them; `search result` and the like for queries; null
            for no prompt.
        dtype: What is stored: `float32`, `float16`, `int8` (scaled) or `binary` (a bit a dimension).
        layout: `parquet`, or `npy` with the items in JSON lines beside it.
        block_size: Items of a file, which is done or not.
        batch_size: Texts embedded at once; an item with media takes the place of 16.
        compute: How a batch goes through the encoder: memory and time.
        num_workers: Processes that read and decode.
        device: `cpu`, `cuda`, or `auto` for the best there is.
        array_index: This task's number from 0; null for that of a Slurm array, or the only task.
        array_size: Number of tasks.

    Raises:
        ValueError: A number, prefix or task does not fit, nothing can be embedded, the folder holds what was made otherwise, or
            too many items in a row are bad.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    console, array, template = Console(), array_task(array_index, array_size), template_of(task)
    found = open_source(source, column)
    encoder = load_embedder(checkpoint, device)
    encoder.use(compute)
    width = encoder.config.embedding_dim if prefix is None else prefix
    check_prefixes((width,), encoder.config.embedding_dim)
    made_by = {"encoder": {"path": os.path.abspath(checkpoint), "sha256": read_provenance(checkpoint)["sha256"]}}
    made_by |= {"task": task, "prefix": width, "dtype": dtype, "layout": layout, "source": found.described}
    job = EmbeddingsJob(out, made_by, len(found), block_size, array)
    assert encoder.processor is not None
    own, todo = job.own_blocks, job.todo()
    if len(todo) < len(own):
        console.print(f"{len(own) - len(todo)} of {len(own)} blocks had been done and are left as they are")
    windows = Windows(found, template, encoder.processor, [job.positions(block) for block in todo], batch_size)
    num_items = sum(len(job.positions(block)) for block in todo)
    began = time.monotonic()
    with bar_of(console) as bar:
        ticket = bar.add_task(f"{Path(source).name}", total=num_items)
        in_a_row = 0
        embedded = _embedded(encoder, windows, width, num_workers)
        for block in todo:
            items, vectors, aside = [], [np.empty((0, width), np.float32)], []
            while len(items) + len(aside) < len(job.positions(block)):
                made = next(embedded)
                items += made.items
                vectors.append(made.vectors)
                aside += made.aside
                in_a_row = made.bad_at_end + (in_a_row if not made.items else 0)
                if in_a_row >= MAX_IN_A_ROW:
                    raise ValueError(
                        f"{in_a_row} items in a row cannot be embedded, the last of them {aside[-1].key!r}: "
                        f"{aside[-1].message}; see to the source or name another"
                    )
                bar.advance(ticket, len(made.items) + len(made.aside))
            job.store(block, items, np.concatenate(vectors), aside)
    seconds = time.monotonic() - began
    here = f"{num_items:,} done here in {seconds:.1f} s, {num_items / max(seconds, 1e-9):,.1f} items/s"
    if about := job.finish(console):
        _tell(console, about, found)
        kinds = ", ".join(f"{number:,} {kind}" for kind, number in about["modalities"].items())
        num_bytes = sum(file["bytes"] for block in about["blocks"] for file in block["files"].values())
        here = f"{about['num_items']:,} items ({kinds}) in {out}, {dtype} of {width}, {num_bytes:,} bytes; {here}"
    console.print(here, soft_wrap=True)


def _tell(console: Console, about: Mapping[str, Any], source: Source) -> None:
    """What of the source was not embedded."""
    if about["quarantined"]:
        number = sum(about["quarantined"].values())
        console.print(f"{number:,} set aside in quarantine.jsonl: {told(about['quarantined'])}", soft_wrap=True)
    if source.left_out:
        console.print(f"{source.left_out.total():,} left out: {told(source.left_out)}", soft_wrap=True)


@dataclass(frozen=True)
class Window:
    """Successive items of a source, read: those of them that can be embedded, their inputs, and the others.

    Args:
        items: In order.
        inputs: Theirs; None where there are none.
        aside: The others, each with its place among the positions.
        positions: All of them.
    """

    items: list[Described]
    inputs: Inputs | None
    aside: list[tuple[int, Aside]]
    positions: range


class Embedded(NamedTuple):
    """A window with vectors (N, D): its good items, those set aside, and how many of them stand at its end."""

    items: list[Described]
    vectors: np.ndarray
    aside: list[Aside]
    bad_at_end: int


class Windows(Dataset[Window]):
    """A source cut into windows that are read, decoded and made inputs of at once.

    Args:
        source: What is read.
        template: The prompt around texts.
        processor: Items to inputs.
        blocks: Positions of each block; a window ends where its block does.
        batch_size: Texts of a window; an item with media takes the place of some.
    """

    def __init__(
        self, source: Source, template: str | None, processor: Processor, blocks: Sequence[range], batch_size: int
    ) -> None:
        self.source, self.template, self.processor = source, template, processor
        self.windows = [window for block in blocks for window in _windows(block, source.has_media, batch_size)]

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, window: int) -> Window:
        positions, aside = self.windows[window], []
        found: list[tuple[Described, Item]] = []
        for position in positions:
            try:
                name, read = self.source.read(position)
            except ValueError as error:
                aside.append((position, _aside(_name(self.source, position), error)))
                continue
            texts = [str(part.data) for part in read.item.parts if part.kind in TEXT_KINDS]
            described = Described(name, read.item.modality, "\n".join(texts) if texts else None, read.path, position)
            found.append((described, with_prompt(read.item, self.template)))

        def refuse(place: int, error: ValueError) -> None:
            aside.append((found[place][0].position, _aside(found[place][0].id, error)))

        places, inputs = prepared([item for _, item in found], self.processor, refuse)
        return Window([found[place][0] for place in places], inputs, aside, positions)


def _windows(block: range, has_media: np.ndarray, batch_size: int) -> Iterator[range]:
    start, cost = block.start, 0
    for position in block:
        own = min(batch_size, MEDIA_COST) if has_media[position] else 1
        if cost + own > batch_size:
            yield range(start, position)
            start, cost = position, 0
        cost += own
    yield range(start, block.stop)


def _embedded(encoder: Embedder, windows: Windows, width: int, num_workers: int) -> Iterator[Embedded]:
    for window in loader_of(windows, num_workers):
        items, aside = window.items, list(window.aside)
        vectors = np.empty((0, width), np.float32)
        if window.inputs is not None:

            def refuse(place: int, error: ValueError, items: list[Described] = items, aside: list = aside) -> None:
                aside.append((items[place].position, _aside(items[place].id, error)))

            places, vectors = unit_vectors(encoder, window.inputs, width, refuse)
            items = [items[place] for place in places]
        aside.sort(key=lambda found: found[0])
        last = items[-1].position if items else window.positions.start - 1
        yield Embedded(items, vectors, [found for _, found in aside], window.positions.stop - 1 - last)


def _name(source: Source, position: int) -> str:
    try:
        return source.name(position)
    except ValueError:
        return str(position)


def _aside(name: str, error: ValueError) -> Aside:
    return Aside(name, getattr(error, "cause", "cannot be embedded"), str(error))
