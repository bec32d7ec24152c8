"""Ratios, drops and rises by hand."""

from __future__ import annotations

import numpy as np
import pytest

from rose_ray.errors import ShapeError
from rose_ray.kernels.loss_scores import ifd_ratio, loss_drop, rises


def test_difficulty_is_loss_with_the_prompt_over_loss_without() -> None:
    found = ifd_ratio(np.array([1.0, 3.0, 0.0, 1.0]), np.array([4.0, 2.0, 0.0, 0.0]))
    assert found[:2].tolist() == [0.25, 1.5] and np.isnan(found[2]) and np.isinf(found[3])


def test_a_drop_is_a_share_of_the_first_loss() -> None:
    found = loss_drop(np.array([4.0, 2.0, 0.0]), np.array([1.0, 3.0, 0.0]))
    assert found[:2].tolist() == [0.75, -0.5] and np.isnan(found[2])


def test_an_anchor_that_stays_equal_has_not_risen() -> None:
    nan = float("nan")
    found = rises(np.array([[-1.0, -2.0, -3.0], [-1.5, nan, -9.0]]), np.array([-1.5, -2.0, -4.0]))
    np.testing.assert_array_equal(found, [[1, 0, 1], [0, nan, 0]])


def test_shapes_must_fit() -> None:
    for score in (ifd_ratio, loss_drop):
        with pytest.raises(ShapeError, match=r"expected \[N\] twice"):
            score(np.zeros(2), np.zeros(3))
    with pytest.raises(ShapeError, match=r"expected \[N, A\] and \[A\]"):
        rises(np.zeros((2, 3)), np.zeros(2))
