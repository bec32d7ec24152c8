"""Correlations against loops and known values."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rose_ray.errors import NonFiniteError, ShapeError
from rose_ray.kernels.correlation import average_ranks, pearson, spearman

FLOAT64_ROUNDING = 1e-12  # sums over 50 numbers of order 1


def _slow_pearson(x: list[float], y: list[float]) -> float:
    mean_x, mean_y = math.fsum(x) / len(x), math.fsum(y) / len(y)
    top = math.fsum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    bottom = math.fsum((a - mean_x) ** 2 for a in x) * math.fsum((b - mean_y) ** 2 for b in y)
    return top / math.sqrt(bottom)


def _slow_ranks(values: list[float]) -> list[float]:
    """One more than the number of smaller values, and half the number of other equal ones."""
    return [
        1 + sum(other < value for other in values) + (sum(other == value for other in values) - 1) / 2
        for value in values
    ]


@pytest.mark.parametrize("levels", [3, 20, 10**9])
def test_both_equal_their_definitions(levels: int) -> None:
    random = np.random.default_rng(levels)
    x = random.integers(0, levels, 50).astype(np.float64)
    y = x + random.integers(0, levels, 50)
    assert average_ranks(x).tolist() == _slow_ranks(x.tolist())
    assert pearson(x, y) == pytest.approx(_slow_pearson(x.tolist(), y.tolist()), abs=FLOAT64_ROUNDING)
    expected = _slow_pearson(_slow_ranks(x.tolist()), _slow_ranks(y.tolist()))
    assert spearman(x, y) == pytest.approx(expected, abs=FLOAT64_ROUNDING)


def test_spearman_by_the_textbook() -> None:
    # without ties 1 - 6 sum d^2 / (n (n^2 - 1)); here d = (0, 1, -1, 0, 0)
    x, y = np.array([10, 20, 30, 40, 50]), np.array([1, 3, 2, 4, 9])
    assert spearman(x, y) == pytest.approx(1 - 6 * 2 / (5 * 24), abs=FLOAT64_ROUNDING)


def test_order_alone_counts_for_spearman() -> None:
    x = np.linspace(-3, 3, 40)
    assert spearman(x, np.exp(x)) == pytest.approx(1.0, abs=FLOAT64_ROUNDING)
    assert spearman(x, -(x**3)) == pytest.approx(-1.0, abs=FLOAT64_ROUNDING)


def test_constant_or_too_short_input_has_no_correlation() -> None:
    varying = np.array([1.0, 2.0, 3.0])
    for other in (np.full(3, 0.1), np.zeros(3)):
        assert pearson(varying, other) is None and pearson(other, varying) is None
        assert spearman(varying, other) is None and spearman(other, varying) is None
    for length in (0, 1):
        assert pearson(varying[:length], varying[:length]) is None
        assert spearman(varying[:length], varying[:length]) is None


@pytest.mark.parametrize("scale", [1e-300, 1e300])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_extreme_scales_neither_overflow_nor_vanish(scale: float, offset: float) -> None:
    x = np.array([offset, offset + 0.25, offset + 1.0]) * scale
    y = np.array([1.0, 2.0, 4.0])
    expected = _slow_pearson([0.0, 0.25, 1.0], y.tolist())
    assert pearson(x, y) == pytest.approx(expected, abs=FLOAT64_ROUNDING)


def test_input_is_checked() -> None:
    with pytest.raises(ShapeError, match="one length"):
        pearson(np.zeros(3), np.zeros(4))
    with pytest.raises(ShapeError, match="one length"):
        spearman(np.zeros((3, 1)), np.zeros((3, 1)))
    with pytest.raises(NonFiniteError, match=r"1 rows .* first \[1\]"):
        spearman(np.array([1.0, np.nan]), np.array([1.0, 2.0]))
