"""A finite ordered pass over columns of a split: for evaluation, mining and embedding."""

from collections.abc import Mapping
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
    """All items of some columns of a split, example by example in its order, those of `batch_size` examples at a time.

    Args:
        split: Where they lie.
        prompts: Column (`query`, `target` or `negatives`) to the template around its text, None for none.
        processor: Items to inputs.
        batch_size: Examples in a batch.

    Raises:
        ValueError: (on reading) an example has no such column, or cannot be decoded.
    """

    def __init__(self, split: Split, prompts: Mapping[str, str | None], processor: Processor, batch_size: int) -> None:
        self.source = Source(split, processor.config.decode)
        self.prompts, self.processor, self.batch_size = prompts, processor, batch_size

    def __len__(self) -> int:
        return -(-len(self.source.split) // self.batch_size)

    def __getitem__(self, batch: int) -> CorpusBatch:
        if batch >= len(self):
            raise IndexError(batch)
        last = min(len(self.source.split), (batch + 1) * self.batch_size)
        found = [
            (item, prompt)
            for position in range(batch * self.batch_size, last)
            for column, prompt in self.prompts.items()
            for item in self.source.items(position, column)
        ]
        inputs = self.processor([with_prompt(item, prompt) for item, prompt in found])
        return CorpusBatch(inputs, torch.tensor([item.content_id for item, _ in found]))

    def loader(self, num_workers: int) -> DataLoader[CorpusBatch]:
        """Batches in order, read by `num_workers` processes."""
        return loader_of(self, num_workers)
