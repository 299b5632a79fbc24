"""Charts as SVG: axes with round ticks, lines with bands, smoothed curves, a legend; colours are the page's own."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

MAX_POINTS = 400  # of a line, so that a page of twenty benchmarks still opens at once
NOTHING = '<p class="note">nothing finite to draw</p>'

Place = Callable[[float], float]  # from data to the chart's own units


@dataclass(frozen=True, slots=True)
class Axis:
    """Ends and ticks of an axis; logarithmic in base 2 where `is_log`."""

    label: str
    low: float
    high: float
    ticks: Sequence[float]
    is_log: bool = False

    def place(self, start: float, end: float) -> Place:
        """Where a value lies between `start` and `end`."""
        scale = _scale(self._own(self.low), self._own(self.high), start, end)
        return lambda value: scale(self._own(value))

    def _own(self, value: float) -> float:
        return math.log2(value) if self.is_log else value


def linear(label: str, values: Iterable[float], *, num_ticks: int = 4) -> Axis:
    """An axis whose round ticks enclose the values."""
    ticks = _ticks(*_ends(values), num_ticks)
    return Axis(label, ticks[0], ticks[-1], ticks)


def logarithmic(label: str, ticks: Sequence[float], values: Iterable[float] = ()) -> Axis:
    """An axis with room around its ascending ticks, and around values beyond them."""
    low, high = _ends([*ticks, *values])
    return Axis(label, low / 2**0.3, high * 2**0.3, ticks, is_log=True)


def framed(
    x_axis: Axis, y_axis: Axis, draw: Callable[[Place, Place], list[str]], *, size: tuple[int, int] = (360, 188), look: str = ""
) -> str:
    """An SVG of two axes, and in them what `draw` makes of the two ways from data to places."""
    width, height = size
    right, bottom = width - 20, height - 42
    x_of, y_of = x_axis.place(48, right), y_axis.place(bottom, 26)
    parts = [f'<line class="grid" x1="48" x2="{right}" y1="{y_of(y):.1f}" y2="{y_of(y):.1f}"/>' for y in y_axis.ticks]
    parts += [f'<text x="42" y="{y_of(y) + 4:.1f}" text-anchor="end">{_tick(y)}</text>' for y in y_axis.ticks]
    for x in apart(x_axis.ticks, x_of):
        parts.append(f'<text x="{x_of(x):.1f}" y="{bottom + 17}" text-anchor="middle">{x:,.6g}</text>')
    parts.append(f'<text x="0" y="11">{escape(y_axis.label)}</text>')
    parts.append(f'<text x="{right}" y="{bottom + 36}" text-anchor="end">{escape(x_axis.label)}</text>')
    label = escape(f"{y_axis.label} by {x_axis.label}")
    body = "".join([*parts, *draw(x_of, y_of)])
    return f'<svg viewBox="0 0 {width} {height}" role="img" class="{look}" aria-label="{label}">{body}</svg>'


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a chart in data coordinates; `look` is its CSS class, `hue` its colour in degrees, `band` (x, low, high)."""

    points: Sequence[tuple[float, float]]
    hue: float
    look: str = ""
    is_labelled: bool = False
    band: Sequence[tuple[float, float, float]] = ()


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
    lines: list[Line],
    *,
    x_label: str,
    y_label: str,
    prefixes: Sequence[int] = (),
    level: float | None = None,
    is_score: bool = True,
) -> str:
    """An SVG of `lines`; with `prefixes` x is logarithmic in base 2 and, where `is_score`, y reaches from 0 to 1.

    Args:
        lines: At least one with a finite point, or there is only a note.
        x_label: What lies along x.
        y_label: What lies along y.
        prefixes: Ascending ticks of x; none fits both axes to the data.
        level: Where a dotted line lies across: chance, or what values are compared with.
        is_score: Whether y is a score, so that charts beside each other have one scale.
    """
    finite = [point for line in lines for point in line.points if math.isfinite(point[1])]
    if not finite:
        return NOTHING
    ys = [y for _, y in finite] + [end for line in lines for _, *ends in line.band for end in ends]
    ys += [] if level is None else [level]
    x_axis = logarithmic(x_label, prefixes) if prefixes else linear(x_label, (x for x, _ in finite))
    y_axis = linear(y_label, [*ys, 0, 1] if prefixes and is_score else ys)

    def draw(x_of: Place, y_of: Place) -> list[str]:
        ends = f'x1="48" x2="340" y1="{y_of(level or 0):.1f}" y2="{y_of(level or 0):.1f}"'
        dotted = [] if level is None else [f'<line class="chance" {ends}/>']
        return dotted + [_drawn(line, x_of, y_of) for line in lines]

    return framed(x_axis, y_axis, draw)


def _drawn(line: Line, x_of: Place, y_of: Place) -> str:
    finite = [(x, y) for x, y in line.points if math.isfinite(y)]
    path = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in finite)
    edge = [(x, high) for x, _, high in line.band] + [(x, low) for x, low, _ in reversed(line.band)]
    around = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in edge)
    drawn = f'<polygon class="band" points="{around}"/>' if len(line.band) > 1 else ""
    drawn += f'<polyline class="line {line.look}" points="{path}"/>'
    if len(finite) <= 12 and not line.look.startswith(("faint", "reference")):
        drawn += "".join(f'<circle cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="2.4"/>' for x, y in finite)
    if line.is_labelled:
        labels = apart([x for x, _ in finite], x_of)
        drawn += "".join(
            f'<text class="value" x="{x_of(x):.1f}" y="{y_of(y) - 6:.1f}" text-anchor="middle">{y:.3f}</text>'
            for x, y in finite
            if x in labels
        )
    return f'<g style="--hue: {line.hue:g}">{drawn}</g>'


def _scale(low: float, high: float, start: float, end: float) -> Place:
    return lambda value: start + (value - low) / ((high - low) or 1) * (end - start)


def _tick(value: float) -> str:
    return f"{value:.4g}".replace("-", "−")


def _ends(values: Iterable[float]) -> tuple[float, float]:
    kept = list(values)
    return min(kept), max(kept)


def _ticks(low: float, high: float, number: int = 4) -> list[float]:
    """Round numbers that enclose the data."""
    from matplotlib.ticker import MaxNLocator

    return list(map(float, MaxNLocator(number, steps=[1, 2, 2.5, 5, 10], min_n_ticks=3).tick_values(low, high)))


def apart(xs: Sequence[float], x_of: Place) -> list[float]:
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
