"""Columns of splits embedded once, in memory or on disk, and the items in them that are distinct.

Shapes: N items of a column, D embedding width, U distinct items.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
import torch.distributed as dist
from rich.progress import Progress

from datamodules.job import ArrayTask, digest_of
from datamodules.shards import Split
from lightning_modules.block_encoder import BlockEncoder
from lightning_modules.objective.gather import gathered, num_ranks, this_rank
from lightning_modules.vectors import Chunk, Vectors

BLOCK = 1000  # examples whose vectors are made, stored and compared together; our choice
Side = Literal["query", "target"]


class Column(Protocol):
    """Unit vectors of a column, in the split's order."""

    def ids(self) -> np.ndarray:
        """Content ids (N,) int64."""
        ...

    def chunks(self, wanted: np.ndarray | None = None) -> Iterator[Chunk]:
        """All vectors, or those where `wanted` (N,) is true, some at a time."""
        ...

    def rows(self, positions: np.ndarray) -> np.ndarray:
        """The vectors at some positions, in their order, float32."""
        ...


class InMemory:
    """A column whose vectors (N, D) are in memory."""

    def __init__(self, ids: np.ndarray, vectors: np.ndarray) -> None:
        self._ids, self._vectors = ids, vectors

    def ids(self) -> np.ndarray:
        return self._ids

    def chunks(self, wanted: np.ndarray | None = None) -> Iterator[Chunk]:
        positions = np.arange(len(self._ids)) if wanted is None else np.flatnonzero(wanted)
        for first in range(0, len(positions), BLOCK):
            own = positions[first : first + BLOCK]
            yield Chunk(own, self._vectors[own])

    def rows(self, positions: np.ndarray) -> np.ndarray:
        return self._vectors[positions]


class Distinct(NamedTuple):
    """The distinct items of a column: equal ones are the same query or the same candidate.

    Args:
        first: Positions at which they stand first (U,), ascending.
        place: Of every item of the column its place among them (N,).
    """

    first: np.ndarray
    place: np.ndarray

    @classmethod
    def of(cls, ids: np.ndarray) -> "Distinct":
        _, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
        return cls(np.sort(first), np.searchsorted(np.sort(first), first[inverse]))

    def mask(self) -> np.ndarray:
        """Whether an item of the column is the first of its kind (N,)."""
        wanted = np.zeros(len(self.place), bool)
        wanted[self.first] = True
        return wanted


def embed_column(
    blocks: BlockEncoder, split: Split, side: Side, prompt: str | None, *, store: tuple[Path, str] | None, bar: Progress
) -> Column:
    """Embed a column; with several ranks each embeds a share, and all have all.

    Args:
        blocks: The encoder.
        split: Where the items lie.
        side: Which column.
        prompt: The template around its text.
        store: A folder for the vectors, and what the encoder is called in it: what is there already stays. None keeps them in
            memory.
        bar: Where the progress is shown.

    Raises:
        ValueError: An example lacks the column, cannot be used, or gets a vector that is not finite.
    """
    if store is None:
        return _in_memory(blocks, split, side, prompt, bar)
    folder, encoder = store
    vectors = Vectors(
        folder / digest_of(split.digest, side, prompt, encoder)[:16],
        split,
        side,
        prompt=prompt,
        encoder=encoder,
        prefix=blocks.prefix,
        dtype="float32",
        block_size=BLOCK,
        task=ArrayTask(this_rank(), num_ranks()),
    )
    todo = vectors.todo()
    made = _embedded(blocks, split, side, prompt, [vectors.positions(block) for block in todo], bar)
    for block, (ids, found) in zip(todo, made, strict=True):
        vectors.store(block, ids, found)
    if num_ranks() > 1:
        dist.barrier()
    if missing := vectors.missing():
        raise ValueError(f"{len(missing)} blocks of vectors are missing in {vectors.out}, a folder that all ranks must share")
    return vectors


def _in_memory(blocks: BlockEncoder, split: Split, side: Side, prompt: str | None, bar: Progress) -> InMemory:
    step = -(-len(split) // num_ranks())
    end = min(len(split), (this_rank() + 1) * step)
    num_own = max(0, end - this_rank() * step)
    first = end - step  # as many for every rank, some twice: where weights are shared out, each step needs all ranks
    cuts = [range(n, min(n + BLOCK, end)) for n in range(first, end, BLOCK)]
    found = list(_embedded(blocks, split, side, prompt, cuts, bar))
    columns = [torch.from_numpy(np.concatenate(parts)[step - num_own :]) for parts in zip(*found, strict=True)]
    if num_ranks() > 1:
        device = blocks.encoder.device
        counts = [[max(0, min(len(split), (n + 1) * step) - n * step) for n in range(num_ranks())]]
        columns = [gathered([column.to(device)], counts)[0].cpu() for column in columns]
    return InMemory(columns[0].numpy(), columns[1].numpy())


def _embedded(
    blocks: BlockEncoder, split: Split, side: Side, prompt: str | None, cuts: list[range], bar: Progress
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    ticket = bar.add_task(f"{Path(str(split.folder)).name}: {side}", total=sum(map(len, cuts)))
    for ids, vectors in blocks.embedded(split, {side: prompt}, cuts):
        bar.advance(ticket, len(ids))
        yield ids, vectors
    bar.remove_task(ticket)
