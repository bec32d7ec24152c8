"""Cosines of vectors of which signs are stored, and of each the part along one direction that all share.

Two vectors at an angle t, seen through D random directions, agree in the sign of a part 1 - t / pi of them (Goemans and
Williamson, 1995; what random projections make hashes of). So signs know cosines, but their own inner product is another
function of the angle: at a cosine of 0.9 the signs' is 0.71. What is known exactly is put back beside it:

    cosine = sqrt(1 - e^2) sqrt(1 - f^2) cos(t) + e f

Shapes: N, B, K rows; D signs; W words of 64 of them; X = W + 1 words of a row.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rose_ray.errors import NonFiniteError, ShapeError

_FLOAT64_ERROR = 1e-12
"""Some roundings of float64 of numbers up to 1; signs that differ are counted."""


def sign_rows(
    bits_NC: NDArray[np.uint8], scales_N: NDArray[np.float32], shared_N: NDArray[np.floating] | None
) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
    """Return rows as `SignCosines` compares them, uint64 [N, X], and which of them have a direction.

    Args:
        bits_NC: Signs as ``quantize`` packs them for ``bit1``.
        scales_N: Their scales; 0 where there are no signs.
        shared_N: The unit vectors' parts along what they share, in [-1, 1]; None for nothing.
    """
    shared_N = np.zeros(len(bits_NC)) if shared_N is None else shared_N.astype(np.float64)
    good_N = np.isfinite(scales_N) & np.isfinite(shared_N) & ((scales_N > 0) | (shared_N != 0))
    padded_NC = np.pad(bits_NC, ((0, 0), (0, -bits_NC.shape[1] % 8)))
    return np.concatenate([padded_NC.view(np.uint64), shared_N[:, None].view(np.uint64)], axis=1), good_N


class SignCosines:
    """Compares rows of signs; a form for `rose_ray.kernels.diversity.CosineFilter`.

    Args:
        dim: D.

    Raises:
        ShapeError: There are no signs.
    """

    def __init__(self, dim: int) -> None:
        if dim < 1:
            raise ShapeError(f"{dim} signs a row; expected 1 or more")
        self._dim = dim

    def check(self, row_X: NDArray[Any]) -> None:
        """See `rose_ray.kernels.diversity.Cosines`."""
        (shared,) = _shared(row_X[None]).tolist()
        if not abs(shared) <= 1 + 1e-3:
            raise NonFiniteError(f"its part along the shared direction is {shared}; expected -1 to 1")

    def error(self, width: int) -> float:
        """See `rose_ray.kernels.diversity.Cosines`."""
        return _FLOAT64_ERROR

    def blockwise(self, rows_BX: NDArray[Any], kept_KX: NDArray[Any]) -> NDArray[np.floating]:
        """See `rose_ray.kernels.diversity.Cosines`."""
        signs_KW = kept_KX[:, :-1]
        agreeing_BK = np.empty((len(rows_BX), len(kept_KX)))
        for place, row_X in enumerate(rows_BX):
            agreeing_BK[place] = self._dim - 2.0 * _num_differing(signs_KW, row_X[:-1])
        shared_B, shared_K = _shared(rows_BX), _shared(kept_KX)
        own_B, own_K = (np.sqrt(np.maximum(0, 1 - each**2)) for each in (shared_B, shared_K))
        cosines_BK: NDArray[np.float64] = np.sin(agreeing_BK * (math.pi / 2 / self._dim))
        cosines_BK *= own_B[:, None] * own_K
        return cosines_BK + shared_B[:, None] * shared_K

    def exactly(self, row_X: NDArray[Any], kept_X: NDArray[Any]) -> float:
        """See `rose_ray.kernels.diversity.Cosines`."""
        differing = int(_num_differing(kept_X[None, :-1], row_X[:-1])[0])
        e, f = (float(_shared(each[None])[0]) for each in (row_X, kept_X))
        own = math.sqrt(max(0.0, 1 - e * e)) * math.sqrt(max(0.0, 1 - f * f))
        return own * math.sin(math.pi / 2 * (1 - 2 * differing / self._dim)) + e * f


def _num_differing(signs_KW: NDArray[np.uint64], signs_W: NDArray[np.uint64]) -> NDArray[np.int64]:
    counts_K: NDArray[np.int64] = np.bitwise_count(signs_KW ^ signs_W).sum(axis=1, dtype=np.int64)
    return counts_K


def _shared(rows_NX: NDArray[np.uint64]) -> NDArray[np.float64]:
    return np.ascontiguousarray(rows_NX[:, -1]).view(np.float64)
