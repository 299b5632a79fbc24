"""Section of a report with quality against bytes: what each prefix in each dtype costs and scores, and what none beats."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from statistics import fmean
from typing import NamedTuple

from lightning_modules.charts import Place, framed, hues_of, legend_of, linear, logarithmic
from lightning_modules.report_scores import MANY, folded, groups_of, table_of
from lightning_modules.results import Score, prefixes_of

DTYPES = ("float32", "int8", "binary_rescored", "binary")  # so that colours are the same in every report
KEPT = (0.99, 0.95)  # shares of the best mean whose cheapest stored vector is named: our choice
LARGE, SMALL = (620, 300), (360, 216)  # sizes of charts
LETTER_WIDTH, LETTER_HEIGHT = 7.2, 12  # of a label, so that none covers another

Kinds = dict[str, Score]  # a benchmark's headline metric by dtype


class Point(NamedTuple):
    """One way to store a vector, and how well it does."""

    num_bytes: int
    value: float
    dtype: str
    prefix: int


def bytes_section(scores: list[Score]) -> str:
    """Charts of quality against bytes of the benchmarks that were judged in several dtypes, and their mean over retrieval."""
    stored = [score for score in scores if score.dtype != "float32"]
    if not stored:
        return ""
    kinds: dict[str, Kinds] = {}
    for score in scores:
        if score.is_headline and score.has_prompts and score.numbers:
            kinds.setdefault(score.benchmark, {})[score.dtype] = score
    several = [by_dtype for by_dtype in kinds.values() if len(by_dtype) > 1]
    names = {dtype for by_dtype in several for dtype in by_dtype}
    hues = {name: hue for name, hue in hues_of([*DTYPES, *sorted(names - {*DTYPES})]).items() if name in names}
    parts = [_overall([by_dtype for by_dtype in several if len(by_dtype) == len(names)], hues)]
    if len(several) > MANY:
        groups = groups_of(next(iter(by_dtype.values())) for by_dtype in several)
        figures = [
            _figure(name, mean_points([kinds[score.benchmark] for score in group]), _y_label(group), hues)
            for name, group in groups.items()
        ]
    else:
        figures = [_figure(s[0].benchmark, mean_points([b]), s[0].metric, hues) for b in several if (s := list(b.values()))]
    parts += [f'<div class="charts">{"".join(figures)}</div>']
    legend = legend_of(hues, (("nothing is both smaller and better", "front"),)) if several else ""
    told = [score for score in stored if score.numbers or score.benchmark in kinds]
    table = folded(f"All values in other dtypes ({len(told)})", table_of(told, prefixes_of(told))) if told else ""
    return (
        '<section id="bytes"><h2>Quality against bytes</h2><p class="note">What a stored candidate vector takes, and what it '
        "scores; a line is a dtype, its points are prefixes. Large points are the ones to choose from: nothing stored "
        f"in as few bytes scores more. The others are pale.</p>{legend}{''.join(parts)}{table}</section>"
    )


def mean_points(benchmarks: Sequence[Mapping[str, Score]]) -> list[Point]:
    """Means over benchmarks of every dtype and prefix that all of them have, with known bytes."""
    first, points = benchmarks[0], []
    for dtype, score in first.items():
        for prefix, number in sorted(score.numbers.items()):
            found = [by_dtype[dtype].numbers.get(prefix) if dtype in by_dtype else None for by_dtype in benchmarks]
            values = [number.value for number in found if number is not None]
            if number.num_bytes is not None and len(values) == len(benchmarks):
                points.append(Point(number.num_bytes, fmean(values), dtype, prefix))
    return points


def front_of(points: Iterable[Point]) -> list[Point]:
    """The points that none beats: no other has at most as many bytes and at least the value; ascending (Pareto front)."""
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (point.num_bytes, -point.value)):
        if not front or point.value > front[-1].value:
            front.append(point)
    return front


def _overall(benchmarks: list[Kinds], hues: dict[str, float]) -> str:
    found = [by_dtype for by_dtype in benchmarks if _is_retrieval(next(iter(by_dtype.values())).metric)]
    points = mean_points(found) if found else []
    if not points:
        return ""
    front = front_of(points)
    best, largest = front[-1].value, max(point.num_bytes for point in points)
    rows = "".join(
        f'<tr><th scope="row"><span class="run" style="--hue: {hues[p.dtype]:g}">●</span> {escape(p.dtype)}</th>'
        f"<td>{p.prefix}</td><td>{p.num_bytes:,}</td><td>{largest / p.num_bytes:,.4g}×</td><td>{p.value:.3f}</td>"
        f"<td>{_percent(p.value, best)}</td></tr>"
        for p in reversed(front)
    )
    head = "".join(f'<th scope="col">{name}</th>' for name in ("dtype", "prefix", "bytes", "smaller", "mean", "of the best"))
    number = f"mean of {len(found)} retrieval benchmark{'s' * (len(found) > 1)}"
    return (
        f'<p>{_told(front, best)}</p><div class="beside"><figure><figcaption><b>{number}</b></figcaption>'
        f'{_chart(points, "mean", hues, LARGE)}</figure><div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div></div>"
    )


def _is_retrieval(metric: str) -> bool:
    return "@" in metric or "_at_" in metric


def _percent(value: float, best: float) -> str:
    return f"{value / best:.1%}" if best > 0 else ""


def _told(front: list[Point], best: float) -> str:
    """The sentence a reader came for: how few bytes keep nearly all of the best mean."""
    cheapest = {share: next(point for point in front if point.value >= share * best) for share in KEPT} if best > 0 else {}
    told = [
        f"{_percent(point.value, best)} of it takes {point.num_bytes:,} bytes ({escape(point.dtype)}, prefix {point.prefix})"
        for point in dict.fromkeys(cheapest.values())
        if point != front[-1]
    ]
    top = front[-1]
    head = f"The best mean, {best:.3f}, takes {top.num_bytes:,} bytes a vector ({escape(top.dtype)}, prefix {top.prefix})"
    return f"{'; '.join([head, *told])}."


def _y_label(group: list[Score]) -> str:
    return group[0].metric if len(group) == 1 else f"mean of {len(group)}"


def _figure(name: str, points: list[Point], y_label: str, hues: dict[str, float]) -> str:
    chart = _chart(points, y_label, hues, SMALL) if points else '<p class="note">nothing that all of them have</p>'
    return f"<figure><figcaption><b>{escape(name)}</b></figcaption>{chart}</figure>"


def _chart(points: list[Point], y_label: str, hues: dict[str, float], size: tuple[int, int]) -> str:
    front = front_of(points)
    sizes = [point.num_bytes for point in points]
    powers = [2**n for n in range(min(sizes).bit_length() - 1, max(sizes).bit_length() + 1)]
    ticks = [power for power in powers if min(sizes) <= power <= max(sizes)] or [min(sizes)]
    x_axis = logarithmic("bytes of a stored vector", ticks[:: 2 if len(ticks) > 6 else 1], sizes)
    y_axis = linear(y_label, (point.value for point in points))

    def draw(x_of: Place, y_of: Place) -> list[str]:
        def at(point: Point) -> tuple[float, float]:
            return x_of(point.num_bytes), y_of(point.value)

        steps = [at(front[0])]
        for point in front[1:]:
            x, y = at(point)
            steps += [(x, steps[-1][1]), (x, y)]
        parts = [f'<polyline class="front" points="{_path(steps)}"/>']
        for dtype, hue in hues.items():
            own = sorted(point for point in points if point.dtype == dtype)
            dots = "".join(_dot(*at(point), is_front=point in front) for point in own)
            parts.append(f'<g style="--hue: {hue:g}"><polyline class="line thin" points="{_path(map(at, own))}"/>{dots}</g>')
        return parts + _labels([(*at(p), str(p.prefix)) for p in reversed(front)], [at(p) for p in points], size[0])

    return framed(x_axis, y_axis, draw, size=size, look="large" if size == LARGE else "")


def _path(places: Iterable[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)


def _dot(x: float, y: float, *, is_front: bool) -> str:
    look = 'r="4"' if is_front else 'r="2.6" class="pale"'
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" {look}/>'


def _labels(wanted: list[tuple[float, float, str]], dots: list[tuple[float, float]], width: int) -> list[str]:
    """Labels above or beside their points, where they cover neither each other nor points; what fits nowhere is left out."""
    boxes = [(x - 4, y - 4, x + 4, y + 4) for x, y in dots] + [(0, 0, 110, 14)]  # the axis has its name there
    parts = []
    for x, y, text in wanted:
        half = LETTER_WIDTH * len(text) / 2
        for middle, base in ((x, y - 8), (x - half - 4, y - 6), (x + half + 4, y + 14), (x, y + 17)):
            box = (middle - half, base - LETTER_HEIGHT + 3, middle + half, base + 1)
            if box[1] >= 0 and box[2] <= width and not any(_overlap(box, other) for other in boxes):
                boxes.append(box)
                parts.append(f'<text class="value" x="{middle:.1f}" y="{base:.1f}" text-anchor="middle">{escape(text)}</text>')
                break
    return parts


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
