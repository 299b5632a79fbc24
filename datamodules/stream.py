"""The planned examples of a step on this rank: read through the index, verified, decoded."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

from torch.utils.data import IterableDataset, get_worker_info

from datamodules.collate import Batch, Collate
from datamodules.decode import DecodeLimits, decode_example, decode_item
from datamodules.plan import Plan
from datamodules.sample import Example, Item
from datamodules.shards import Split

T = TypeVar("T")


@dataclass(frozen=True)
class Source:
    """Reads decoded examples of a task's split; errors name the shard folder and the key."""

    split: Split
    limits: DecodeLimits

    def read(self, position: int) -> Example:
        """A whole example, decoded."""
        example = self.split.read(position)
        return self._named(example.key, lambda: decode_example(example, self.limits))

    def item(self, position: int, column: str) -> Item:
        """Only the query, or only the target, of an example, decoded."""
        example = self.split.read(position)
        item = getattr(example, column)
        if item is None:
            raise ValueError(f"{self.split.folder}: example {example.key!r} has no {column}")
        return self._named(example.key, lambda: decode_item(item, self.limits))

    def _named(self, key: str, decode: Callable[[], T]) -> T:
        try:
            return decode()
        except ValueError as error:
            raise ValueError(f"{self.split.folder}: example {key!r} cannot be used: {error}") from error


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
        collate: Collate,
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
        task, _ = self.plan.task_of(step)
        positions = self.plan.positions(step)
        each = len(positions) // self.world_size
        mine = positions[self.rank * each : (self.rank + 1) * each]
        return self.collate(
            task, step, [self.sources[task].read(int(position)) for position in mine], first_row=self.rank * each
        )
