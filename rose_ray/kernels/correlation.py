"""Correlation of two columns of the score table.

Shapes: N values.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rose_ray.errors import NonFiniteError, ShapeError

_ROW_BLOCK = 1 << 20


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
    return rank_correlation(doubled_ranks(x_N), doubled_ranks(y_N))


def rank_correlation(x_N: NDArray[Any], y_N: NDArray[Any]) -> float | None:
    """Spearman's correlation of columns whose :func:`doubled_ranks` are known; added up a block at a time."""
    middle = len(x_N) + 1.0
    products = squares_x = squares_y = 0.0
    for start in range(0, len(x_N), _ROW_BLOCK):
        x_B = x_N[start : start + _ROW_BLOCK] - middle
        y_B = y_N[start : start + _ROW_BLOCK] - middle
        products += float(x_B @ y_B)
        squares_x += float(x_B @ x_B)
        squares_y += float(y_B @ y_B)
    if not squares_x or not squares_y:
        return None
    return float(np.clip(products / (math.sqrt(squares_x) * math.sqrt(squares_y)), -1.0, 1.0))


def average_ranks(values_N: NDArray[Any]) -> NDArray[np.float64]:
    """Ranks from 1 for the smallest value; equal values share the mean of the ranks they take up."""
    return doubled_ranks(values_N) / 2.0


def doubled_ranks(values_N: NDArray[Any]) -> NDArray[np.unsignedinteger[Any]]:
    """Twice the :func:`average_ranks`: whole numbers, of 4 bytes up to two thousand million values.

    Takes some 20 bytes a value meanwhile.

    Raises:
        NonFiniteError: A value is NaN or infinite.
    """
    values_N = np.asarray(values_N)
    _refuse(~np.isfinite(values_N))
    order_N = np.argsort(values_N)
    sorted_N = values_N[order_N]
    same = sorted_N[1:] == sorted_N[:-1]
    del sorted_N
    # A group in places a to b - 1, counted from 0, shares the rank (a + 1 + b) / 2.
    kind = np.min_scalar_type(2 * len(order_N))
    starts_N, ends_N = np.arange(len(order_N), dtype=kind), np.arange(1, len(order_N) + 1, dtype=kind)
    starts_N[1:][same] = 0
    ends_N[:-1][same] = len(order_N)
    np.maximum.accumulate(starts_N, out=starts_N)
    np.minimum.accumulate(ends_N[::-1], out=ends_N[::-1])
    starts_N += ends_N
    starts_N += kind.type(1)
    doubled_N = ends_N
    doubled_N[order_N] = starts_N
    return doubled_N


def _checked(x_N: NDArray[Any], y_N: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    x_N, y_N = np.asarray(x_N, dtype=np.float64), np.asarray(y_N, dtype=np.float64)
    if x_N.ndim != 1 or x_N.shape != y_N.shape:
        raise ShapeError(f"columns have shapes {x_N.shape} and {y_N.shape}; expected two of one length")
    _refuse(~(np.isfinite(x_N) & np.isfinite(y_N)))
    return x_N, y_N


def _refuse(bad_N: NDArray[np.bool_]) -> None:
    if bad_N.any():
        bad = np.flatnonzero(bad_N)
        raise NonFiniteError(f"{bad.size} rows hold NaN or infinity, first {bad[:10].tolist()}")


def _constant(values_N: NDArray[np.float64]) -> bool:
    return values_N.size == 0 or bool(values_N.min() == values_N.max())


def _unit_deviation(values_N: NDArray[np.float64]) -> NDArray[np.float64]:
    # scaled first, so that the squares neither overflow nor vanish
    scaled_N = values_N / np.abs(values_N).max()
    deviation_N = scaled_N - scaled_N.mean()
    deviation_N /= np.abs(deviation_N).max()
    unit_N: NDArray[np.float64] = deviation_N / np.sqrt(np.dot(deviation_N, deviation_N))
    return unit_N
