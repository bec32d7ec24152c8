"""Does a direction from a few pairs point where that of many others points?

Shapes: H held-out pairs, D projected dimensions, R resamples.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rose_ray.errors import NumericsError, ShapeError

Floats = NDArray[np.float64]


def resampled_weights(num_pairs: int, num_resamples: int, random: np.random.Generator) -> Floats:
    """Return how often each pair is drawn, with replacement, in each resample: [R, H]."""
    counts_RH: Floats = random.multinomial(num_pairs, np.full(num_pairs, 1 / num_pairs), num_resamples).astype(float)
    return counts_RH


def half_weights(num_pairs: int, num_resamples: int, random: np.random.Generator) -> Floats:
    """Return 1 for the pairs of a random half, the smaller one where they are odd, and 0 for the others: [R, H]."""
    order_RH = random.permuted(np.tile(np.arange(num_pairs), (num_resamples, 1)), axis=1)
    return (order_RH < num_pairs // 2).astype(np.float64)


def cosines_with_sums(direction_D: Floats, terms_HD: Floats, weights_RH: Floats) -> Floats:
    """Return the cosine of a direction with each weighted sum of vectors: [R].

    Args:
        direction_D: Any length.
        terms_HD: Of the held-out pairs.
        weights_RH: Of each sum.

    Raises:
        ShapeError: The shapes disagree.
        NumericsError: The direction or a sum is zero.
    """
    if terms_HD.ndim != 2 or direction_D.shape != terms_HD.shape[1:] or weights_RH.shape[1:] != terms_HD.shape[:1]:
        raise ShapeError(
            f"direction {direction_D.shape}, vectors {terms_HD.shape} and weights {weights_RH.shape} do not fit"
        )
    return _cosines(weights_RH @ (terms_HD @ direction_D), _squares(terms_HD, weights_RH), direction_D @ direction_D)


def cosines_between_halves(terms_HD: Floats, first_RH: Floats) -> Floats:
    """Return the cosine between the sum of some vectors and that of all the others: [R]; raises as above.

    Args:
        terms_HD: Of the held-out pairs.
        first_RH: 1 for the vectors of the first sum, 0 for those of the second.
    """
    other_RH = 1.0 - first_RH
    gram_HH = terms_HD @ terms_HD.T
    products_R = np.einsum("rh,hk,rk->r", first_RH, gram_HH, other_RH, optimize=True)
    return _cosines(products_R, _squares(terms_HD, first_RH), _squares(terms_HD, other_RH))


def _squares(terms_HD: Floats, weights_RH: Floats) -> Floats:
    """Squared lengths of the sums, [R], without making the sums: [R, D] may be large."""
    squares_R: Floats = np.einsum("rh,hk,rk->r", weights_RH, terms_HD @ terms_HD.T, weights_RH, optimize=True)
    return squares_R


def _cosines(products_R: Floats, squares_R: Floats, other_squares: Floats | float) -> Floats:
    lengths_R = np.sqrt(np.maximum(squares_R * other_squares, 0.0))
    if not (lengths_R > 0).all():
        raise NumericsError("a direction is zero: the pairs that make it cancel each other")
    return np.clip(products_R / lengths_R, -1.0, 1.0)
