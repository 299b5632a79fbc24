"""A finite ordered pass over columns of a split: for evaluation, mining and embedding."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datamodules.collate import with_prompt
from datamodules.loader import loader_of
from datamodules.processors.inputs import Inputs
from datamodules.processors.processor import Processor
from datamodules.sample import Item
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
        prompts: Column (`query`, `target` or `negatives`) to the template around its text, None for none; of an example, the
            columns come in this order.
        processor: Items to inputs.
        batch_size: Examples in a batch.
        blocks: Positions that are read instead of all; a batch ends where its block does.
        may_lack: A column that examples need not have.

    Raises:
        ValueError: (on reading) an example has no such column, or cannot be decoded.
    """

    def __init__(
        self,
        split: Split,
        prompts: Mapping[str, str | None],
        processor: Processor,
        batch_size: int,
        *,
        blocks: Sequence[range] | None = None,
        may_lack: str | None = None,
    ) -> None:
        self.source = Source(split, processor.config.decode)
        self.prompts, self.processor, self.may_lack = prompts, processor, may_lack
        blocks = [range(len(split))] if blocks is None else blocks
        self.batches = [block[n : n + batch_size] for block in blocks for n in range(0, len(block), batch_size)]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, batch: int) -> CorpusBatch:
        found = [
            (item, prompt)
            for position in self.batches[batch]
            for column, prompt in self.prompts.items()
            for item in self._items(position, column)
        ]
        inputs = self.processor([with_prompt(item, prompt) for item, prompt in found])
        return CorpusBatch(inputs, torch.tensor([item.content_id for item, _ in found]))

    def _items(self, position: int, column: str) -> list[Item]:
        if column == self.may_lack and getattr(self.source.split.read(position), column) is None:
            return []
        return self.source.items(position, column)

    def loader(self, num_workers: int) -> DataLoader[CorpusBatch]:
        """Batches in order, read by `num_workers` processes."""
        return loader_of(self, num_workers)
