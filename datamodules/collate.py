"""Examples to a Batch: prompts and their dropout, the processor, and content ids for the loss's mask."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from datamodules.order import generator
from datamodules.processors.inputs import Inputs
from datamodules.processors.processor import Processor
from datamodules.sample import Example, Item, Part, content_id_of_label
from datamodules.tasks import TaskSpec, apply_prompt


@dataclass
class Batch:
    """One step's examples of one task on one rank; B examples, M hard negatives of any of them.

    Args:
        task: Name of the task.
        step: The step it was made for.
        keys: Keys of the examples (B).
        query, target: Model inputs (B items each).
        query_id, target_id: Content ids (B,) int64.
        negative: Model inputs of the hard negatives (M items), or None.
        negative_id: Their content ids (M,) int64, or None.
        negative_row: The example each belongs to (M,) int64, or None.
        query_vector, target_vector: A teacher's vectors (B, T) fp32, rows of NaN where it has none; None if it has none at all.
        negative_vector: The same of the hard negatives (M, T).
        faults: Bad examples that others took the place of, see `datamodules.stream.Fault`.
    """

    task: str
    step: int
    keys: list[str]
    query: Inputs
    target: Inputs
    query_id: Tensor
    target_id: Tensor
    negative: Inputs | None = None
    negative_id: Tensor | None = None
    negative_row: Tensor | None = None
    query_vector: Tensor | None = None
    target_vector: Tensor | None = None
    negative_vector: Tensor | None = None
    faults: tuple[Any, ...] = ()

    def to(self, device: torch.device | str) -> Self:
        """The batch with every tensor on a device."""
        moved = {
            field.name: value.to(device)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor | Inputs)
        }
        return dataclasses.replace(self, **moved)

    def pairs(self) -> Self:
        """The batch without its hard negatives."""
        return dataclasses.replace(self, negative=None, negative_id=None, negative_row=None, negative_vector=None)


@dataclass(frozen=True)
class Collate:
    """Makes batches.

    Args:
        tasks: Name to its prompts, number of hard negatives and notion of equality.
        processor: Items to model inputs.
        prompt_dropout: Share of queries that go without their prompt, so that inputs without it work too (Gemini Embedding 2).
        seed: Of the dropout.
    """

    tasks: Mapping[str, TaskSpec]
    processor: Processor
    prompt_dropout: float
    seed: int

    def __call__(
        self, task: str, step: int, examples: Sequence[Example], *, rows: np.ndarray | None = None, faults: tuple[Any, ...] = ()
    ) -> Batch:
        """The batch of a step.

        Args:
            task: Name of the task.
            step: The step.
            examples: This rank's (B), decoded.
            rows: Their rows in the global batch (B,); None where they are all of it.
            faults: Go into the batch.

        Raises:
            ValueError: An example has no query, no target, or no label where the task compares labels; or the teacher's vectors
                differ in width.
        """
        spec = self.tasks[task]
        for example in examples:
            if example.query is None or example.target is None:
                raise ValueError(f"task {task!r}: example {example.key!r} has no query or no target; train on a split of pairs")
        queries = [example.query for example in examples if example.query is not None]
        targets = [example.target for example in examples if example.target is not None]
        rows = np.arange(len(examples)) if rows is None else rows
        dropped = generator(self.seed, "prompt dropout", step).random(int(rows.max()) + 1)[rows] < self.prompt_dropout
        negatives = [
            (place, negative)
            for place, (row, example) in enumerate(zip(rows.tolist(), examples, strict=True))
            for negative in self._chosen(example, spec.negatives, step, row)
        ]
        teacher_dim = _teacher_dim(task, [*queries, *targets, *(item for _, item in negatives)])
        hard = {}
        if negatives:
            hard = {
                "negative": self.processor([with_prompt(item, spec.target_prompt) for _, item in negatives]),
                "negative_id": _ids(negative_id(item, spec) for _, item in negatives),
                "negative_row": torch.tensor([place for place, _ in negatives]),
            }
        return Batch(
            task,
            step,
            [example.key for example in examples],
            query=self.processor(
                [with_prompt(item, None if drop else spec.query_prompt) for item, drop in zip(queries, dropped, strict=True)]
            ),
            target=self.processor([with_prompt(item, spec.target_prompt) for item in targets]),
            query_id=_ids(item.content_id for item in queries),
            target_id=_ids(target_id(example, spec) for example in examples),
            query_vector=_vectors(queries, teacher_dim),
            target_vector=_vectors(targets, teacher_dim),
            negative_vector=_vectors([item for _, item in negatives], teacher_dim),
            faults=faults,
            **hard,
        )

    def _chosen(self, example: Example, most: int, step: int, row: int) -> Sequence[Item]:
        """At most so many of an example's hard negatives, without a preference, in their order."""
        negatives = example.negatives
        if len(negatives) <= most:
            return negatives
        random = generator(self.seed, "negatives", step, row)
        return [negatives[n] for n in sorted(random.permutation(len(negatives))[:most])]


def target_id(example: Example, spec: TaskSpec) -> int:
    """What the loss's mask compares of a target: its content, or its label.

    Raises:
        ValueError: The task compares labels and the example has none.
    """
    assert example.target is not None
    if spec.kind in ("retrieval", "similarity"):
        return example.target.content_id
    if example.label is None:
        raise ValueError(f"example {example.key!r} has no label, which a task of kind {spec.kind} compares")
    return content_id_of_label(example.label)


def negative_id(item: Item, spec: TaskSpec) -> int:
    """What the mask compares of a hard negative: its content, or the class that its text names."""
    if spec.kind in ("retrieval", "similarity") or not item.is_text:
        return item.content_id
    return content_id_of_label(" ".join(str(part.data) for part in item.parts))


def with_prompt(item: Item, template: str | None) -> Item:
    """The item with its prompt around its text; items that hold media carry none."""
    if template is None or not item.is_text:
        return item
    text = "\n".join(str(part.data) for part in item.parts)
    prompted = apply_prompt(template, text, item.title)
    return Item((Part("text", prompted, content=prompted),))


def _teacher_dim(task: str, items: Sequence[Item]) -> int:
    """The width of the teacher's vectors; 0 if no item has one.

    Raises:
        ValueError: They differ in width.
    """
    dims = {len(item.teacher) for item in items if item.teacher is not None}
    if len(dims) > 1:
        raise ValueError(f"task {task!r}: examples have teacher vectors of widths {sorted(dims)}; they must be one teacher's")
    return dims.pop() if dims else 0


def _vectors(items: Sequence[Item], teacher_dim: int) -> Tensor | None:
    """The teacher's vectors of items (R, T), rows of NaN where it has none; None if T is 0 or there are no items."""
    if not teacher_dim or not items:
        return None
    rows = np.full((len(items), teacher_dim), np.nan, dtype=np.float32)
    for row, item in zip(rows, items, strict=True):
        if item.teacher is not None:
            row[:] = item.teacher
    return torch.from_numpy(rows)


def _ids(values: Iterable[int]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int64)
