"""Past targets as further in-batch negatives: memory in the place of a larger batch.

Source: the memory of past batches of XBM (arXiv 1912.06798); none of the papers that we follow has one. Off by default.
Letters: G examples on all ranks, Q past targets, D embedding width.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Past(NamedTuple):
    """Targets of earlier batches: vectors (Q, D) and the content ids of their pairs (Q,), the oldest first."""

    target_QD: Tensor
    query_id_Q: Tensor
    target_id_Q: Tensor


class Queue(nn.Module):
    """The last targets of each task, without gradient.

    They are buffers, so that a checkpoint holds them; a task's begin with its first batch. As all ranks' targets enter, in an
    order that follows from their content alone, every rank holds the same, and as many ranks hold what one would.

    Args:
        size: Targets kept of each task.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def of(self, task: str) -> Past | None:
        """What is kept of a task; None before its first batch."""
        names = _names(task)
        return Past(*(getattr(self, name) for name in names)) if hasattr(self, names[0]) else None

    @torch.no_grad()
    def push(self, task: str, target_GD: Tensor, query_id_G: Tensor, target_id_G: Tensor) -> None:
        """Adds a batch's targets; the oldest go."""
        order_G = query_id_G.argsort(stable=True)
        order_G = order_G[target_id_G[order_G].argsort(stable=True)]
        new = Past(target_GD.detach()[order_G], query_id_G[order_G], target_id_G[order_G])
        past = self.of(task)
        for name, rows, earlier in zip(_names(task), new, past or (None,) * 3, strict=True):
            kept = rows if earlier is None else torch.cat([earlier.to(rows), rows])
            self.register_buffer(name, kept[-self.size :].clone())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """As buffers come and go with the tasks, those of the checkpoint take the place of all that are here."""
        for name in list(self._buffers):
            delattr(self, name)
        for key, value in state_dict.items():
            if key.startswith(prefix):
                self.register_buffer(key.removeprefix(prefix), torch.empty_like(value))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _names(task: str) -> tuple[str, str, str]:
    """Names of a task's buffers; a module's may hold no dot."""
    escaped = task.replace("%", "%25").replace(".", "%2E")
    return f"{escaped} vectors", f"{escaped} query ids", f"{escaped} target ids"
