"""Rows one after the other, each kept only while it is unlike all that were kept: DEITA's filter (arXiv:2312.15685).

Shapes: B rows measured together, K kept rows, X numbers of a row as it is compared, N rows of D numbers.

Rows wait in the order in which they will be asked about, and are compared with the kept ones a block at a time, which
one matrix product does. What decides is each pair's cosine in float64: of most pairs the block says on which side of
the bound they are, and the others are looked at again. So the outcome hangs neither on blocks nor on threads.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from itertools import islice
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from rose_ray.errors import ConfigError, NonFiniteError, ShapeError

_BLOCK_ROWS = 256
_CHUNK_ROWS = 1024
_ERROR_PER_NUMBER = 2.0**-23
"""Twice the most that float32 adds to the error of a product of unit vectors with every number of theirs."""


class Cosines(Protocol):
    """Cosines of rows in some form, X numbers a row."""

    def check(self, row_X: NDArray[Any]) -> None:
        """Raise NonFiniteError where a row is none of the form's."""
        ...

    def error(self, width: int) -> float:
        """Return the most by which `blockwise` may differ from `exactly` at X = ``width``."""
        ...

    def blockwise(self, rows_BX: NDArray[Any], kept_KX: NDArray[Any]) -> NDArray[np.floating]:
        """Return the cosines of rows with rows, [B, K]."""
        ...

    def exactly(self, row_X: NDArray[Any], kept_X: NDArray[Any]) -> float:
        """Return one cosine in float64, the same wherever the two rows stand."""
        ...


class UnitCosines:
    """Of unit vectors in float32."""

    def check(self, row_X: NDArray[Any]) -> None:
        """See `Cosines`."""
        if not abs(float(np.linalg.norm(row_X)) - 1) < 1e-3:
            raise NonFiniteError(f"its vector has length {np.linalg.norm(row_X)}; expected 1")

    def error(self, width: int) -> float:
        """See `Cosines`."""
        return _ERROR_PER_NUMBER * width

    def blockwise(self, rows_BX: NDArray[Any], kept_KX: NDArray[Any]) -> NDArray[np.floating]:
        """See `Cosines`."""
        cosines_BK: NDArray[np.floating] = rows_BX @ kept_KX.T
        return cosines_BK

    def exactly(self, row_X: NDArray[Any], kept_X: NDArray[Any]) -> float:
        """See `Cosines`."""
        return float(row_X.astype(np.float64) @ kept_X.astype(np.float64))


