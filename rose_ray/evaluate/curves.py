"""Curves of a measure over the budget, as SVG that any browser shows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape

from rose_ray.evaluate.results import Number
from rose_ray.evaluate.table import budget_text

_WIDTH, _HEIGHT = 760, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 190, 40, 50
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_NUM_TICKS = 5


def curves_svg(numbers: Sequence[Number], benchmark: str, measure: str) -> str:
    """Draw one measure on one benchmark: a line an arm over the budget's logarithm, intervals as bars, knees ringed.

    Rows without a budget (the untrained model, controls) are dashed lines across. What is missing is left out.

    Args:
        numbers: From `table_numbers`.
        benchmark, measure: Which of them.

    Returns:
        The SVG, or an empty text where fewer than two budgets have a number.
    """
    own = [n for n in numbers if (n.benchmark, n.measure) == (benchmark, measure) and n.estimate is not None]
    budgets = sorted({n.budget for n in own if n.budget is not None})
    if len(budgets) < 2:
        return ""
    plot = _Plot(budgets, [value for number in own for value in _ends(number)])
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        f'<text x="{_LEFT}" y="22" font-size="14">{escape(benchmark)}: {escape(measure)}</text>',
        *plot.axes(),
    ]
    arms = list(dict.fromkeys(number.arm for number in own))
    for place, arm in enumerate(arms):
        colour = _COLOURS[place % len(_COLOURS)]
        points = sorted((n for n in own if n.arm == arm), key=lambda n: n.budget or 0.0)
        lines += plot.curve(points, colour) if points[0].budget is not None else plot.level(points[0], colour)
        height = _TOP + 18 * place + 8
        lines.append(f'<text x="{_WIDTH - _RIGHT + 14}" y="{height}" fill="{colour}">{escape(arm)}</text>')
    return "\n".join([*lines, "</svg>"]) + "\n"


def _ends(number: Number) -> Iterator[float]:
    assert number.estimate is not None
    yield from (v for v in (number.estimate.low, number.estimate.value, number.estimate.high) if v is not None)


class _Plot:
    def __init__(self, budgets: Sequence[float], values: Sequence[float]) -> None:
        self.budgets = budgets
        low, high = min(values), max(values)
        room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
        self.low, self.high = low - room, high + room

    def x(self, budget: float) -> float:
        """Place of a budget."""
        first, last = math.log(self.budgets[0]), math.log(self.budgets[-1])
        share = (math.log(budget) - first) / (last - first)
        return round(_LEFT + share * (_WIDTH - _LEFT - _RIGHT), 2)

    def y(self, value: float) -> float:
        """Place of a value."""
        share = (value - self.low) / (self.high - self.low)
        return round(_HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM), 2)

    def axes(self) -> Iterator[str]:
        """Frame, ticks and names."""
        right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
        yield f'<path d="M{_LEFT} {_TOP}V{bottom}H{right}" fill="none" stroke="#444"/>'
        for budget in self.budgets:
            yield f'<text x="{self.x(budget)}" y="{bottom + 18}" text-anchor="middle">{budget_text(budget)}</text>'
        for tick in range(_NUM_TICKS):
            value = self.low + (self.high - self.low) * tick / (_NUM_TICKS - 1)
            height = self.y(value)
            yield f'<path d="M{_LEFT} {height}H{right}" stroke="#ddd"/>'
            yield f'<text x="{_LEFT - 8}" y="{height + 4}" text-anchor="end">{value:.4g}</text>'
        yield f'<text x="{(_LEFT + right) / 2}" y="{_HEIGHT - 10}" text-anchor="middle">share of the pool</text>'

    def curve(self, points: Sequence[Number], colour: str) -> Iterator[str]:
        """One arm."""
        places = [(self.x(n.budget or 0.0), self.y(n.estimate.value)) for n in points if n.estimate is not None]
        joined = " ".join(f"{x},{y}" for x, y in places)
        yield f'<polyline points="{joined}" fill="none" stroke="{colour}" stroke-width="2"/>'
        for number, (x, y) in zip(points, places, strict=True):
            estimate = number.estimate
            if estimate is not None and estimate.low is not None and estimate.high is not None:
                yield f'<path d="M{x} {self.y(estimate.low)}V{self.y(estimate.high)}" stroke="{colour}"/>'
            yield f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>'
            if number.is_knee:
                yield f'<circle class="knee" cx="{x}" cy="{y}" r="8" fill="none" stroke="{colour}" stroke-width="2"/>'

    def level(self, number: Number, colour: str) -> Iterator[str]:
        """A row without a budget."""
        assert number.estimate is not None
        height = self.y(number.estimate.value)
        yield f'<path d="M{_LEFT} {height}H{_WIDTH - _RIGHT}" stroke="{colour}" stroke-dasharray="6 4"/>'
