"""Charts as SVG: lines with round ticks, smoothed curves, a legend. Sizes and colours are the page's own, see `report.py`."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

MAX_POINTS = 400  # of a line, so that a page of twenty benchmarks still opens at once


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a chart in data coordinates; `look` is its CSS class, `hue` its colour in degrees."""

    points: Sequence[tuple[float, float]]
    hue: float
    look: str = ""
    is_labelled: bool = False


def smoothed(points: list[tuple[float, float]], hue: float, look: str) -> list[Line]:
    """The raw line and its centred running mean, thinned to at most `MAX_POINTS`; no line without finite points."""
    kept = np.array(sorted(point for point in points if math.isfinite(point[1])))
    if not len(kept):
        return []
    window = np.ones(len(kept) // 30 | 1)
    mean = np.convolve(kept[:, 1], window, "same") / np.convolve(np.ones(len(kept)), window, "same")
    thin = np.unique(np.linspace(0, len(kept) - 1, min(len(kept), MAX_POINTS)).round().astype(int))
    return [
        Line(kept[thin].tolist(), hue, f"faint{look}"),
        Line(np.column_stack([kept[:, 0], mean])[thin].tolist(), hue, look.strip()),
    ]


def chart_of(
    lines: list[Line], *, x_label: str, y_label: str, prefixes: Sequence[int] = (), chance: float | None = None
) -> str:
    """An SVG of `lines`; with `prefixes` x is logarithmic in base 2 and y a score, else both fit the data."""
    points = [point for line in lines for point in line.points if math.isfinite(point[1])]
    if not points:
        return '<p class="note">nothing finite to draw</p>'
    xs, ys = zip(*points, strict=True)
    if prefixes:
        log_of = _scale(math.log2(prefixes[0]) - 0.3, math.log2(prefixes[-1]) + 0.3, 48, 340)
        x_of, x_ticks, y_ticks = (lambda x: log_of(math.log2(x))), prefixes, _ticks(min(0, *ys), 1)
    else:
        x_ticks, y_ticks = _ticks(min(xs), max(xs)), _ticks(min(ys), max(ys))
        x_of = _scale(x_ticks[0], x_ticks[-1], 48, 340)
    y_of = _scale(y_ticks[0], y_ticks[-1], 146, 26)
    parts = [f'<line class="grid" x1="48" x2="340" y1="{y_of(y):.1f}" y2="{y_of(y):.1f}"/>' for y in y_ticks]
    parts += [f'<text x="42" y="{y_of(y) + 4:.1f}" text-anchor="end">{y:.4g}</text>' for y in y_ticks]
    parts += [f'<text x="{x_of(x):.1f}" y="163" text-anchor="middle">{x:,.6g}</text>' for x in _apart(x_ticks, x_of)]
    parts += [f'<text x="0" y="11">{escape(y_label)}</text><text x="340" y="182" text-anchor="end">{x_label}</text>']
    if chance is not None:
        parts.append(f'<line class="chance" x1="48" x2="340" y1="{y_of(chance):.1f}" y2="{y_of(chance):.1f}"/>')
    parts += [_drawn(line, x_of, y_of) for line in lines]
    return f'<svg viewBox="0 0 360 188" role="img" aria-label="{escape(y_label)} by {x_label}">{"".join(parts)}</svg>'


def _drawn(line: Line, x_of: Callable[[float], float], y_of: Callable[[float], float]) -> str:
    finite = [(x, y) for x, y in line.points if math.isfinite(y)]
    path = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in finite)
    drawn = f'<polyline class="line {line.look}" points="{path}"/>'
    if len(finite) <= 12:
        drawn += "".join(f'<circle cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="2.4"/>' for x, y in finite)
    if line.is_labelled:
        labels = _apart([x for x, _ in finite], x_of)
        drawn += "".join(
            f'<text class="value" x="{x_of(x):.1f}" y="{y_of(y) - 6:.1f}" text-anchor="middle">{y:.3f}</text>'
            for x, y in finite
            if x in labels
        )
    return f'<g style="--hue: {line.hue:g}">{drawn}</g>'


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    return lambda value: start + (value - low) / ((high - low) or 1) * (end - start)


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers that enclose the data."""
    from matplotlib.ticker import MaxNLocator

    return list(map(float, MaxNLocator(4, steps=[1, 2, 2.5, 5, 10], min_n_ticks=3).tick_values(low, high)))


def _apart(xs: Sequence[float], x_of: Callable[[float], float]) -> list[float]:
    """Those of the ascending `xs` that can be labelled without touching; the last always can."""
    kept: list[float] = []
    for x in reversed(xs):
        if not kept or x_of(kept[-1]) - x_of(x) >= 34:
            kept.append(x)
    return kept


def hues_of(names: Iterable[str]) -> dict[str, float]:
    """A colour for every name, as far from the others as the golden angle brings it."""
    return {name: (250 + 137.5 * index) % 360 for index, name in enumerate(dict.fromkeys(names))}


def legend_of(hues: dict[str, float], looks: tuple[tuple[str, str], ...]) -> str:
    """A line for every colour and, uncoloured, for every way of drawing."""
    swatch = '<svg viewBox="0 0 28 8"><line x1="0" x2="28" y1="4" y2="4" class="{}" style="{}"/></svg>'
    entries = [swatch.format("line", f"--hue: {hue:g}") + escape(name) for name, hue in hues.items()]
    entries += [swatch.format(look, "stroke: var(--soft)") + name for name, look in looks]
    return f'<p class="legend">{"".join(f"<span>{entry}</span>" for entry in entries)}</p>'
