"""What every training stage shares: the encoder, its probe, the optimiser, the log, and the encoder's folder at the end.

It holds no `training_step`: each stage writes its own, so that a stage can be read in one place.
"""

import dataclasses
import time
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from datamodules.collate import Batch
from datamodules.order import generator
from datamodules.processors.inputs import Inputs
from datamodules.processors.loading import load_processor
from datamodules.training import TrainingData
from lightning_modules.adapters import LoRAConfig, inject, merged, unmoved
from lightning_modules.ema import averaged
from lightning_modules.encoder.checkpoint import (
    load_encoder,
    load_weights,
    read_provenance,
    read_weights,
    save_encoder,
    trainable,
)
from lightning_modules.encoder.embedder import ComputeConfig, Embedder, EncoderConfig, probe, require_cached_is_plain
from lightning_modules.encoder.native import require_its_inputs
from lightning_modules.guard import Guard
from lightning_modules.objective.health import CollapseWatch, first_line
from lightning_modules.objective.objective import Objective, ObjectiveConfig, ObjectiveLoss
from lightning_modules.optimizer import OptimizerConfig, base_rate, freeze, optimizer_of, warmup_cosine
from lightning_modules.quantization import QuantizationConfig
from lightning_modules.sharded import Sharded, is_sharded, shard, whole
from lightning_modules.trained import frozen_sha256, require_same_run, trained_state


