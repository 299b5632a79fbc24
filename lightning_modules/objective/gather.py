"""All ranks' vectors, with their gradients: what makes N ranks learn what one rank learns from the whole batch.

Each rank minimises a mean over its own rows, or a value of all rows, and DDP and FSDP average the parameters' gradients over
the ranks: the mean of the ranks' losses is what is minimised. A vector counts in every rank's loss, so going backward all
ranks' gradients of it are summed, in fp32, on the rank that it came from; averaged, they are those of the whole batch.

What meets other ranks here must be called by all of them, in the same order. Letters: W ranks, P rows with padding.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.problem import HALF


def num_ranks() -> int:
    """Processes that train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def this_rank() -> int:
    """This process's place among them."""
    return dist.get_rank() if num_ranks() > 1 else 0


def told_by_all(numbers: Mapping[str, int | Tensor], device: torch.device) -> dict[str, list[int]]:
    """What each rank says, by name, in the ranks' order; waits for the device once.

    Args:
        numbers: Whole numbers, or 0-d tensors of them; the same names on every rank.
        device: Where the process group's tensors lie.
    """
    own_S = torch.stack([torch.as_tensor(number, dtype=torch.int64, device=device) for number in numbers.values()])
    all_WS = _all_gather(own_S).unflatten(0, (num_ranks(), len(own_S)))
    return dict(zip(numbers, all_WS.T.tolist(), strict=True))


def require_equal(told: Mapping[str, list[int]], *names: str) -> None:
    """Raises ValueError, on all ranks alike, unless they say the same of everything that is named."""
    for name in names:
        if len(set(told[name])) > 1:
            raise ValueError(
                f"the ranks' batches differ in their number of {name}: {told[name]}, in the order of the ranks; their losses "
                "are averaged, so every rank needs as many as the others"
            )


def gathered(columns: Sequence[Tensor], counts: Sequence[Sequence[int]]) -> list[Tensor]:
    """The rows of every rank, one tensor (Σ R, ..) per column, rank after rank; with gradient, see above.

    Args:
        columns: This rank's rows, (R, D) vectors or (R,) ids; alike but for their number.
        counts: For each column the rows of every rank, as `told_by_all` has them.
    """
    if num_ranks() == 1:
        return list(columns)
    most = [max(of_ranks) for of_ranks in counts]
    padded = [
        column if len(column) == rows else torch.cat([column, column.new_zeros(rows - len(column), *column.shape[1:])])
        for column, rows in zip(columns, most, strict=True)
    ]
    by_rank = _AllGather.apply(torch.cat(padded)).chunk(num_ranks())
    starts = itertools.accumulate(most[:-1], initial=0)
    return [
        torch.cat([rows[start : start + count] for rows, count in zip(by_rank, of_ranks, strict=True)])
        for start, of_ranks in zip(starts, counts, strict=True)
    ]


def mean_over_ranks(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The mean of each of some scalars, detached; the same names on every rank."""
    if num_ranks() == 1:
        return dict(parts)
    values = torch.stack([value.detach().double() for value in parts.values()])
    dist.all_reduce(values)
    return dict(zip(parts, values / num_ranks(), strict=True))


class _AllGather(torch.autograd.Function):
    """This rank's rows (P, ..) to those of all (W · P, ..); one collective each way, whatever the rows hold."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        ctx.dtype = own.dtype
        return _all_gather(own)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad = (grad.float() if grad.dtype in HALF else grad).contiguous()
        own = grad.new_empty(len(grad) // num_ranks(), *grad.shape[1:])
        dist.reduce_scatter_tensor(own, grad)
        return own.to(ctx.dtype)


def _all_gather(own: Tensor) -> Tensor:
    if num_ranks() == 1:
        return own
    everything = own.new_empty(num_ranks() * len(own), *own.shape[1:])
    dist.all_gather_into_tensor(everything, own.contiguous())
    return everything
