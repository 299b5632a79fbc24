"""Blocks of a split through an encoder, one loader for all of them; what they are stored as is the caller's.

Shapes: N items of a block, D embedding width (a prefix).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from datamodules.collate import with_prompt
from datamodules.corpus import CorpusBatch
from datamodules.loader import loader_of
from datamodules.processors.processor import Processor
from datamodules.sample import BadExampleError, Item
from datamodules.shards import Split
from datamodules.stream import Source
from lightning_modules.encoder.embedder import Embedder, cut


class Pieces(Dataset[CorpusBatch]):
    """The items of some positions, batch by batch; a batch ends where its block does.

    Args:
        split: Where they lie.
        prompts: Column to the template around its text; of an example, the columns come in this order.
        may_lack: A column that examples need not have.
        processor: Items to inputs.
        batches: The positions of each.
    """

    def __init__(
        self, split: Split, prompts: Mapping[str, str | None], may_lack: str | None, processor: Processor, batches: list[range]
    ) -> None:
        self.source = Source(split, processor.config.decode)
        self.prompts, self.may_lack, self.processor, self.batches = prompts, may_lack, processor, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> CorpusBatch:
        items = [
            (item, prompt)
            for position in self.batches[number]
            for column, prompt in self.prompts.items()
            for item in self._items(position, column)
        ]
        inputs = self.processor([with_prompt(item, prompt) for item, prompt in items])
        return CorpusBatch(inputs, torch.tensor([item.content_id for item, _ in items]))

    def _items(self, position: int, column: str) -> list[Item]:
        if column == self.may_lack and getattr(self.source.split.read(position), column) is None:
            return []
        return self.source.items(position, column)


@dataclass(frozen=True)
class BlockEncoder:
    """Embeds blocks of a split.

    Args:
        encoder: On its device, in evaluation mode.
        processor: Its own.
        prefix: Width D of the vectors.
        batch_size: Examples embedded at once.
        num_workers: Processes that read and decode.
    """

    encoder: Embedder
    processor: Processor
    prefix: int
    batch_size: int
    num_workers: int

    def embedded(
        self, split: Split, prompts: Mapping[str, str | None], blocks: Sequence[range], *, may_lack: str | None = None
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Content ids (N,) and unit vectors (N, D) float32 of each block's items, read ahead of one another.

        Args:
            split: Where they lie.
            prompts: Column to the template around its text; of an example, the columns come in this order.
            blocks: Positions of each.
            may_lack: A column that examples need not have.

        Raises:
            ValueError: An example lacks another column, cannot be used, or gets a vector that is not finite.
        """
        cuts = [[block[n : n + self.batch_size] for n in range(0, len(block), self.batch_size)] for block in blocks]
        pieces = Pieces(split, prompts, may_lack, self.processor, [batch for batches in cuts for batch in batches])
        loaded = iter(loader_of(pieces, self.num_workers))
        for batches in cuts:
            try:
                found = [self._embedded(next(loaded), split, batch) for batch in batches]
            except BadExampleError as error:
                place = Path(str(split.folder))
                told = f"{error}; conf=verify root={place.parent} splits=[{place.name}] leaves bad examples out"
                raise BadExampleError(told, error.cause) from error
            yield tuple(np.concatenate(column) for column in zip(*found, strict=True))  # pyright: ignore[reportReturnType]

    @torch.inference_mode()
    def _embedded(self, batch: CorpusBatch, split: Split, positions: range) -> tuple[np.ndarray, np.ndarray]:
        vectors = cut(self.encoder(batch.inputs.to(self.encoder.device)), self.prefix).cpu()
        if not vectors.isfinite().all():
            raise ValueError(
                f"the encoder gives a vector that is not finite to one of the examples {split.key(positions[0])!r} to "
                f"{split.key(positions[-1])!r} of {split.folder}; use another checkpoint, or leave the example out"
            )
        return batch.content_id.numpy(), vectors.numpy()
