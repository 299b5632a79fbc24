"""Sections of a report that look deeper: languages beside each other, what prompts are worth, health of the vector space."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from html import escape
from statistics import fmean, median
from typing import Any

from datamodules.tasks import BENCHMARK_NAME
from lightning_modules.charts import Line, chart_of, hues_of, legend_of
from lightning_modules.report_scores import MANY, cell_of, folded, groups_of, signed, table_of
from lightning_modules.results import Number, Score, prefixes_of

READ_AS = {  # what is measured, how to read it
    "spread": "Mean squared cosine of pairs, as a multiple of that of random directions (1/d a side, 2/d both). Near 1 the "
    "whole sphere is used; the higher, the smaller the part.",
    "mean_cosine": "Mean cosine of pairs. Near 0 vectors point all ways; towards 1 they share one direction.",
    "isotropy": "How evenly the variance lies over the dimensions. 1 is evenly, 0 along one line; as many vectors in random "
    "directions reach the reference.",
    "hubness": "Skewness of how often a candidate is among the 10 nearest. At the reference chance decides; far above it "
    "a few candidates are near to everything.",
    "modality_gap": "Distance between the mean query and the mean candidate, of benchmarks across modalities where there are "
    "any. At the reference both fill one region; 2 is the most.",
}
ACROSS = "modality_gap"  # says most of benchmarks across modalities, so that the chart is of these
RATIO = "spread"  # falls with the prefix, so that it is drawn as a multiple of its reference
CSS = """
.interval.interval { display: block; opacity: .6; font-size: .72rem }
.languages table { width: auto; min-width: min(100%, 26rem) } .languages td { padding-block: .25rem }
.languages td small { display: inline-block; min-width: 1.2em; line-height: 1 }
.languages .interval.interval { display: inline-block; min-width: 7.4em }
.front { fill: none; stroke: var(--soft); stroke-width: 7; opacity: .22; stroke-linejoin: round; stroke-linecap: round }
.pale { opacity: .45 }
.line.thin { stroke-width: 1.2; opacity: .6 }
.line.reference { stroke: var(--soft); stroke-dasharray: 2 4 }
.beside { display: grid; grid-template-columns: minmax(0, 1.25fr) minmax(0, 1fr); gap: 1rem 2.5rem; align-items: start;
  margin-bottom: 1.6rem } .beside .scroll { margin: 0 }
.total > * { border-top: 2px solid var(--rule); font-weight: 600 } .mark { color: var(--soft); font-size: .75rem }
.change { position: relative } .change i { position: absolute; bottom: 0; height: 2px; background: var(--good) }
.change i.less { background: var(--bad) } .change.less { color: var(--bad) }
@media (max-width: 760px) { .beside { grid-template-columns: minmax(0, 1fr) } svg.large { font-size: 17px }
  .beside th:first-child { max-width: none; white-space: nowrap } }
