"""Which task and which examples make step t: a pure function of (seed, step).

Every block of `steps_per_block` steps holds each task its largest-remainder share of them, in a seeded order. A task's j-th
batch takes places [jB, (j+1)B) of the endless sequence epoch 0, epoch 1, .. of its examples, each epoch in an order of its
own: every example once per task epoch, no tail dropped. Ranks agree without talking, workers change nothing, and the state of
a run's data is one integer.

Within an epoch the order is `datamodules.order`'s. Where lengths are known, the rows of a batch lie by length, so that ranks
that take them in snake order have as much to do.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from datamodules.order import Order, generator

STEPS_PER_BLOCK = 1000  # our choice


@dataclass(frozen=True, slots=True)
class PlannedTask:
    """What the plan needs to know of a task.

    Args:
        order: The examples' order within an epoch; it knows how many there are.
        batch_size: Examples of a step over all ranks.
        rate: Share of the steps, relative to the other tasks' rates.
        lengths: Positions (P,) to lengths (P,), which rows are put in order by; None leaves them as they come.
    """

    order: Order
    batch_size: int
    rate: float
    lengths: Callable[[np.ndarray], np.ndarray] | None = None


class Plan:
    """The order of a run.

    Args:
        tasks: Name to what is known of it; tasks of rate 0 are left out.
        seed: Of the order.
        steps_per_block: Steps after which every task has had exactly its share.

    Raises:
        ValueError: No task has a rate above 0, a task has no example, or a rate is too small to get a step in a block.
    """

    def __init__(self, tasks: Mapping[str, PlannedTask], *, seed: int, steps_per_block: int = STEPS_PER_BLOCK) -> None:
        self.tasks = {name: task for name, task in tasks.items() if task.rate > 0}
        if not self.tasks:
            raise ValueError("no task has a rate above 0; give at least one in data.tasks")
        if steps_per_block < 1:
            raise ValueError(f"steps_per_block is {steps_per_block}; it must be at least 1")
        self.names = sorted(self.tasks)
        self.seed, self.steps_per_block = seed, steps_per_block
        for name, task in self.tasks.items():
            if not task.order.num_examples:
                raise ValueError(f"task {name!r} has no examples; prepare its shards or set its rate to 0")
        self.shares = largest_remainder([self.tasks[name].rate for name in self.names], steps_per_block)
        for name, share in zip(self.names, self.shares, strict=True):
            if not share:
                raise ValueError(
                    f"task {name!r} with rate {self.tasks[name].rate} gets no step in a block of {steps_per_block}; "
                    "raise its rate, raise data.steps_per_block, or set its rate to 0"
                )
        self._block = lru_cache(maxsize=2)(self._make_block)

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
        epochs, places = np.divmod(np.arange(batch * task.batch_size, (batch + 1) * task.batch_size), task.order.num_examples)
        found = np.empty(task.batch_size, np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            found[here] = task.order.positions((self.seed, f"examples of {name}", int(epoch)), places[here])
        return found if task.lengths is None else found[np.argsort(-task.lengths(found), kind="stable")]

    def _make_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        order = generator(self.seed, "task order", block).permutation(np.repeat(np.arange(len(self.names)), self.shares))
        earlier = np.empty_like(order)
        for number in range(len(self.names)):
            here = order == number
            earlier[here] = np.arange(here.sum())
        return order, earlier

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "_block"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._block = lru_cache(maxsize=2)(self._make_block)


def rows_of_rank(batch_size: int, rank: int, world_size: int) -> np.ndarray:
    """Rows of a global batch that a rank takes, in snake order: as many each, and about as long."""
    there_and_back = np.arange(batch_size).reshape(-1, world_size)
    there_and_back[1::2] = there_and_back[1::2, ::-1]
    return there_and_back[:, rank]


def largest_remainder(rates: list[float], total: int) -> list[int]:
    """Whole shares of `total` in proportion to `rates`, summing to it exactly; ties go to the first."""
    exact = [rate * total / sum(rates) for rate in rates]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(rates)), key=lambda n: shares[n] - exact[n])
    for n in by_remainder[: total - sum(shares)]:
        shares[n] += 1
    return shares
