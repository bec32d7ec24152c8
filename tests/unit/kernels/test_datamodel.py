"""The linear datamodeling score, by hand and on a model that is linear."""

from __future__ import annotations

import numpy as np
import pytest

from rose_ray.errors import NonFiniteError, NumericsError, ShapeError
from rose_ray.kernels.datamodel import datamodel_score, subset_sums


def test_sums_of_subsets_by_hand() -> None:
    subsets = [np.array([0, 2]), np.array([1]), np.array([], int)]
    np.testing.assert_array_equal(subset_sums(np.array([1.0, 2.0, 4.0]), subsets), [5.0, 2.0, 0.0])
    both = subset_sums(np.array([[1.0, -1.0], [2.0, -2.0], [4.0, 0.0]]), subsets)
    np.testing.assert_array_equal(both, [[5.0, -1.0], [2.0, -2.0], [0.0, 0.0]])


def test_score_by_hand() -> None:
    # ranks 1 2 3 4 against 2 1 3 4: 1 - 6 x 2 / (4 x 15) = 0.8; against 4 3 2 1: -1
    measured_SQ = np.array([[2.0, 9.0], [1.0, 8.0], [3.0, 7.0], [4.0, 6.0]])
    found = datamodel_score(np.array([1.0, 2.0, 3.0, 4.0]), measured_SQ, num_resamples=50)
    np.testing.assert_allclose(found.correlations_Q, [0.8, -1.0])
    assert found.value == pytest.approx(-0.1)
    assert found.low is not None and found.high is not None and found.low <= found.value <= found.high


def test_a_linear_model_scores_one_and_noise_lowers_it() -> None:
    random = np.random.default_rng(0)
    effects_NQ = random.normal(size=(30, 3))
    subsets = [random.permutation(30)[:15] for _ in range(40)]
    sums_SQ = subset_sums(effects_NQ, subsets)
    assert datamodel_score(sums_SQ, 7 + 3 * sums_SQ, num_resamples=20).value == pytest.approx(1.0)
    noisy = datamodel_score(sums_SQ, sums_SQ + random.normal(scale=6, size=sums_SQ.shape), num_resamples=200)
    assert noisy.low is not None and noisy.high is not None
    assert 0 < noisy.value < 0.9 and noisy.low < noisy.value < noisy.high


def test_a_query_that_does_not_vary_is_left_out() -> None:
    found = datamodel_score(np.arange(3.0), np.array([[1.0, 5.0], [2.0, 5.0], [3.0, 5.0]]), num_resamples=20)
    assert found.value == pytest.approx(1.0) and np.isnan(found.correlations_Q[1])


def test_what_cannot_be_scored_is_refused() -> None:
    with pytest.raises(NumericsError, match="nothing varies"):
        datamodel_score(np.ones(3), np.arange(3.0))
    with pytest.raises(ShapeError, match="expected one shape"):
        datamodel_score(np.ones((3, 2)), np.ones((3, 3)))
    with pytest.raises(NonFiniteError, match="leave its subset out"):
        datamodel_score(np.arange(2.0), np.array([1.0, np.nan]))
    with pytest.raises(ShapeError, match="subset 0 holds a row twice"):
        subset_sums(np.ones(3), [np.array([1, 1])])
    with pytest.raises(ShapeError, match="positions outside of 0 to 2"):
        subset_sums(np.ones(3), [np.array([3])])
