"""Which task and which examples make step t: a pure function of (seed, step).

Every block of `steps_per_block` steps holds each task its largest-remainder share of them, in a seeded order. A task's j-th
batch takes positions [jB, (j+1)B) of the endless sequence permutation(epoch 0), permutation(epoch 1), ..: every example once
per task epoch, no tail dropped. Ranks agree without talking, workers change nothing, and the state of a run's data is one
integer.
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np


def generator(seed: int, purpose: str, *numbers: int) -> np.random.Generator:
    """A random generator of its own for (seed, purpose, numbers): nothing else in the run can move it."""
    return np.random.default_rng([seed, zlib.crc32(purpose.encode()), *numbers])


@dataclass(frozen=True, slots=True)
class PlannedTask:
    """What the plan needs to know of a task: how many examples, how many a step takes over all ranks, how often."""

    num_examples: int
    batch_size: int
    rate: float


class Plan:
    """The order of a run.

    Args:
        tasks: Name to size, batch size and rate; tasks of rate 0 are left out.
        seed: Of the order.
        steps_per_block: Steps after which every task has had exactly its share.

    Raises:
        ValueError: No task has a rate above 0, a task has no example, or a rate is too small to get a step in a block.
    """

    def __init__(self, tasks: Mapping[str, PlannedTask], *, seed: int, steps_per_block: int = 1000) -> None:
        self.tasks = {name: task for name, task in tasks.items() if task.rate > 0}
        if not self.tasks:
            raise ValueError("no task has a rate above 0; give at least one in data.tasks")
        self.names = sorted(self.tasks)
        self.seed = seed
        self.steps_per_block = steps_per_block
        for name, task in self.tasks.items():
            if not task.num_examples:
                raise ValueError(f"task {name!r} has no examples; prepare its shards or set its rate to 0")
        self.shares = _largest_remainder([self.tasks[name].rate for name in self.names], steps_per_block)
        for name, share in zip(self.names, self.shares, strict=True):
            if not share:
                raise ValueError(
                    f"task {name!r} with rate {self.tasks[name].rate} gets no step in a block of {steps_per_block}; "
                    "raise its rate, raise data.steps_per_block, or set its rate to 0"
                )
        self._block = lru_cache(maxsize=2)(self._make_block)
        self._permutation = lru_cache(maxsize=2 * len(self.names))(self._make_permutation)

    def task_of(self, step: int) -> tuple[str, int]:
        """The step's task, and how many batches of that task came before."""
        block, within = divmod(step, self.steps_per_block)
        order, earlier = self._block(block)
        number = order[within]
        return self.names[number], block * self.shares[number] + int(earlier[within])

    def positions(self, step: int) -> np.ndarray:
        """The global batch of a step: positions in the task's split (batch_size,) int64."""
        name, batch = self.task_of(step)
        task = self.tasks[name]
        places = np.arange(batch * task.batch_size, (batch + 1) * task.batch_size)
        epochs, within = np.divmod(places, task.num_examples)
        found = np.empty(len(places), dtype=np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            found[here] = self._permutation(name, int(epoch))[within[here]]
        return found

    def _make_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        order = generator(self.seed, "task order", block).permutation(np.repeat(np.arange(len(self.names)), self.shares))
        earlier = np.empty_like(order)
        for number in range(len(self.names)):
            here = order == number
            earlier[here] = np.arange(here.sum())
        return order, earlier

    def _make_permutation(self, name: str, epoch: int) -> np.ndarray:
        return generator(self.seed, f"examples of {name}", epoch).permutation(self.tasks[name].num_examples)


def _largest_remainder(rates: list[float], total: int) -> list[int]:
    """Whole shares of `total` in proportion to `rates`, summing to it exactly; ties go to the first."""
    exact = [rate * total / sum(rates) for rate in rates]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(rates)), key=lambda n: shares[n] - exact[n])
    for n in by_remainder[: total - sum(shares)]:
        shares[n] += 1
    return shares
