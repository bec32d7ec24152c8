"""Products of stored features with directions against loops over what the codes stand for."""

from __future__ import annotations

import math
from typing import Any, get_args

import numpy as np
import pytest

import rose_ray.kernels.feature_matrix as module
from rose_ray.errors import NonFiniteError, NumericsError, ShapeError
from rose_ray.kernels.feature_matrix import FeatureMatrix
from rose_ray.kernels.influence import influence, influences
from rose_ray.kernels.quantization import StoredType, dequantize, quantize

FLOAT64_ROUNDING = 1e-12
"""Some thousands of roundings of float64 in sums of numbers of order 1, in another order."""

FLOAT32_ROUNDING = 3e-7
"""Restoring rounds each feature to float32 once; products of codes do not."""

STORED = get_args(StoredType)


def _made(stored: StoredType, *, rows: int = 11, dim: int = 53, exact: int = 2) -> tuple[FeatureMatrix, np.ndarray]:
    """Stored features with exact numbers behind them, and their numbers in float64, one by one."""
    random = np.random.default_rng(3)
    features_ND = random.standard_normal((rows, dim)).astype(np.float32)
    codes_NC, scales_N = quantize(features_ND, stored)
    exact_NE = random.standard_normal((rows, exact)).astype(np.float32)
    numbers = np.empty((rows, dim + exact))
    for row in range(rows):
        scale = 1.0 if scales_N is None else float(scales_N[row])
        for place in range(dim):
            if stored == "bit1":
                bit = int(codes_NC[row, place // 8]) >> (place % 8) & 1
                numbers[row, place] = scale if bit else -scale
            else:
                numbers[row, place] = float(codes_NC[row, place]) * scale
        numbers[row, dim:] = exact_NE[row]
    return FeatureMatrix(codes_NC, scales_N, dim, exact_NE if exact else None), numbers


@pytest.fixture(params=[(512, 512), (4, 16)], ids=["one block", "many blocks"])
def _blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_ROWS", request.param[0])
    monkeypatch.setattr(module, "BLOCK_FEATURES", request.param[1])


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("exact", [0, 2])
@pytest.mark.parametrize("stored", STORED)
def test_products_equal_exact_sums(stored: StoredType, exact: int) -> None:
    matrix, numbers = _made(stored, exact=exact)
    directions_UD = np.random.default_rng(4).standard_normal((3, numbers.shape[1]))
    found = influence(matrix, directions_UD)
    assert found.dtype == np.float64 and found.shape == (11, 3) and matrix.shape == numbers.shape
    for row in range(11):
        for column in range(3):
            expected = math.fsum(a * b for a, b in zip(numbers[row], directions_UD[column], strict=True))
            assert found[row, column] == pytest.approx(expected, abs=FLOAT64_ROUNDING)
        own = math.fsum(a * a for a in numbers[row, :53]) * (2 / math.pi if stored == "bit1" else 1)
        squares = own + math.fsum(a * a for a in numbers[row, 53:])
        assert matrix.squares()[row] == pytest.approx(squares, rel=FLOAT64_ROUNDING)
        assert matrix.last_N[row] == pytest.approx(numbers[row, -1], rel=FLOAT32_ROUNDING)
    np.testing.assert_allclose(matrix.restored(), numbers, rtol=FLOAT32_ROUNDING)


@pytest.mark.parametrize("stored", STORED)
def test_restored_is_what_dequantize_gives(stored: StoredType) -> None:
    matrix, _ = _made(stored, exact=0)
    assert matrix.codes_NC is not None and matrix.restored().dtype == np.float32
    assert np.array_equal(matrix.restored(), dequantize(matrix.codes_NC, matrix.scales_N, matrix.dim))


@pytest.mark.parametrize("stored", STORED)
def test_factors_scale_rows(stored: StoredType) -> None:
    matrix, numbers = _made(stored)
    factors_N = np.linspace(0.5, 2, 11)
    scaled = matrix.times(factors_N)
    directions_UD = np.random.default_rng(4).standard_normal((3, numbers.shape[1]))
    (ours,), (plain,) = scaled.products(directions_UD), matrix.products(directions_UD)
    np.testing.assert_allclose(ours, plain * factors_N[:, None])
    np.testing.assert_allclose(scaled.restored(), matrix.restored() * factors_N[:, None])
    assert scaled.times(None).factors_N is None


def test_signs_know_the_length_of_what_they_were_taken_of() -> None:
    features_ND = np.random.default_rng(5).standard_normal((20, 4096)).astype(np.float32)
    codes_NC, scales_N = quantize(features_ND, "bit1")
    found = FeatureMatrix(codes_NC, scales_N, 4096).squares() / np.square(features_ND.astype(np.float64)).sum(axis=1)
    # |x|^2 / |x|_1^2 is pi / 2D but for the deviation of a mean of 4,096 absolute values, 1.2 % of it, doubled.
    np.testing.assert_allclose(found, 1, atol=5 * 0.024)


def test_exact_numbers_alone() -> None:
    exact_NE = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)
    matrix = FeatureMatrix(None, None, 0, exact_NE)
    assert matrix.shape == (2, 2) and np.array_equal(matrix.restored(), exact_NE)
    assert matrix.products(np.array([[1.0, -1.0]]))[0].tolist() == [[-1.0], [-1.0]]
    assert matrix.squares().tolist() == [5.0, 25.0] and matrix.last_N.tolist() == [2.0, 4.0]


@pytest.mark.parametrize("stored", STORED)
def test_a_row_s_products_depend_on_no_other_row(stored: StoredType) -> None:
    matrix, numbers = _made(stored, rows=37, dim=640)
    assert matrix.codes_NC is not None and matrix.exact_NE is not None
    directions_UD = np.random.default_rng(4).standard_normal((5, numbers.shape[1]))
    scale = None if matrix.scales_N is None else matrix.scales_N[7:8]
    alone = FeatureMatrix(matrix.codes_NC[7:8], scale, matrix.dim, matrix.exact_NE[7:8])
    whole = matrix.products(directions_UD)[0][7]
    np.testing.assert_allclose(alone.products(directions_UD)[0][0], whole, rtol=0, atol=FLOAT64_ROUNDING)


@pytest.mark.parametrize("stored", STORED)
def test_several_directions_at_once_get_the_bits_that_they_get_alone(stored: StoredType) -> None:
    matrix, numbers = _made(stored, rows=600, dim=1100)
    random = np.random.default_rng(4)
    several = [random.standard_normal((number, numbers.shape[1])) for number in (1, 18, 4)]
    for together, directions_UD in zip(influences(matrix, several), several, strict=True):
        assert np.array_equal(together, influence(matrix, directions_UD))


@pytest.mark.parametrize("stored", ["int8", "bit1"])
def test_a_scale_that_is_not_finite_is_named(stored: StoredType) -> None:
    matrix, numbers = _made(stored)
    assert matrix.scales_N is not None
    matrix.scales_N[4] = np.inf
    with pytest.raises(NonFiniteError, match=r"1 rows \(first \[4\]\)"):
        influence(matrix, np.zeros((2, numbers.shape[1])))


def test_parts_that_do_not_fit_are_refused() -> None:
    codes: Any = np.zeros((3, 8), np.int8)
    with pytest.raises(ShapeError, match="scales are missing"):
        FeatureMatrix(codes, None, 8)
    with pytest.raises(NumericsError, match="codes are int16"):
        FeatureMatrix(codes.astype(np.int16), np.ones(3, np.float32), 8)
    with pytest.raises(ShapeError, match=r"\[2, 3\] rows"):
        FeatureMatrix(codes, np.ones(3, np.float32), 8, np.ones((2, 1), np.float32))
    with pytest.raises(ShapeError, match=r"expected \[U, 8\]"):
        FeatureMatrix(codes, np.ones(3, np.float32), 8).products(np.ones((1, 9)))