def unit_vectors(vectors_ND: NDArray[np.floating]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Return rows over their lengths, float32, and which rows have a direction: finite ones that are not zero.

    Rows without one come back as zeros.
    """
    rows_ND = vectors_ND.astype(np.float64)
    finite_N = np.isfinite(rows_ND).all(axis=1)
    rows_ND[~finite_N] = 0.0
    largest_N = np.abs(rows_ND).max(axis=1, initial=0.0)
    rows_ND /= np.where(largest_N > 0, largest_N, 1.0)[:, None]  # the square of a tiny number would be zero
    lengths_N = np.linalg.norm(rows_ND, axis=1)
    units_ND = (rows_ND / np.where(lengths_N > 0, lengths_N, 1.0)[:, None]).astype(np.float32)
    return units_ND, lengths_N > 0


class CosineFilter:
    """Says of rows, in order, whether their cosine with every row kept so far is at most a bound.

    In memory is every row that waits or was kept. The same rows in the same order give the same answers.

    Args:
        max_cosine: The bound, in (0, 1); a cosine that equals it is allowed.
        cosines: What compares rows; None for unit vectors in float32.

    Raises:
        ConfigError: The bound is another number.
    """

    def __init__(self, max_cosine: float, cosines: Cosines | None = None) -> None:
        if not 0 < max_cosine < 1:
            raise ConfigError(f"max_cosine is {max_cosine}; expected a number between 0 and 1, both excluded")
        self._bound, self._cosines = max_cosine, cosines or UnitCosines()
        self._waiting: OrderedDict[int, NDArray[Any]] = OrderedDict()
        self._unmeasured: OrderedDict[int, None] = OrderedDict()
        self._measured: dict[int, tuple[int | None, int]] = {}
        self._kept_labels: list[int] = []
        self._chunks: list[NDArray[Any]] = []

    def __contains__(self, label: int) -> bool:
        """Whether the row waits."""
        return label in self._waiting

    def add(self, label: int, row_X: NDArray[Any]) -> None:
        """Let a row wait; rows that come first should be asked about first.

        Args:
            label: Of the row, another one than those of rows that wait or were kept.
            row_X: The row, kept as it is.

        Raises:
            ShapeError: It has another shape or type than the rows before it.
            NonFiniteError: It cannot be compared.
        """
        known = next(iter(self._waiting.values()), self._chunks[0][0] if self._chunks else row_X)
        if row_X.shape != known.shape or row_X.dtype != known.dtype:
            raise ShapeError(f"row {label}: {row_X.dtype} {row_X.shape}; expected {known.dtype} {known.shape}")
        try:
            self._cosines.check(row_X)
        except NonFiniteError as error:
            raise NonFiniteError(f"row {label}: {error}") from None
        self._waiting[label] = row_X
        self._unmeasured[label] = None

    def find(self, label: int) -> int | None:
        """Return the row kept first to which a waiting row is too near, or None where there is none."""
        if label not in self._measured:
            self._measure(label)
        found, num_compared = self._measured[label]
        if found is None and num_compared < len(self._kept_labels):
            (found,) = self._compare(self._waiting[label][None], num_compared)
            self._measured[label] = found, len(self._kept_labels)
        return found

    def keep(self, label: int) -> None:
        """Keep a waiting row: others are compared with it from now on."""
        place = len(self._kept_labels) % _CHUNK_ROWS
        row_X = self._waiting[label]
        if place == 0:
            self._chunks.append(np.empty((_CHUNK_ROWS, len(row_X)), row_X.dtype))
        self._chunks[-1][place] = row_X
        self._kept_labels.append(label)
        self.drop(label)

    def drop(self, label: int) -> None:
        """Forget a waiting row."""
        del self._waiting[label]
        self._unmeasured.pop(label, None)
        self._measured.pop(label, None)

    def restart(self) -> None:
        """Keep nothing: rows that were kept wait again, before the others."""
        later, self._waiting, place = self._waiting, OrderedDict(), 0
        while self._chunks:
            chunk = self._chunks.pop(0)
            for label, row_X in zip(self._kept_labels[place : place + _CHUNK_ROWS], chunk, strict=False):
                self._waiting[label] = row_X.copy()
            place += _CHUNK_ROWS
        self._waiting.update(later)
        self._kept_labels, self._measured = [], {}
        self._unmeasured = OrderedDict.fromkeys(self._waiting)

    def _measure(self, label: int) -> None:
        """Compare a row, and those that wait behind the last one measured, with all rows kept so far."""
        del self._unmeasured[label]
        labels = [label, *islice(self._unmeasured, _BLOCK_ROWS - 1)]
        for other in labels[1:]:
            del self._unmeasured[other]
        found = self._compare(np.stack([self._waiting[each] for each in labels]), 0)
        for each, match in zip(labels, found, strict=True):
            self._measured[each] = match, len(self._kept_labels)

    def _compare(self, rows_BX: NDArray[Any], start: int) -> list[int | None]:
        """Return of each row the first kept one, from a place on, that it is too near to."""
        found: list[int | None] = [None] * len(rows_BX)
        error = self._cosines.error(rows_BX.shape[1])
        for first, kept_KX in self._kept_from(start):
            cosines_BK = self._cosines.blockwise(rows_BX, kept_KX)
            for row in np.flatnonzero(cosines_BK.max(axis=1) > self._bound - error).tolist():
                if found[row] is None:
                    found[row] = self._first(rows_BX[row], cosines_BK[row], kept_KX, first, error)
        return found

    def _kept_from(self, start: int) -> Iterator[tuple[int, NDArray[Any]]]:
        while start < len(self._kept_labels):
            number, place = divmod(start, _CHUNK_ROWS)
            filled = min(_CHUNK_ROWS, len(self._kept_labels) - number * _CHUNK_ROWS)
            yield start, self._chunks[number][place:filled]
            start = number * _CHUNK_ROWS + filled

    def _first(
        self, row_X: NDArray[Any], cosines_K: NDArray[np.floating], kept_KX: NDArray[Any], first: int, error: float
    ) -> int | None:
        for place in np.flatnonzero(cosines_K > self._bound - error).tolist():
            sure = cosines_K[place] > self._bound + error
            if sure or self._cosines.exactly(row_X, kept_KX[place]) > self._bound:
                return self._kept_labels[first + place]
        return None
