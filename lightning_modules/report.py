"""One page that shows a run: scores against chance, score by prefix, training curves, real neighbours.

The page is a single HTML file that asks nothing of anybody: style inline, charts as SVG, media as data URIs, no script;
its Content-Security-Policy makes the browser hold it to that. `results_table` shows the same numbers in a terminal.
"""

import base64
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

from datamodules.files import replace_file
from datamodules.sample import TEXT_KINDS, Item, Part
from lightning_modules.charts import Line, chart_of, hues_of, legend_of, smoothed

# Our choice, so that a page of twenty benchmarks still opens at once.
MAX_QUERIES = 8
MAX_FOUND = 5
MAX_MEDIA_BYTES = 16 * 2**20

SUBTYPES = {name: name for name in ("flac", "jpeg", "mp4", "ogg", "pdf", "png", "wav", "webm", "webp")}
SUBTYPES |= {"jpg": "jpeg", "mp3": "mpeg"}

CSS = """
:root { color-scheme: light dark; --paper: #fcfbf8; --ink: #1c1c1a; --soft: #6a6862; --rule: #dfdcd3; --card: #fff;
  --light: .55; --tint: 52 112 160; --good: #2c7a4b; --bad: #a8452c }
@media (prefers-color-scheme: dark) { :root { --paper: #161719; --ink: #e5e3dd; --soft: #9b9890; --rule: #34363a;
  --card: #1d1f22; --light: .74; --tint: 104 166 216; --good: #6cc48e; --bad: #e58b70 } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 3rem clamp(1rem, 3vw, 2.5rem) 5rem; max-width: 78rem; font: 15px/1.5 system-ui, sans-serif;
  font-variant-numeric: tabular-nums; background: var(--paper); color: var(--ink) }
h1, h2 { font: 500 1.45rem/1.2 "Iowan Old Style", Charter, Palatino, Georgia, serif }
h1 { font-size: clamp(1.7rem, 4vw, 2.4rem); margin: 0 0 1.5rem; overflow-wrap: anywhere }
h2 { margin: 3.5rem 0 .4rem; padding-top: 1.1rem; border-top: 1px solid var(--rule) }
h3 { font-size: 1rem; font-weight: 600; margin: 2rem 0 .3rem; overflow-wrap: anywhere }
.note, small { margin: .3rem 0; color: var(--soft); font-size: .82rem; font-weight: 400 }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(45%, 11rem), 1fr)); gap: .8rem 2rem; margin: 0 }
dt { color: var(--soft); font-size: .78rem } dd { margin: 0; overflow-wrap: anywhere }
.scroll { overflow-x: auto; margin: 1rem 0 } table { border-collapse: collapse; width: 100% }
th, td { padding: .42rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--rule); line-height: 1.3 }
th { font-weight: 400; color: var(--soft); font-size: .82rem } th[scope=row] { color: var(--ink); font-size: inherit }
th:first-child, .metric { text-align: left } th:first-child { padding-left: 0 } th small { display: block }
.score { background: rgb(var(--tint) / calc(var(--share) * .4)) } .score.below { color: var(--bad) }
.score small { display: inline-block; min-width: 3.3em; color: inherit; opacity: .7 }
summary { cursor: pointer; color: var(--soft) }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); gap: 1.6rem 2rem }
figure { margin: 0; min-width: 0 } figcaption { display: flex; flex-wrap: wrap; gap: 0 .8rem; overflow-wrap: anywhere }
figcaption b { font-weight: 600; margin-right: auto }
svg { display: block; width: 100%; height: auto; font: 11px system-ui, sans-serif; fill: var(--soft) }
.value { fill: var(--ink); stroke: var(--paper); stroke-width: 4; paint-order: stroke }
.grid { stroke: var(--rule) } .chance { stroke: var(--soft); stroke-dasharray: 2 4 }
.line { fill: none; stroke: oklch(var(--light) .13 var(--hue)); stroke-width: 1.7; stroke-linejoin: round }
.faint { stroke-width: 1; opacity: .35 } .dashed { stroke-dasharray: 5 3 }
circle, .run { fill: oklch(var(--light) .13 var(--hue)); color: oklch(var(--light) .13 var(--hue)) }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.4rem; margin: .4rem 0 1.3rem; font-size: .85rem }
.legend svg { display: inline-block; width: 28px; height: 8px; margin-right: .45em; vertical-align: middle }
.query { display: grid; grid-template-columns: repeat(6, minmax(0, 1fr)); gap: .8rem; padding: .9rem 0 }
.query + .query { border-top: 1px solid var(--rule) }
.item { border: 1px solid var(--rule); border-radius: 5px; padding: .5rem .6rem .6rem; background: var(--card); min-width: 0 }
.item.asked { border-color: transparent; background: none; padding-left: 0 }
.item.relevant { border-color: var(--good); box-shadow: inset 0 0 0 1px var(--good) }
.tag { display: flex; flex-wrap: wrap; gap: 0 .6em; margin: 0 0 .4rem; font-size: .75rem; color: var(--soft) }
.relevant .tag b { color: var(--good); margin-left: auto }
.item > :where(:not(.tag)) { display: block; width: 100%; max-height: 15rem; margin: .4rem 0 0; font-size: .87rem }
.item img, .item video { object-fit: contain; border-radius: 3px } audio { height: 36px } a { color: inherit }
.item > p, .item > pre { overflow: auto; overflow-wrap: anywhere; white-space: pre-wrap; line-height: 1.4; tab-size: 4 }
.item > p { max-height: 10rem } .item > pre { font: .75rem/1.4 ui-monospace, Menlo, Consolas, monospace }
@media (max-width: 760px) { body { padding-top: 1.6rem } th, td { padding: .4rem .45rem; font-size: .85rem }
  .query { grid-template-columns: repeat(2, minmax(0, 1fr)) } .item.asked { grid-column: 1 / -1 }
  .metric { white-space: normal } .score small { display: block }
  th:first-child { position: sticky; left: 0; background: var(--paper); white-space: normal; min-width: 7rem } }
"""

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; img-src data:; media-src data:">
<link rel="icon" href="data:,"><style>{css}</style></head>
<body><header><h1>{title}</h1><dl>{facts}</dl></header><main>
{sections}
</main></body></html>
"""


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
    line; media beyond `MAX_MEDIA_BYTES` are named instead of embedded.

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
    head = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    page = PAGE.format(title=escape(title), css=CSS, facts=head, sections="\n".join(sections))
    replace_file(path, page)


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
    cards = [f'<div class="item asked"><p class="tag">query</p>{_item(neighbour.query)}</div>']
    for rank, (item, cosine, is_relevant) in enumerate(found, start=1):
        mark, look = ("<b>relevant</b>", " relevant") if is_relevant else ("", "")
        tag = f'<p class="tag"><span>{rank}</span><span>cos {cosine:.3f}</span>{mark}</p>'
        cards.append(f'<div class="item{look}">{tag}{_item(item)}</div>')
    return f'<div class="query">{"".join(cards)}</div>'


def _item(item: Item) -> str:
    title = f"<p><b>{escape(item.title)}</b></p>" if item.title else ""
    return title + "".join(map(_part, item.parts))


def _part(part: Part) -> str:
    if part.kind in TEXT_KINDS:
        tag = "pre" if part.kind == "code" else "p"
        return f"<{tag}>{escape(str(part.data))}</{tag}>"
    assert isinstance(part.data, bytes)
    name = f"{part.kind}, {part.format}, {len(part.data) / 1024:,.0f} KiB"
    if len(part.data) > MAX_MEDIA_BYTES:
        return f'<p class="note">{escape(name)}: too large for this page</p>'
    family = "image" if part.kind == "page" else part.kind
    family = "application" if part.format not in SUBTYPES or part.format == "pdf" else family
    source = f"data:{family}/{SUBTYPES.get(part.format, 'octet-stream')};base64,{base64.b64encode(part.data).decode()}"
    tags = {
        "image": f'<img src="{source}" alt="{escape(name)}">',
        "audio": f'<audio controls preload="metadata" src="{source}"></audio>',
        "video": f'<video controls loop muted playsinline preload="metadata" src="{source}"></video>',
        "application": f'<a download="{escape(part.kind)}.{escape(part.format)}" href="{source}">{escape(name)}</a>',
    }
    return tags[family]
