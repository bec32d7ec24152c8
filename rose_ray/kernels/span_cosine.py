"""Cosines inside the span of validation gradients (GIST, arXiv:2602.18584).

Shapes: N pool rows, V pairs, D numbers of a feature, K numbers of the subspace.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rose_ray.errors import ConfigError, NonFiniteError, ShapeError
from rose_ray.kernels.influence import influence

Floats = NDArray[np.float64]

MIN_SINGULAR_FRACTION = 1e-6
"""Of the largest singular value. Pairs that differ by less than this part are one pair computed twice: it is what
float32 leaves of a gradient (kernels/span.py has the same bound, squared)."""

MIN_LENGTH_INSIDE = 1e-6
"""Part of a direction's own length below which what lies in the span is float32 rounding and has no direction."""


def gradient_subspace(directions_VD: NDArray[Any], rank: int | None = None) -> Floats:
    """Orthonormal rows that span the leading singular directions of the validation gradients.

    Args:
        directions_VD: One row a pair; where inner products with them are exact, so is what follows.
        rank: K; None for all that differ beyond rounding, at most V.

    Returns:
        Array [K, D], float64; rows by falling singular value.

    Raises:
        ShapeError: Not a matrix with at least one row and column.
        NonFiniteError: A direction has a NaN or infinity.
        ConfigError: ``rank`` is more than the gradients have, or below 1.
    """
    if directions_VD.ndim != 2 or 0 in directions_VD.shape:
        raise ShapeError(f"directions have shape {directions_VD.shape}; expected [V, D], both at least 1")
    bad = np.flatnonzero(~np.isfinite(directions_VD).all(axis=1))
    if bad.size:
        raise NonFiniteError(f"{bad.size} directions are not finite, first {bad[:10].tolist()}; compute the bank again")
    _, values, rows_KD = np.linalg.svd(directions_VD.astype(np.float64), full_matrices=False)
    present = int((values > MIN_SINGULAR_FRACTION * values[0]).sum()) if values[0] > 0 else 0
    wanted = present if rank is None else rank
    if not 1 <= wanted <= present:
        raise ConfigError(
            f"the subspace is to have {wanted} dimensions, but {len(directions_VD)} validation gradients span "
            f"{present}; expected 1 to {present}: lower the rank or add pairs"
        )
    return np.ascontiguousarray(rows_KD[:wanted])


def span_cosines(rows_NK: Floats, directions_VD: NDArray[Any], basis_KD: Floats) -> Floats:
    """Cosine of every row with every pair, both cut down to the subspace.

    The length that a row has outside the subspace drops out, so with K = 1 every cosine is +1 or -1. A row with
    less inside than ``MIN_LENGTH_INSIDE``, or a pair with nothing, has cosine 0.

    Args:
        rows_NK: Products of the rows, over their exact length, with the subspace's.
        directions_VD: Pairs, of any length.
        basis_KD: From :func:`gradient_subspace`.

    Returns:
        Array [N, V], float64.

    Raises:
        ShapeError, NumericsError, NonFiniteError: As in :func:`rose_ray.kernels.influence.influence`.
    """
    if rows_NK.ndim != 2 or rows_NK.shape[1] != len(basis_KD):
        raise ShapeError(f"products have shape {rows_NK.shape}; expected [N, {len(basis_KD)}]")
    pairs_VK = influence(np.asarray(directions_VD, dtype=np.float64), basis_KD)
    reach_V = np.linalg.norm(directions_VD, axis=1)
    return _units(rows_NK, np.ones(len(rows_NK))) @ _units(pairs_VK, reach_V).T


def _units(vectors_MK: Floats, reach_M: Floats) -> Floats:
    lengths_M = np.linalg.norm(vectors_MK, axis=1)
    counts_M = lengths_M > MIN_LENGTH_INSIDE * reach_M
    return vectors_MK * np.where(counts_M, 1 / np.where(counts_M, lengths_M, 1), 0)[:, None]
