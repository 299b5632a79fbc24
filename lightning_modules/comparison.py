"""A run against a baseline on the same queries: the difference of each headline metric, and how sure it is.

Differences are tested over the queries that both runs judged; p-values are corrected for the number of benchmarks tested.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, NamedTuple

import numpy as np

from lightning_modules.report_scores import headlines_of
from lightning_modules.results import Score, Values, read_results, scores_of
from lightning_modules.statistics import holm, paired

CLEAR = 0.05  # corrected p-value below which a difference is called clear: our choice
NEAR = 1e-3  # by which the mean of per-query values may differ from the row's value before it is said: our choice

Verdict = Literal["better", "worse", "unclear", "untested", ""]


@dataclass(frozen=True, slots=True)
class Row:
    """A benchmark in both runs; without a difference `note` says why, without a p-value there is no test.

    Args:
        benchmark: Its name.
        group: What it is shown with; None for none.
        metric: The headline metric of both.
        prefix: At which both are compared.
        baseline: Mean of the baseline over the shared queries; of all where there is no test.
        value: The same of the run.
        difference: Of the run to the baseline.
        low: Lower end of its 95 % interval.
        high: Upper end.
        p_value: Of the paired randomisation test.
        corrected: The same after Holm's correction.
        num_queries: That both runs judged; None where there is no test.
        verdict: `better` or `worse` where the corrected p-value is below `CLEAR`.
        note: What else has to be known.
    """

    benchmark: str
    group: str | None = None
    metric: str = ""
    prefix: int | None = None
    baseline: float | None = None
    value: float | None = None
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    p_value: float | None = None
    corrected: float | None = None
    num_queries: int | None = None
    verdict: Verdict = ""
    note: str = ""


class AtPrefix(NamedTuple):
    """Differences of headline metrics at one prefix, by benchmark."""

    prefix: int
    differences: dict[str, float]


@dataclass(frozen=True)
class Comparison:
    """A run beside its baseline."""

    name: str
    baseline: str
    rows: list[Row]
    by_prefix: list[AtPrefix]

    @property
    def compared(self) -> list[Row]:
        """Rows with a difference."""
        return [row for row in self.rows if row.difference is not None]

    @property
    def mean_difference(self) -> float | None:
        """Over the benchmarks compared."""
        return fmean(row.difference or 0.0 for row in self.compared) if self.compared else None

    def num(self, verdict: Verdict) -> int:
        """How many rows have this verdict."""
        return sum(row.verdict == verdict for row in self.rows)

    def summary(self) -> dict[str, Any]:
        """All of it as plain values."""
        differences = [row.difference or 0.0 for row in self.compared]
        return {
            "run": self.name,
            "baseline": self.baseline,
            "compared": len(self.compared),
            "mean_difference": self.mean_difference,
            "wins": self.num("better"),
            "ties": self.num("unclear"),
            "losses": self.num("worse"),
            "untested": self.num("untested"),
            "higher": sum(difference > 0 for difference in differences),
            "equal": sum(difference == 0 for difference in differences),
            "lower": sum(difference < 0 for difference in differences),
            "by_prefix": [
                {"prefix": at.prefix, "mean_difference": fmean(at.differences.values()), "benchmarks": len(at.differences)}
                for at in self.by_prefix
            ],
            "rows": [asdict(row) for row in self.rows],
        }


class Run:
    """A folder that an evaluation wrote.

    Raises:
        ValueError: Its results.json is missing or broken, or its values.npz is broken.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.name, self.folder = name, folder
        self.headlines = {score.benchmark: score for score in headlines_of(scores_of(read_results(folder)))}
        self.values = Values(folder)


def compared(run: Run, baseline: Run) -> Comparison:
    """Every benchmark of either run, at the widest prefix that both have.

    Raises:
        ValueError: An array of a values.npz is broken.
    """
    names = dict.fromkeys([*baseline.headlines, *run.headlines])
    rows = [_row(name, run, baseline) for name in names]
    tested = [place for place, row in enumerate(rows) if row.p_value is not None]
    for place, corrected in zip(tested, holm([rows[t].p_value or 0.0 for t in tested]) if tested else [], strict=True):
        better = (rows[place].difference or 0.0) > 0
        verdict: Verdict = "unclear" if corrected >= CLEAR else "better" if better else "worse"
        rows[place] = replace(rows[place], corrected=corrected, verdict=verdict)
    return Comparison(run.name, baseline.name, rows, _by_prefix(rows, run, baseline))


