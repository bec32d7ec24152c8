"""The knee of curves whose knee is plain to see."""

from __future__ import annotations

import pytest

from rose_ray.errors import ShapeError
from rose_ray.kernels.knee import knee


def test_by_hand() -> None:
    # On a log axis the budgets lie at 0, 1/3, 2/3, 1; the values rise 0, 0.8, 0.9, 1: above the chord by 0.47 and 0.23.
    assert knee([1, 10, 100, 1000], [0, 8, 9, 10]) == 1
    assert knee([1, 10, 100, 1000], [5, 4.2, 4.1, 4], higher_is_better=False) == 1


def test_what_falls_behind_the_best_is_left_out() -> None:
    assert knee([1, 10, 100, 1000], [0, 8, 10, 3]) == 1


def test_no_knee() -> None:
    assert knee([1, 10, 100], [0, 1, 2]) is None  # on the chord
    assert knee([1, 10, 100], [0, 0, 2]) is None  # below it
    assert knee([1, 10, 100], [2, 1, 0]) is None  # the smallest budget is best
    assert knee([1, 10], [0, 1]) is None
    assert knee([], []) is None


def test_refusals() -> None:
    with pytest.raises(ShapeError, match="rising"):
        knee([1, 1], [0, 1])
    with pytest.raises(ShapeError):
        knee([1, 2], [0])
