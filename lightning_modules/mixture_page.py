"""The page of a mixture search: every mixture with its score, how scores depend on each task's share, each task alone."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from datamodules.record import read_json
from lightning_modules.benchmarking import SCORES
from lightning_modules.charts import Line, Place, chart_of, framed, hues_of, legend_of, linear
from lightning_modules.mixture_trials import ALONE, KINDS, Plan
from lightning_modules.page import write_page
from lightning_modules.report_scores import folded

MANY = 30  # rows of a table that stand open: our choice
HUES = hues_of(kind for kind in KINDS if kind != ALONE)
CSS = """
td.share { background: rgb(var(--tint) / calc(var(--share) * .5)) } tr.winner th { font-weight: 600 }
circle.winner { stroke: var(--ink); stroke-width: 1.6 }
"""

Trials = Mapping[str, Mapping[str, Any]]


def write_mixture_page(out: Path, plan: Plan, trials: Trials, winners: Sequence[str]) -> None:
    """Write `mixture.html` of what is known.

    Args:
        out: Folder of the search.
        plan: What is searched.
        trials: As in mixture.json, in the order in which they were begun.
        winners: Names of the best mixtures.
    """
    known = {name: trial for name, trial in trials.items() if "score" in trial}
    mixtures = {name: trial for name, trial in known.items() if not name.startswith(ALONE)}
    facts = {"trials": f"{len(known)} of {plan.num_trials} done", "hours": f"{sum(t['hours'] for t in known.values()):.2f}"}
    if winners:
        facts |= {"best mixture": winners[0], "its score": f"{mixtures[winners[0]]['score']:.4f}"}
    sections = [_alone_section(out, known)] if len(known) > len(mixtures) else []
    if mixtures:
        sections = [_mixtures_section(plan, mixtures, winners), _shares_section(plan, mixtures, winners), *sections]
    write_page(out / "mixture.html", title=f"Mixture search in {out}", facts=facts, sections=sections, css=CSS)


def _mixtures_section(plan: Plan, mixtures: Trials, winners: Sequence[str]) -> str:
    heads = ("score", "at step", "hours", *plan.tasks)
    head = '<tr><th scope="col">mixture</th>' + "".join(f'<th scope="col">{escape(name)}</th>' for name in heads) + "</tr>"
    rows = []
    for name in sorted(mixtures, key=lambda name: -mixtures[name]["score"]):
        trial = mixtures[name]
        cells = f"<td>{trial['score']:.4f}</td><td>{trial['steps']:,}</td><td>{trial['hours']:.2f}</td>"
        for share in (trial["rates"].get(task, 0.0) for task in plan.tasks):
            cells += f'<td class="share" style="--share: {share:.3f}">{f"{share:.3f}" if share else "–"}</td>'
        look = ' class="winner"' if name in winners else ""
        rows.append(f'<tr{look}><th scope="row">{escape(name)}</th>{cells}</tr>')
    table = '<div class="scroll"><table><thead>{}</thead><tbody>{}</tbody></table></div>'
    shown = table.format(head, "".join(rows[:MANY]))
    shown += folded(f"{len(rows) - MANY} more", table.format(head, "".join(rows[MANY:]))) if len(rows) > MANY else ""
    kinds = "".join(f"<div><dt>{kind}</dt><dd>{told}</dd></div>" for kind, told in KINDS.items() if kind != ALONE)
    return (
        '<section id="mixtures"><h2>Mixtures</h2><p class="note">Shares of the steps, and the score of the best step. '
        f"In bold: those whose encoders are averaged.</p>{shown}<dl>{kinds}</dl></section>"
    )


def _shares_section(plan: Plan, mixtures: Trials, winners: Sequence[str]) -> str:
    """Scores in the order of the trials, and by the share of each task."""
    order = [(float(n), trial["score"]) for n, trial in enumerate(mixtures.values(), start=1)]
    figures = _figure("Score by order", "mixture", order, mixtures, winners)
    for task in plan.tasks:
        points = [(trial["rates"].get(task, 0.0), trial["score"]) for trial in mixtures.values()]
        figures += _figure(escape(task), "share of the steps", points, mixtures, winners)
    return (
        '<section id="shares"><h2>Score by share</h2><p class="note">A point is a mixture; ringed: those whose encoders are '
        f'averaged.</p>{legend_of(HUES, ())}<div class="charts">{figures}</div></section>'
    )


def _figure(caption: str, x_label: str, points: list[tuple[float, float]], mixtures: Trials, winners: Sequence[str]) -> str:
    def draw(x_of: Place, y_of: Place) -> list[str]:
        drawn = []
        for (x, y), name in zip(points, mixtures, strict=True):
            look = ' class="winner"' if name in winners else ""
            hue = f"--hue: {HUES[name.partition('.')[0]]:g}"
            place = f'cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="3.4"'
            drawn.append(f'<circle{look} {place} style="{hue}"><title>{escape(f"{name}: {y:.4f}")}</title></circle>')
        return drawn

    chart = framed(linear(x_label, [0.0, *(x for x, _ in points)]), linear("score", (y for _, y in points)), draw)
    return f"<figure><figcaption><b>{caption}</b></figcaption>{chart}</figure>"


def _alone_section(out: Path, known: Trials) -> str:
    """Each task alone: its score by step, a line for each number of steps that was tried."""
    of_task: dict[str, list[str]] = {}
    for name, trial in known.items():
        if name.startswith(ALONE):
            of_task.setdefault(next(iter(trial["rates"])), []).append(name)
    figures = ""
    for task, names in of_task.items():
        best = max(names, key=lambda name: (known[name]["score"], -known[name]["steps"]))
        lines = []
        for name in names:
            scores = read_json(out / name.replace(".", "/") / SCORES)
            points = [(float(step), values[known[name]["judged_by"]]) for step, values in scores.items()]
            lines.append(Line(points, HUES["seed"], "" if name == best else "faint"))
        chart = chart_of(lines, x_label="step", y_label="score")
        caption = f"<b>{escape(task)}</b><small>best after {known[best]['steps']:,} steps</small>"
        figures += f"<figure><figcaption>{caption}</figcaption>{chart}</figure>"
    return (
        '<section id="alone"><h2>Each task alone</h2><p class="note">The best number of steps of each; rates in proportion to '
        f'them are the seed.</p><div class="charts">{figures}</div></section>'
    )
