"""Fine-tuning: (query, positive, hard negatives) triples over a task mixture (Gemini Embedding 2, arXiv 2605.27295)."""

from torch import Tensor

from datamodules.collate import Batch
from lightning_modules.objective.objective import objective
from lightning_modules.stage import Stage


class FineTune(Stage):
    """Trains on triples; every batch is one task's, with that task's batch size and number of hard negatives."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        del batch_idx
        out = objective(
            self.objective_config,
            self.encoder(batch.query),
            self.encoder(batch.target),
            query_id=batch.query_id,
            target_id=batch.target_id,
            prefixes=self.prefixes,
            progress=self.progress,
            temperature=self.temperature,
            negative_MD=None if batch.negative is None else self.encoder(batch.negative),
            negative_id=batch.negative_id,
            negative_row=batch.negative_row,
        )
        return self.minimised(batch, out)
