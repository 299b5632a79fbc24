"""What ends a run early, agreed over all ranks: a signal, values that are not finite, a storm of bad examples.

Each rank only notes what it meets. Before the optimiser's step the notes are reduced over the ranks, so that all of them skip
the same update, and all of them stop after the same batch, with a checkpoint.
"""

import json
import signal
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from datamodules.collate import Batch
from datamodules.training import TrainingData
from lightning_modules.sharded import share

STOPS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Guard(Callback):
    """Skips updates that are not finite, and stops the run cleanly when it must.

    A second SIGINT (Ctrl-C) stops at once, without a checkpoint.

    Args:
        max_skipped: Updates in a row that may be skipped.

    Raises:
        ValueError: One more update in a row was not finite; on all ranks.
    """

    def __init__(self, max_skipped: int) -> None:
        self.max_skipped = max_skipped
        self.stopped_by: signal.Signals | None = None
        self.storm: str | None = None
        self.num_skipped = self._in_a_row = 0
        self._heard = 0
        self._loss_is_finite = True
        self._batches: list[Batch] = []
        self._agreed = [0, 0]
        self._former: dict[signal.Signals, Any] = {}

    @property
    def stopped(self) -> bool:
        """Whether the run was ended before its time."""
        return self.stopped_by is not None or self.storm is not None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """After Lightning has put in handlers of its own, which would save in the middle of a step."""
        self._former = {stop: signal.signal(stop, self._hear) for stop in STOPS}
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # a wait for the device at every batch

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        for stop, handler in self._former.items():
            signal.signal(stop, handler)
        self._former = {}

    def _hear(self, number: int, frame: FrameType | None) -> None:
        del frame
        if number == signal.SIGINT == self._heard:
            raise KeyboardInterrupt
        self._heard = number

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int) -> None:
        self._batches.append(batch)

    def see_loss(self, loss: Tensor) -> None:
        """Note whether a loss is finite."""
        self._loss_is_finite &= bool(torch.isfinite(loss))

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        is_finite = self._loss_is_finite and all_finite([share(p.grad) for p in parameters if p.grad is not None])
        notes = torch.tensor([not is_finite, self._heard, _data(trainer).storm is not None], device=pl_module.device).int()
        if trainer.world_size > 1:
            torch.distributed.all_reduce(notes, torch.distributed.ReduceOp.MAX)
        skip, *self._agreed = [int(note) for note in notes.tolist()]
        self._in_a_row = self._in_a_row + 1 if skip else 0
        if skip:
            self._skip(trainer, parameters)
        self._loss_is_finite = True
        self._batches.clear()

    def _skip(self, trainer: L.Trainer, parameters: list[nn.Parameter]) -> None:
        """Take the gradients away, so that the optimiser does nothing, and write down what was in the batch."""
        self.num_skipped += 1
        for parameter in parameters:
            parameter.grad = None
        file = Path(trainer.default_root_dir) / f"skipped-rank{trainer.global_rank}.jsonl"
        with file.open("a", encoding="utf-8") as lines:
            for batch in self._batches:
                lines.write(json.dumps({"step": batch.step, "task": batch.task, "keys": batch.keys}, ensure_ascii=False) + "\n")
        where = f"step {self._batches[-1].step}, task {self._batches[-1].task!r}"
        if self._in_a_row > self.max_skipped:
            updates = "1 update" if self._in_a_row == 1 else f"{self._in_a_row} updates in a row"
            raise ValueError(
                f"loss or gradient was not finite in {updates}, the last at {where}; no weight was changed, and {file} lists "
                "their examples. Lower the learning rate, or go on from an earlier checkpoint"
            )
        if trainer.is_global_zero:
            print(f"{where}: loss or gradient is not finite, the update is skipped; its examples are in {file}", flush=True)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if self._batches:  # gradients are still being gathered; a checkpoint would lose them
            return
        heard, storm = self._agreed
        if heard:
            self.stopped_by = signal.Signals(heard)
        if storm:
            self.storm = _data(trainer).storm or "another rank met too many bad examples; its faults-rank*.jsonl lists them"
        trainer.should_stop = trainer.should_stop or self.stopped


def all_finite(tensors: list[Any]) -> bool:
    """Whether every value of the tensors is finite.

    Their length, which is fast, is finite only then; where it is not, large values alone may be why.
    """
    tensors = [tensor for tensor in tensors if tensor.numel()]  # a rank's share may be empty
    return not tensors or any(bool(torch.nn.utils.get_total_norm(tensors, norm).isfinite()) for norm in (2.0, torch.inf))


def _data(trainer: L.Trainer) -> TrainingData:
    data = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
    assert isinstance(data, TrainingData)
    return data
