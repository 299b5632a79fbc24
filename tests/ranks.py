"""One of two ranks that train a linear encoder with the loss, under DDP and FSDP: prints its gradients (test_operator.py)."""

import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from kernels.contrastive import contrastive_loss


def encoder_and_inputs() -> tuple[torch.nn.Linear, torch.Tensor]:
    """The same on every rank: inputs (2 ranks, 2 sides, 6 rows, 10)."""
    torch.manual_seed(0)
    return torch.nn.Linear(10, 8), torch.randn(2, 2, 6, 10)


def loss_of(encoder: torch.nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """Of one rank's rows."""
    query, passage = encoder(inputs.flatten(0, 1)).unflatten(0, inputs.shape[:2])
    return contrastive_loss(query, passage, prefixes=(4, 8), temperature=0.1).loss


def main(rank: int, address: str) -> None:
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    for wrap in (DistributedDataParallel, lambda x: fully_shard(x, mesh=init_device_mesh("cpu", (2,)))):
        encoder, inputs = encoder_and_inputs()
        wrapped = wrap(encoder)
        loss_of(wrapped, inputs[rank]).backward()
        gradient = encoder.weight.grad
        assert gradient is not None
        print(*(gradient.full_tensor() if isinstance(gradient, DTensor) else gradient).flatten().tolist())
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may outlive what they use at the interpreter's end, and abort it


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
