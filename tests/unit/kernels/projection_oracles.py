"""Projection matrices built one entry at a time with plain integers, and short ways to apply a projection."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rose_ray.kernels.factored import make_grids
from rose_ray.kernels.projection import Projection

FLOAT64_ROUNDING = 1e-12  # sums of a few hundred numbers of order 1, in whatever order
FLOAT32_ROUNDING = 1e-4  # the same in float32
STANDARD_ERRORS = 5.0  # seeds are fixed, so this bound either holds for ever or points at a fault

_LETTERS = {"rademacher": b"RADE", "sketch": b"SKET", "factored": b"FACT"}


def slow_mix(x: int) -> int:
    x ^= x >> 16
    x = x * 0x21F0AAAD % 2**32
    x ^= x >> 15
    x = x * 0x735A2D97 % 2**32
    return x ^ (x >> 15)


def slow_keys(kind: str, seed: int, word: int) -> tuple[int, int]:
    state = int.from_bytes(_LETTERS[kind], "big")
    for half in (seed % 2**32, seed // 2**32):
        state = slow_mix(state ^ half)
    first = slow_mix(state ^ slow_mix(2 * word + 1))
    return first, slow_mix(first ^ slow_mix(2 * word + 2))


def slow_word(kind: str, seed: int, word: int, index: int) -> int:
    """Two rounds over the index, each with a key of (kind, seed, word)."""
    for key in slow_keys(kind, seed, word):
        index = slow_mix(index ^ key)
    return index


def slow_sketch_entry(dim: int, seed: int, index: int) -> tuple[int, int]:
    """Row and sign of one parameter."""
    row = (index % dim + slow_word("sketch", seed, 0, index // dim) % dim) % dim
    return row, 1 if slow_word("sketch", seed, 1, index // 32) // 2 ** (index % 32) % 2 else -1


def slow_signs(kind: str, seed: int, num_rows: int, num_columns: int) -> Tensor:
    """Signs [num_rows, num_columns], 32 rows a word."""
    signs = torch.zeros(num_rows, num_columns, dtype=torch.float64)
    for row, column in itertools.product(range(num_rows), range(num_columns)):
        bit = slow_word(kind, seed, row // 32, column) // 2 ** (row % 32) % 2
        signs[row, column] = 1.0 if bit else -1.0
    return signs


def slow_factor(seed: int, stream: int, num_rows: int, length: int) -> Tensor:
    first, second = slow_keys("factored", seed, stream)
    return slow_signs("factored", first + 2**32 * second, num_rows, length) / math.sqrt(num_rows)


def slow_factored(dim: int, seed: int, shapes: Sequence[tuple[int, int]]) -> Tensor:
    """Row-major: the entry of L V R^T at (p, q) is the product with row (p, q) of L (x) R."""
    parts = []
    for m, grid in enumerate(make_grids(dim, shapes)):
        left = slow_factor(seed, 2 * m, grid.rows_kept, grid.num_rows)
        right = slow_factor(seed, 2 * m + 1, grid.columns_kept, grid.num_columns)
        parts.append(torch.kron(left, right))
    return torch.block_diag(*parts)


def slow_matrix(kind: str, dim: int, seed: int, num_parameters: int) -> Tensor:
    if kind == "rademacher":
        return slow_signs(kind, seed, dim, num_parameters) / math.sqrt(dim)
    matrix = torch.zeros(dim, num_parameters, dtype=torch.float64)
    for i in range(num_parameters):
        row, sign = slow_sketch_entry(dim, seed, i)
        matrix[row, i] = sign
    return matrix


def project(projection: Projection, values: Tensor, cuts: Sequence[int] = ()) -> Tensor:
    out = torch.zeros(values.shape[0], projection.dim, dtype=values.dtype)
    for start, stop in itertools.pairwise([0, *cuts, values.shape[1]]):
        projection.add(out, start, values[:, start:stop])
    return out


def matrix_of(projection: Projection) -> Tensor:
    return project(projection, torch.eye(projection.num_parameters, dtype=torch.float64)).T


def random_values(num_rows: int, num_parameters: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, num_parameters, generator=generator, dtype=torch.float64)


def assert_unbiased(products: Sequence[Tensor], truth: Tensor) -> None:
    """The mean of independent draws is the truth, within its standard error."""
    sample = torch.stack(list(products))
    standard_error = float(sample.std()) / math.sqrt(len(products))
    error = abs(float(sample.mean() - truth))
    assert error < STANDARD_ERRORS * standard_error, f"off by {error / standard_error:.1f} standard errors"
