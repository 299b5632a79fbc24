"""One page that shows a run: scores against chance, score by prefix, training curves, real neighbours.

The page is that of `lightning_modules.page`, its charts are SVG. `results_table` shows the same numbers in a terminal.
"""

import csv
import math
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from datamodules.sample import Item
from lightning_modules.charts import Line, chart_of, hues_of, legend_of, smoothed
from lightning_modules.page import item_of, write_page

# Our choice, so that a page of twenty benchmarks still opens at once.
MAX_QUERIES = 8
MAX_FOUND = 5


@dataclass(frozen=True, slots=True)
class Neighbours:
    """What a query of `benchmark` found: item, cosine to the query and whether it is relevant; best first."""

    benchmark: str
    query: Item
    found: tuple[tuple[Item, float, bool], ...]


@dataclass(frozen=True, slots=True)
class Score:
    """The values of one metric, kept in one dtype, by prefix; `is_headline` says it is the benchmark's first metric."""

    benchmark: str
    metric: str
    dtype: str
    is_headline: bool
    chance: float
    size: str
    values: dict[int, float]

    @property
    def name(self) -> str:
        return self.metric if self.dtype == "float32" else f"{self.metric} · {self.dtype}"


def write_report(
    path: Path, *, title: str, rows: list[dict], curves: dict[str, Path], neighbours: list[Neighbours], facts: dict[str, str]
) -> None:
    """Write the page; at `path` there is afterwards a whole page or what was there before.

    Size is bounded: `MAX_QUERIES` queries per benchmark, `MAX_FOUND` found items each, `charts.MAX_POINTS` points per
    line; media beyond `page.MAX_MEDIA_BYTES` are named instead of embedded.

    Args:
        path: The HTML file.
        title: Heading of the page.
        rows: The rows of results.json; the first metric met for a benchmark is its headline.
        curves: Name of a run to the metrics.csv of its CSVLogger; empty drops the section.
        neighbours: Queries with what they found; empty drops the section.
        facts: Short values for the head: date, checkpoint, steps.

    Raises:
        ValueError: There are no rows, two rows give the same score, or a metrics.csv has no column `step`.
        OSError: A metrics.csv cannot be read or the page cannot be written.
    """
    scores = _scores(rows)
    sections = [_scores_section(scores), _prefix_section(scores)]
    sections += [_curves_section(curves)] if curves else []
    sections += [_neighbours_section(neighbours)] if neighbours else []
    write_page(path, title=title, facts=facts, sections=sections)


def results_table(rows: list[dict], *, all_metrics: bool = False) -> Table:
    """A terminal table of task, metric, chance and the value at each prefix.

    Args:
        rows: The rows of results.json.
        all_metrics: Show every metric; otherwise the headline metric of each benchmark.

    Raises:
        ValueError: There are no rows or two rows give the same score.
    """
    scores = _scores(rows)
    prefixes = _prefixes(scores)
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("task", "metric", "chance", *map(str, prefixes)):
        table.add_column(column, overflow="fold", justify="left" if column in ("task", "metric") else "right")
    for score in scores:
        if score.is_headline or all_metrics:
            values = (f"{score.values[prefix]:.3f}" if prefix in score.values else "" for prefix in prefixes)
            table.add_row(score.benchmark, score.name, f"{score.chance:.3f}", *values)
    return table


def _scores(rows: list[dict]) -> list[Score]:
    if not rows:
        raise ValueError("there are no results to report: rows is empty; evaluate at least one benchmark first")
    headlines: dict[str, str] = {}
    scores: dict[tuple[str, str, str], Score] = {}
    for row in rows:
        benchmark, metric, dtype = key = (row["benchmark"], row["metric"], row["dtype"])
        is_headline = headlines.setdefault(benchmark, metric) == metric
        size = f"{row['num_queries']:,} queries, {row['num_candidates']:,} candidates"
        score = scores.setdefault(key, Score(benchmark, metric, dtype, is_headline, row["chance"], size, {}))
        if row["prefix"] in score.values:
            raise ValueError(f"two rows give {metric} of {benchmark} at prefix {row['prefix']} in {dtype}; keep one of them")
        score.values[row["prefix"]] = row["value"]
    order = list(headlines)
    return sorted(scores.values(), key=lambda score: order.index(score.benchmark))


def _prefixes(scores: Iterable[Score]) -> list[int]:
    return sorted({prefix for score in scores for prefix in score.values})


def _scores_section(scores: list[Score]) -> str:
    prefixes = _prefixes(scores)
    others = [score for score in scores if not score.is_headline]
    more = f"<details><summary>Other metrics ({len(others)})</summary>{_table(others, prefixes)}</details>" if others else ""
    return (
        '<section id="scores"><h2>Scores</h2><p class="note">One column per prefix of the embedding. The stronger the colour, '
        "the further the value lies from chance towards 1; the small number is the value divided by chance.</p>"
        f"{_table([score for score in scores if score.is_headline], prefixes)}{more}</section>"
    )


