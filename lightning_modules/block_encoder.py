"""Blocks of a split through an encoder, one loader for all of them; what they are stored as is the caller's.

Shapes: N items of a block, D embedding width (a prefix).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from datamodules.corpus import Corpus, CorpusBatch
from datamodules.processors.processor import Processor
from datamodules.sample import BadExampleError
from datamodules.shards import Split
from lightning_modules.encoder.embedder import Embedder, cut


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
        corpus = Corpus(split, prompts, self.processor, self.batch_size, blocks=blocks, may_lack=may_lack)
        loaded = zip(corpus.batches, corpus.loader(self.num_workers), strict=True)
        for block in blocks:
            num_batches = -(-len(block) // self.batch_size)
            try:
                found = [self._embedded(batch, split, positions) for positions, batch in islice(loaded, num_batches)]
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
