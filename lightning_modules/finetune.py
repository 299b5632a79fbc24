"""Fine-tuning: (query, positive, hard negatives) triples over a task mixture (Gemini Embedding 2, arXiv 2605.27295)."""

from torch import Tensor

from datamodules.collate import Batch
from lightning_modules.stage import Stage


class FineTune(Stage):
    """Trains on triples; every batch is one task's, with that task's batch size and number of hard negatives."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        del batch_idx
        query, target, negative = self.vectors(batch)
        out = self.objective(
            query,
            target,
            negative,
            query_id=batch.query_id,
            target_id=batch.target_id,
            negative_id=batch.negative_id,
            negative_row=batch.negative_row,
            query_vector=batch.query_vector,
            target_vector=batch.target_vector,
            negative_vector=batch.negative_vector,
            task=batch.task,
            progress=self.progress,
        )
        return self.minimised(batch, out)