"""


def languages_section(scores: list[Score]) -> str:
    """A table for each set of languages, best first: a column per prefix, or per group where several have these languages."""
    groups: dict[str, list[Score]] = defaultdict(list)
    for score in scores:
        if score.is_headline and score.is_plain and score.group and score.language and score.numbers:
            groups[score.group].append(score)
    columns: dict[frozenset[str], dict[str, list[Score]]] = defaultdict(dict)
    for name, group in groups.items():
        pairs = groups_of(replace(score, group=None) for score in group)
        for pair, members in pairs.items():
            languages = frozenset(score.language or "" for score in members)
            if len(languages) > 1:
                columns[languages][name if len(pairs) == 1 else f"{name}, {pair}"] = members
    if not columns:
        return ""
    tables = "".join(_languages(groups) for groups in columns.values())
    return (
        '<section id="languages"><h2>Languages</h2><p class="note">The headline metric by language of the queries, best '
        f"language first; ▲ marks the best of a column, ▼ the worst.</p>{tables}</section>"
    )


def _languages(groups: dict[str, list[Score]]) -> str:
    columns: dict[str, dict[str, list[Score]]] = {}
    if len(groups) == 1:
        members = next(iter(groups.values()))
        columns = {str(prefix): _by_language([s for s in members if prefix in s.numbers]) for prefix in prefixes_of(members)}
        prefix_of = {name: int(name) for name in columns}
    else:
        common = set.intersection(*(set(score.numbers) for group in groups.values() for score in group))
        prefix_of = {name: max(common or prefixes_of(group)) for name, group in groups.items()}
        columns = {name: _by_language([s for s in g if prefix_of[name] in s.numbers]) for name, g in groups.items()}
    values = {
        name: {language: _mean_number([s.numbers[prefix_of[name]] for s in found]) for language, found in column.items()}
        for name, column in columns.items()
    }
    languages = sorted(
        {language for column in values.values() for language in column},
        key=lambda language: -fmean(column[language].value for column in values.values() if language in column),
    )
    ends = {name: _ends(column) for name, column in values.items()}
    rows = []
    for language in languages:
        cells = "".join(
            cell_of(column[language], columns[name][language][0].chance, ends[name].get(language, ""))
            if language in column
            else "<td></td>"
            for name, column in values.items()
        )
        rows.append(f'<tr><th scope="row">{escape(language)}</th>{cells}</tr>')
    empty = "<small></small>" + '<small class="interval"></small>' * any("interval" in row for row in rows)
    means = "".join(f"<td>{fmean(n.value for n in column.values()):.3f} {empty}</td>" for column in values.values())
    heads = "".join(
        f'<th scope="col">{escape(name)}{"" if len(groups) == 1 else f"<small>{prefix_of[name]}</small>"}</th>'
        for name in columns
    )
    table = (
        f'<div class="scroll languages"><table><thead><tr><th scope="col">language</th>{heads}</tr></thead>'
        f'<tbody>{"".join(rows)}<tr class="total"><th scope="row">mean</th>{means}</tr></tbody></table></div>'
    )
    metrics = dict.fromkeys(score.metric for group in groups.values() for score in group)
    table = folded(f"{len(languages)} languages", table) if len(languages) > MANY else table
    last = {name: values[name] for name in (list(values)[-1:] if len(groups) == 1 else values)}
    told = "; ".join(_told(name, column, is_named=len(groups) > 1) for name, column in last.items())
    return f"<h3>{escape(', '.join(groups))} <small>{escape(', '.join(metrics))}</small></h3><p>{told}.</p>{table}"


def _by_language(scores: list[Score]) -> dict[str, list[Score]]:
    found: dict[str, list[Score]] = defaultdict(list)
    for score in scores:
        found[score.language or ""].append(score)
    return found


def _mean_number(numbers: list[Number]) -> Number:
    return numbers[0] if len(numbers) == 1 else Number(fmean(number.value for number in numbers))


def _ends(column: dict[str, Number]) -> dict[str, str]:
    """Marks of the best and the worst language."""
    order = sorted(column, key=lambda language: column[language].value)
    return {order[0]: "▼", order[-1]: "▲"} if len(order) > 1 and column[order[0]].value < column[order[-1]].value else {}


def _told(name: str, column: dict[str, Number], *, is_named: bool) -> str:
    order = sorted(column, key=lambda language: column[language].value)
    best, worst = (f"{escape(language)} {column[language].value:.3f}" for language in (order[-1], order[0]))
    mean = fmean(number.value for number in column.values())
    return f"{f'{escape(name)}: ' if is_named else ''}best {best}, worst {worst}, mean {mean:.3f}"


def prompts_section(scores: list[Score]) -> str:
    """What the headline metrics lose at full width when queries and targets come without the prompts of their task."""
    bare = [score for score in scores if score.dtype == "float32" and not score.has_prompts]
    told = [score for score in bare if score.is_headline]
    prompted = {score.benchmark: score for score in scores if score.is_headline and score.is_plain}
    pairs: list[tuple[Score, int, float, float]] = []
    lone: list[Score] = []
    for score in told:
        common = set(score.numbers) & set(prompted[score.benchmark].numbers) if score.benchmark in prompted else set()
        if common:
            width = max(common)
            pairs.append((score, width, prompted[score.benchmark].numbers[width].value, score.numbers[width].value))
        elif score.benchmark in prompted and (score.numbers or prompted[score.benchmark].numbers):
            lone.append(score)
    if not pairs and not lone:
        return ""
    pairs.sort(key=lambda pair: pair[3] - pair[2])
    most = max((abs(bare - given) for *_, given, bare in pairs), default=0) or 1
    rows = [
        f'<tr><th scope="row">{escape(score.benchmark)}</th><td class="metric">{escape(score.metric)}</td><td>{width}</td>'
        f"<td>{given:.3f}</td><td>{bare:.3f}</td>{_change(bare - given, most)}</tr>"
        for score, width, given, bare in pairs
    ]
    rows += [
        f'<tr><th scope="row">{escape(score.benchmark)}</th><td class="metric">{escape(score.metric)}</td>'
        f'<td class="missing" colspan="4">{escape("; ".join(score.notes) or "no prefix that both have")}</td></tr>'
        for score in lone
    ]
    total = ""
    if pairs:
        with_mean, without_mean = fmean(pair[2] for pair in pairs), fmean(pair[3] for pair in pairs)
        total = (
            f'<tr class="total"><th scope="row">mean of {len(pairs)}</th><td></td><td></td><td>{with_mean:.3f}</td>'
            f"<td>{without_mean:.3f}</td><td>{signed(without_mean - with_mean)}</td></tr>"
        )
    tables = _prompts_table([*rows[:MANY], total])
    tables += folded(f"The other {len(rows) - MANY}", _prompts_table(rows[MANY:])) if len(rows) > MANY else ""
    widths = prefixes_of(bare)
    tables += folded(f"Without prompts, all values ({len(bare)})", table_of(bare, widths)) if len(widths) > 1 else ""
    return (
        '<section id="prompts"><h2>Without task prompts</h2><p class="note">The headline metric at full width with the prompts '
        f"of the task and with bare text; the largest loss first.</p>{tables}</section>"
    )


def _prompts_table(rows: Sequence[str]) -> str:
    head = "".join(f'<th scope="col">{name}</th>' for name in ("prefix", "with", "without", "difference"))
    return (
        '<div class="scroll"><table><thead><tr><th scope="col">benchmark</th><th scope="col" class="metric">metric</th>'
        f"{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _change(difference: float, most: float) -> str:
    look = " less" if difference < 0 else ""
    bar = f'<i class="{look.strip()}" style="right: 0; width: {abs(difference) / most:.1%}"></i>'
    return f'<td class="change{look}">{signed(difference)}{bar}</td>'


def space_section(rows: Sequence[dict[str, Any]]) -> str:
    """How the vectors lie: a chart for each measure by prefix, median and range over benchmarks, and all values folded away."""
    if not rows:
        return ""
    measures: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        measures[row["measure"]].append(row)
    hues = hues_of(dict.fromkeys(["queries", "candidates", "both", *(row["side"] for row in rows)]))
    used = {row["side"] for row in rows}
    looks = (("lowest to highest benchmark", "sample-band"), ("reference", "chance"))
    figures = "".join(_space_figure(measure, found, hues) for measure, found in measures.items())
    tables = "".join(folded(f"{_words(measure)}, all values", _space_table(found)) for measure, found in measures.items())
    return (
        '<section id="space"><h2>Health of the vector space</h2><p class="note">Lines are medians over the benchmarks.</p>'
        f"{legend_of({side: hue for side, hue in hues.items() if side in used}, looks)}"
        f'<div class="charts">{figures}</div>{tables}</section>'
    )


def _words(measure: str) -> str:
    return measure.replace("_", " ")


def _space_figure(measure: str, rows: list[dict[str, Any]], hues: dict[str, float]) -> str:
    given = [row for row in rows if row["value"] is not None and math.isfinite(row["value"])]
    if measure == ACROSS:
        given = [row for row in given if _is_across(row["benchmark"])] or given
    is_ratio = measure == RATIO and all(row.get("reference") for row in given)
    found: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    references: dict[int, list[float]] = defaultdict(list)
    for row in given:
        found[row["side"]][row["prefix"]].append(row["value"] / row["reference"] if is_ratio else row["value"])
        if row.get("reference") is not None:
            references[row["prefix"]].append(1.0 if is_ratio else row["reference"])
    lines = []
    for side, by_prefix in found.items():
        points = [(prefix, median(values)) for prefix, values in sorted(by_prefix.items())]
        band = [(prefix, min(values), max(values)) for prefix, values in sorted(by_prefix.items())]
        lines.append(Line(points, hues[side], "", band=band if any(low < high for _, low, high in band) else ()))
    middle = [(prefix, median(values)) for prefix, values in sorted(references.items())]
    level = middle[0][1] if len({value for _, value in middle}) == 1 else None
    if middle and level is None:
        lines.append(Line(middle, 0, "reference"))
    y_label = f"{_words(measure)} ÷ reference" if is_ratio else _words(measure)
    prefixes = sorted({row["prefix"] for row in given})
    chart = chart_of(lines, x_label="prefix (dimensions)", y_label=y_label, prefixes=prefixes, level=level, is_score=False)
    return (
        f"<figure><figcaption><b>{escape(_words(measure))}</b></figcaption>"
        f'{chart}<p class="note">{escape(READ_AS.get(measure, ""))}</p></figure>'
    )


def _is_across(benchmark: str) -> bool:
    match = BENCHMARK_NAME.fullmatch(benchmark)
    return match is not None and match[1] != match[2]


def _space_table(rows: list[dict[str, Any]]) -> str:
    prefixes = sorted({row["prefix"] for row in rows if row["prefix"] is not None})
    cells: dict[tuple[str, str], dict[int | None, str]] = defaultdict(dict)
    for row in rows:
        reference = "" if row.get("reference") is None else f"<small>{row['reference']:.4g}</small>"
        value = row["value"]
        shown = f"{value:.4g} {reference}" if value is not None and math.isfinite(value) else ""
        cells[row["benchmark"], row["side"]][row["prefix"]] = f"{shown}<small>{escape(row.get('note') or '')}</small>"
    body = "".join(
        f'<tr><th scope="row">{escape(benchmark)}</th><td class="metric">{escape(side)}</td>'
        + "".join(f"<td>{by_prefix.get(prefix, '')}</td>" for prefix in prefixes)
        + "</tr>"
        for (benchmark, side), by_prefix in cells.items()
    )
    head = "".join(f'<th scope="col">{prefix}</th>' for prefix in prefixes)
    return (
        '<p class="note">The small number is the reference.</p><div class="scroll"><table><thead><tr><th scope="col">benchmark'
        f'</th><th scope="col" class="metric">side</th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )
