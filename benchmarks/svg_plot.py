"""Line charts as SVG, for documents: axes, ticks, log scales, a legend beside the lines. Readable on white."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
"""Told apart by most eyes (Okabe and Ito)."""

WIDTH, HEIGHT = 760, 360
LEFT, RIGHT, TOP, BOTTOM = 70, 250, 40, 50
FONT = 'font-family="sans-serif" font-size="12"'

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Axis:
    """An axis.

    Attributes:
        label: What it shows, with its unit.
        log: Powers of ten at equal distances; values must be above 0.
        ticks: Where to write numbers; chosen where not given.
    """

    label: str
    log: bool = False
    ticks: Sequence[float] | None = None


@dataclass(frozen=True)
class _Scale:
    low: float
    high: float
    start: float
    end: float
    log: bool

    def __call__(self, value: float) -> float:
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def line_chart(title: str, series: Mapping[str, Points], x_axis: Axis, y_axis: Axis) -> str:
    """Return an SVG with one line a series.

    Args:
        title: Above the lines.
        series: Points by name, in order of x.
        x_axis, y_axis: Labels and scales; ranges are those of points and ticks.

    Raises:
        ValueError: There is no point, or a log scale meets a value that is not above 0.
    """
    x_ticks = _ticks([x for points in series.values() for x, _ in points], x_axis)
    y_ticks = _ticks([y for points in series.values() for _, y in points], y_axis)
    x = _Scale(x_ticks[0], x_ticks[-1], LEFT, WIDTH - RIGHT, x_axis.log)
    y = _Scale(y_ticks[0], y_ticks[-1], HEIGHT - BOTTOM, TOP, y_axis.log)
    middle_x, middle_y = (LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" {FONT}>',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{LEFT}" y="{TOP - 16}" font-size="14">{escape(title)}</text>',
        f'<text x="{middle_x}" y="{HEIGHT - 12}" text-anchor="middle">{escape(x_axis.label)}</text>',
        f'<text transform="translate(16 {middle_y}) rotate(-90)" text-anchor="middle">{escape(y_axis.label)}</text>',
        *(_grid(x(tick), HEIGHT - BOTTOM, x(tick), TOP) for tick in x_ticks),
        *(_grid(LEFT, y(tick), WIDTH - RIGHT, y(tick)) for tick in y_ticks),
        *(_text(x(tick), HEIGHT - BOTTOM + 16, _number(tick), "middle") for tick in x_ticks),
        *(_text(LEFT - 6, y(tick) + 4, _number(tick), "end") for tick in y_ticks),
    ]
    for place, (name, points) in enumerate(series.items()):
        colour = COLOURS[place % len(COLOURS)]
        path = " ".join(f"{x(px):.1f},{y(py):.1f}" for px, py in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x(px):.1f}" cy="{y(py):.1f}" r="2.5" fill="{colour}"/>' for px, py in points]
        line_y = TOP + 8 + 18 * place
        start = WIDTH - RIGHT + 12
        parts.append(f'<path d="M{start} {line_y}h18" stroke="{colour}" stroke-width="2"/>')
        parts.append(_text(start + 24, line_y + 4, name, "start"))
    return "\n".join([*parts, "</svg>", ""])


def write_chart(path: Path, chart: str) -> None:
    """Write what `line_chart` returned."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(chart, encoding="utf-8")


def _ticks(values: Sequence[float], axis: Axis) -> list[float]:
    if not values or (axis.log and min(values) <= 0):
        raise ValueError(f"axis {axis.label!r} has values {sorted(values)[:3]}; a log scale needs some above 0")
    if axis.ticks is not None:
        return list(axis.ticks)
    low, high = min(values), max(values)
    if axis.log:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        return [10.0**power for power in range(first, max(last, first + 1) + 1)]
    low = min(0.0, low)
    rough = (high - low or 1.0) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    return [step * number for number in range(math.floor(low / step), math.ceil(high / step) + 1)]


def _grid(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#dddddd"/>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 or value == int(value) else f"{value:g}"
