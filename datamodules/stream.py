"""The planned examples of a step on this rank: read through the index, verified, decoded; bad ones replaced and told."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

from torch.utils.data import IterableDataset, get_worker_info

from datamodules.collate import Batch
from datamodules.decode import decode_example, decode_item
from datamodules.media.limits import DecodeLimits
from datamodules.order import generator
from datamodules.plan import Plan, rows_of_rank
from datamodules.sample import BadExampleError, Example, Item
from datamodules.shards import Split

MAX_IN_A_ROW = 100
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Fault:
    """A bad example met at a step, which another of the same task took the place of."""

    task: str
    step: int
    shard: str
    key: str
    cause: str
    message: str


@dataclass(frozen=True)
class Source:
    """Reads decoded examples of a task's split; errors name the shard and the key."""

    split: Split
    limits: DecodeLimits

    def read(self, position: int) -> Example:
        """A whole example, decoded.

        Raises:
            BadExampleError: It is damaged, malformed, or does not decode within the limits.
        """
        example = self.split.read(position)
        return self._named(position, lambda: decode_example(example, self.limits))

    def items(self, position: int, column: str) -> list[Item]:
        """One column of an example, decoded: its `query`, its `target`, or its `negatives`, which may be none."""
        example = self.split.read(position)
        items = example.negatives if column == "negatives" else (getattr(example, column),)
        if None in items:
            raise ValueError(f"{self.split.folder}: example {example.key!r} has no {column}")
        return self._named(position, lambda: [decode_item(item, self.limits) for item in items])

    def _named(self, position: int, decode: Callable[[], T]) -> T:
        try:
            return decode()
        except ValueError as error:
            message = f"{self.split.shard(position)}: example {self.split.key(position)!r} cannot be used: {error}"
            raise BadExampleError(message, getattr(error, "cause", "does not decode")) from error


class StepStream(IterableDataset[Batch]):
    """Batches of the steps from `first_step` up to `num_steps`, for one rank; its length is that of the whole run.

    Worker w of W makes steps first_step + w, + W, ..; the loader takes from workers in turn, so the order is the plan's
    whatever their number.

    Args:
        plan: Which examples make a step.
        sources: Task name to its examples.
        collate: Examples to a batch.
        first_step: Where to begin.
        num_steps: Steps of the whole run.
        rank: This process's place.
        world_size: Number of processes; every task's batch size is a multiple of it.
    """

    def __init__(
        self,
        plan: Plan,
        sources: Mapping[str, Source],
        collate: Callable[..., Batch],
        *,
        first_step: int,
        num_steps: int,
        rank: int,
        world_size: int,
    ) -> None:
        self.plan, self.sources, self.collate = plan, sources, collate
        self.first_step, self.num_steps, self.rank, self.world_size = first_step, num_steps, rank, world_size

    def __len__(self) -> int:
        return self.num_steps

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        step, stride = (self.first_step, 1) if worker is None else (self.first_step + worker.id, worker.num_workers)
        for planned in range(step, self.num_steps, stride):
            yield self.batch_of(planned)

    def batch_of(self, step: int) -> Batch:
        """The batch of a step on this rank."""
        task, _ = self.plan.task_of(step)
        positions = self.plan.positions(step)
        rows = rows_of_rank(len(positions), self.rank, self.world_size)
        faults: list[Fault] = []
        examples = [self._read(task, step, int(row), int(positions[row]), faults) for row in rows]
        return self.collate(task, step, examples, rows=rows, faults=tuple(faults))

    def _read(self, task: str, step: int, row: int, position: int, faults: list[Fault]) -> Example:
        """The planned example, or where it is bad one drawn from the same task by (seed, step, row) alone.

        Raises:
            ValueError: A hundred draws in a row were bad.
        """
        source, draws = self.sources[task], None
        for _ in range(MAX_IN_A_ROW):
            try:
                return source.read(position)
            except BadExampleError as error:
                split = source.split
                faults.append(Fault(task, step, split.shard(position), split.key(position), error.cause, str(error)))
                draws = generator(self.plan.seed, "replacement", step, row) if draws is None else draws
                position = int(draws.integers(len(split)))
        raise ValueError(
            f"task {task!r}: {MAX_IN_A_ROW} examples in a row cannot be used, the last because: {faults[-1].message}. "
            "Run conf=verify on its shards, or prepare them again"
        )
