"""Pre-fine-tuning: noisy pairs, in-batch negatives only, as many steps as can be (Gemini Embedding, arXiv 2503.07891)."""

from torch import Tensor

from datamodules.collate import Batch
from lightning_modules.stage import Stage


class PreFineTune(Stage):
    """Trains on (query, target) pairs; every batch is one task's."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        del batch_idx
        query, target, _ = self.vectors(batch.pairs())
        out = self.objective(
            query,
            target,
            query_id=batch.query_id,
            target_id=batch.target_id,
            query_vector=batch.query_vector,
            target_vector=batch.target_vector,
            task=batch.task,
            progress=self.progress,
        )
        return self.minimised(batch, out)
