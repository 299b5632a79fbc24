"""Pre-fine-tuning: noisy pairs, in-batch negatives only, as many steps as can be (Gemini Embedding, arXiv 2503.07891)."""

from torch import Tensor

from datamodules.collate import Batch
from lightning_modules.objective.objective import objective
from lightning_modules.stage import Stage


class PreFineTune(Stage):
    """Trains on (query, target) pairs; every batch is one task's."""

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
        )
        return self.minimised(batch, out)
