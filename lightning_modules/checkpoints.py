"""Checkpoints of a run: when they are written, how long they are kept, and which one a run goes on from.

A file with a checkpoint's name is whole: written beside, flushed, renamed, and closed by a trailer with the SHA-256 of what
comes before it (`torch.load` reads such a file as any other). It is verified before it is read, and read without unpickling.
"""

import errno
import hashlib
import os
import re
import shutil
import time
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import CheckpointIO

from lightning_modules.encoder.checkpoint import not_finite
from lightning_modules.sharded import put_together, share, what_is_wrong_with_shards

BYTEARRAY = re.compile(rb"c(builtins|__builtin__)\nbytearray\n")
MAGIC = b"POLYPHONY-SHA256"
NAME = re.compile(r"step=(\d+)\.ckpt")
PARTIAL = re.compile(r"\.step=\d+\.ckpt\.\d+\.partial")
FOLDER = "checkpoints"
CLOCK_STEPS = 20  # ranks ask the first one's clock so often: asking waits for all of them


class Checkpoints(Checkpoint):
    """Writes `<root>/checkpoints/step=<n>.ckpt` now and then, when the run stops, and at its end.

    Args:
        every_steps: Optimiser steps between two checkpoints.
        every_minutes: Minutes between two, if that is sooner, by the first rank's clock; None counts steps alone.
        keep: How many of the newest stay.
        keep_every_steps: Checkpoints of multiples of so many steps stay for good; None keeps none of them.
    """

    def __init__(
        self,
        *,
        every_steps: int = 1000,
        every_minutes: float | None = 30.0,
        keep: int = 3,
        keep_every_steps: int | None = None,
    ) -> None:
        if every_steps < 1 or keep < 1 or (keep_every_steps is not None and keep_every_steps < 1):
            raise ValueError(
                f"checkpoints: every_steps is {every_steps}, keep {keep}, keep_every_steps {keep_every_steps}; allowed: above 0"
            )
        self.every_steps, self.every_minutes = every_steps, every_minutes
        self.keep, self.keep_every_steps = keep, keep_every_steps
        self._seen_step, self._last_time = 0, time.monotonic()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._seen_step, self._last_time = trainer.global_step, time.monotonic()
        if not trainer.is_global_zero:
            return
        folder = folder_of(trainer)
        for path in folder.glob(".*.partial"):  # of a run that was killed while it saved
            if PARTIAL.fullmatch(path.name):
                remove(path)
        if trainer.ckpt_path is None and in_order(folder):
            print(f"checkpoints of an earlier run were moved to {_set_aside(folder)}; ckpt_path=<one of them> goes on from it")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self._seen_step:  # gradients are still being gathered; a checkpoint would lose them
            return
        self._seen_step = step
        due = step % self.every_steps == 0 or step >= trainer.max_steps or trainer.should_stop or self._time_is_up(trainer)
        if due:
            self.save(trainer, pl_module)

    def save(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save now, on all ranks; older ones go when the new one is there.

        Raises:
            ValueError: A weight is not finite.
            OSError: The disk is full; the former checkpoints stay.
        """
        lost = not_finite(pl_module, {name: share(value) for name, value in pl_module.state_dict().items()})
        if trainer.strategy.reduce_boolean_decision(bool(lost), all=False) if trainer.world_size > 1 else lost:
            where = f"{lost[0] if lost else 'a weight of another rank'} holds values that are not finite"
            raise ValueError(
                f"{where} at step {trainer.global_step}; no checkpoint is written. "
                "Lower the learning rate, or go on from an earlier checkpoint"
            )
        folder = folder_of(trainer)
        trainer.save_checkpoint(folder / f"step={trainer.global_step:08d}.ckpt", weights_only=False)
        self._last_time = time.monotonic()
        if trainer.is_global_zero:
            for path in in_order(folder)[self.keep :]:
                if self.keep_every_steps is None or step_of(path) % self.keep_every_steps:
                    remove(path)

    def _time_is_up(self, trainer: L.Trainer) -> bool:
        if self.every_minutes is None:
            return False
        is_up = time.monotonic() - self._last_time > 60 * self.every_minutes
        if trainer.world_size == 1 or trainer.global_step % CLOCK_STEPS:
            return is_up and trainer.world_size == 1
        return bool(trainer.strategy.broadcast(is_up))


def remove(path: Path) -> None:
    """Delete a checkpoint, a file or a folder of shards."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def folder_of(trainer: L.Trainer) -> Path:
    """Where a run's checkpoints lie."""
    return Path(trainer.default_root_dir) / FOLDER


def in_order(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the newest first."""
    return sorted((path for path in folder.glob("step=*.ckpt") if NAME.fullmatch(path.name)), key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """The optimiser step that a checkpoint was written after."""
    found = NAME.fullmatch(path.name)
    assert found is not None
    return int(found[1])


def newest(folder: Path) -> Path | None:
    """The newest checkpoint in a folder that verifies; newer ones that do not are named on the screen. None: there is none.

    Raises:
        ValueError: There are checkpoints and not one of them verifies.
    """
    found = in_order(folder)
    for path in found:
        wrong = what_is_wrong_with(path)
        if wrong is None:
            return path
        print(f"WARNING: the checkpoint {path} is passed over: {wrong}", flush=True)
    if found:
        raise ValueError(f"none of the {len(found)} checkpoints in {folder} can be read; move them away to start anew")
    return None


def what_is_wrong_with(path: Path) -> str | None:
    """Why something is no whole checkpoint, or None when its trailer and hash, or those of all its shards, are right."""
    if path.is_dir():
        return what_is_wrong_with_shards(path)
    size = path.stat().st_size - len(MAGIC) - 32
    if size < 0:
        return "it is too short"
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while size:
            block = file.read(min(size, 2**20))
            digest.update(block)
            size -= len(block)
            if not block:
                return "it became shorter while it was read"
        trailer = file.read()
    if not trailer.startswith(MAGIC):
        return "it has no trailer: it was cut off, or something else wrote it"
    return None if trailer[len(MAGIC) :] == digest.digest() else "its bytes are not those that were written (SHA-256)"


class _Hashing:
    """A file that is hashed while it is written."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


class VerifiedCheckpointIO(CheckpointIO):
    """Saves to a local or mounted file system, so that a file with a checkpoint's name is a whole one that says so itself."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Raises OSError when the disk is full; what stood there before stays."""
        del storage_options
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        _require_room(path, checkpoint)
        beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            with beside.open("wb") as file:
                hashing: Any = _Hashing(file)
                torch.save(checkpoint, hashing)
                file.write(MAGIC + hashing.digest.digest())
                file.flush()
                os.fsync(file.fileno())
            beside.replace(path)
            _sync_folder(path.parent)
        except BaseException as error:
            beside.unlink(missing_ok=True)
            if isinstance(error, RuntimeError):  # torch's zip writer hides the system's error
                raise OSError(
                    f"could not write the checkpoint {path} ({error}); is the disk full? The former one is kept"
                ) from error
            raise

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Raises ValueError when there is no checkpoint, its hash is wrong, or it cannot be read."""
        del weights_only  # always: nothing is unpickled
        path = Path(path)
        if not path.exists():
            raise ValueError(f"no checkpoint at {path}; give a file, or ckpt_path=newest for the run's own newest one")
        wrong = what_is_wrong_with(path)
        if wrong is not None:
            raise ValueError(f"the checkpoint {path} cannot be used: {wrong}; ckpt_path=newest takes the newest that is whole")
        if path.is_dir():
            return put_together(path, self.load_checkpoint)
        try:
            _require_stored(path)
            found = torch.load(path, map_location=map_location or "cpu", weights_only=True)
        except Exception as error:  # torch's own text would advise to unpickle it
            reason = str(error) if isinstance(error, ValueError | zipfile.BadZipFile) else type(error).__name__
            raise ValueError(
                f"the checkpoint {path} cannot be read: it holds more than weights and numbers ({reason})"
            ) from error
        if not isinstance(found, dict):
            raise ValueError(f"the checkpoint {path} cannot be read: it holds {type(found).__name__} where a mapping must be")
        return found

    def remove_checkpoint(self, path: Any) -> None:
        remove(Path(path))


def _require_stored(path: Path) -> None:
    """Refuse what torch never writes: compressed files, which could unfold to anything, and a call that takes any memory."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size for entry in entries):
            raise ValueError("it holds compressed files")
        for entry in entries:
            if entry.filename.endswith("data.pkl") and BYTEARRAY.search(archive.read(entry)):
                raise ValueError("it makes a bytearray")


def _require_room(path: Path, checkpoint: dict[str, Any]) -> None:
    """Refuse to begin what cannot be finished: the tensors alone need more than what is free."""
    needed, free = _bytes_of(checkpoint), shutil.disk_usage(path.parent).free
    if needed > free:
        raise OSError(
            errno.ENOSPC,
            f"the checkpoint {path} takes {needed / 1e6:.0f} MB, {free / 1e6:.0f} MB are free; the former one is kept",
        )


def _bytes_of(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.nbytes
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return sum(map(_bytes_of, inner))


def _set_aside(folder: Path) -> Path:
    """Move a folder to the first free name with a number behind, and say which."""
    number = 1
    while (aside := folder.with_name(f"{folder.name}-{number}")).exists():
        number += 1
    return folder.rename(aside)


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