class Stage(L.LightningModule):
    """A training stage around an encoder.

    Args:
        encoder: Shape of a new encoder; None takes that of `init_from`.
        init_from: An encoder's folder to start from; None starts from the encoder's own (random or pretrained) weights.
        lora: Adapters beside the encoder's linear layers; it is then frozen but for them and what `optimizer.train` names.
        objective: Terms and their weights.
        optimizer: Rule, learning rates and schedule.
        prefixes: Widths that are trained; None means those of the encoder.
        compute: How a batch goes through the encoder: memory and time.
        compare_cached: Compare, on the first batch, the gradients of a batch in parts with those of a whole one, which must fit
            into memory.
        snapshot_every: Steps after which the encoder is also kept as `encoder-<step>`, for soups; None keeps the last only.
    """

    data_class: ClassVar[type[TrainingData]] = TrainingData
    quantization: QuantizationConfig | None = None  # how matrices are rounded while it trains

    def __init__(
        self,
        encoder: EncoderConfig | None = None,
        *,
        init_from: str | None = None,
        lora: LoRAConfig | None = None,
        objective: ObjectiveConfig = ObjectiveConfig(),  # noqa: B008 (frozen)
        optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008 (frozen)
        prefixes: tuple[int, ...] | None = None,
        compute: ComputeConfig = ComputeConfig(),  # noqa: B008 (frozen)
        compare_cached: bool = False,
        snapshot_every: int | None = None,
    ) -> None:
        super().__init__()
        self.guard = Guard(optimizer.max_skipped)
        self.stopped_early = False  # by a callback, before the last step
        self.init_from, self.lora, self.optimizer_config = init_from, lora, optimizer
        self.snapshot_every = snapshot_every
        if encoder is not None:
            self.encoder = Embedder(encoder, load_pretrained=init_from is None)
            if init_from is not None:
                load_weights(self.encoder, read_weights(init_from), init_from)
        elif init_from is not None:
            self.encoder, _ = load_encoder(init_from)
        else:
            raise ValueError("give model.encoder (a new encoder's shape) or model.init_from (an encoder's folder)")
        self.adapted = [] if lora is None else inject(self.encoder, lora)
        own = self.encoder.config
        self.prefixes = own.prefixes if prefixes is None else prefixes
        self.objective = Objective(objective, prefixes=self.prefixes, embedding_dim=own.embedding_dim)
        self.collapse = CollapseWatch()
        self.encoder.use(compute)
        self._compared = not compare_cached
        self._noted: dict[str, float] = {}
        self.settle()

    def settle(self) -> None:
        """Freeze what is not trained, and keep what checkpoints will say of it; once all of the stage is there."""
        freeze(self, self.optimizer_config)
        chosen = {"lora": self.lora, "quantization": self.quantization}
        described = {key: None if config is None else dataclasses.asdict(config) for key, config in chosen.items()}
        self.made_for = {**described, "frozen_sha256": frozen_sha256(self)}

    @property
    def data(self) -> TrainingData:
        data = getattr(self.trainer, "datamodule", None)
        assert isinstance(data, TrainingData)
        return data

    @property
    def progress(self) -> float:
        """Share of the run that is over, in [0, 1]."""
        return min(1.0, self.global_step / max(1, self.trainer.max_steps))

    def configure_callbacks(self) -> list[Callback]:
        return [self.guard]

    def configure_model(self) -> None:
        """Share the parameters out over the ranks, where the strategy says so."""
        if isinstance(self.trainer.strategy, Sharded) and not is_sharded(self.encoder):
            probe(self.encoder)
            assert self.device_mesh is not None
            mesh = self.device_mesh["data_parallel"]
            shard(self.encoder, self.encoder.backbone.layers, mesh)  # towers with the rest: not every part has media for them
            if any(True for _ in self.objective.parameters()):
                shard(self.objective, [], mesh)

    def configure_optimizers(self) -> Any:
        if self.trainer.max_steps < 1:
            raise ValueError(f"trainer.max_steps is {self.trainer.max_steps}; the schedule needs the run's number of steps")
        optimizer = optimizer_of(self, self.optimizer_config)
        schedule = warmup_cosine(optimizer, self.optimizer_config, self.trainer.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_fit_start(self) -> None:
        if self.data.processor_config is not None:
            require_its_inputs(self.encoder.backbone, self.data.processor_config)
        num_tokens = len(self.data.processor.tokenizer)
        if num_tokens > self.encoder.backbone.vocab_size:
            raise ValueError(
                f"the tokenizer has {num_tokens} entries, the text model {self.encoder.backbone.vocab_size}; "
                "make data.processor.vocab_size at most the text model's vocab_size"
            )
        if self.init_from is not None:
            vocabulary = load_processor(self.init_from).tokenizer.get_vocab()
            if vocabulary != self.data.processor.tokenizer.get_vocab():
                raise ValueError(
                    f"{self.init_from} knows another tokenizer's tokens than data.processor has; "
                    "set data.init_from to the same folder and data.processor=null"
                )
        if not is_sharded(self.encoder):  # those were probed before
            probe(self.encoder)
        if self.made_for["frozen_sha256"] is not None and self.trainer.is_global_zero:
            num_all = sum(parameter.numel() for parameter in self.encoder.parameters())
            adapters = f", with adapters beside {len(self.adapted)} linear layers" if self.adapted else ""
            print(f"{trainable(self.encoder)} of the encoder's {num_all} parameters are trained{adapters}", flush=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """What is frozen is named by its hash alone."""
        trained = trained_state(self).keys()
        checkpoint["state_dict"] = {name: value for name, value in checkpoint["state_dict"].items() if name in trained}
        checkpoint.update(self.made_for)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        adapted = [
            any(name.startswith("decoder.") for name in names) for names in (checkpoint["state_dict"], self.state_dict())
        ]
        if adapted[0] != adapted[1]:
            raise ValueError(
                f"the checkpoint given as ckpt_path is {'' if adapted[0] else 'not '}one of an adaptation; "
                "begin a run of its own, with model.init_from where there is an encoder to start from"
            )
        require_same_run(self, checkpoint)
        trained = trained_state(self).keys()
        frozen = {name: value for name, value in self.state_dict().items() if name not in trained}
        checkpoint["state_dict"] = frozen | checkpoint["state_dict"]

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        del batch_idx
        self._began, self._begun_at = time.perf_counter(), self.global_step
        self._noted = self.data.note(batch)
        random = generator(self.data.seed, "training step", batch.step, self.global_rank)
        torch.manual_seed(int(random.integers(2**63)))  # what draws at random in a step draws the same after a resume
        self._learning_rate = base_rate(self.trainer.optimizers[0])

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        del outputs, batch_idx
        rate = len(batch.keys) * self.trainer.world_size / (time.perf_counter() - self._began)
        skipped = {"skipped_updates": float(self.guard.num_skipped)}
        told = self._told(batch.step)
        self._write_log({**self._parts, **self._noted, **skipped, **told, "examples_per_second": rate}, batch.task)
        is_new = self._begun_at < self.global_step < self.trainer.max_steps  # not while gradients are still being gathered
        if self.snapshot_every and is_new and self.global_step % self.snapshot_every == 0:
            self.save_encoder(f"encoder-{self.global_step:06d}")

    def on_fit_end(self) -> None:
        """Also where nothing was left to train: a run may have been stopped after its last step and before this."""
        is_over = self.global_step >= self.trainer.max_steps or self.stopped_early
        if is_over and self.guard.storm is None:
            self.save_encoder("encoder")

    def vectors(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        """Embeddings of a batch's queries (B, D), targets (B, D) and hard negatives (M, D), None where it has none."""
        columns = [batch.query, batch.target, *([] if batch.negative is None else [batch.negative])]
        inputs = Inputs.join(columns)
        if not self._compared:
            require_cached_is_plain(self.encoder, inputs)
            self._compared = True
        vectors = self.encoder(inputs).split([len(column) for column in columns])
        self._noted["padding"] = self.encoder.padding
        return vectors[0], vectors[1], vectors[2] if len(vectors) > 2 else None

    def minimised(self, batch: Batch, out: ObjectiveLoss) -> Tensor:
        """What is minimised, once its parts are noted for the log, and for the guard whether it is finite."""
        self.guard.see_loss(out.total.detach())
        columns = (batch.query, batch.target, batch.negative)
        truncated = float(sum(inputs.num_truncated for inputs in columns if inputs is not None))
        values = torch.stack([value.double() for value in out.parts.values()]).tolist()  # waits for the device once
        self._parts = {**dict(zip(out.parts, values, strict=True)), "truncated_items": truncated}
        self.log("loss", out.parts["loss"], prog_bar=True, logger=False)
        return out.total

    def _told(self, step: int) -> dict[str, float]:
        """Whether the embeddings have collapsed, for the log; on the screen that, and the first loss of a run from scratch."""
        lines = [self.collapse.see(self._parts)]
        prefix = self.prefixes[0]
        if step == 0 and self.init_from is None and f"loss@{prefix}" in self._parts:
            config = self.objective.config
            lines.append(first_line(self._parts, prefix, both=config.directions == "both", centred=config.centring > 0))
        if self.trainer.is_global_zero:
            for line in filter(None, lines):
                print(line, flush=True)
        return {"collapsed": float(self.collapse.is_collapsed)}

    def _write_log(self, parts: dict[str, float], task: str) -> None:
        """One step's values under its task's name.

        Straight to the loggers: Lightning's own log repeats what other tasks logged last at every later step.
        """
        values = {f"train/{task}/{name}": value for name, value in parts.items()}
        values["learning_rate"] = self._learning_rate
        for logger in self.loggers:
            logger.log_metrics(values, step=self.global_step)

    def save_encoder(self, name: str, **more: Any) -> None:
        """Write the encoder's folder; all ranks together, as each may have a share of the weights.

        Args:
            name: The folder's, in that of the run.
            more: What its provenance says beside stage, steps and parents.
        """
        parents = [] if self.init_from is None else [self.init_from]
        provenance = {
            "stage": type(self).__name__,
            "steps": self.global_step,
            "parameters": trainable(self.encoder),
            "seed": self.data.seed,
            "tasks": sorted(self.data.tasks),
            "parents": [{"path": folder, "sha256": read_provenance(folder)["sha256"]} for folder in parents],
            **more,
        }
        folder = Path(self.trainer.default_root_dir) / name
        with averaged(self.trainer, self.encoder) as average:
            weights = {key: whole(weight) for key, weight in self.encoder.state_dict().items()}
            if self.trainer.is_global_zero:
                weights, about = self.stored(weights)
                provenance |= average | about
                save_encoder(folder, self.encoder, self.data.processor, provenance=provenance, weights=weights)
                print(f"encoder in {folder}")

    def stored(self, weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The weights that the encoder's folder holds, adapters merged into them, and what its provenance says of that.

        Args:
            weights: The encoder's whole state.
        """
        if self.lora is None:
            return weights, {}
        idle = unmoved(self.encoder, weights)
        if idle:
            print(
                f"{len(idle)} of {len(self.adapted)} adapters are as they began, among them {', '.join(idle[:3])}: no example "
                "went through their layers, or the model uses the weights of these without calling them",
                flush=True,
            )
        about = {"lora": {**dataclasses.asdict(self.lora), "layers": len(self.adapted)}}
        return merged(weights, self.lora), about
