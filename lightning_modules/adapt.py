"""Adaptation: a decoder-only text model becomes an encoder (T5Gemma, arXiv 2504.06225; EmbeddingGemma, arXiv 2509.20354).

The text model without its causal mask is the encoder, the same weights with cross-attention the decoder; both learn to denoise
(UL2, arXiv 2205.05131). The encoder is what is kept.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from datamodules.denoising import DenoisingBatch, DenoisingData
from lightning_modules.encoder.backbone import checkpoint_transformers
from lightning_modules.encoder.decoder import Decoder
from lightning_modules.encoder.embedder import ComputeConfig, EncoderConfig
from lightning_modules.optimizer import OptimizerConfig
from lightning_modules.sharded import Sharded
from lightning_modules.stage import Stage


class Adapt(Stage):
    """Trains text model and decoder; towers, boundaries and projection of the encoder stay as they were drawn.

    Args:
        encoder: Its shape; `backbone.pretrained` names the decoder-only text model.
        optimizer: Rule, learning rates and schedule; `decoder` is a part of its own.
        compute: How a batch goes through the encoder; the decoder's sequences are padded to the longest.
        snapshot_every: Steps after which the encoder is also kept as `encoder-<step>`; None keeps the last only.
    """

    data_class = DenoisingData

    def __init__(
        self,
        encoder: EncoderConfig,
        *,
        optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008 (frozen)
        compute: ComputeConfig = ComputeConfig(),  # noqa: B008 (frozen)
        snapshot_every: int | None = None,
    ) -> None:
        if compute.max_tokens is not None:
            raise ValueError(
                f"compute.max_tokens is {compute.max_tokens}; an adaptation takes a batch whole, "
                "make the tasks' batch_size smaller and trainer.accumulate_grad_batches larger"
            )
        super().__init__(encoder, optimizer=optimizer, compute=compute, snapshot_every=snapshot_every)
        text = self.encoder.backbone.text
        self.encoder.requires_grad_(False)
        text.requires_grad_(True)
        self.decoder = Decoder(text)
        if compute.checkpoint_layers:
            checkpoint_transformers(self.decoder.text)
        self.settle()

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, Sharded):
            raise ValueError("an adaptation does not share its weights out over ranks; set trainer.strategy=ddp")

    def on_fit_start(self) -> None:
        super().on_fit_start()
        data, longest = self.data, getattr(self.encoder.backbone.text.config, "max_position_embeddings", None)
        assert isinstance(data, DenoisingData)
        if longest is not None and data.ul2.sequence_length + 2 > longest:  # as many sentinels as spans, a begin or an end
            raise ValueError(
                f"data.ul2.sequence_length is {data.ul2.sequence_length}, the text model takes {longest} tokens, "
                "2 of them for begin and end; make it smaller"
            )
        if max(data.sentinels) >= self.encoder.backbone.vocab_size:
            raise ValueError(
                f"sequences of {data.ul2.sequence_length} tokens need {len(data.sentinels)} sentinels, here the ids from "
                f"{min(data.sentinels)} to {max(data.sentinels)}; the text model has {self.encoder.backbone.vocab_size}: "
                "make data.processor.vocab_size or data.ul2.sequence_length smaller, or set data.ul2.first_sentinel"
            )
        self.names = list(data.ul2.denoisers)
        pretrained, is_tied = self.encoder.config.backbone.pretrained, self.decoder.text.config.tie_word_embeddings
        if pretrained is not None and not is_tied and self.trainer.is_global_zero:
            print(f"{pretrained} has an output layer of its own, which is left out: the decoder writes with its embeddings")

    def training_step(self, batch: DenoisingBatch, batch_idx: int) -> Tensor:
        del batch_idx
        loss_U = self.losses(batch)
        number = torch.tensor(float(len(loss_U)), device=loss_U.device)
        loss = loss_U.sum() / self.trainer.strategy.reduce(number, reduce_op="mean")  # each token counts alike on all ranks
        self.guard.see_loss(loss.detach())
        self._parts = self._noted_parts(batch, loss_U.detach())
        self.log("loss", self._parts["loss"], prog_bar=True, logger=False)
        return loss

    def losses(self, batch: DenoisingBatch) -> Tensor:
        """Cross entropy of each token that the decoder is to write (U,)."""
        states_TH = self.encoder.backbone(batch.encoder, packed=self.encoder.packed)
        return F.cross_entropy(self.decoder(batch.decoder, batch.encoder, states_TH), batch.target, reduction="none")

    def _noted_parts(self, batch: DenoisingBatch, loss_U: Tensor) -> dict[str, float]:
        """The mean loss of this rank's tokens, of all and of each denoiser's, for the log."""
        lengths = batch.decoder.lengths
        denoiser_U = batch.denoiser.repeat_interleave(lengths.to(batch.denoiser.device))
        parts = {f"loss@{self.names[n]}": loss_U[denoiser_U == n].mean() for n in batch.denoiser.unique().tolist()}
        values = torch.stack([loss_U.mean(), *parts.values()]).tolist()  # waits for the device once
        return {
            **dict(zip(["loss", *parts], values, strict=True)),
            "target_tokens": float(len(loss_U)),
            "padding": 1.0 - len(loss_U) / (len(lengths) * int(lengths.max())),
            "items_without_text": float(batch.num_without_text),
        }

    def _told(self, step: int) -> dict[str, float]:
        del step
        return {}
