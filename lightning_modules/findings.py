"""What judging gives: rows, values by query, the space's health, neighbours; and how a benchmark's come into them.

Letters: Q queries.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from datamodules.tasks import BenchmarkSpec
from lightning_modules.precision import Dtype, bytes_of
from lightning_modules.report import Neighbours
from lightning_modules.results import name_of_values
from lightning_modules.statistics import bootstrap_interval

FIRST = {"retrieval": "recall@1", "similarity": "spearman", "classification": "accuracy_probe", "clustering": "v_measure"}


@dataclass(frozen=True)
class Findings:
    """What judging gave.

    Args:
        rows: Those of results.json, see `Judge.results`.
        values: Name to values (Q,) of each query, see `results.name_of_values`; `<benchmark>|queries` holds the queries'
            content ids in the same order.
        space: Rows of space.json, see `lightning_modules.space`.
        neighbours: What the report shows of retrieval.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    values: dict[str, np.ndarray] = field(default_factory=dict)
    space: list[dict[str, Any]] = field(default_factory=list)
    neighbours: list[Neighbours] = field(default_factory=list)


@dataclass(frozen=True)
class Settings:
    """At which widths, in which forms, with which prompts, and whether with intervals, the space's health and neighbours."""

    widths: Sequence[int]
    dtypes: Sequence[Dtype] = ("float32",)
    prompts: bool = True
    deep: bool = True


class Judged:
    """Where the findings of one benchmark go."""

    def __init__(self, findings: Findings, name: str, spec: BenchmarkSpec, settings: Settings) -> None:
        self.findings, self.name, self.spec, self.settings = findings, name, spec, settings
        self._sizes: dict[str, int | None] = {"num_queries": None, "num_candidates": None}

    def sizes(self, num_queries: int, num_candidates: int, query_ids: np.ndarray | None) -> None:
        """How many there are; and the queries' content ids, where each has a value of its own."""
        self._sizes = {"num_queries": num_queries, "num_candidates": num_candidates}
        if query_ids is not None:  # the second of equal items is another query than the first
            order = np.argsort(query_ids, kind="stable")
            ordered, number_Q = query_ids[order], np.empty(len(order), np.int64)
            number_Q[order] = np.arange(len(order)) - np.searchsorted(ordered, ordered)
            self.findings.values[f"{self.name}|queries"] = query_ids + number_Q

    def add(self, width: int, dtype: Dtype, values: Mapping[str, np.ndarray], chance: Mapping[str, float | None]) -> None:
        """Rows of means over queries; the metric that stands for the benchmark comes first, with its interval."""
        headline = self.spec.metric or next(iter(values))
        if headline not in values:
            raise ValueError(f"benchmark {self.name!r} asks for {headline!r}; {self.spec.measure} has {', '.join(values)}")
        for metric in sorted(values, key=lambda metric: metric != headline):
            interval = None
            if metric == headline:
                interval = bootstrap_interval(values[metric]) if self.settings.deep and len(values[metric]) > 1 else None
                key = name_of_values(self.name, metric, width, dtype, self.settings.prompts)
                self.findings.values[key] = values[metric]
            elif dtype != "float32" or not self.settings.prompts:
                continue
            self.row(metric, width, dtype, float(values[metric].mean()), interval=interval, chance=chance[metric])

    def row(
        self,
        metric: str,
        width: int,
        dtype: Dtype,
        value: float | None,
        *,
        chance: float | None,
        interval: tuple[float, float] | None = None,
        note: str | None = None,
    ) -> None:
        low, high = interval or (None, None)
        row = {"benchmark": self.name, "metric": metric, "prefix": width, "dtype": dtype, "prompts": self.settings.prompts}
        row |= {"value": value, "low": low, "high": high, "chance": chance, **self._sizes, "bytes": bytes_of(width, dtype)}
        row |= {"group": self.spec.group, "language": self.spec.language}
        self.findings.rows.append(row if note is None else row | {"note": note})

    def without_value(self, note: str) -> None:
        """Rows that say why there is no number."""
        metric = self.spec.metric or FIRST[self.spec.measure]
        for width in self.settings.widths:
            self.row(metric, width, "float32", None, chance=None, note=note)
