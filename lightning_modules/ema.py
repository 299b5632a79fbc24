"""The exponential moving average of the encoder's weights, which is then what a stage writes.

Not Lightning's EMAWeightAveraging: that one counts updates which the guard skipped, averages in the weights' own precision and
where the model was built (on the CPU, also for a run on a GPU), and leaves the encoders of `snapshot_every` as they are.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_modules.encoder.checkpoint import require_same_shape
from lightning_modules.encoder.embedder import Embedder
from lightning_modules.sharded import shared_out
from lightning_modules.trained import trained_state


class EMA(Callback):
    """Averages the encoder's trained weights after every update, the weights of k updates ago weighted by decay ** k.

    The weights sum to 1 from the first update on, so that nothing of the encoder before it is in the average: with the sum
    s_t = decay · s_{t-1} + 1 of all weights so far, a_t = a_{t-1} + (θ_t - a_{t-1}) / s_t. In fp32, whatever the encoder has.
    What is trained is not touched, and checkpoints hold both.

    Args:
        decay: In (0, 1); half of the average is younger than 0.69 / (1 - decay) updates. None averages nothing.
    """

    def __init__(self, *, decay: float | None = None) -> None:
        if decay is not None and not 0 < decay < 1:
            raise ValueError(f"the average's decay is {decay}; allowed: above 0 and below 1, or null for no average")
        self.decay = decay
        self.sum = 0.0
        self.average: dict[str, Tensor] = {}
        self._num_updates = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.decay is None:
            return
        self._num_updates = _num_updates(trainer, pl_module)
        weights = trained_state(_encoder(pl_module))
        if self.average:
            require_same_shape(_encoder(pl_module), self.average, "given as ckpt_path (its average)", own=weights)
        elif trainer.ckpt_path is not None and trainer.is_global_zero:
            print(f"{trainer.ckpt_path} holds no average of the weights; it begins at step {trainer.global_step}", flush=True)
        source = self.average or weights
        for name, weight in weights.items():  # clone: of a shared-out tensor .to(copy=True) copies nothing
            copied = shared_out(source[name], weight).detach().to(weight.device).clone()
            self.average[name] = copied.float() if copied.is_floating_point() else copied

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.decay is None:
            return
        num_updates = _num_updates(trainer, pl_module)
        if num_updates == self._num_updates:  # gradients are still being gathered, or the update was skipped
            return
        self._num_updates = num_updates
        self.sum = self.decay * self.sum + 1.0
        for name, weight in trained_state(_encoder(pl_module)).items():
            if weight.is_floating_point():
                self.average[name].lerp_(weight.float(), 1.0 / self.sum)
            else:  # a counter
                self.average[name].copy_(weight)

    def state_dict(self) -> dict[str, Any]:
        return {} if self.decay is None else {"sum": self.sum, "average": self.average}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.sum, self.average = state_dict["sum"], state_dict["average"]


@contextmanager
def averaged(trainer: L.Trainer, encoder: Embedder) -> Iterator[dict[str, float]]:
    """The encoder has its averaged weights inside the block, if the run averages them; yields what provenance says of it."""
    ema = next((c for c in trainer.callbacks if isinstance(c, EMA)), None)  # pyright: ignore[reportAttributeAccessIssue]
    if ema is None or ema.decay is None or not ema.sum:
        yield {}
        return
    weights = trained_state(encoder)
    trained = {name: weight.clone() for name, weight in weights.items()}
    _put(ema.average, weights)
    try:
        yield {"ema": ema.decay}
    finally:
        _put(trained, weights)


@torch.no_grad()
def _put(values: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
    for name, weight in weights.items():
        weight.copy_(values[name])


def _num_updates(trainer: L.Trainer, pl_module: L.LightningModule) -> int:
    """Updates that this process made, up to a constant: steps without those that were skipped."""
    guard: Any = pl_module.guard
    return trainer.global_step - guard.num_skipped


def _encoder(pl_module: L.LightningModule) -> Embedder:
    encoder = pl_module.encoder
    assert isinstance(encoder, Embedder)
    return encoder
