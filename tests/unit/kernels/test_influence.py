"""Influence and checkpoint weights against loops."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import rose_ray.kernels.feature_matrix as feature_matrix
from rose_ray.errors import NonFiniteError, NumericsError, ShapeError
from rose_ray.kernels.influence import checkpoint_weights, influence

FLOAT64_ROUNDING = 1e-12  # inner products of 300 numbers of order 1, in another order


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_influence_equals_exact_sums(dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_matrix, "BLOCK_ROWS", 4)
    monkeypatch.setattr(feature_matrix, "BLOCK_FEATURES", 64)
    random = np.random.default_rng(0)
    features = random.standard_normal((11, 300)).astype(dtype)
    directions = random.standard_normal((3, 300)).astype(np.float32)
    ours = influence(features, directions)
    assert ours.dtype == np.float64 and ours.shape == (11, 3)
    for row in range(11):
        for column in range(3):
            products = (float(a) * float(b) for a, b in zip(features[row], directions[column], strict=True))
            assert ours[row, column] == pytest.approx(math.fsum(products), abs=FLOAT64_ROUNDING)


def test_large_numbers_that_cancel_do_not_drown_small_ones() -> None:
    features = np.array([[1e8, 1.0, -1e8]], dtype=np.float32)
    assert influence(features, np.ones((1, 3), dtype=np.float32)).item() == 1.0


def test_equal_rows_get_equal_influence_wherever_they_stand() -> None:
    random = np.random.default_rng(1)
    features = random.standard_normal((37, 64)).astype(np.float32)
    features[[5, 36]] = features[0]
    directions = random.standard_normal((5, 64)).astype(np.float32)
    whole = influence(features, directions).astype(np.float32)
    for row in (5, 36):
        assert np.array_equal(whole[row], whole[0])
    alone = influence(features[:1], directions).astype(np.float32)
    assert np.array_equal(alone[0], whole[0])


def test_influence_of_nothing_is_empty() -> None:
    assert influence(np.zeros((0, 4), dtype=np.float32), np.zeros((2, 4))).shape == (0, 2)


def test_influence_checks_its_input() -> None:
    with pytest.raises(ShapeError, match="one D"):
        influence(np.zeros((2, 4)), np.zeros((2, 5)))
    with pytest.raises(NumericsError, match="features are int8"):
        influence(np.zeros((2, 4), dtype=np.int8), np.zeros((2, 4)))
    spoilt = np.zeros((3, 4))
    spoilt[1, 2] = np.nan
    with pytest.raises(NonFiniteError, match=r"1 rows \(first \[1\]\) and 2 directions"):
        influence(spoilt, np.ones((2, 4)))


def test_checkpoint_weights_by_hand() -> None:
    np.testing.assert_allclose(checkpoint_weights([3e-5, 1e-5]), [0.75, 0.25], rtol=FLOAT64_ROUNDING)
    assert checkpoint_weights([2e-5]).tolist() == [1.0]
    assert checkpoint_weights([1.0, 0.0]).tolist() == [1.0, 0.0]
    for rates in ([1e-320, 1e-320], [1e308, 1e308], [1e-5, 7e-6, 4e-6, 1e-6]):
        assert float(checkpoint_weights(rates).sum()) == pytest.approx(1.0, abs=FLOAT64_ROUNDING)


@pytest.mark.parametrize("rates", [[], [0.0, 0.0], [1e-5, -1e-6], [1e-5, math.nan], [math.inf]])
def test_useless_learning_rates_are_refused(rates: list[float]) -> None:
    with pytest.raises(NumericsError, match="mean learning rates"):
        checkpoint_weights(rates)
