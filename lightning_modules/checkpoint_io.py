"""Checkpoints of a run: written beside their place, flushed and renamed, and read without unpickling code."""

import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import CheckpointIO


class AtomicCheckpointIO(CheckpointIO):
    """Saves to a local or mounted file system so that a file with a checkpoint's name is always a whole one."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Raises OSError when the disk is full; what stood there before stays."""
        del storage_options
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            with beside.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(path)
        except BaseException as error:
            beside.unlink(missing_ok=True)
            if isinstance(error, RuntimeError):  # torch's zip writer hides the system's error
                raise OSError(
                    f"could not write the checkpoint {path} ({error}); is the disk full? The former one is kept"
                ) from error
            raise

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Raises ValueError when there is no checkpoint, or it cannot be read."""
        del weights_only  # always: nothing is unpickled
        if not Path(path).is_file():
            raise ValueError(f"no checkpoint at {path}; ckpt_path must name a file such as runs/finetune/checkpoints/last.ckpt")
        try:
            return torch.load(path, map_location=map_location or "cpu", weights_only=True)
        except Exception as error:
            raise ValueError(f"the checkpoint {path} cannot be read: {error}") from error

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)
