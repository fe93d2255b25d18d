"""Curves as inline SVG: no script, colours from the page's variables, a tooltip at every point."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup, escape

WIDTH, HEIGHT = 460, 200
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 8, 24
MAX_POINTS = 400
"""Points of one line; more are averaged."""
NUM_TICKS = 4
Point = tuple[float, float]


class Series(NamedTuple):
    name: str
    points: Sequence[Point]
    is_dotted: bool = False
    """Single points, joined by a thin line."""


def draw(series: Sequence[Series], is_share: bool = False) -> Markup:
    """Draws lines over steps; `is_share`: on an axis from 0 to 1. Values that are not finite are omitted."""
    finite = [[point for point in one.points if all(map(math.isfinite, point))] for one in series]
    shown = [one._replace(points=downsample(points)) for one, points in zip(series, finite, strict=True)]
    points = [point for one in shown for point in one.points]
    if not points:
        return Markup('<p class="none">nothing was measured</p>')
    low_x, high_x = min(x for x, _ in points), max(x for x, _ in points)
    ticks = ticks_between(*((0.0, 1.0) if is_share else (min(y for _, y in points), max(y for _, y in points))))
    low_y, high_y = min(ticks), max(ticks)

    def place(point: Point) -> tuple[str, str]:
        x = LEFT + (WIDTH - LEFT - RIGHT) * (point[0] - low_x) / ((high_x - low_x) or 1)
        y = TOP + (HEIGHT - TOP - BOTTOM) * (high_y - min(max(point[1], low_y), high_y)) / ((high_y - low_y) or 1)
        return f"{x:.1f}", f"{y:.1f}"

    parts = [Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">').format(WIDTH, HEIGHT, _names(shown))]
    for tick in ticks:
        y = place((low_x, tick))[1]
        parts.append(Markup('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(LEFT, WIDTH - RIGHT, y, y))
        parts.append(
            Markup('<text x="{}" y="{}" dy="4" text-anchor="end">{}</text>').format(LEFT - 6, y, format_number(tick))
        )
    for x, anchor in ((low_x, "start"), (high_x, "end")):
        text = Markup('<text x="{}" y="{}" text-anchor="{}">{:g}</text>')
        parts.append(text.format(place((x, low_y))[0], HEIGHT - 6, anchor, x))
    for index, one in enumerate(shown):
        parts.append(_line(one, index, [place(point) for point in one.points]))
    return Markup("").join([*parts, Markup("</svg>")])


def _line(series: Series, index: int, places: Sequence[tuple[str, str]]) -> Markup:
    path = " ".join(",".join(place) for place in places)
    style = "thin" if series.is_dotted else "line"
    parts = [Markup('<polyline class="{} s{}" points="{}"/>').format(style, index, path)]
    for (x, y), (step, value) in zip(places, series.points, strict=True):
        radius, title = 3.2 if series.is_dotted else 2.2, f"step {step:g}: {series.name} {value:.4g}"
        point = Markup('<circle class="{} s{}" cx="{}" cy="{}" r="{}"><title>{}</title></circle>')
        parts.append(point.format("dot" if series.is_dotted else "near", index, x, y, radius, title))
    return Markup("").join(parts)


def downsample(points: Sequence[Point]) -> list[Point]:
    """At most `MAX_POINTS` points: means of equally many neighbours."""
    size = math.ceil(len(points) / MAX_POINTS) or 1
    parts = [points[first : first + size] for first in range(0, len(points), size)]
    return [(part[-1][0], sum(y for _, y in part) / len(part)) for part in parts]


def ticks_between(low: float, high: float) -> list[float]:
    """Round numbers that enclose the range."""
    span = (high - low) or abs(high) or 1.0
    size = 10 ** math.floor(math.log10(span / NUM_TICKS))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if span / (size * factor) <= NUM_TICKS)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, max(last, first + 1) + 1)]


def format_number(value: float) -> str:
    if value and abs(value) < 1e-3:
        return f"{value:.2g}".replace("e-0", "e-")
    return f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:g}"


def _names(series: Sequence[Series]) -> Markup:
    return escape(", ".join(one.name for one in series))
