"""Scores of both orders, and length control against a slow search."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from rose_ray.errors import NumericsError, ShapeError
from rose_ray.kernels.win_rate import (
    LENGTH_PENALTY,
    both_orders_score,
    length_controlled_win_rate,
    outcome,
    position_bias,
)


def test_both_orders() -> None:
    table = {
        ("first", "second"): 1.0,
        ("first", "first"): 0.5,
        ("second", "second"): 0.5,
        ("second", "first"): 0.0,
        ("tie", "tie"): 0.5,
        ("first", "tie"): 0.75,
        ("tie", "second"): 0.75,
        ("tie", "first"): 0.25,
        ("second", "tie"): 0.25,
    }
    for (ours_first, ours_second), score in table.items():
        assert both_orders_score(ours_first, ours_second) == score  # type: ignore[arg-type]
    assert [outcome(score) for score in (0.75, 0.5, 0.25)] == ["win", "tie", "loss"]


def test_position_bias_is_following_a_place() -> None:
    assert position_bias(["first", "first", "second", "tie"], ["first", "second", "second", "tie"]) == 0.5
    assert position_bias([], []) == 0.0


def _slow_rate(scores: list[float], differences: list[float]) -> float:
    """Search a grid around the best point so far, ever finer."""
    deviation = float(np.std(differences))
    terms = [math.tanh(each / deviation) for each in differences]

    def loss(a: float, b: float) -> float:
        total = sum(math.log1p(math.exp(a + b * t)) - s * (a + b * t) for s, t in zip(scores, terms, strict=True))
        return total / len(scores) + LENGTH_PENALTY * b * b / 2

    best, width = (0.0, 0.0), 4.0
    while width > 1e-9:
        steps = [-width, -width / 2, 0.0, width / 2, width]
        around = [(best[0] + da, best[1] + db) for da, db in itertools.product(steps, steps)]
        better = min(around, key=lambda point: loss(*point))
        width = width if better != best and loss(*better) < loss(*best) else width / 2
        best = better
    return 1 / (1 + math.exp(-best[0]))


def test_length_control_equals_a_slow_search() -> None:
    random = np.random.default_rng(0)
    differences = random.normal(5, 20, 40)
    scores = random.choice([0.0, 0.25, 0.5, 0.75, 1.0], 40)
    scores[differences > 10] = 1.0
    # the search stops at steps of 1e-9, where the loss is flat to rounding some 1e-8 around
    assert length_controlled_win_rate(scores, differences) == pytest.approx(
        _slow_rate(scores.tolist(), differences.tolist()), abs=1e-6
    )


def test_a_judge_of_length_alone_gives_one_half() -> None:
    differences = np.array([-3.0, -2, -1, 1, 2, 3])
    scores = (differences > 0).astype(float)
    # symmetric data: the intercept is 0 in exact arithmetic
    assert length_controlled_win_rate(scores, differences) == pytest.approx(0.5, abs=1e-9)
    longer = np.array([1.0, 1, 1, 1, 1, -1])
    wins = (longer > 0).astype(float)
    assert wins.mean() > 0.8 and length_controlled_win_rate(wins, longer) < 0.75


def test_edges() -> None:
    assert length_controlled_win_rate(np.ones(3), np.array([1.0, 2, 3])) == 1.0
    assert length_controlled_win_rate(np.zeros(3), np.array([1.0, 2, 3])) == 0.0
    assert length_controlled_win_rate(np.array([1.0, 0.0, 1.0, 1.0]), np.zeros(4)) == 0.75
    with pytest.raises(NumericsError, match=r"\[0, 1\]"):
        length_controlled_win_rate(np.array([2.0]), np.array([1.0]))
    with pytest.raises(ShapeError):
        length_controlled_win_rate(np.array([]), np.array([]))
