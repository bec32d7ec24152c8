"""Kendall's tau, partial rank correlation, and agreement of judges beyond chance.

Shapes: N values or items.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rose_ray.errors import NonFiniteError, ShapeError
from rose_ray.kernels.correlation import spearman


def kendall(x_N: NDArray[Any], y_N: NDArray[Any]) -> float | None:
    """Kendall's tau-b in [-1, 1], ties accounted for; None where either side does not vary.

    Compares all N (N - 1) / 2 pairs: for some thousand values at most.

    Raises:
        ShapeError: The two are not one-dimensional and equally long.
        NonFiniteError: A value is NaN or infinite.
    """
    x_N, y_N = np.asarray(x_N, dtype=np.float64), np.asarray(y_N, dtype=np.float64)
    if x_N.ndim != 1 or x_N.shape != y_N.shape:
        raise ShapeError(f"columns have shapes {x_N.shape} and {y_N.shape}; expected two of one length")
    if not (np.isfinite(x_N).all() and np.isfinite(y_N).all()):
        raise NonFiniteError("a column holds NaN or infinity")
    agreeing = differing_x = differing_y = 0.0
    for place in range(len(x_N) - 1):
        sign_x, sign_y = np.sign(x_N[place + 1 :] - x_N[place]), np.sign(y_N[place + 1 :] - y_N[place])
        agreeing += float(sign_x @ sign_y)
        differing_x += float(np.abs(sign_x).sum())
        differing_y += float(np.abs(sign_y).sum())
    if not differing_x or not differing_y:
        return None
    return max(-1.0, min(1.0, agreeing / math.sqrt(differing_x * differing_y)))


def partial_spearman(x_N: NDArray[Any], y_N: NDArray[Any], z_N: NDArray[Any]) -> float | None:
    """Rank correlation of x and y with z held fixed, in [-1, 1].

    ``(r_xy - r_xz r_yz) / sqrt((1 - r_xz^2) (1 - r_yz^2))`` of the three rank correlations. None where a side does not
    vary, or where z orders x or y completely and nothing is left to correlate.

    Raises:
        ShapeError, NonFiniteError: As :func:`rose_ray.kernels.correlation.spearman`.
    """
    r_xy, r_xz, r_yz = spearman(x_N, y_N), spearman(x_N, z_N), spearman(y_N, z_N)
    if r_xy is None or r_xz is None or r_yz is None:
        return None
    left = (1 - r_xz**2) * (1 - r_yz**2)
    if left < 1e-12:  # rounding of correlations that are 1 in exact arithmetic
        return None
    return max(-1.0, min(1.0, (r_xy - r_xz * r_yz) / math.sqrt(left)))


def cohen_kappa(first: Sequence[Hashable], second: Sequence[Hashable]) -> float | None:
    """Agreement of two judges on the same N items beyond what chance gives (Cohen 1960), at most 1.

    ``(p_o - p_e) / (1 - p_e)`` with p_o the share of equal labels and p_e the share expected of two judges who keep
    their own frequencies of labels and otherwise guess. None where both always give the same one label.

    Raises:
        ShapeError: Not the same number of labels, or none.
    """
    if len(first) != len(second) or not first:
        raise ShapeError(f"{len(first)} and {len(second)} labels; expected two equally long lists, not empty")
    number = len(first)
    observed = sum(a == b for a, b in zip(first, second, strict=True)) / number
    expected = sum(list(first).count(label) * list(second).count(label) for label in set(first)) / number**2
    return None if expected == 1 else (observed - expected) / (1 - expected)
