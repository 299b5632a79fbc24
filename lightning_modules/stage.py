"""What every training stage shares: the encoder, its probe, the optimiser, the log, and the encoder's folder at the end.

It holds no `training_step`: each stage writes its own, so that a stage can be read in one place.
"""

import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from datamodules.collate import Batch
from datamodules.order import generator
from datamodules.training import TrainingData
from kernels.contrastive import check_prefixes
from lightning_modules.encoder.checkpoint import (
    load_encoder,
    load_weights,
    read_provenance,
    read_weights,
    require_same_shape,
    save_encoder,
    trainable,
)
from lightning_modules.encoder.embedder import Embedder, EncoderConfig, probe
from lightning_modules.guard import Guard
from lightning_modules.objective.objective import Objective, ObjectiveConfig
from lightning_modules.optimizer import OptimizerConfig, adamw, warmup_cosine


class Stage(L.LightningModule):
    """A training stage around an encoder.

    Args:
        encoder: Shape of a new encoder; None takes that of `init_from`.
        init_from: An encoder's folder to start from; None starts from the encoder's own (random or pretrained) weights.
        objective: Terms and their weights.
        optimizer: Learning rate and schedule.
        prefixes: Widths that are trained; None means those of the encoder.
        snapshot_every: Steps after which the encoder is also kept as `encoder-<step>`, for soups; None keeps the last only.
    """

    def __init__(
        self,
        encoder: EncoderConfig | None = None,
        *,
        init_from: str | None = None,
        objective: ObjectiveConfig = ObjectiveConfig(),  # noqa: B008 (frozen)
        optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008 (frozen)
        prefixes: tuple[int, ...] | None = None,
        snapshot_every: int | None = None,
    ) -> None:
        super().__init__()
        self.guard = Guard()
        self.init_from, self.objective_config, self.optimizer_config = init_from, objective, optimizer
        self.snapshot_every = snapshot_every
        if encoder is not None:
            self.encoder = Embedder(encoder, load_pretrained=init_from is None)
            if init_from is not None:
                load_weights(self.encoder, read_weights(init_from), init_from)
        elif init_from is not None:
            self.encoder, _ = load_encoder(init_from)
        else:
            raise ValueError("give model.encoder (a new encoder's shape) or model.init_from (an encoder's folder)")
        own = self.encoder.config
        self.prefixes = own.prefixes if prefixes is None else prefixes
        check_prefixes(self.prefixes, own.embedding_dim)
        if objective.learn_temperature:
            self.log_temperature = torch.nn.Parameter(torch.tensor(objective.temperature).log())

    @property
    def data(self) -> TrainingData:
        data = getattr(self.trainer, "datamodule", None)
        assert isinstance(data, TrainingData)
        return data

    @property
    def progress(self) -> float:
        """Share of the run that is over, in [0, 1]."""
        return min(1.0, self.global_step / max(1, self.trainer.max_steps))

    @property
    def temperature(self) -> Tensor | None:
        """The learnt temperature, or None when it is not learnt."""
        return self.log_temperature.exp() if self.objective_config.learn_temperature else None

    def configure_callbacks(self) -> list[Callback]:
        return [self.guard]

    def configure_optimizers(self) -> Any:
        if self.trainer.max_steps < 1:
            raise ValueError(f"trainer.max_steps is {self.trainer.max_steps}; the schedule needs the run's number of steps")
        optimizer = adamw(self, self.optimizer_config)
        schedule = warmup_cosine(optimizer, self.optimizer_config, self.trainer.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_fit_start(self) -> None:
        num_tokens = len(self.data.processor.tokenizer)
        if num_tokens > self.encoder.backbone.vocab_size:
            raise ValueError(
                f"the tokenizer has {num_tokens} entries, the text model {self.encoder.backbone.vocab_size}; "
                "make data.processor.vocab_size at most the text model's vocab_size"
            )
        probe(self.encoder)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        encoder = "encoder."
        weights = {n.removeprefix(encoder): w for n, w in checkpoint["state_dict"].items() if n.startswith(encoder)}
        require_same_shape(self.encoder, weights, "given as ckpt_path")

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        del batch_idx
        self._began = time.perf_counter()
        self._noted = self.data.note(batch)
        random = generator(self.data.seed, "training step", batch.step, self.global_rank)
        torch.manual_seed(int(random.integers(2**63)))  # what draws at random in a step draws the same after a resume
        self._learning_rate = self.trainer.optimizers[0].param_groups[0]["lr"]

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        del outputs, batch_idx
        rate = len(batch.keys) * self.trainer.world_size / (time.perf_counter() - self._began)
        skipped = {"skipped_updates": float(self.guard.num_skipped)}
        self._write_log({**self._parts, **self._noted, **skipped, "examples_per_second": rate}, batch.task)
        if self.snapshot_every and self.global_step % self.snapshot_every == 0 and self.global_step < self.trainer.max_steps:
            self._save(f"encoder-{self.global_step:06d}")

    def on_train_end(self) -> None:
        if not self.guard.stopped:
            self._save("encoder")

    def minimised(self, batch: Batch, out: Objective) -> Tensor:
        """What is minimised, once its parts are noted for the log, and for the guard whether it is finite."""
        self.guard.see_loss(out.total.detach())
        columns = (batch.query, batch.target, batch.negative)
        truncated = float(sum(inputs.num_truncated for inputs in columns if inputs is not None))
        self._parts = {**{name: value.item() for name, value in out.parts.items()}, "truncated_items": truncated}
        self.log("loss", out.total.detach(), prog_bar=True, logger=False)
        return out.total

    def _write_log(self, parts: dict[str, float], task: str) -> None:
        """One step's values under its task's name.

        Straight to the loggers: Lightning's own log repeats what other tasks logged last at every later step.
        """
        values = {f"train/{task}/{name}": value for name, value in parts.items()}
        values["learning_rate"] = self._learning_rate
        for logger in self.loggers:
            logger.log_metrics(values, step=self.global_step)

    def _save(self, name: str) -> None:
        if self.trainer.is_global_zero:
            parents = [] if self.init_from is None else [self.init_from]
            provenance = {
                "stage": type(self).__name__,
                "steps": self.global_step,
                "parameters": trainable(self.encoder),
                "seed": self.data.seed,
                "tasks": sorted(self.data.tasks),
                "parents": [{"path": folder, "sha256": read_provenance(folder)["sha256"]} for folder in parents],
            }
            folder = Path(self.trainer.default_root_dir) / name
            save_encoder(folder, self.encoder, self.data.processor, provenance=provenance)
            print(f"encoder in {folder}")
