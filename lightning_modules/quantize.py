"""Quantisation-aware training: fine-tuning while matrices act as they will when rounded; and rounding without training.

Source: EmbeddingGemma (arXiv 2509.20354) quantises so, during fine-tuning, in three schemes; see `quantization`.
"""

import dataclasses
from typing import Any

from torch import Tensor

from datamodules.processors.loading import load_processor
from lightning_modules.encoder.checkpoint import WEIGHTS, load_encoder, read_provenance, save_encoder
from lightning_modules.encoder.embedder import ComputeConfig
from lightning_modules.finetune import FineTune
from lightning_modules.objective.objective import ObjectiveConfig
from lightning_modules.optimizer import OptimizerConfig
from lightning_modules.quantization import QuantizationConfig, fake_quantize, packed, plan_of, require_torchao
from lightning_modules.sharded import Sharded


class Quantize(FineTune):
    """Fine-tunes an encoder for its rounded weights, which are what its folder then holds.

    Args:
        init_from: The fine-tuned encoder's folder.
        quantization: Which matrices are rounded, and how.
        objective: Terms and their weights.
        optimizer: Rule, learning rates and schedule.
        prefixes: Widths that are trained; None means those of the encoder.
        compute: How a batch goes through the encoder: memory and time.
        compare_cached: Compare, on the first batch, the gradients of a batch in parts with those of a whole one.
        snapshot_every: Steps after which the encoder is also kept as `encoder-<step>`; None keeps the last only.
    """

    def __init__(
        self,
        init_from: str,
        *,
        quantization: QuantizationConfig = QuantizationConfig(),  # noqa: B008 (frozen)
        objective: ObjectiveConfig = ObjectiveConfig(),  # noqa: B008 (frozen)
        optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008 (frozen)
        prefixes: tuple[int, ...] | None = None,
        compute: ComputeConfig = ComputeConfig(),  # noqa: B008 (frozen)
        compare_cached: bool = False,
        snapshot_every: int | None = None,
    ) -> None:
        if quantization.scheme == "bf16":
            raise ValueError("quantization.scheme=bf16 rounds no matrix, so there is nothing to train; use conf=quantize_post")
        require_torchao()
        super().__init__(
            init_from=init_from,
            objective=objective,
            optimizer=optimizer,
            prefixes=prefixes,
            compute=compute,
            compare_cached=compare_cached,
            snapshot_every=snapshot_every,
        )
        self.plan, self.about = plan_of(self.encoder, quantization), about(quantization)
        fake_quantize(self.encoder, self.plan)
        self.quantization = quantization
        self.settle()

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, Sharded):
            raise ValueError("quantisation-aware training does not share its weights out over ranks; set trainer.strategy=ddp")

    def stored(self, weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The rounded weights."""
        return packed(weights, self.plan), self.about


def quantize_post(
    checkpoint: str,
    out: str,
    quantization: QuantizationConfig = QuantizationConfig(),  # noqa: B008 (frozen)
) -> None:
    """Round an encoder's weights as they are and write its folder (post-training quantisation).

    Args:
        checkpoint: The encoder's folder.
        out: Folder of the rounded one.
        quantization: Which matrices are rounded, and how.
    """
    encoder, _ = load_encoder(checkpoint)
    plan = plan_of(encoder, quantization)
    parents = [{"path": checkpoint, "sha256": read_provenance(checkpoint)["sha256"]}]
    provenance = {"stage": "quantize_post", "parents": parents, **about(quantization)}
    weights = packed(encoder.state_dict(), plan)
    save_encoder(out, encoder, load_processor(checkpoint), provenance=provenance, weights=weights)
    num_bytes = sum(tensor.nbytes for tensor in weights.values())
    print(f"{len(plan)} matrices rounded ({quantization.scheme}), {num_bytes / 1e6:.1f} MB in {out}/{WEIGHTS}")


def about(quantization: QuantizationConfig) -> dict[str, Any]:
    """What provenance says of rounded weights."""
    return {"quantization": dataclasses.asdict(quantization)}