def _table(scores: list[Score], prefixes: list[int]) -> str:
    head = "".join(f'<th scope="col">{prefix}</th>' for prefix in prefixes)
    body = "".join(
        f'<tr><th scope="row">{escape(score.benchmark)}<small>{escape(score.size)}</small></th>'
        f'<td class="metric">{escape(score.name).replace("_", "_<wbr>")}</td><td>{score.chance:.3f}</td>'
        + "".join(_cell(score.values.get(prefix), score.chance) for prefix in prefixes)
        + "</tr>"
        for score in scores
    )
    return (
        '<div class="scroll"><table><thead><tr><th scope="col">benchmark</th><th scope="col" class="metric">metric</th>'
        f'<th scope="col">chance</th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _cell(value: float | None, chance: float) -> str:
    if value is None:
        return "<td></td>"
    share = (value - chance) / (1 - chance) if chance < 1 and math.isfinite(value) else 0.0
    ratio = f"{value / chance:.{0 if value >= 10 * chance else 2}f}×" if chance > 0 and math.isfinite(value) else ""
    look = "score below" if value < chance else "score"
    return f'<td class="{look}" style="--share: {min(max(share, 0), 1):.3f}">{value:.3f} <small>{ratio}</small></td>'


def _prefix_section(scores: list[Score]) -> str:
    groups: dict[str, list[Score]] = defaultdict(list)
    for score in scores:
        if score.is_headline:
            groups[score.benchmark].append(score)
    hues = hues_of(score.dtype for score in scores)
    figures = []
    for benchmark, group in groups.items():
        lines = [Line(sorted(score.values.items()), hues[score.dtype], "", is_labelled=len(group) == 1) for score in group]
        chart = chart_of(
            lines, x_label="prefix (dimensions)", y_label=group[0].metric, prefixes=_prefixes(group), chance=group[0].chance
        )
        figures.append(f"<figure><figcaption><b>{escape(benchmark)}</b></figcaption>{chart}</figure>")
    return (
        f'<section id="prefixes"><h2>Score by prefix</h2>{legend_of(hues, (("chance", "chance"),))}'
        f'<div class="charts">{"".join(figures)}</div></section>'
    )


def _curves_section(curves: dict[str, Path]) -> str:
    runs = {run: _read_curves(path) for run, path in curves.items()}
    names = (re.fullmatch(r"train/(.+)/loss", column) for columns in runs.values() for column in columns)
    tasks = dict.fromkeys(name[1] for name in names if name)
    hues = hues_of(runs)
    looks = (("raw values", "line faint"), ("positive cosine", "line"), ("negative cosine", "line dashed"))
    body = "".join(_task_figure(task, runs, hues) for task in tasks) or "<p>No loss was logged.</p>"
    return (
        '<section id="curves"><h2>Training</h2><p class="note">Lines are running means over a thirtieth of the run; '
        "the number beside a task is where its smoothed loss ends.</p>"
        f'{legend_of(hues, looks)}<div class="charts">{body}</div></section>'
    )


def _task_figure(task: str, runs: dict[str, dict[str, list]], hues: dict[str, float]) -> str:
    losses, cosines, ends = [], [], []
    for run, columns in runs.items():
        lines = smoothed(columns.get(f"train/{task}/loss", []), hues[run], "")
        losses += lines
        cosines += smoothed(columns.get(f"train/{task}/positive_cosine", []), hues[run], "")
        cosines += smoothed(columns.get(f"train/{task}/negative_cosine", []), hues[run], " dashed")
        ends += [f'<span class="run" style="--hue: {hues[run]:g}">{lines[-1].points[-1][1]:.3g}</span>'] if lines else []
        lost = sum(not math.isfinite(value) for _, value in columns.get(f"train/{task}/loss", []))
        ends += [f"<small>{escape(run)}: {lost} losses are not finite</small>"] if lost else []
    charts = chart_of(losses, x_label="step", y_label="loss")
    charts += chart_of(cosines, x_label="step", y_label="cosine") if cosines else ""
    return f"<figure><figcaption><b>{escape(task)}</b>{''.join(ends)}</figcaption>{charts}</figure>"


def _read_curves(path: Path) -> dict[str, list[tuple[float, float]]]:
    columns = defaultdict(list)
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if "step" not in (reader.fieldnames or ["step"]):
            raise ValueError(f"{path} has no column `step`; give the metrics.csv that a CSVLogger wrote")
        for row in reader:
            for name in filter(row.get, reader.fieldnames or []):
                if name.startswith("train/"):
                    columns[name].append((float(row["step"]), float(row[name])))
    return columns


def _neighbours_section(neighbours: list[Neighbours]) -> str:
    groups: dict[str, list[Neighbours]] = defaultdict(list)
    for neighbour in neighbours:
        groups[neighbour.benchmark].append(neighbour)
    parts = []
    for benchmark, group in groups.items():
        shown = f" <small>{MAX_QUERIES} of {len(group)} queries</small>" if len(group) > MAX_QUERIES else ""
        parts.append(f"<h3>{escape(benchmark)}{shown}</h3>{''.join(map(_query, group[:MAX_QUERIES]))}")
    return (
        '<section id="neighbours"><h2>Nearest neighbours</h2><p class="note">Each row is a query and what lies nearest to it, '
        f"best first, with its cosine; relevant items are outlined.</p>{''.join(parts)}</section>"
    )


def _query(neighbour: Neighbours) -> str:
    found = neighbour.found[:MAX_FOUND]
    cards = [f'<div class="item asked"><p class="tag">query</p>{item_of(neighbour.query)}</div>']
    for rank, (item, cosine, is_relevant) in enumerate(found, start=1):
        mark, look = ("<b>relevant</b>", " relevant") if is_relevant else ("", "")
        tag = f'<p class="tag"><span>{rank}</span><span>cos {cosine:.3f}</span>{mark}</p>'
        cards.append(f'<div class="item{look}">{tag}{item_of(item)}</div>')
    return f'<div class="query">{"".join(cards)}</div>'
