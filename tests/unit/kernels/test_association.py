"""Kendall, partial correlation and kappa against loops and textbook numbers."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from rose_ray.errors import NonFiniteError, ShapeError
from rose_ray.kernels.association import cohen_kappa, kendall, partial_spearman
from rose_ray.kernels.correlation import average_ranks, pearson

FLOAT64_ROUNDING = 1e-12


def _slow_kendall(x: list[float], y: list[float]) -> float:
    concordant = discordant = only_x = only_y = 0
    for (a, b), (c, d) in itertools.combinations(zip(x, y, strict=True), 2):
        if a == c and b == d:
            continue
        if a == c:
            only_x += 1
        elif b == d:
            only_y += 1
        elif (a < c) == (b < d):
            concordant += 1
        else:
            discordant += 1
    both = concordant + discordant
    return (concordant - discordant) / math.sqrt((both + only_x) * (both + only_y))


@pytest.mark.parametrize("levels", [3, 8, 10**9])
def test_kendall_equals_its_definition(levels: int) -> None:
    random = np.random.default_rng(levels)
    x = random.integers(0, levels, 40).astype(float)
    y = x + random.integers(0, levels, 40)
    assert kendall(x, y) == pytest.approx(_slow_kendall(x.tolist(), y.tolist()), abs=FLOAT64_ROUNDING)


def test_kendall_by_hand() -> None:
    # (1, 2, 3) against (1, 3, 2): two pairs agree, one does not
    assert kendall(np.array([1, 2, 3]), np.array([1, 3, 2])) == pytest.approx(1 / 3, abs=FLOAT64_ROUNDING)
    assert kendall(np.array([1, 2, 3]), np.ones(3)) is None
    with pytest.raises(ShapeError):
        kendall(np.ones(2), np.ones(3))
    with pytest.raises(NonFiniteError):
        kendall(np.array([1.0, np.inf]), np.ones(2))


def test_partial_correlation_is_that_of_residuals() -> None:
    random = np.random.default_rng(0)
    z = random.normal(size=60)
    x, y = z + random.normal(size=60), z + random.normal(size=60)
    ranks = [average_ranks(each) for each in (x, y, z)]
    residuals = [each - np.polyval(np.polyfit(ranks[2], each, 1), ranks[2]) for each in ranks[:2]]
    # polyfit solves by SVD on columns of order 60, hence less exact than sums
    assert partial_spearman(x, y, z) == pytest.approx(pearson(*residuals), abs=1e-9)


def test_partial_correlation_where_nothing_is_left() -> None:
    x, y = np.arange(5.0), np.array([2.0, 1, 3, 5, 4])
    assert partial_spearman(x, y, x) is None
    assert partial_spearman(x, np.ones(5), y) is None


def test_kappa_by_hand() -> None:
    # 50 grants judged by two readers: both yes 20, both no 15, yes/no 5, no/yes 10: p_o 0.7, p_e 0.5
    first = ["yes"] * 25 + ["no"] * 25
    second = ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15
    assert cohen_kappa(first, second) == pytest.approx(0.4, abs=FLOAT64_ROUNDING)
    assert cohen_kappa(first, first) == 1.0
    assert cohen_kappa(["a", "b"], ["b", "a"]) == pytest.approx(-1.0, abs=FLOAT64_ROUNDING)
    assert cohen_kappa(["a", "a"], ["a", "a"]) is None
    with pytest.raises(ShapeError):
        cohen_kappa([], [])
