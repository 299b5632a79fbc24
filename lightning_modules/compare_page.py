"""Sections of the page that compares runs: who won, every difference with its interval, run against baseline, by prefix."""

from collections.abc import Sequence
from html import escape
from statistics import fmean

import numpy as np

from lightning_modules.charts import Line, Place, chart_of, framed, hues_of, legend_of, linear
from lightning_modules.comparison import CLEAR, Comparison, Row
from lightning_modules.report_scores import MANY, folded, signed

SCATTER = (360, 330)
MIDDLE = (0.1, 0.9)  # quantiles between which many benchmarks are shown: our choice
HUE = hues_of(["run"])["run"]
WORDS = {"better": "better", "worse": "worse", "unclear": "unclear", "untested": "not tested", "": ""}
CSS = """
.better { --own: var(--good) } .worse { --own: var(--bad) } .unclear, .untested { --own: var(--soft) }
.changes { display: grid; grid-template-columns: fit-content(36%) minmax(0, 1fr) auto; gap: 0 1rem; margin: 1rem 0 }
.changes > div { display: grid; grid-template-columns: subgrid; grid-column: 1 / -1; align-items: center; min-height: 1.55rem }
.changes > div:nth-child(even) { background: color-mix(in srgb, var(--rule) 22%, transparent) }
.changes .name { overflow-wrap: anywhere; line-height: 1.25 } .changes output { color: var(--own); text-align: right }
.track { position: relative; align-self: stretch } .track i { position: absolute }
.track .zero { left: var(--zero); top: 0; bottom: 0; border-left: 1px solid var(--soft) }
.track .range { top: calc(50% - 1px); height: 2px; background: var(--own); opacity: .6 }
.track .dot { top: 50%; width: 9px; height: 9px; margin: -4.5px; border-radius: 50%; border: 2px solid var(--own);
  background: var(--paper) } .better .dot, .worse .dot { background: var(--own) }
.changes > .ticks { min-height: 1.3rem; background: none; color: var(--soft); font-size: .75rem }
.ticks .track span { position: absolute; transform: translateX(-50%); white-space: nowrap }
.changes .left { color: var(--soft) }
.untested .dot { border-radius: 0; transform: scale(.8) } .legend .untested i { border-radius: 0; transform: scale(.8) }
circle.untested { stroke-dasharray: 2 2 } th small { white-space: normal; max-width: 22rem } .charts { margin-top: 1.8rem }
td.better, td.worse { color: var(--own) }
circle.run { fill: var(--own); stroke: var(--own); stroke-width: 1.4 } circle.unclear, circle.untested { fill: var(--paper) }
.faint { opacity: .25 }
.legend i { display: inline-block; width: 10px; height: 10px; border-radius: 50%; border: 2px solid var(--own);
  margin-right: .45em; vertical-align: -1px } .legend .better i, .legend .worse i { background: var(--own) }
@media (max-width: 760px) { .ticks .inner { display: none } }
"""


def overview_section(comparisons: Sequence[Comparison]) -> str:
    """A row for each run: wins, ties and losses against the baseline, and the mean difference."""
    heads = (
        "mean difference",
        "clearly better",
        "unclear",
        "clearly worse",
        "not tested",
        "higher / equal / lower",
        "compared",
    )
    rows = ""
    for comparison in comparisons:
        found = comparison.summary()
        mean = "–" if comparison.mean_difference is None else signed(comparison.mean_difference)
        cells = (found["wins"], found["ties"], found["losses"], found["untested"])
        looks = ("better" if found["wins"] else "", "", "worse" if found["losses"] else "", "")
        rows += f'<tr><th scope="row">{escape(comparison.name)}</th><td>{mean}</td>'
        rows += "".join(f'<td class="{look}">{cell}</td>' for look, cell in zip(looks, cells, strict=True))
        rows += f"<td>{found['higher']} / {found['equal']} / {found['lower']}</td>"
        rows += f"<td>{found['compared']} of {len(comparison.rows)}</td></tr>"
    head = "".join(f'<th scope="col">{head}</th>' for head in heads)
    return (
        '<section id="overview"><h2>Overview</h2><p class="note">Headline metrics of float32 vectors with prompts, at the '
        "widest prefix that both have, over the queries that both judged. Clearly: p below "
        f"{CLEAR} in a paired randomisation test over queries, after Holm's correction for the number of benchmarks "
        'tested.</p><div class="scroll"><table><thead><tr><th scope="col">run</th>'
        f"{head}</tr></thead><tbody>{rows}</tbody></table></div></section>"
    )


