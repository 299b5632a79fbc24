"""Sections of a report with the scores themselves: against chance, by prefix; grouped where there are many benchmarks."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from html import escape
from statistics import fmean

from datamodules.tasks import BENCHMARK_NAME
from lightning_modules.charts import Line, chart_of, hues_of, legend_of
from lightning_modules.results import Number, Score, prefixes_of

MANY = 24  # benchmarks beyond which they are shown by group and rows are folded away: our choice


def scores_section(scores: list[Score]) -> str:
    """Every float32 score with prompts: headlines in a table, or in one for each group, other metrics folded away."""
    plain = [score for score in scores if score.is_plain]
    headlines, others = headlines_of(scores), [score for score in plain if not score.is_headline]
    prefixes = prefixes_of([*plain, *headlines])
    if len(headlines) > MANY:
        groups = groups_of(headlines)
        single = [score for group in groups.values() if len(group) == 1 for score in group]
        larger = {name: group for name, group in groups.items() if len(group) > 1}
        larger |= {"Benchmarks on their own": single} if single else {}
        tables = _overview(groups, prefixes)
        tables += "".join(folded(f"{name} ({len(group)})", table_of(group, prefixes)) for name, group in larger.items())
    else:
        tables = table_of(headlines, prefixes)
    tables += folded(f"Other metrics ({len(others)})", table_of(others, prefixes)) if others else ""
    interval = ", below it the 95 % interval over queries" if any(map(_band, plain)) else ""
    return (
        '<section id="scores"><h2>Scores</h2><p class="note">One column per prefix of the embedding. The stronger the colour, '
        f"the further the value lies from chance towards 1; beside it the value divided by chance{interval}.</p>"
        f"{tables}</section>"
    )


def headlines_of(scores: Iterable[Score]) -> list[Score]:
    """The score that stands for each benchmark: of its first metric, in float32 with prompts where there is one."""
    found: dict[str, Score] = {}
    for score in scores:
        if score.is_headline and (score.benchmark not in found or (score.is_plain and not found[score.benchmark].is_plain)):
            found[score.benchmark] = score
    return list(found.values())


def groups_of(scores: Iterable[Score]) -> dict[str, list[Score]]:
    """Scores by their benchmark's group, those without one by what is sought with what; one alone has its own name."""
    groups: dict[str, list[Score]] = defaultdict(list)
    for score in scores:
        match = BENCHMARK_NAME.fullmatch(score.benchmark)
        family, dot, _ = score.benchmark.partition("/")[0].partition(".")
        pair = f"{match[1]} → {match[2]}" if match else "others"
        groups[score.group or (f"{family}, {pair}" if dot else pair)].append(score)
    return {name if len(group) > 1 else group[0].benchmark: group for name, group in groups.items()}