def _row(benchmark: str, run: Run, baseline: Run) -> Row:
    own, other = run.headlines.get(benchmark), baseline.headlines.get(benchmark)
    if own is None or other is None:
        there = baseline if own is None else run
        found = own or other
        assert found is not None
        return Row(benchmark, found.group, found.metric, note=f"only in {there.name}")
    row = Row(benchmark, other.group or own.group, other.metric)
    for score, where in ((other, baseline), (own, run)):
        if not score.numbers:
            return replace(row, note=f"{where.name}: {'; '.join(score.notes)}")
    if own.name != other.name:
        return replace(row, metric="", note=f"{baseline.name} measures {other.name}, {run.name} {own.name}")
    common = set(own.numbers) & set(other.numbers)
    if not common:
        return replace(row, note=f"no prefix in common: {_prefixes(other)} in {baseline.name}, {_prefixes(own)} in {run.name}")
    return _compared_at(max(common), row, own, other, run, baseline)


def _compared_at(prefix: int, row: Row, own: Score, other: Score, run: Run, baseline: Run) -> Row:
    value, before = own.numbers[prefix].value, other.numbers[prefix].value
    row = replace(row, prefix=prefix, baseline=before, value=value, difference=value - before, verdict="untested")
    narrower = [f"{run_.name} has {max(s.numbers)}" for s, run_ in ((other, baseline), (own, run)) if max(s.numbers) > prefix]
    notes = [f"at {prefix}, the widest in common; {', '.join(narrower)}"] if narrower else []
    if own.size != other.size:
        notes.append(f"{other.size} in {baseline.name}, {own.size} in {run.name}")
    by_query, by_query_before = run.values.of(own, prefix), baseline.values.of(other, prefix)
    if by_query is None or by_query_before is None:
        lacking = [r.name for r, found in ((baseline, by_query_before), (run, by_query)) if found is None]
        return replace(row, note="; ".join([*notes, f"not tested: no values of single queries in {' and '.join(lacking)}"]))
    values_Q, before_Q = _shared(by_query, by_query_before)
    if not len(values_Q):
        note = f"no query in common ({len(by_query_before):,} in {baseline.name}, {len(by_query):,} in {run.name})"
        return replace(row, baseline=None, value=None, difference=None, verdict="", note="; ".join([*notes, note]))
    is_whole = len(values_Q) == len(by_query) == len(by_query_before)
    if not is_whole:
        notes.append(f"over the {len(values_Q):,} queries in common of {len(by_query_before):,} and {len(by_query):,}")
    for mean, stated, where in ((before_Q.mean(), before, baseline), (values_Q.mean(), value, run)):
        if is_whole and not math.isclose(mean, stated, abs_tol=NEAR):
            notes.append(f"the queries' mean is {mean:.3f}, results.json of {where.name} says {stated:.3f}")
    difference, low, high, p_value = paired(values_Q, before_Q)
    return replace(
        replace(row, baseline=float(before_Q.mean()), value=float(values_Q.mean()), difference=difference, low=low, high=high),
        p_value=p_value,
        num_queries=len(values_Q),
        note="; ".join(notes),
    )


def _prefixes(score: Score) -> str:
    return ", ".join(map(str, sorted(score.numbers)))


def _shared(by_query: dict[int, float], by_query_before: dict[int, float]) -> tuple[np.ndarray, np.ndarray]:
    """Values of the queries that both have, in one order (Q,)."""
    shared = sorted(by_query.keys() & by_query_before.keys())
    return np.array([by_query[query] for query in shared]), np.array([by_query_before[query] for query in shared])


def _by_prefix(rows: Sequence[Row], run: Run, baseline: Run) -> list[AtPrefix]:
    """Differences of the benchmarks compared, over the same queries, at every prefix that both have."""
    found: dict[int, dict[str, float]] = {}
    for row in rows:
        if row.difference is None:
            continue
        own, other = run.headlines[row.benchmark], baseline.headlines[row.benchmark]
        for prefix in set(own.numbers) & set(other.numbers):
            difference = own.numbers[prefix].value - other.numbers[prefix].value
            values, before = run.values.of(own, prefix), baseline.values.of(other, prefix)
            if row.num_queries and values is not None and before is not None:
                values_Q, before_Q = _shared(values, before)
                difference = float(values_Q.mean() - before_Q.mean())
            found.setdefault(prefix, {})[row.benchmark] = difference
    return [AtPrefix(prefix, differences) for prefix, differences in sorted(found.items())]


def named(runs: Sequence[str], names: Sequence[str] | None) -> list[str]:
    """Names of runs: those given, else their folders', with as many folders above as tell them apart.

    Raises:
        ValueError: There are fewer than two runs, one is given twice, or the names do not fit.
    """
    if len(runs) < 2:
        raise ValueError(f"a comparison needs at least two runs and got {len(runs)}; give runs=[baseline,run,..]")
    places = [Path(run).resolve() for run in runs]
    if len(set(places)) < len(places):
        raise ValueError(f"a run is given more than once: {', '.join(runs)}; give each once")
    if names is None:
        depth = next(n for n in range(1, 99) if len({place.parts[-n:] for place in places}) == len(places))
        return ["/".join(place.parts[-depth:]) for place in places]
    if len(names) != len(runs) or len(set(names)) < len(names) or not all(names):
        raise ValueError(f"names are {list(names)}; give {len(runs)} different ones, one for each run")
    return list(names)
