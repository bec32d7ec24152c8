"""Stored features as a matrix: what they make of directions, without being restored.

Codes become float64 block by block, small enough to stay in a processor's cache; scales are multiplied into products,
not into features.

Shapes: N rows, D features a row, C codes a row (D, or an eighth of it for ``bit1``), E exact numbers behind the
features, U directions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rose_ray.errors import ShapeError
from rose_ray.kernels.quantization import Float32Array, check_codes, dequantize

BLOCK_ROWS = 512
BLOCK_FEATURES = 512
"""Of a block of float64, 2 MiB; a multiple of 8, so that no byte of signs is split."""

Float64Array = NDArray[np.float64]


@dataclass(frozen=True)
class FeatureMatrix:
    """Features as :func:`rose_ray.kernels.quantization.quantize` returned them, and exact numbers behind them.

    Attributes:
        codes_NC: Codes, or features in any float type; None where all numbers are exact ones.
        scales_N: The codes' scales, float32; None for floats.
        dim: D; 0 without codes.
        exact_NE: float [N, E], or None.
        factors_N: What rows are multiplied with, float64, or None.

    Raises:
        NumericsError: The codes have a dtype that no stored form has.
        ShapeError: The parts do not fit together.
    """

    codes_NC: NDArray[Any] | None
    scales_N: Float32Array | None
    dim: int
    exact_NE: NDArray[np.floating] | None = None
    factors_N: Float64Array | None = None

    def __post_init__(self) -> None:
        if self.codes_NC is not None:
            check_codes(self.codes_NC, self.scales_N, self.dim)
        sizes = {len(each) for each in (self.codes_NC, self.exact_NE, self.factors_N) if each is not None}
        if len(sizes) != 1:
            raise ShapeError(f"parts of a feature matrix have {sorted(sizes)} rows; expected one number")

    @property
    def shape(self) -> tuple[int, int]:
        """N, and D + E."""
        exact = 0 if self.exact_NE is None else self.exact_NE.shape[1]
        rows = self.codes_NC if self.codes_NC is not None else self.exact_NE
        assert rows is not None
        return len(rows), self.dim + exact

    @property
    def sign_bits(self) -> NDArray[np.uint8] | None:
        """The codes, where they are packed signs."""
        is_signs = self.codes_NC is not None and self.codes_NC.dtype == np.uint8
        return self.codes_NC if is_signs else None

    @property
    def last_N(self) -> Float64Array:
        """The last number of every row, float64, factors left out."""
        if self.exact_NE is not None:
            return self.exact_NE[:, -1].astype(np.float64)
        return self._restored_codes()[:, -1].astype(np.float64)

    def times(self, factors_N: NDArray[np.floating] | None) -> FeatureMatrix:
        """Return the matrix with rows multiplied by these factors, and by no others; None for none."""
        return replace(self, factors_N=None if factors_N is None else factors_N.astype(np.float64))

    def restored(self) -> NDArray[np.floating]:
        """Return the features [N, D + E]: float32, or float64 where there are factors."""
        parts = [] if self.codes_NC is None else [self._restored_codes()]
        parts += [] if self.exact_NE is None else [self.exact_NE.astype(np.float32)]
        features_ND: NDArray[np.floating] = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
        return features_ND if self.factors_N is None else features_ND * self.factors_N[:, None]

    def products(self, *directions: NDArray[Any]) -> list[Float64Array]:
        """Return inner products with directions [U, D + E], float64 [N, U], added up in float64.

        Several matrices of directions share the way from codes to float64; each gets the bits that it gets alone.

        Raises:
            ShapeError: A direction has another width.
        """
        num_rows, width = self.shape
        for directions_UD in directions:
            if directions_UD.ndim != 2 or directions_UD.shape[1] != width:
                raise ShapeError(f"directions have shape {directions_UD.shape}; expected [U, {width}]")
        vectors = [directions_UD.astype(np.float64, copy=False) for directions_UD in directions]
        made = [np.zeros((num_rows, len(vectors_UD))) for vectors_UD in vectors]
        for rows, features, block in self._blocks():
            for products_NU, vectors_UD in zip(made, vectors, strict=True):
                products_NU[rows] += block @ vectors_UD[:, features].T
        for products_NU, vectors_UD in zip(made, vectors, strict=True):
            self._finish(products_NU, vectors_UD)
        return made

    def _finish(self, products_NU: Float64Array, vectors_UD: Float64Array) -> None:
        """Scale sums over codes, and add exact numbers."""
        if self.sign_bits is not None:  # bits are 0 and 1, and stand for -1 and 1
            products_NU *= 2
            products_NU -= vectors_UD[:, : self.dim].sum(axis=1)
        if self.scales_N is not None:
            products_NU *= self.scales_N[:, None]
        if self.exact_NE is not None:
            products_NU += self.exact_NE.astype(np.float64) @ vectors_UD[:, self.dim :].T
        if self.factors_N is not None:
            products_NU *= self.factors_N[:, None]

    def squares(self) -> Float64Array:
        """Return the squared length of every row, float64 [N], factors left out.

        Of signs it is the length of what they were taken of, as far as they know it: restored signs are longer, by
        pi / 2 in the square, for their products to be the vector's own.
        """
        squares_N = np.zeros(self.shape[0])
        if self.sign_bits is not None:
            squares_N += self.dim * 2 / math.pi
        else:
            for rows, _, block in self._blocks():
                squares_N[rows] += np.einsum("nd,nd->n", block, block)
        if self.scales_N is not None:
            squares_N *= self.scales_N.astype(np.float64) ** 2
        if self.exact_NE is not None:
            squares_N += np.square(self.exact_NE.astype(np.float64)).sum(axis=1)
        return squares_N

    def _restored_codes(self) -> Float32Array:
        assert self.codes_NC is not None
        return dequantize(self.codes_NC, self.scales_N, self.dim)

    def _blocks(self) -> Iterator[tuple[slice, slice, Float64Array]]:
        """Yield rows, features and their codes in float64, without scales; bits are 0 and 1."""
        if self.codes_NC is None:
            return
        for first in range(0, len(self.codes_NC), BLOCK_ROWS):
            rows = slice(first, first + BLOCK_ROWS)
            for start in range(0, self.dim, BLOCK_FEATURES):
                features = slice(start, min(start + BLOCK_FEATURES, self.dim))
                if self.codes_NC.dtype == np.uint8:
                    bytes_NC = self.codes_NC[rows, start // 8 : -(-features.stop // 8)]
                    count = features.stop - start
                    block = np.unpackbits(bytes_NC, axis=1, count=count, bitorder="little")
                else:
                    block = self.codes_NC[rows, features]
                yield rows, features, block.astype(np.float64)
