"""Cosines of a direction with sums of vectors: against sums made one by one."""

from __future__ import annotations

import numpy as np
import pytest

from rose_ray.errors import NumericsError, ShapeError
from rose_ray.kernels.alignment import cosines_between_halves, cosines_with_sums, half_weights, resampled_weights

FLOAT64 = 1e-12
"""Some hundred products of numbers of about 1."""


def cosine(x: np.ndarray, y: np.ndarray) -> float:
    return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))


def test_cosines_with_sums_are_those_of_the_sums() -> None:
    random = np.random.default_rng(0)
    direction_D, terms_HD = random.normal(size=12), random.normal(size=(7, 12))
    weights_RH = resampled_weights(7, 20, random)
    assert weights_RH.shape == (20, 7) and (weights_RH.sum(1) == 7).all() and weights_RH.max() > 1
    found = cosines_with_sums(direction_D, terms_HD, weights_RH)
    wanted = [cosine(direction_D, sum(w * t for w, t in zip(row, terms_HD, strict=True))) for row in weights_RH]
    np.testing.assert_allclose(found, wanted, atol=FLOAT64)


@pytest.mark.parametrize("size", [2, 5, 8])
def test_halves_are_halves(size: int) -> None:
    random = np.random.default_rng(0)
    terms_HD = random.normal(size=(size, 12))
    first_RH = half_weights(size, 30, random)
    assert (first_RH.sum(1) == size // 2).all() and (first_RH.sum(0) > 0).all()
    found = cosines_between_halves(terms_HD, first_RH)
    wanted = [cosine(terms_HD[row > 0].sum(0), terms_HD[row == 0].sum(0)) for row in first_RH]
    np.testing.assert_allclose(found, wanted, atol=FLOAT64)


def test_by_hand() -> None:
    terms_HD = np.array([[1.0, 0.0], [0.0, 1.0]])
    found = cosines_with_sums(np.array([3.0, 0.0]), terms_HD, np.array([[1.0, 1.0], [2.0, 0.0], [0.0, 2.0]]))
    np.testing.assert_allclose(found, [0.5**0.5, 1.0, 0.0], atol=FLOAT64)


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(NumericsError, match="cancel each other"):
        cosines_with_sums(np.ones(2), np.array([[1.0, 0.0], [-1.0, 0.0]]), np.ones((1, 2)))
    with pytest.raises(ShapeError, match="do not fit"):
        cosines_with_sums(np.ones(3), np.ones((2, 2)), np.ones((1, 2)))