def comparison_section(comparison: Comparison, number: int) -> str:
    """Everything about one run beside its baseline."""
    order = sorted(comparison.compared, key=lambda row: -(row.difference or 0.0))
    name, baseline = escape(comparison.name), escape(comparison.baseline)
    head = f'<section id="run-{number}"><h2>{name} against {baseline}</h2>'
    others = [row for row in comparison.rows if row.difference is None]
    lacking = f"<h3>Not compared ({len(others)})</h3>{_notes(others)}" if others else ""
    if not order:
        return f'{head}<p class="note">Nothing can be compared.</p>{lacking}</section>'
    changes = _changes(order)
    if len(order) > MANY:
        changes = _changes(order, shown=MANY // 2) + folded(f"All {len(order)} differences", changes)
    charts = f"{_scatter(comparison, order)}{_prefix_figure(comparison)}"
    table = folded(f"All numbers ({len(order)})", _table(order, comparison), is_open=len(order) <= MANY)
    return (
        f"{head}{_legend(order)}<h3>Differences</h3>{changes}"
        f'<div class="charts">{charts}</div><h3>Numbers</h3>{table}{lacking}</section>'
    )


def _legend(rows: Sequence[Row]) -> str:
    told = {"better": "clearly better", "worse": "clearly worse", "unclear": "unclear", "untested": "not tested"}
    used = {row.verdict for row in rows}
    entries = [f'<span class="{name}"><i></i>{text}</span>' for name, text in told.items() if name in used]
    entries.append("<span>line: 95 % interval of the difference, by bootstrap over queries</span>")
    return f'<p class="legend">{"".join(entries)}</p>'


def _changes(rows: Sequence[Row], shown: int | None = None) -> str:
    """A dot and an interval for every row, on one axis; with `shown` only for so many at both ends."""
    ends = [end for row in rows for end in (row.difference, row.low, row.high) if end is not None]
    axis = linear("", [0.0, *ends])
    at = axis.place(0, 100)
    drawn = ""
    for place, row in enumerate(rows):
        assert row.difference is not None
        if shown is not None and shown <= place < len(rows) - shown:
            left = f"{len(rows) - 2 * shown} between these"
            drawn += f'<div class="left"><span class="name">{left}</span></div>' if place == shown else ""
            continue
        interval = ""
        if row.low is not None and row.high is not None:
            interval = f'<i class="range" style="left: {at(row.low):.2f}%; width: {at(row.high) - at(row.low):.2f}%"></i>'
        drawn += (
            f'<div class="{row.verdict}"><span class="name">{escape(row.benchmark)}</span><span class="track">'
            f'<i class="zero"></i>{interval}<i class="dot" style="left: {at(row.difference):.2f}%"></i></span>'
            f"<output>{signed(row.difference)}</output></div>"
        )
    kept, inner = (axis.low, 0, axis.high), ' class="inner"'
    ticks = "".join(
        f'<span{"" if tick in kept else inner} style="left: {at(tick):.2f}%">{_tick(tick)}</span>' for tick in axis.ticks
    )
    feet = f'<div class="ticks"><span></span><span class="track">{ticks}</span><output></output></div>'
    return f'<div class="changes" style="--zero: {at(0):.2f}%">{drawn}{feet}</div>'


def _tick(value: float) -> str:
    return f"{value:+.4g}".replace("-", "−") if abs(value) > 1e-12 else "0"


def _scatter(comparison: Comparison, rows: Sequence[Row]) -> str:
    """Each benchmark at its two values; above the diagonal the run is better."""
    upper = sorted(rows, key=lambda row: row.verdict in ("better", "worse"))  # these lie above the others
    pairs = [(row.baseline or 0.0, row.value or 0.0, row) for row in upper]
    ends = [end for x, y, _ in pairs for end in (x, y)]
    x_axis, y_axis = linear(comparison.baseline, ends), linear(comparison.name, ends)

    def draw(x_of: Place, y_of: Place) -> list[str]:
        low, high = x_axis.low, x_axis.high
        parts = [
            f'<line class="chance" x1="{x_of(low):.1f}" y1="{y_of(low):.1f}" x2="{x_of(high):.1f}" y2="{y_of(high):.1f}"/>'
        ]
        for x, y, row in pairs:
            told = escape(f"{row.benchmark}: {x:.3f}, {y:.3f}")
            place = f'cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="3.2"'
            parts.append(f'<circle class="run {row.verdict}" {place}><title>{told}</title></circle>')
        return parts

    chart = framed(x_axis, y_axis, draw, size=SCATTER)
    caption = "<b>Run against baseline</b><small>above the diagonal the run is better</small>"
    return f"<figure><figcaption>{caption}</figcaption>{chart}</figure>"


def _prefix_figure(comparison: Comparison) -> str:
    """Differences by prefix: each benchmark, or the middle of many, and the mean of those that have every prefix."""
    found = comparison.by_prefix
    if len(found) < 2:
        return ""
    whole = set.intersection(*(set(at.differences) for at in found))
    benchmarks = dict.fromkeys(name for at in found for name in at.differences)
    lines, looks = [], (("a benchmark", "line faint"),)
    mean = [(at.prefix, fmean(at.differences[name] for name in whole)) for at in found] if whole else []
    if len(benchmarks) <= MANY:
        own = ([(at.prefix, at.differences[name]) for at in found if name in at.differences] for name in benchmarks)
        lines = [*(Line(points, HUE, "faint") for points in own), *([Line(mean, HUE, "", is_labelled=True)] if mean else [])]
    else:
        ends = ((at.prefix, np.quantile(list(at.differences.values()), MIDDLE)) for at in found)
        band = [(prefix, float(low), float(high)) for prefix, (low, high) in ends]
        lines, looks = [Line(mean, HUE, "", is_labelled=True, band=band)], (("eight of ten benchmarks", "sample-band"),)
    prefixes = [at.prefix for at in found]
    chart = chart_of(lines, x_label="prefix (dimensions)", y_label="difference", prefixes=prefixes, level=0.0, is_score=False)
    rows = "".join(
        f'<tr><th scope="row">{at.prefix}</th><td>{signed(fmean(at.differences.values()))}</td>'
        f"<td>{sum(d > 0 for d in at.differences.values())} / {sum(d == 0 for d in at.differences.values())} / "
        f"{sum(d < 0 for d in at.differences.values())}</td></tr>"
        for at in found
    )
    table = (
        '<div class="scroll"><table><thead><tr><th scope="col">prefix</th><th scope="col">mean difference</th>'
        f'<th scope="col">higher / equal / lower</th></tr></thead><tbody>{rows}</tbody></table></div>'
    )
    legend = legend_of({"mean": HUE}, looks)
    return f"<figure><figcaption><b>Difference by prefix</b></figcaption>{chart}{legend}</figure><figure>{table}</figure>"


def _table(rows: Sequence[Row], comparison: Comparison) -> str:
    heads = (comparison.baseline, comparison.name, "difference", "95 % interval", "p", "p (Holm)", "queries")
    body = ""
    for row in rows:
        assert row.difference is not None
        metric = f"{escape(row.metric)} <small>@ {row.prefix}</small>"
        interval = "" if row.low is None or row.high is None else f"{signed(row.low)} … {signed(row.high)}"
        cells = (f"{row.baseline:.3f}", f"{row.value:.3f}")
        last = (*map(_p_value, (row.p_value, row.corrected)), "" if row.num_queries is None else f"{row.num_queries:,}")
        body += (
            f'<tr><th scope="row">{escape(row.benchmark)}<small>{escape(row.note)}</small></th><td class="metric">{metric}</td>'
            + "".join(f"<td>{cell}</td>" for cell in cells)
            + f'<td class="{row.verdict}">{signed(row.difference)}</td><td>{interval}</td>'
            + "".join(f"<td>{cell}</td>" for cell in last)
            + "</tr>"
        )
    head = "".join(f'<th scope="col">{escape(head)}</th>' for head in heads)
    return (
        '<div class="scroll"><table><thead><tr><th scope="col">benchmark</th><th scope="col" class="metric">metric</th>'
        f"{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _p_value(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}" if value >= 0.00005 else "< 0.0001"


def _notes(rows: Sequence[Row]) -> str:
    body = "".join(
        f'<tr><th scope="row">{escape(row.benchmark)}</th><td class="missing">{escape(row.note)}</td></tr>' for row in rows
    )
    return f'<div class="scroll"><table><tbody>{body}</tbody></table></div>'
