"""FSDP2: every rank keeps a share of each parameter, of its gradient and of its moments, and writes its own share.

A sharded checkpoint is a folder `step=<n>.ckpt/` with a file for each rank and COMPLETE, which names their sizes and hashes and
is written last; the folder is written beside its place and renamed. It holds what a checkpoint of one file holds, each sharded
tensor cut along its first dimension. Either kind is put together on the CPU and then shared out as the run that loads it has
its parameters: one process, DDP, or any number of ranks.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from datamodules.files import replace_file, replace_folder, sha256_of
from datamodules.record import read_json

COMPLETE, FORMAT, SHARD = "COMPLETE", "polyphony-sharded/1", "shard of"


class Sharded(ModelParallelStrategy):
    """Lightning's FSDP2 over all ranks, with checkpoints as this module says."""

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1)

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return True

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return Strategy.lightning_module_state_dict(self)

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        return getattr(optimizer, "optimizer", optimizer).state_dict()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """All ranks together. Raises OSError on all of them when one cannot write; what stood there before stays."""
        path = Path(self.broadcast(str(filepath)))
        beside = path.with_name(f".{path.name}.{self.broadcast(os.getpid())}.partial")
        own, error = beside / f"rank{self.global_rank:05d}", ""
        try:
            beside.mkdir(parents=True, exist_ok=True)
            self.checkpoint_io.save_checkpoint(_mapped(checkpoint, _own_shard), own, storage_options)
            described = {"bytes": own.stat().st_size, "sha256": sha256_of(own)}
        except OSError as failure:
            described, error = {}, str(failure)
        told: list[Any] = [None] * self.world_size
        dist.all_gather_object(told, (own.name, described, error))
        error = next((failure for *_, failure in told if failure), "")
        if not error and self.is_global_zero:
            try:
                complete = {"format": FORMAT, "files": {name: about for name, about, _ in told}}
                replace_file(beside / COMPLETE, json.dumps(complete, indent=1))
                replace_folder(path, beside)
            except OSError as failure:
                error = str(failure)
        if error := self.broadcast(error):
            shutil.rmtree(beside, ignore_errors=True)
            raise OSError(f"could not write the checkpoint {path}: {error}; the former one is kept")

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        assert self.lightning_module is not None
        own = self.lightning_module.state_dict()
        state = {name: shared_out(value, own.get(name)) for name, value in checkpoint["state_dict"].items()}
        self.lightning_module.load_state_dict(state, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            moments = {
                number: {name: shared_out(value, parameters[number]) for name, value in of_one.items()}
                for number, of_one in state["state"].items()
            }
            optimizer.load_state_dict({**state, "state": moments})


def shard(module: nn.Module, layers: list[nn.Module], mesh: Any) -> None:
    """Share out a module's parameters over the ranks of a mesh: those of each of its layers together, then all others."""
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)


def whole(tensor: Tensor) -> Tensor:
    """A tensor with the shares of all ranks, which all must ask for; one that is not shared is itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def share(tensor: Tensor) -> Tensor:
    """This rank's share of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shared_out(tensor: Any, like: Any) -> Any:
    """A whole tensor as another of its shape is shared out; anything else is itself."""
    if not isinstance(like, DTensor) or not isinstance(tensor, Tensor) or tensor.shape != like.shape:
        return tensor
    tensor = tensor.to(like.device)
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def largest_of_ranks(number: int, device: torch.device) -> int:
    """The largest of the numbers that the ranks call this with, all together."""
    told = torch.tensor(number, device=device)
    dist.all_reduce(told, dist.ReduceOp.MAX)
    return int(told)


def put_together(folder: Path, read: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """The checkpoint in a folder, whole, on the CPU.

    Args:
        folder: A sharded checkpoint.
        read: Reads a rank's file.

    Raises:
        ValueError: The ranks' files are not those of one checkpoint.
    """
    ranks = [read(folder / name) for name in sorted(_complete(folder)["files"])]
    try:
        return _merged(ranks)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"the checkpoint {folder} cannot be put together: its {len(ranks)} files do not fit ({reason})"
        ) from error


def what_is_wrong_with_shards(folder: Path) -> str | None:
    """Why a folder is no whole checkpoint, or None when all its files are there with their sizes and hashes."""
    try:
        files = _complete(folder)["files"]
    except ValueError as error:
        return str(error)
    for name, about in files.items():
        path = folder / name
        if Path(name).name != name or not path.is_file() or path.stat().st_size != about["bytes"]:
            return f"{name} is missing or has another size"
        if sha256_of(path) != about["sha256"]:
            return f"the bytes of {name} are not those that were written (SHA-256)"
    return None


def _complete(folder: Path) -> dict[str, Any]:
    path = folder / COMPLETE
    if not path.is_file():
        raise ValueError(f"it has no {COMPLETE}: it was not finished, or something else wrote it")
    described = read_json(path)
    files = described.get("files") if isinstance(described, dict) and described.get("format") == FORMAT else None
    is_whole = isinstance(files, dict) and all(
        isinstance(about, dict) and {"bytes", "sha256"} <= {*about} for about in files.values()
    )
    if not files or not is_whole:
        raise ValueError(f"its {COMPLETE} is damaged")
    return described


def _mapped(value: Any, change: Callable[[Tensor], Any]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {name: _mapped(inner, change) for name, inner in value.items()}
    return type(value)(_mapped(inner, change) for inner in value) if type(value) in (list, tuple) else value


def _own_shard(tensor: Tensor) -> Any:
    return {SHARD: list(tensor.shape), "rows": share(tensor)} if isinstance(tensor, DTensor) else tensor


def _merged(ranks: list[Any]) -> Any:
    """What the ranks wrote, shards joined; the rest is the first rank's, as it is the same on all."""
    first = ranks[0]
    if isinstance(first, dict) and SHARD in first:
        return torch.cat([rank["rows"] for rank in ranks]).view(first[SHARD])
    if isinstance(first, dict):
        return {name: _merged([rank[name] for rank in ranks]) for name in first}
    if type(first) in (list, tuple):
        return type(first)(_merged(list(inner)) for inner in zip(*ranks, strict=True))
    return first


def is_sharded(module: nn.Module) -> bool:
    """Whether a module's parameters are shared out."""
    return isinstance(module, FSDPModule)
