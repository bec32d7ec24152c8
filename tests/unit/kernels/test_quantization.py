"""Stored forms against row-by-row arithmetic on Python numbers."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
from numpy.typing import NDArray

from rose_ray.errors import ConfigError, NonFiniteError, NumericsError, ShapeError
from rose_ray.kernels.quantization import StoredType, dequantize, quantize

FLOAT32_RELATIVE = 3e-7  # a few float32 roundings
FLOAT16_RELATIVE = 2**-11  # half a unit in the last of 11 bits
HALF_STEP = 0.5 + 1e-4  # of int8, in units of the scale; the quotient is rounded to float32 before
ROW_PRODUCT_RELATIVE = 1e-6  # the scale's rounding to float32, times a sum in float64


def _features(num_rows: int = 7, dim: int = 21, seed: int = 0) -> NDArray[np.float32]:
    features = np.random.default_rng(seed).standard_normal((num_rows, dim)).astype(np.float32)
    features *= np.logspace(-3, 3, num_rows, dtype=np.float32)[:, None]
    features[2] = 0
    features[3, ::4] = 0
    return features


def _round_trip(features: NDArray[np.float32], stored: StoredType) -> NDArray[np.float32]:
    restored = dequantize(*quantize(features, stored), features.shape[1])
    assert restored.dtype == np.float32 and restored.shape == features.shape
    return restored


@pytest.mark.parametrize(
    ("stored", "dtype", "num_codes"),
    [("float32", "float32", 21), ("float16", "float16", 21), ("int8", "int8", 21), ("bit1", "uint8", 3)],
)
def test_codes_have_their_size(stored: StoredType, dtype: str, num_codes: int) -> None:
    features = _features()
    copy = features.copy()
    codes, scales = quantize(features, stored)
    assert codes.dtype.name == dtype and codes.shape == (7, num_codes)
    assert (scales is None) == (stored in ("float32", "float16"))
    assert scales is None or (scales.dtype == np.float32 and scales.shape == (7,))
    np.testing.assert_array_equal(features, copy)
    np.testing.assert_array_equal(_round_trip(features, stored)[2], 0)


def test_floats_are_rounded_to_nearest() -> None:
    features = _features()
    np.testing.assert_array_equal(_round_trip(features, "float32"), features)
    np.testing.assert_allclose(_round_trip(features, "float16"), features, rtol=FLOAT16_RELATIVE)


def test_int8_equals_the_slow_rounding() -> None:
    features = _features()
    codes, scales = quantize(features, "int8")
    assert scales is not None
    for row, code, scale in zip(features.tolist(), codes.tolist(), scales.tolist(), strict=True):
        largest = max(abs(x) for x in row)
        assert scale == pytest.approx(largest / 127, rel=FLOAT32_RELATIVE)
        for x, c in zip(row, code, strict=True):
            # round() of Python is half to even; the quotient is that of float32
            assert c == (round(float(np.float32(x) / np.float32(scale))) if largest else 0)
        assert max(abs(c) for c in code) == (127 if largest else 0)
    errors = np.abs(_round_trip(features, "int8") - features)
    assert (errors <= HALF_STEP * scales[:, None]).all()


def test_int8_halves_go_to_even() -> None:
    codes, scales = quantize(np.array([[127, 0.5, 1.5, 2.5, -0.5, -1.5, -127]], np.float32), "int8")
    assert codes.tolist() == [[127, 0, 2, 2, 0, -2, -127]]
    assert scales is not None and scales.tolist() == [1.0]


@pytest.mark.parametrize("largest", [1e-45, 1e-43, 3e-39, 3e38])
def test_int8_stays_in_range_at_the_ends_of_float32(largest: float) -> None:
    features = np.array([[largest, -largest, 0, largest / 2]], np.float32)
    codes, _ = quantize(features, "int8")
    assert np.abs(codes.astype(int)).max() <= 127 and codes[0, 2] == 0
    assert np.isfinite(_round_trip(features, "int8")).all()


@pytest.mark.parametrize("dim", [1, 7, 8, 9, 64])
def test_bits_equal_the_slow_packing(dim: int) -> None:
    features = _features(dim=dim)
    codes, scales = quantize(features, "bit1")
    assert scales is not None
    restored = _round_trip(features, "bit1")
    for n, row in enumerate(features.tolist()):
        expected = [0] * -(-dim // 8)
        for i, x in enumerate(row):
            expected[i // 8] += (1 if x >= 0 else 0) << (i % 8)
        assert codes[n].tolist() == expected
        length_1 = sum(abs(x) for x in row)
        scale = sum(x * x for x in row) / length_1 if length_1 else 0.0
        assert float(scales[n]) == pytest.approx(scale, rel=FLOAT32_RELATIVE)
        for i, x in enumerate(row):
            assert restored[n, i] == (scales[n] if x >= 0 else -scales[n])


def test_bits_are_unbiased_along_the_row() -> None:
    features = _features(dim=1000)
    restored = _round_trip(features, "bit1").astype(np.float64)
    exact = (features.astype(np.float64) ** 2).sum(1)
    np.testing.assert_allclose((restored * features).sum(1), exact, rtol=ROW_PRODUCT_RELATIVE)


@pytest.mark.parametrize("stored", get_args(StoredType))
def test_rows_that_are_not_finite_are_named(stored: StoredType) -> None:
    features = _features()
    features[1, 0], features[5, 3] = np.nan, -np.inf
    with pytest.raises(NonFiniteError, match=r"2 of 7 feature rows hold NaN or infinity: rows \[1, 5\]"):
        quantize(features, stored)


def test_rows_too_large_for_float16_are_named() -> None:
    features = _features()
    features[4, 2] = 65520  # rounds to 65536, one past the end; 65519 rounds to 65504
    with pytest.raises(NonFiniteError, match=r"too large for float16 .* rows \[4\]"):
        quantize(features, "float16")
    features[4, 2] = 65519
    assert _round_trip(features, "float16")[4, 2] == 65504


@pytest.mark.parametrize("stored", get_args(StoredType))
def test_no_rows_are_no_rows(stored: StoredType) -> None:
    assert _round_trip(np.zeros((0, 5), np.float32), stored).shape == (0, 5)


def test_arguments_are_checked() -> None:
    features: Any = _features()
    with pytest.raises(ConfigError, match="'int4'"):
        quantize(features, "int4")  # type: ignore[arg-type]
    with pytest.raises(NumericsError, match="float64"):
        quantize(features.astype(np.float64), "int8")
    for bad in (features[0], features[:, :0]):
        with pytest.raises(ShapeError, match="features have shape"):
            quantize(bad, "int8")
    codes, scales = quantize(features, "bit1")
    with pytest.raises(ShapeError, match=r"expected \[N, 4\]"):
        dequantize(codes, scales, 25)
    with pytest.raises(ShapeError, match="scales are missing"):
        dequantize(codes, None, 21)
    with pytest.raises(ShapeError, match="scales are given"):
        dequantize(features, scales, 21)
    with pytest.raises(ShapeError, match="scales have shape"):
        dequantize(codes, scales[:3] if scales is not None else None, 21)
    with pytest.raises(NumericsError, match="int64"):
        dequantize(codes.astype(np.int64), scales, 21)
