"""Cosines of vectors of which signs are stored, and of each the part along one direction that all share.

Two vectors at an angle t, seen through D random directions, agree in the sign of a part 1 - t / pi of them (Goemans and
Williamson, 1995; what random projections make hashes of). So signs know cosines, but their own inner product is another
function of the angle: at a cosine of 0.9 the signs' is 0.71. What is known exactly is put back beside it:

    cosine = sqrt(1 - e^2) sqrt(1 - f^2) cos(t) + e f

Shapes: N, B, K rows; D signs, C = ceil(D / 8) bytes of them; X = C + 4 bytes of a row.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rose_ray.errors import NonFiniteError, ShapeError

_SHARED_BYTES = 4
_FLOAT64_ERROR = 1e-12
"""Some roundings of float64 of numbers up to 1; the sums of signs are whole numbers, exact in float32 below 2**24."""


def sign_rows(
    bits_NC: NDArray[np.uint8], scales_N: NDArray[np.float32], shared_N: NDArray[np.floating] | None
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Return rows as `SignCosines` compares them, uint8 [N, X], and which of them have a direction.

    Args:
        bits_NC: Signs as ``quantize`` packs them for ``bit1``.
        scales_N: Their scales; 0 where there are no signs.
        shared_N: The unit vectors' parts along what they share, in [-1, 1]; None for nothing.
    """
    shared_N = (np.zeros(len(bits_NC)) if shared_N is None else shared_N).astype(np.float32)
    good_N = np.isfinite(scales_N) & np.isfinite(shared_N) & ((scales_N > 0) | (shared_N != 0))
    return np.concatenate([bits_NC, shared_N[:, None].view(np.uint8)], axis=1), good_N


class SignCosines:
    """Compares rows of signs; a form for `rose_ray.kernels.diversity.CosineFilter`.

    Args:
        dim: D.

    Raises:
        ShapeError: There are too many signs to add up exactly.
    """

    def __init__(self, dim: int) -> None:
        if not 0 < dim < 2**24:
            raise ShapeError(f"{dim} signs a row; expected 1 to 2**24 - 1")
        self._dim = dim

    def check(self, row_X: NDArray[Any]) -> None:
        """See `rose_ray.kernels.diversity.Cosines`."""
        (shared,) = self._shared(row_X[None]).tolist()
        if not abs(shared) <= 1 + 1e-3:
            raise NonFiniteError(f"its part along the shared direction is {shared}; expected -1 to 1")

    def error(self, width: int) -> float:
        """See `rose_ray.kernels.diversity.Cosines`."""
        return _FLOAT64_ERROR

    def blockwise(self, rows_BX: NDArray[Any], kept_KX: NDArray[Any]) -> NDArray[np.floating]:
        """See `rose_ray.kernels.diversity.Cosines`."""
        sums_BK = (self._signs(rows_BX) @ self._signs(kept_KX).T).astype(np.float64)
        shared_B, shared_K = self._shared(rows_BX), self._shared(kept_KX)
        own_B, own_K = (np.sqrt(np.maximum(0, 1 - each**2)) for each in (shared_B, shared_K))
        cosines_BK: NDArray[np.float64] = np.sin(sums_BK * (math.pi / 2 / self._dim))
        cosines_BK *= own_B[:, None] * own_K
        return cosines_BK + shared_B[:, None] * shared_K

    def exactly(self, row_X: NDArray[Any], kept_X: NDArray[Any]) -> float:
        """See `rose_ray.kernels.diversity.Cosines`."""
        num_bytes = len(row_X) - _SHARED_BYTES
        differing = int(np.bitwise_count(row_X[:num_bytes] ^ kept_X[:num_bytes]).sum())
        e, f = (float(self._shared(each[None])[0]) for each in (row_X, kept_X))
        own = math.sqrt(max(0.0, 1 - e * e)) * math.sqrt(max(0.0, 1 - f * f))
        return own * math.sin(math.pi / 2 * (1 - 2 * differing / self._dim)) + e * f

    def _signs(self, rows_NX: NDArray[Any]) -> NDArray[np.float32]:
        bits_ND = np.unpackbits(rows_NX[:, :-_SHARED_BYTES], axis=1, count=self._dim, bitorder="little")
        signs_ND = bits_ND.astype(np.float32)
        signs_ND *= 2
        signs_ND -= 1
        return signs_ND

    def _shared(self, rows_NX: NDArray[Any]) -> NDArray[np.float64]:
        shared_N1 = np.ascontiguousarray(rows_NX[:, -_SHARED_BYTES:]).view(np.float32)
        return shared_N1[:, 0].astype(np.float64)
