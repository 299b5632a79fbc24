"""A finite ordered pass over one column of a split: for evaluation, mining and embedding."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datamodules.collate import with_prompt
from datamodules.loader import loader_of
from datamodules.processors.inputs import Inputs
from datamodules.processors.processor import Processor
from datamodules.shards import Split
from datamodules.stream import Source


@dataclass
class CorpusBatch:
    """Inputs of successive items, with their content ids (N,) int64."""

    inputs: Inputs
    content_id: Tensor


class Corpus(Dataset[CorpusBatch]):
    """All queries, or all targets, of a split in its order, `batch_size` at a time.

    Args:
        split: Where they lie.
        column: `query` or `target`.
        prompt: Template around text, None for none.
        processor: Items to inputs.
        batch_size: Items in a batch.

    Raises:
        ValueError: (on reading) an example has no such column, or cannot be decoded.
    """

    def __init__(self, split: Split, column: str, prompt: str | None, processor: Processor, batch_size: int) -> None:
        self.source = Source(split, processor.config.decode)
        self.column, self.prompt, self.processor, self.batch_size = column, prompt, processor, batch_size

    def __len__(self) -> int:
        return -(-len(self.source.split) // self.batch_size)

    def __getitem__(self, batch: int) -> CorpusBatch:
        if batch >= len(self):
            raise IndexError(batch)
        last = min(len(self.source.split), (batch + 1) * self.batch_size)
        items = [self.source.item(position, self.column) for position in range(batch * self.batch_size, last)]
        inputs = self.processor([with_prompt(item, self.prompt) for item in items])
        return CorpusBatch(inputs, torch.tensor([item.content_id for item in items]))

    def loader(self, num_workers: int) -> DataLoader[CorpusBatch]:
        """Batches in order, read by `num_workers` processes."""
        return loader_of(self, num_workers)
