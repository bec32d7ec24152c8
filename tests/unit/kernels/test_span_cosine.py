"""Cosines inside the span of a few gradients, against explicit projections."""

from __future__ import annotations

import numpy as np
import pytest

from rose_ray.errors import ConfigError, NonFiniteError, ShapeError
from rose_ray.kernels.influence import influence
from rose_ray.kernels.span_cosine import gradient_subspace, span_cosines
from tests.oracles import cosine

FLOAT64 = 1e-12
"""Sums of 40 products, and an SVD of a 4 by 40 matrix of condition below 10."""

RANDOM = np.random.default_rng(0)
DIRECTIONS = RANDOM.normal(size=(4, 40))
FEATURES = RANDOM.normal(size=(25, 40))
FEATURES /= np.linalg.norm(FEATURES, axis=1, keepdims=True)


def cosines(features: np.ndarray, directions: np.ndarray, basis: np.ndarray) -> np.ndarray:
    return span_cosines(influence(features, basis), directions, basis)


def test_two_pairs_by_hand() -> None:
    directions = np.array([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
    features = np.array([[0.6, 0.0, 0.8], [0.36, 0.48, 0.8], [0.0, 0.0, 1.0], [-0.6, 0.8, 0.0]])
    found = cosines(features, directions, gradient_subspace(directions))
    # The third number lies outside the span and drops out; the third row has nothing inside.
    np.testing.assert_allclose(found, [[1, 0], [0.6, 0.8], [0, 0], [-0.6, 0.8]], rtol=0, atol=FLOAT64)


def test_with_one_pair_every_score_is_a_sign() -> None:
    found = cosines(FEATURES, DIRECTIONS[:1], gradient_subspace(DIRECTIONS[:1]))
    np.testing.assert_allclose(found[:, 0], np.sign(FEATURES @ DIRECTIONS[0]), rtol=0, atol=FLOAT64)


@pytest.mark.parametrize("rank", [None, 2, 3, 4])
def test_cosines_are_those_of_projected_vectors(rank: int | None) -> None:
    basis = gradient_subspace(DIRECTIONS, rank)
    values, vectors = np.linalg.eigh(DIRECTIONS.T @ DIRECTIONS)  # another way to the same singular directions
    kept = vectors[:, np.argsort(values)[::-1][: rank or 4]]
    projector = kept @ kept.T
    expected = [[cosine(projector @ f, projector @ g) for g in DIRECTIONS] for f in FEATURES]
    # 1e-9: eigenvectors of a squared matrix lose half the digits where values are near each other
    np.testing.assert_allclose(cosines(FEATURES, DIRECTIONS, basis), expected, rtol=0, atol=1e-9)


def test_coordinates_in_an_orthonormal_basis_of_the_span_give_the_same() -> None:
    q, _ = np.linalg.qr(DIRECTIONS.T)
    whole = cosines(FEATURES, DIRECTIONS, gradient_subspace(DIRECTIONS, 3))
    inside = DIRECTIONS @ q
    cut = cosines(FEATURES @ q, inside, gradient_subspace(inside, 3))
    np.testing.assert_allclose(cut, whole, rtol=0, atol=FLOAT64)


def test_pairs_computed_twice_add_no_dimension() -> None:
    twice = np.vstack([DIRECTIONS[:2], DIRECTIONS[:1] * (1 + 1e-9)])
    assert gradient_subspace(twice).shape == (2, 40)
    with pytest.raises(ConfigError, match=r"3 dimensions, but 3 validation gradients span 2"):
        gradient_subspace(twice, 3)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"expected \[V, D\]"):
        gradient_subspace(DIRECTIONS[0])
    with pytest.raises(ConfigError, match="span 0"):
        gradient_subspace(np.zeros((2, 3)))
    with pytest.raises(NonFiniteError, match=r"first \[1\]"):
        gradient_subspace(np.array([[1.0], [np.nan]]))
    with pytest.raises(ShapeError, match=r"expected \[N, 4\]"):
        span_cosines(FEATURES[:, :3], DIRECTIONS, gradient_subspace(DIRECTIONS))
