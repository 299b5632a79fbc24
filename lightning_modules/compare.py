"""Compare evaluations of the same benchmarks with a baseline: a table, compare.json and compare.html."""

import json
import os
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from datamodules.files import replace_file
from lightning_modules.compare_page import CSS, comparison_section, overview_section
from lightning_modules.comparison import CLEAR, Comparison, Run, compared, named
from lightning_modules.listing import printable
from lightning_modules.page import write_page
from lightning_modules.report_scores import signed


def compare(runs: list[str], out: str, *, names: list[str] | None = None) -> None:
    """Compare runs with the first of them; writes compare.json and compare.html and prints a table.

    Args:
        runs: Folders that conf=evaluate wrote (results.json, values.npz); the first is the baseline.
        out: Folder for compare.json and compare.html.
        names: What the runs are called; None takes their folders' names.

    Raises:
        ValueError: There are fewer than two runs, one is missing or broken, or names do not fit.
    """
    called = named(runs, names)
    baseline, *others = [Run(Path(folder), name) for folder, name in zip(runs, called, strict=True)]
    comparisons = [compared(run, baseline) for run in track(others, "compare", transient=True)]
    untold = [run.name for run in (baseline, *others) if not run.values.is_there]
    facts = {"baseline": baseline.name, "compared with it": ", ".join(called[1:])}
    if untold:
        facts["not tested"] = f"no values.npz in {', '.join(untold)}: differences there have no interval; evaluate again"
    content = {"baseline": baseline.name, "folders": dict(zip(called, runs, strict=True))}
    summaries = [comparison.summary() for comparison in comparisons]
    replace_file(Path(out) / "compare.json", json.dumps(content | {"comparisons": summaries}, indent=1))
    page = Path(out) / "compare.html"
    sections = [overview_section(comparisons), *(comparison_section(c, n) for n, c in enumerate(comparisons))]
    write_page(page, title=f"{', '.join(called[1:])} against {baseline.name}", facts=facts, sections=sections, css=CSS)
    console = Console(width=None if os.isatty(1) else 120)
    for comparison in comparisons:
        console.print(comparison_table(comparison))
        console.print(told(comparison), highlight=False, markup=False)
    if untold:
        console.print(facts["not tested"], highlight=False, markup=False)
    console.print(f"all of this in {page} and {Path(out) / 'compare.json'}", highlight=False, markup=False)


def comparison_table(comparison: Comparison) -> Table:
    """A terminal table of the headline metric of both, the difference, its interval and the corrected p-value."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("task", "metric"):
        table.add_column(column, overflow="fold")
    for column in (comparison.baseline, comparison.name):
        table.add_column(Text(printable(column)), overflow="fold", justify="right", max_width=16)
    for column in ("difference", "95 % interval", "p (Holm)"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in comparison.rows:
        task = Text(printable(row.benchmark)).append(f"\n{printable(row.note)}" if row.note else "", "dim")
        metric = printable(row.metric) + (f" @ {row.prefix}" if row.prefix else "")
        values = ("–" if value is None else f"{value:.3f}" for value in (row.baseline, row.value))
        style = {"better": "green", "worse": "red"}.get(row.verdict, "")
        difference = Text("–" if row.difference is None else signed(row.difference), style)
        interval = "" if row.low is None or row.high is None else f"{signed(row.low)} … {signed(row.high)}"
        p_value = "" if row.corrected is None else f"{row.corrected:.3g}"
        table.add_row(task, metric, *values, difference, interval, p_value)
    return table


def told(comparison: Comparison) -> str:
    """What came out, in one sentence."""
    if comparison.mean_difference is None:
        return f"{comparison.name} and {comparison.baseline} have nothing that can be compared"
    return (
        f"{comparison.name} against {comparison.baseline}: {signed(comparison.mean_difference)} on average of "
        f"{len(comparison.compared)} benchmarks; {comparison.num('better')} clearly better, "
        f"{comparison.num('worse')} clearly worse (p < {CLEAR} after Holm's correction), {comparison.num('unclear')} unclear, "
        f"{comparison.num('untested')} not tested"
    )
