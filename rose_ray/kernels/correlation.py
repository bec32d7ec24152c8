"""Correlation of two columns of the score table.

Shapes: N values.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rose_ray.errors import NonFiniteError, ShapeError


def pearson(x_N: NDArray[Any], y_N: NDArray[Any]) -> float | None:
    """Linear correlation in [-1, 1], computed in float64; None where either side does not vary.

    Raises:
        ShapeError: The two are not one-dimensional and equally long.
        NonFiniteError: A value is NaN or infinite.
    """
    x_N, y_N = _checked(x_N, y_N)
    if _constant(x_N) or _constant(y_N):
        return None
    x_N, y_N = _unit_deviation(x_N), _unit_deviation(y_N)
    return float(np.clip(np.dot(x_N, y_N), -1.0, 1.0))


def spearman(x_N: NDArray[Any], y_N: NDArray[Any]) -> float | None:
    """Rank correlation in [-1, 1]: Pearson's of the ranks, ties sharing their mean rank.

    None where either side does not vary.

    Raises:
        ShapeError: The two are not one-dimensional and equally long.
        NonFiniteError: A value is NaN or infinite.
    """
    x_N, y_N = _checked(x_N, y_N)
    return pearson(average_ranks(x_N), average_ranks(y_N))


def average_ranks(values_N: NDArray[Any]) -> NDArray[np.float64]:
    """Ranks from 1 for the smallest value; equal values share the mean of the ranks they take up."""
    _, group_N, counts = np.unique(values_N, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks_N: NDArray[np.float64] = (last - (counts - 1) / 2.0)[group_N]
    return ranks_N


def _checked(x_N: NDArray[Any], y_N: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    x_N, y_N = np.asarray(x_N, dtype=np.float64), np.asarray(y_N, dtype=np.float64)
    if x_N.ndim != 1 or x_N.shape != y_N.shape:
        raise ShapeError(f"columns have shapes {x_N.shape} and {y_N.shape}; expected two of one length")
    bad = np.flatnonzero(~(np.isfinite(x_N) & np.isfinite(y_N)))
    if bad.size:
        raise NonFiniteError(f"{bad.size} rows hold NaN or infinity, first {bad[:10].tolist()}")
    return x_N, y_N


def _constant(values_N: NDArray[np.float64]) -> bool:
    return values_N.size == 0 or bool(values_N.min() == values_N.max())


def _unit_deviation(values_N: NDArray[np.float64]) -> NDArray[np.float64]:
    # scaled first, so that the squares neither overflow nor vanish
    scaled_N = values_N / np.abs(values_N).max()
    deviation_N = scaled_N - scaled_N.mean()
    deviation_N /= np.abs(deviation_N).max()
    unit_N: NDArray[np.float64] = deviation_N / np.sqrt(np.dot(deviation_N, deviation_N))
    return unit_N
