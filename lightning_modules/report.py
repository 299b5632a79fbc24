"""One page that shows a run: its scores and what `report_*.py` looks at in them, training curves, real neighbours.

The page is that of `lightning_modules.page`, its charts are SVG. `results_table` shows the same numbers in a terminal.
"""

import csv
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from datamodules.sample import Item
from lightning_modules.charts import chart_of, hues_of, legend_of, smoothed
from lightning_modules.listing import printable
from lightning_modules.page import item_of, write_page
from lightning_modules.report_bytes import bytes_section
from lightning_modules.report_scores import headlines_of, prefix_section, scores_section
from lightning_modules.report_sections import CSS, languages_section, prompts_section, space_section
from lightning_modules.results import prefixes_of, scores_of

# Our choice, so that a page of twenty benchmarks still opens at once.
MAX_QUERIES = 8
MAX_FOUND = 5


@dataclass(frozen=True, slots=True)
class Neighbours:
    """What a query of `benchmark` found: item, cosine to the query and whether it is relevant; best first."""

    benchmark: str
    query: Item
    found: tuple[tuple[Item, float, bool], ...]


def write_report(
    path: Path,
    *,
    title: str,
    rows: list[dict],
    curves: dict[str, Path],
    neighbours: list[Neighbours],
    facts: dict[str, str],
    space: Sequence[dict] = (),
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
        space: The rows of space.json; empty drops the section.

    Raises:
        ValueError: There are no rows, two rows give the same score, or a metrics.csv has no column `step`.
        OSError: A metrics.csv cannot be read or the page cannot be written.
    """
    scores = scores_of(rows)
    sections = [scores_section(scores), prefix_section(scores), bytes_section(scores), languages_section(scores)]
    sections += [prompts_section(scores), space_section(space)]
    sections += [_curves_section(curves)] if curves else []
    sections += [_neighbours_section(neighbours)] if neighbours else []
    write_page(path, title=title, facts=facts, sections=filter(None, sections), css=CSS)


def results_table(rows: list[dict], *, all_metrics: bool = False) -> Table:
    """A terminal table of task, metric, chance and the value at each prefix, in float32 with prompts.

    What has no number says why under its name.

    Args:
        rows: The rows of results.json.
        all_metrics: Show every metric; otherwise the headline metric of each benchmark.

    Raises:
        ValueError: There are no rows or two rows give the same score.
    """
    scores = scores_of(rows)
    shown = [score for score in scores if score.is_plain] if all_metrics else headlines_of(scores)
    prefixes = prefixes_of(shown)
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("task", "metric", "chance", *map(str, prefixes)):
        is_text = column in ("task", "metric")
        table.add_column(column, overflow="fold", justify="left" if is_text else "right", no_wrap=not is_text)
    for score in shown:
        values = (f"{score.numbers[prefix].value:.3f}" if prefix in score.numbers else "–" for prefix in prefixes)
        task = Text(printable(score.benchmark)).append("".join(f"\n{printable(note)}" for note in score.notes), "dim")
        chance = "" if score.chance is None else f"{score.chance:.3f}"
        table.add_row(task, Text(printable(score.name)), chance, *values)
    return table


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
