"""What splits hold: lengths from their index, contents from one pass over their examples, and what batches would pad."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from rich.progress import Progress

from datamodules.extent import EXTENT
from datamodules.order import generator
from datamodules.processors.passes import passes_of
from datamodules.processors.processor import BYTES_PER_TOKEN
from datamodules.shards import Split
from datamodules.store import Store

COLUMNS = ("query", "target")
MAX_EXTENTS = 100_000  # rows of an index that lengths are taken from: our choice
MAX_KEPT = 5  # bad examples that are kept of a split: our choice
MISSING = "missing"


class Spread(NamedTuple):
    """Median, 95th percentile and maximum."""

    median: float
    high: float
    longest: float


@dataclass(frozen=True, slots=True)
class BadExample:
    """An example that could not be read, and why."""

    shard: str
    key: str
    cause: str
    message: str


@dataclass
class Survey:
    """What reading a split found; N examples were read, B of them bad.

    Args:
        positions: Of the examples that could be used (N - B).
        ids: Content ids of their query and target (N - B, 2) int64, 0 where there is none.
        present: Whether they have a query and a target (N - B, 2).
        num_read: N.
        num_negatives: Hard negatives of them all.
        modalities: Column to how often it held what; "nothing" where it is absent.
        labels: The classes met.
        causes: How often what was wrong, B in all.
        bad: The first of those.
    """

    positions: np.ndarray
    ids: np.ndarray
    present: np.ndarray
    num_read: int = 0
    num_negatives: int = 0
    modalities: dict[str, Counter[str]] = field(default_factory=lambda: {column: Counter() for column in COLUMNS})
    labels: set[str] = field(default_factory=set)
    causes: Counter[str] = field(default_factory=Counter)
    bad: list[BadExample] = field(default_factory=list)

    @property
    def mean_negatives(self) -> float:
        """Hard negatives of an example."""
        return self.num_negatives / max(1, len(self.positions))

    def contents(self, column: str) -> tuple[np.ndarray, np.ndarray]:
        """Content ids (P,) and positions (P,) of the column's items."""
        number = COLUMNS.index(column)
        present = self.present[:, number]
        return self.ids[present, number], self.positions[present]


def evenly(size: int, most: int) -> np.ndarray:
    """At most so many of the positions below `size`, evenly spaced, the first among them (P,)."""
    number = min(size, most)
    return np.arange(number) * size // max(1, number)


def survey(split: Split, max_examples: int, advance: Callable[[], None] = lambda: None) -> Survey:
    """Read a split once, or evenly spaced examples of it.

    Args:
        split: What is read.
        max_examples: Most examples that are read.
        advance: Called after each.
    """
    positions = evenly(len(split), max_examples)
    found = Survey(positions, np.zeros((len(positions), 2), np.int64), np.zeros((len(positions), 2), bool))
    usable = np.zeros(len(positions), bool)
    for row, position in enumerate(positions.tolist()):
        try:
            example = split.read(position)
            items = (example.query, example.target)
            ids = [0 if item is None else item.content_id for item in items]
        except ValueError as error:  # not only bad examples: a title may hold what is no UTF-8
            cause = getattr(error, "cause", "malformed record")
            found.causes[cause] += 1
            if len(found.bad) < MAX_KEPT:
                found.bad.append(BadExample(split.shard(position), split.key(position), cause, str(error)))
        else:
            usable[row], found.ids[row], found.present[row] = True, ids, [item is not None for item in items]
            found.num_negatives += len(example.negatives)
            found.labels |= set() if example.label is None else {example.label}
            for column, item in zip(COLUMNS, items, strict=True):
                found.modalities[column]["nothing" if item is None else item.modality] += 1
        found.num_read += 1
        advance()
    found.positions, found.ids, found.present = positions[usable], found.ids[usable], found.present[usable]
    return found


def spreads(split: Split) -> dict[tuple[str, str], Spread]:
    """Column and field of `EXTENT` to how long its items are; fields that no example fills are left out."""
    extents = split.extents(evenly(len(split), MAX_EXTENTS))
    return {
        (column, name): Spread(*np.percentile(extents[column][name], (50, 95, 100)).tolist())
        for column in COLUMNS
        for name in [name for name in EXTENT.names or () if extents[column][name].any()] or ["text"]
    }


def padding(split: Split, batch_size: int) -> tuple[float, float] | None:
    """Share of a batch's places for text that are padding: with whole batches, and in passes of like length.

    Lengths are the texts' bytes, as tokens. None where there is no text, or no whole batch.
    """
    extents = split.extents(evenly(len(split), MAX_EXTENTS))
    order = generator(0, "padding").permutation(len(extents["query"]))
    batches = order[: len(order) // batch_size * batch_size].reshape(-1, batch_size)
    tokens = whole = in_passes = 0
    for column in COLUMNS:
        for lengths in np.ceil(extents[column]["text"][batches] / BYTES_PER_TOKEN):
            tokens, whole = tokens + lengths.sum(), whole + lengths.max() * batch_size
            in_passes += sum(lengths[rows].max() * len(rows) for rows in passes_of(lengths))
    return (1 - tokens / whole, 1 - tokens / in_passes) if tokens else None


@dataclass
class Shards:
    """The splits of a configuration by their folder, what reading them found, and why others cannot be opened."""

    splits: dict[str, Split]
    surveys: dict[str, Survey]
    problems: dict[str, str]


def survey_all(store: Store, folders: Iterable[str], max_examples: int) -> Shards:
    """Open what can be opened and read it once, with a progress bar."""
    shards = Shards({}, {}, {})
    for folder in dict.fromkeys(folders):
        try:
            if (store / folder).exists("manifest.json"):
                shards.splits[folder] = Split(store / folder)
            else:
                shards.problems[folder] = MISSING
        except ValueError as error:
            shards.problems[folder] = str(error)
    with Progress(transient=True) as bar:
        ticket = bar.add_task("", total=sum(min(len(split), max_examples) for split in shards.splits.values()))
        for folder, split in shards.splits.items():
            bar.update(ticket, description=folder)
            shards.surveys[folder] = survey(split, max_examples, lambda: bar.advance(ticket))
    return shards
