"""Draw the charts of an adapter's page as SVG. Colours come from the page's style sheet, so that they follow its theme."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element

from perennial.streams.cli.adapter_page.page_elements import element

WIDTH, HEIGHT = 880, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 14, 22, 38
_MAX_TICKS = 6
SERIES_COLOURS = 8
"""Number of classes `s0` … of the style sheet."""


@dataclass(frozen=True)
class Point:
    """A point of a chart.

    Attributes:
        x: Sequence number of the version.
        y: Value.
        label: Shown when the pointer rests on it.
        series: Number of its colour; None: the colour of the text.
        refused: Draw a cross instead of a dot.
        start: Value where a line to the point begins; None: no line.
    """

    x: int
    y: float
    label: str
    series: int | None = None
    refused: bool = False
    start: float | None = None


def dot_chart(
    points: Sequence[Point], *, title: str, unit: str, marks: Sequence[tuple[int, str]] = (),
    limits: Sequence[tuple[float, str, str]] = (), joined: bool = False,
) -> Element:  # fmt: skip
    """Return a chart of points over versions.

    Args:
        points: At least one point.
        title: What it shows, for readers who cannot see it.
        unit: Title of the vertical axis.
        marks: Versions at which a vertical line stands, and what it says.
        limits: Values at which a horizontal line stands, what it says, and its class: `limit` or `ground`.
        joined: Join the points of one series that are not refused.
    """
    values = [value for p in points for value in (p.y, p.start) if value is not None] + [
        value for value, _, _ in limits
    ]
    scale = _Scale.over([point.x for point in points] + [x for x, _ in marks], values)
    parts: list[Element] = [*_axes(scale, unit)]
    for x, label in marks:
        line = element("line", element("title", label), class_="mark", **_vertical(scale.x(x)))
        parts.append(line)
    for value, label, kind in limits:
        y = f"{scale.y(value):.1f}"
        parts += [
            element("line", element("title", label), class_=kind, x1=_LEFT, x2=WIDTH - _RIGHT, y1=y, y2=y),
            element("text", label, class_="tick end", x=WIDTH - _RIGHT, y=f"{scale.y(value) - 5:.1f}"),
        ]
    if joined:
        kept = [point for point in points if not point.refused]
        path = " ".join(f"{scale.x(point.x):.1f},{scale.y(point.y):.1f}" for point in kept)
        parts.append(element("polyline", class_="joined", points=path))
    parts += [_drawn(point, scale) for point in points]
    return element(
        "svg", element("title", title), parts, class_="chart", viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img",
        preserveAspectRatio="xMidYMid meet",
    )  # fmt: skip


def _drawn(point: Point, scale: _Scale) -> Element:
    x, y = scale.x(point.x), scale.y(point.y)
    colour = "plain" if point.series is None else f"s{point.series % SERIES_COLOURS}"
    parts = [element("title", point.label)]
    if point.start is not None:
        start = scale.y(point.start)
        parts += [
            element("line", class_="fall", x1=f"{x:.1f}", x2=f"{x:.1f}", y1=f"{start:.1f}", y2=f"{y:.1f}"),
            element("circle", class_="hollow", cx=f"{x:.1f}", cy=f"{start:.1f}", r=3),
        ]
    if point.refused:
        cross = f"M{x - 4:.1f} {y - 4:.1f}L{x + 4:.1f} {y + 4:.1f}M{x + 4:.1f} {y - 4:.1f}L{x - 4:.1f} {y + 4:.1f}"
        parts.append(element("path", class_="cross", d=cross))
    else:
        parts.append(element("circle", class_="dot", cx=f"{x:.1f}", cy=f"{y:.1f}", r=4))
    return element("g", parts, class_=colour)


@dataclass(frozen=True)
class _Scale:
    first: int
    last: int
    low: float
    high: float

    @classmethod
    def over(cls, xs: Sequence[int], values: Sequence[float]) -> _Scale:
        low, high = min(values), max(values)
        room = (high - low) * 0.08 or max(abs(high) * 0.05, 0.01)
        return cls(min(xs), max(xs), low - room, high + room)

    def x(self, seq: int) -> float:
        inner = WIDTH - _LEFT - _RIGHT
        if self.last == self.first:
            return _LEFT + inner / 2
        return _LEFT + 8 + (inner - 16) * (seq - self.first) / (self.last - self.first)

    def y(self, value: float) -> float:
        return HEIGHT - _BOTTOM - (HEIGHT - _TOP - _BOTTOM) * (value - self.low) / (self.high - self.low)


def _axes(scale: _Scale, unit: str) -> list[Element]:
    bottom = HEIGHT - _BOTTOM
    parts = [element("text", unit, class_="axis", x=4, y=13)]
    ticks, decimals = _ticks(scale.low, scale.high)
    for value in ticks:
        y = f"{scale.y(value):.1f}"
        parts += [
            element("line", class_="grid", x1=_LEFT, x2=WIDTH - _RIGHT, y1=y, y2=y),
            element("text", f"{value:.{decimals}f}", class_="tick end", x=_LEFT - 6, y=f"{scale.y(value) + 4:.1f}"),
        ]
    for seq in _whole_ticks(scale.first, scale.last):
        parts.append(element("text", str(seq), class_="tick mid", x=f"{scale.x(seq):.1f}", y=bottom + 16))
    parts.append(element("text", "version (seq)", class_="axis mid", x=(_LEFT + WIDTH - _RIGHT) / 2, y=HEIGHT - 6))
    return parts


def _ticks(low: float, high: float) -> tuple[list[float], int]:
    """Return round values in a range, and the decimals that tell them apart."""
    raw = (high - low) / _MAX_TICKS
    power = math.floor(math.log10(raw))
    step = next(size * 10.0**power for size in (1, 2, 5, 10) if size * 10.0**power >= raw)
    first = math.ceil(low / step)
    return [number * step for number in range(first, math.floor(high / step) + 1)], max(
        0, -math.floor(math.log10(step))
    )


def _whole_ticks(first: int, last: int) -> list[int]:
    step = next(
        size * 10**power
        for power in range(20)
        for size in (1, 2, 5)
        if (last - first) / (size * 10**power) <= 2 * _MAX_TICKS
    )
    return list(range(-(-first // step) * step, last + 1, step)) or [first]


def _vertical(x: float) -> dict[str, object]:
    return {"x1": f"{x:.1f}", "x2": f"{x:.1f}", "y1": _TOP, "y2": HEIGHT - _BOTTOM}


def heat_colours(value: float, low: float, high: float) -> tuple[str, str]:
    """Return the background and the ink of a cell: the lower the value, the darker.

    Args:
        value: The cell's value.
        low: Least value of the map.
        high: Largest value of the map.
    """
    share = 0.0 if high <= low else (value - low) / (high - low)
    light, dark = (236, 243, 250), (8, 69, 148)
    mixed = [round(start + (end - start) * share) for start, end in zip(dark, light, strict=True)]
    return f"rgb({mixed[0]},{mixed[1]},{mixed[2]})", "#fff" if share < 0.55 else "#10202f"
