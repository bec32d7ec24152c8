"""Feature matrices in fewer bytes.

Shapes: N rows, D features a row, C codes a row (D, or an eighth of it for ``bit1``).
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from rose_ray.errors import ConfigError, NonFiniteError, NumericsError, ShapeError

StoredType = Literal["float32", "float16", "int8", "bit1"]

INT8_LIMIT = 127
"""Codes are symmetric; -128 is not used."""

_NUM_ROWS_NAMED = 10
_CODE_TYPES = ("float64", "float32", "float16", "int8", "uint8")

Float32Array = NDArray[np.float32]


def quantize(features_ND: Float32Array, stored: StoredType) -> tuple[NDArray[Any], Float32Array | None]:
    """Return the stored form of a feature matrix.

    - ``float32``: the features themselves, not a copy.
    - ``float16``: rounded to nearest; numbers below 3e-8 become 0, so scale rows to unit length before.
    - ``int8``: ``x / scale`` rounded half to even, ``scale = max|x| / 127`` of the row.
    - ``bit1``: signs (1 for 0 and above), eight a byte, the first in the lowest bit, unused bits 0;
      ``scale = |x|_2**2 / |x|_1`` of the row, with which ``<q, x> = <x, x>``: no bias along the row itself.

    A row of zeros is restored as zeros by all of them.

    Args:
        features_ND: float32 [N, D], D at least 1. Not modified.
        stored: One of the four above.

    Returns:
        Codes: float32, float16 or int8 [N, D], or uint8 [N, ceil(D / 8)]. Scales: float32 [N], or None for the floats.

    Raises:
        ConfigError: The stored form is unknown.
        ShapeError: The features are not a matrix with at least one column.
        NumericsError: They are not float32.
        NonFiniteError: Rows hold NaN or infinity, or numbers too large for float16; the message has their numbers.
    """
    if stored not in get_args(StoredType):
        raise ConfigError(f"stored form is {stored!r}; expected one of {', '.join(get_args(StoredType))}")
    if features_ND.ndim != 2 or features_ND.shape[1] < 1:
        raise ShapeError(f"features have shape {features_ND.shape}; expected [N, D] with D at least 1")
    if features_ND.dtype != np.float32:
        raise NumericsError(f"features are {features_ND.dtype}; expected float32")
    _refuse_rows(np.isfinite(features_ND), "hold NaN or infinity")
    if stored == "int8":
        return _to_int8(features_ND)
    if stored == "bit1":
        return _to_bits(features_ND)
    return (features_ND, None) if stored == "float32" else (_to_float16(features_ND), None)


def dequantize(codes_NC: NDArray[Any], scales_N: Float32Array | None, dim: int) -> Float32Array:
    """Return the features [N, D], float32, of what :func:`quantize` returned.

    Args:
        codes_NC: The codes; their dtype tells the stored form.
        scales_N: The scales, float32 [N], or None for the floats.
        dim: D.

    Raises:
        NumericsError: The codes have a dtype that no stored form has.
        ShapeError: Codes, scales and ``dim`` do not fit together.
    """
    check_codes(codes_NC, scales_N, dim)
    if scales_N is None:
        return codes_NC.astype(np.float32, copy=False)
    if codes_NC.dtype == np.int8:
        return codes_NC.astype(np.float32) * scales_N[:, None]
    positive_ND = np.unpackbits(codes_NC, axis=1, count=dim, bitorder="little").view(bool)
    return np.where(positive_ND, scales_N[:, None], -scales_N[:, None])


def _to_float16(features_ND: Float32Array) -> NDArray[np.float16]:
    with np.errstate(over="ignore"):
        codes_ND = features_ND.astype(np.float16)
    _refuse_rows(np.isfinite(codes_ND), "are too large for float16 (65504); scale them, or store float32")
    return codes_ND


def _to_int8(features_ND: Float32Array) -> tuple[NDArray[np.int8], Float32Array]:
    scales_N = np.abs(features_ND).max(1) / np.float32(INT8_LIMIT)
    divisor_N1 = np.where(scales_N > 0, scales_N, np.float32(1))[:, None]
    codes_ND = np.rint(features_ND / divisor_N1)
    # Only a row of numbers near the end of float32's range has a scale so coarse that codes pass the limit.
    return np.clip(codes_ND, -INT8_LIMIT, INT8_LIMIT).astype(np.int8), scales_N


def _to_bits(features_ND: Float32Array) -> tuple[NDArray[np.uint8], Float32Array]:
    sums_N = np.abs(features_ND).sum(1, dtype=np.float64)
    squares_N = np.square(features_ND, dtype=np.float64).sum(1)
    scales_N = np.divide(squares_N, sums_N, out=np.zeros_like(sums_N), where=sums_N > 0)
    return np.packbits(features_ND >= 0, axis=1, bitorder="little"), scales_N.astype(np.float32)


def check_codes(codes_NC: NDArray[Any], scales_N: Float32Array | None, dim: int) -> None:
    """Check codes of any stored form; float64 passes too.

    Raises:
        NumericsError: The codes have a dtype that no stored form has.
        ShapeError: Codes, scales and ``dim`` do not fit together.
    """
    if codes_NC.dtype.name not in _CODE_TYPES:
        raise NumericsError(f"codes are {codes_NC.dtype}; expected one of {', '.join(_CODE_TYPES)}")
    num_codes = -(-dim // 8) if codes_NC.dtype == np.uint8 else dim
    if codes_NC.ndim != 2 or codes_NC.shape[1] != num_codes:
        raise ShapeError(f"codes have shape {codes_NC.shape}; expected [N, {num_codes}] for {dim} features")
    if (scales_N is None) != (codes_NC.dtype.kind == "f"):
        raise ShapeError(f"codes are {codes_NC.dtype} and scales are {'missing' if scales_N is None else 'given'}")
    if scales_N is not None and scales_N.shape != codes_NC.shape[:1]:
        raise ShapeError(f"scales have shape {scales_N.shape}; expected ({codes_NC.shape[0]},)")


def _refuse_rows(finite_ND: NDArray[np.bool_], problem: str) -> None:
    rows = np.flatnonzero(~np.all(finite_ND, axis=1)).tolist()
    if rows:
        raise NonFiniteError(f"{len(rows)} of {len(finite_ND)} feature rows {problem}: rows {rows[:_NUM_ROWS_NAMED]}")
