"""Which task and which examples make step t: a pure function of (seed, step).

Every block of `steps_per_block` steps holds each task its largest-remainder share of them, in a seeded order. A task's j-th
batch takes places [jB, (j+1)B) of the endless sequence epoch 0, epoch 1, .. of its examples, each epoch in an order of its
own: every example once per task epoch, no tail dropped. Ranks agree without talking, workers change nothing, and the state of
a run's data is one integer.

Within an epoch the order is `datamodules.order`'s; where lengths are known, the examples of successive batches (a pool) are
then dealt to these batches by length, see `datamodules.buckets`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from datamodules.buckets import Lengths, bucketed
from datamodules.order import Order, generator


@dataclass(frozen=True, slots=True)
class PlannedTask:
    """What the plan needs to know of a task.

    Args:
        order: The examples' order within an epoch; it knows how many there are.
        batch_size: Examples of a step over all ranks.
        rate: Share of the steps, relative to the other tasks' rates.
        lengths: Positions (P,) to lengths of their query and target (P, 2); None leaves batches as they come.
    """

    order: Order
    batch_size: int
    rate: float
    lengths: Lengths | None = None


class Plan:
    """The order of a run.

    Args:
        tasks: Name to what is known of it; tasks of rate 0 are left out.
        seed: Of the order.
        steps_per_block: Steps after which every task has had exactly its share.
        pool_batches: Batches whose examples are dealt by length among each other.

    Raises:
        ValueError: No task has a rate above 0, a task has no example, or a rate is too small to get a step in a block.
    """

    def __init__(
        self, tasks: Mapping[str, PlannedTask], *, seed: int, steps_per_block: int = 1000, pool_batches: int = 50
    ) -> None:
        self.tasks = {name: task for name, task in tasks.items() if task.rate > 0}
        if not self.tasks:
            raise ValueError("no task has a rate above 0; give at least one in data.tasks")
        if steps_per_block < 1 or pool_batches < 0:
            raise ValueError(
                f"steps_per_block is {steps_per_block}, pool_batches {pool_batches}; allowed: at least 1, at least 0"
            )
        self.names = sorted(self.tasks)
        self.seed, self.steps_per_block, self.pool_batches = seed, steps_per_block, pool_batches
        for name, task in self.tasks.items():
            if not task.order.num_examples:
                raise ValueError(f"task {name!r} has no examples; prepare its shards or set its rate to 0")
        self.shares = _largest_remainder([self.tasks[name].rate for name in self.names], steps_per_block)
        for name, share in zip(self.names, self.shares, strict=True):
            if not share:
                raise ValueError(
                    f"task {name!r} with rate {self.tasks[name].rate} gets no step in a block of {steps_per_block}; "
                    "raise its rate, raise data.steps_per_block, or set its rate to 0"
                )
        self._remember()

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
        first, last = batch * task.batch_size, (batch + 1) * task.batch_size
        size = task.order.num_examples
        parts = []
        for epoch in range(first // size, (last - 1) // size + 1):
            begin, end = max(first - epoch * size, 0), min(last - epoch * size, size)
            parts.append(self._stretch(name, epoch, begin, end))
        return np.concatenate(parts)

    def _stretch(self, name: str, epoch: int, begin: int, end: int) -> np.ndarray:
        """Positions of the places [begin, end) of an epoch, which lie in one batch."""
        task = self.tasks[name]
        size, length = task.order.num_examples, task.batch_size
        head = -epoch * size % length  # places that complete the batch begun in the epoch before
        num_batches = (size - head) // length
        if task.lengths is None or self.pool_batches < 2 or num_batches < 2:
            return task.order.positions(self._key(name, epoch), np.arange(begin, end))
        num_pools = -(-num_batches // self.pool_batches)
        ends = [head + (pool + 1) * num_batches // num_pools * length for pool in range(num_pools)]
        pool = next((pool for pool, last in enumerate(ends) if begin < last), num_pools - 1)
        start, stop = ends[pool - 1] if pool else 0, size if pool == num_pools - 1 else ends[pool]
        return self._pool(name, epoch, pool, start, stop, head)[begin - start : end - start]

    def _make_pool(self, name: str, epoch: int, pool: int, start: int, stop: int, head: int) -> np.ndarray:
        """Positions of the places [start, stop) of an epoch, dealt by length; the first pool begins with the epoch's head."""
        task = self.tasks[name]
        positions = task.order.positions(self._key(name, epoch), np.arange(start, stop))
        assert task.lengths is not None
        random = generator(self.seed, f"pool of {name}", epoch, pool)
        return positions[bucketed(task.lengths(positions), task.batch_size, 0 if pool else head, random)]

    def _key(self, name: str, epoch: int) -> tuple[int, str, int]:
        return self.seed, f"examples of {name}", epoch

    def _make_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        order = generator(self.seed, "task order", block).permutation(np.repeat(np.arange(len(self.names)), self.shares))
        earlier = np.empty_like(order)
        for number in range(len(self.names)):
            here = order == number
            earlier[here] = np.arange(here.sum())
        return order, earlier

    def _remember(self) -> None:
        """What was worked out last is kept: two blocks, two pools of each task."""
        self._block = lru_cache(maxsize=2)(self._make_block)
        self._pool = lru_cache(maxsize=2 * len(self.names))(self._make_pool)

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_block", "_pool")}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._remember()


def rows_of_rank(batch_size: int, rank: int, world_size: int) -> np.ndarray:
    """Rows of a global batch that a rank takes, in snake order: as many each, and about as long, when rows lie by length."""
    there_and_back = np.arange(batch_size).reshape(-1, world_size)
    there_and_back[1::2] = there_and_back[1::2, ::-1]
    return there_and_back[:, rank]


def _largest_remainder(rates: list[float], total: int) -> list[int]:
    """Whole shares of `total` in proportion to `rates`, summing to it exactly; ties go to the first."""
    exact = [rate * total / sum(rates) for rate in rates]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(rates)), key=lambda n: shares[n] - exact[n])
    for n in by_remainder[: total - sum(shares)]:
        shares[n] += 1
    return shares
