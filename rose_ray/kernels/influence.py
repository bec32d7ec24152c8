"""Influence of pool samples on the directions of a bank.

Shapes: N pool rows, U directions, D projected dimensions, C checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rose_ray.errors import NonFiniteError, NumericsError, ShapeError
from rose_ray.kernels.feature_matrix import FeatureMatrix


def influence(features_ND: NDArray[Any] | FeatureMatrix, directions_UD: NDArray[Any]) -> NDArray[np.float64]:
    """Inner product of every feature with every direction: one checkpoint's term of the influence.

    The weighted sum over checkpoints is the influence of LESS, section 3 (arXiv:2402.04333). Both sides bring
    their own normalisation. Products are added up in float64 whatever the inputs, so the place of a row in
    its shard changes the result by far less than float32 can hold.

    Args:
        features_ND: Features of one checkpoint, float16, float32 or float64, or as they are stored.
        directions_UD: Directions of the same checkpoint, floats.

    Returns:
        Array [N, U], float64. Positive where training on the row helps.

    Raises:
        ShapeError: An array is not two-dimensional, or the D differ.
        NumericsError: An array holds no floating-point numbers; stored integers need their scale first.
        NonFiniteError: A result is NaN or infinite; the message lists rows and directions.
    """
    return influences(features_ND, [directions_UD])[0]


def influences(
    features_ND: NDArray[Any] | FeatureMatrix, directions: Sequence[NDArray[Any]]
) -> list[NDArray[np.float64]]:
    """Return `influence` for several matrices of directions, bit for bit, in one pass over the features."""
    for directions_UD in directions:
        if len(features_ND.shape) != 2 or directions_UD.ndim != 2 or features_ND.shape[1] != directions_UD.shape[1]:
            raise ShapeError(
                f"features have shape {features_ND.shape} and directions {directions_UD.shape}; "
                "expected [N, D] and [U, D] with one D"
            )
        _require_floats("directions", directions_UD)
    if isinstance(features_ND, np.ndarray):
        _require_floats("features", features_ND)
        features_ND = FeatureMatrix(features_ND, None, features_ND.shape[1])
    with np.errstate(invalid="ignore"):  # a row or a scale that is not finite is named below
        found = features_ND.products(*directions)
    for influences_NU in found:
        _check_finite(influences_NU)
    return found


def _check_finite(influences_NU: NDArray[np.float64]) -> None:
    finite_NU = np.isfinite(influences_NU)
    if not finite_NU.all():
        rows = np.flatnonzero(~finite_NU.all(axis=1))
        columns = np.flatnonzero(~finite_NU.all(axis=0))
        raise NonFiniteError(
            f"influence is not finite in {len(rows)} rows (first {rows[:10].tolist()}) and {len(columns)} "
            f"directions (first {columns[:10].tolist()}); expected finite features and directions"
        )


def _require_floats(name: str, array: NDArray[Any]) -> None:
    if not np.issubdtype(array.dtype, np.floating):
        raise NumericsError(f"{name} are {array.dtype}; expected floating-point numbers")


def checkpoint_weights(mean_learning_rates: Sequence[float]) -> NDArray[np.float64]:
    """Weight of each checkpoint: the mean learning rate of its epoch over the sum of all.

    LESS (section 3) weighs by the learning rate; dividing by the sum keeps scores of runs comparable.

    Args:
        mean_learning_rates: One a checkpoint, at least 0, not all 0.

    Returns:
        Array [C], float64, summing to 1.

    Raises:
        NumericsError: There are none, one is negative or not finite, or all are 0.
    """
    rates_C = np.asarray(mean_learning_rates, dtype=np.float64)
    if rates_C.ndim != 1 or rates_C.size == 0:
        raise NumericsError(f"mean learning rates have shape {rates_C.shape}; expected one a checkpoint")
    if not np.isfinite(rates_C).all() or (rates_C < 0).any() or not rates_C.any():
        raise NumericsError(
            f"mean learning rates are {rates_C.tolist()}; expected finite numbers of at least 0, not all 0: "
            "check the warm-up's schedule, or state the checkpoints' weights"
        )
    scaled_C = rates_C / rates_C.max()
    weights_C: NDArray[np.float64] = scaled_C / scaled_C.sum()
    return weights_C
