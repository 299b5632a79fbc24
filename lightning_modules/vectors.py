"""Vectors of a split's column on disk, made block by block by the tasks of an array, and read without loading them.

    <folder>/made_by.json       the encoder, the split, and all else that decides what the vectors are
    <folder>/000123.npy         unit vectors of block 123 (N, D), in the order of its positions
    <folder>/000123.ids.npy     content ids of the same items (N,) int64
    <folder>/blocks/000123.json written last, see `datamodules.job`: without it the two files do not count

Shapes: N items of a block, D embedding width (a prefix), P positions.
"""

import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from datamodules.job import ArrayTask, Job
from datamodules.shards import Split

MAX_MAPS = 4096  # files that are mapped at a time; Linux allows 65,530 maps to a process
Dtype = Literal["float16", "float32"]


class Chunk(NamedTuple):
    """Some of the vectors: their positions in the split (N,) int64, ascending, and themselves (N, D)."""

    positions: np.ndarray
    vectors: np.ndarray


class Vectors(Job):
    """The vectors of a column, one item to an example.

    Args:
        folder: Where they lie.
        split: What they are of.
        column: `query` or `target`.
        prompt: The template around its text, None for none.
        encoder: SHA-256 of the encoder's weights.
        prefix: Width D.
        dtype: Of what is stored; half of it costs cosines about 1e-4.
        block_size: Positions of a block.
        task: Which blocks are made here.

    Raises:
        ValueError: The folder holds vectors of another making; says what differs.
    """

    def __init__(
        self,
        folder: str | Path,
        split: Split,
        column: Literal["query", "target"],
        *,
        prompt: str | None,
        encoder: str,
        prefix: int,
        dtype: Dtype,
        block_size: int,
        task: ArrayTask,
    ) -> None:
        made_by = {"split": split.digest, "column": column, "prompt": prompt, "encoder": encoder, "prefix": prefix}
        super().__init__(folder, made_by | {"dtype": dtype}, len(split), block_size, task)
        self.width, self.dtype = prefix, dtype
        self._mapped = lru_cache(MAX_MAPS)(lambda file: np.load(file, mmap_mode="r", allow_pickle=False))

    def is_done(self, block: int) -> bool:
        """Whether a block's two files are there as they were written."""
        try:
            sizes = self._read(block)["counts"]
        except FileNotFoundError:
            return False
        files = self._files(block)
        return all(file.is_file() and file.stat().st_size == sizes.get(name) for name, file in files.items())

    def missing(self) -> list[int]:
        """The blocks, of whatever task, that are not done."""
        return [block for block in range(self.num_blocks) if not self.is_done(block)]

    def store(self, block: int, ids: np.ndarray, vectors: np.ndarray) -> None:
        """Write a block's content ids (N,) and unit vectors (N, D), and then that it is done.

        Raises:
            OSError: The disk is full or the place is not writable; the block is then not done.
        """
        assert ids.shape == (len(self.positions(block)),)
        assert vectors.shape == (len(ids), self.width)
        arrays, sizes = {"ids": ids.astype(np.int64), "vectors": vectors.astype(self.dtype)}, {}
        for name, file in self._files(block).items():
            beside = file.with_name(f".{file.name}.{os.getpid()}.partial")
            try:
                with beside.open("wb") as opened:
                    np.save(opened, arrays[name], allow_pickle=False)
                sizes[name] = beside.stat().st_size
                os.replace(beside, file)
            except OSError as error:
                raise OSError(error.errno, f"could not write {file}: {error.strerror or error}") from error
            finally:
                beside.unlink(missing_ok=True)
        self.write(block, (), sizes)

    def ids(self) -> np.ndarray:
        """Content ids of all items, in order (int64)."""
        return np.concatenate([np.load(self._files(block)["ids"], allow_pickle=False) for block in range(self.num_blocks)])

    def chunks(self, wanted: np.ndarray | None = None) -> Iterator[Chunk]:
        """The vectors block by block, in order; those where `wanted` (bool, one for each position) is true."""
        for block in range(self.num_blocks):
            positions, vectors = np.array(self.positions(block)), self._of(block)
            if wanted is not None and not (mask := wanted[positions]).all():
                positions, vectors = positions[mask], vectors[mask]
            yield Chunk(positions, vectors)

    def rows(self, positions: np.ndarray) -> np.ndarray:
        """The vectors at some positions (P,), in their order (P, D) float32."""
        found = np.empty((len(positions), self.width), np.float32)
        blocks = positions // self.block_size
        order = np.argsort(blocks, kind="stable")
        for own in np.split(order, np.flatnonzero(np.diff(blocks[order])) + 1):
            if len(own):
                found[own] = self._of(int(blocks[own[0]]))[positions[own] % self.block_size]
        return found

    def _of(self, block: int) -> np.ndarray:
        vectors = self._mapped(self._files(block)["vectors"])
        assert vectors.shape == (len(self.positions(block)), self.width)
        return vectors

    def _files(self, block: int) -> dict[str, Path]:
        return {"ids": self.out / f"{block:06d}.ids.npy", "vectors": self.out / f"{block:06d}.npy"}