def _overview(groups: dict[str, list[Score]], prefixes: Sequence[int]) -> str:
    """Mean of each group's headline metrics at each prefix."""
    body = "".join(
        f'<tr><th scope="row">{escape(name)}<small>{_counted(group)}</small></th><td class="metric">{_metrics(group)}</td>'
        + "".join(
            _mean_cell([s.numbers[prefix].value for s in group if prefix in s.numbers], len(group)) for prefix in prefixes
        )
        + "</tr>"
        for name, group in groups.items()
    )
    head = "".join(f'<th scope="col">{prefix}</th>' for prefix in prefixes)
    return (
        '<div class="scroll"><table><thead><tr><th scope="col">benchmarks and means of groups</th>'
        f'<th scope="col" class="metric">metric</th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _counted(group: list[Score]) -> str:
    missing = sum(not score.numbers for score in group)
    if len(group) == 1:
        return escape(group[0].size or "; ".join(group[0].notes))
    return f"{len(group)} benchmarks{f', {missing} without a number' if missing else ''}"


def _metrics(group: list[Score]) -> str:
    names = list(dict.fromkeys(score.metric for score in group if score.numbers))
    return _breakable(names[0]) if len(names) == 1 else f"{len(names)} metrics" if names else ""


def _mean_cell(values: list[float], number: int) -> str:
    if not values:
        return "<td></td>"
    few = f" <small>of {len(values)}</small>" if len(values) < number else ""
    return f'<td class="score" style="--share: {min(max(fmean(values), 0), 1):.3f}">{fmean(values):.3f}{few}</td>'


def table_of(scores: list[Score], prefixes: Sequence[int]) -> str:
    """A table with a column per prefix; a benchmark without a number says why."""
    head = "".join(f'<th scope="col">{prefix}</th>' for prefix in prefixes)
    body = "".join(
        f'<tr><th scope="row">{escape(score.benchmark)}<small>{escape(_beneath(score))}</small></th>'
        f'<td class="metric">{_breakable(score.name)}</td><td>{"" if score.chance is None else f"{score.chance:.3f}"}</td>'
        f"{_cells(score, prefixes)}</tr>"
        for score in scores
    )
    return (
        '<div class="scroll"><table><thead><tr><th scope="col">benchmark</th><th scope="col" class="metric">metric</th>'
        f'<th scope="col">chance</th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _beneath(score: Score) -> str:
    return "; ".join(filter(None, [score.size, *(score.notes if score.numbers else [])]))


def _breakable(metric: str) -> str:
    return escape(metric).replace("_", "_<wbr>")


def _cells(score: Score, prefixes: Sequence[int]) -> str:
    if not score.numbers:
        return f'<td class="missing" colspan="{max(1, len(prefixes))}">{escape("; ".join(score.notes))}</td>'
    return "".join(cell_of(score.numbers[p], score.chance) if p in score.numbers else "<td></td>" for p in prefixes)


def cell_of(number: Number, chance: float | None, mark: str | None = None) -> str:
    """A value, coloured by where it lies between chance and 1, with its interval, and `mark` or else the multiple of chance."""
    value, floor = number.value, chance or 0.0
    share = (value - floor) / (1 - floor) if floor < 1 else 0.0
    ratio = f"{value / floor:.{0 if value >= 10 * floor else 2}f}×" if floor > 0 else ""
    interval = "" if number.low is None or number.high is None else f"{number.low:.3f}–{number.high:.3f}"
    beside = ratio if mark is None else mark
    look = "score below" if chance is not None and value < chance else "score"
    below = f'<small class="interval">{interval}</small>' if interval else ""
    return f'<td class="{look}" style="--share: {min(max(share, 0), 1):.3f}">{value:.3f} <small>{beside}</small>{below}</td>'


def signed(value: float) -> str:
    """With its sign, a true minus, and no sign where it rounds to nothing."""
    return f"{value:+.3f}".replace("-", "−") if abs(value) >= 0.0005 else "0.000"


def folded(summary: str, content: str, *, is_open: bool = False) -> str:
    """What a click unfolds."""
    return f"<details{' open' * is_open}><summary>{escape(summary)}</summary>{content}</details>"


def prefix_section(scores: list[Score]) -> str:
    """A chart per benchmark, or where there are many per group: its benchmarks and their mean."""
    shown = [score for score in scores if score.is_headline and score.is_plain and score.numbers]
    if not shown:
        return ""
    if len(shown) > MANY:
        figures = [_group_figure(name, group) for name, group in groups_of(shown).items()]
        legend = legend_of({}, (("mean of the group", "line"), ("a benchmark", "line faint")))
    else:
        figures = [_figure(score) for score in shown]
        looks = (("95 % interval", "sample-band"),) if any(_band(score) for score in shown) else ()
        legend = legend_of({}, (*looks, ("chance", "chance")))
    return f'<section id="prefixes"><h2>Score by prefix</h2>{legend}<div class="charts">{"".join(figures)}</div></section>'


def _figure(score: Score) -> str:
    line = Line(points_of(score), hues_of(["float32"])["float32"], "", is_labelled=True, band=_band(score))
    chart = chart_of(
        [line], x_label="prefix (dimensions)", y_label=score.metric, prefixes=prefixes_of([score]), level=score.chance
    )
    return f"<figure><figcaption><b>{escape(score.benchmark)}</b></figcaption>{chart}</figure>"


def _group_figure(name: str, group: list[Score]) -> str:
    prefixes = prefixes_of(group)
    common = [p for p in prefixes if all(p in score.numbers for score in group)]
    hue = hues_of(["float32"])["float32"]
    lines = [Line(points_of(score), hue, "faint") for score in group] if len(group) > 1 else []
    lines += [Line([(p, fmean(s.numbers[p].value for s in group)) for p in common], hue, "", is_labelled=True)]
    metrics = list(dict.fromkeys(score.metric for score in group))
    y_label = metrics[0] if len(metrics) == 1 else f"{len(metrics)} metrics"
    chart = chart_of(lines, x_label="prefix (dimensions)", y_label=y_label, prefixes=prefixes)
    number = f"<small>{_counted(group)}</small>" if len(group) > 1 else ""
    return f"<figure><figcaption><b>{escape(name)}</b>{number}</figcaption>{chart}</figure>"


def points_of(score: Score) -> list[tuple[float, float]]:
    """Prefix and value, ascending."""
    return [(prefix, number.value) for prefix, number in sorted(score.numbers.items())]


def _band(score: Score) -> list[tuple[float, float, float]]:
    found = sorted(score.numbers.items())
    return [(p, n.low, n.high) for p, n in found if n.low is not None and n.high is not None]
