"""Rows one after the other, each kept only while it is unlike all that were kept: DEITA's filter (arXiv:2312.15685).

Shapes: B rows measured together, K kept rows, D numbers of a row's vector.

Rows wait in the order in which they will be asked about, and are compared with the kept ones a block at a time, which
one matrix product does. What decides is each pair's float64 product: float32 says of most pairs on which side of the
bound they are, and the others are looked at again. So the outcome hangs neither on blocks nor on threads.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from rose_ray.errors import ConfigError, NonFiniteError, ShapeError

_BLOCK_ROWS = 256
_CHUNK_ROWS = 1024
_ERROR_PER_NUMBER = 2.0**-23
"""Twice the most that float32 adds to the error of a product of unit vectors with every number of theirs."""


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

    In memory are 4 D bytes a row that waits or was kept. The same rows in the same order give the same answers.

    Args:
        max_cosine: The bound, in (0, 1); a cosine that equals it is allowed.

    Raises:
        ConfigError: The bound is another number.
    """

    def __init__(self, max_cosine: float) -> None:
        if not 0 < max_cosine < 1:
            raise ConfigError(f"max_cosine is {max_cosine}; expected a number between 0 and 1, both excluded")
        self._bound = max_cosine
        self._waiting: OrderedDict[int, NDArray[np.float32]] = OrderedDict()
        self._unmeasured: OrderedDict[int, None] = OrderedDict()
        self._measured: dict[int, tuple[int | None, int]] = {}
        self._kept_labels: list[int] = []
        self._chunks: list[NDArray[np.float32]] = []

    def __contains__(self, label: int) -> bool:
        """Whether the row waits."""
        return label in self._waiting

    def add(self, label: int, unit_D: NDArray[np.float32]) -> None:
        """Let a row wait; rows that come first should be asked about first.

        Args:
            label: Of the row, another one than those of rows that wait or were kept.
            unit_D: Its vector, of length 1, float32; kept as it is.

        Raises:
            ShapeError: It has another length than the vectors before it.
            NonFiniteError: It is not of length 1.
        """
        known = next(iter(self._waiting.values()), self._chunks[0][0] if self._chunks else unit_D)
        if unit_D.shape != known.shape or unit_D.dtype != np.float32:
            raise ShapeError(f"row {label}: {unit_D.dtype} {unit_D.shape}; expected float32 {known.shape}")
        if not abs(float(np.linalg.norm(unit_D)) - 1) < 1e-3:
            raise NonFiniteError(f"row {label}: its vector has length {np.linalg.norm(unit_D)}; expected 1")
        self._waiting[label] = unit_D
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
        unit_D = self._waiting[label]
        if place == 0:
            self._chunks.append(np.empty((_CHUNK_ROWS, len(unit_D)), np.float32))
        self._chunks[-1][place] = unit_D
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
            for label, unit_D in zip(self._kept_labels[place : place + _CHUNK_ROWS], chunk, strict=False):
                self._waiting[label] = unit_D.copy()
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

    def _compare(self, rows_BD: NDArray[np.float32], start: int) -> list[int | None]:
        """Return of each row the first kept one, from a place on, that it is too near to."""
        found: list[int | None] = [None] * len(rows_BD)
        error = _ERROR_PER_NUMBER * rows_BD.shape[1]
        for first, kept_KD in self._kept_from(start):
            cosines_BK = rows_BD @ kept_KD.T
            for row in np.flatnonzero(cosines_BK.max(axis=1) > self._bound - error).tolist():
                if found[row] is None:
                    found[row] = self._first(rows_BD[row], cosines_BK[row], kept_KD, first, error)
        return found

    def _kept_from(self, start: int) -> Iterator[tuple[int, NDArray[np.float32]]]:
        while start < len(self._kept_labels):
            number, place = divmod(start, _CHUNK_ROWS)
            filled = min(_CHUNK_ROWS, len(self._kept_labels) - number * _CHUNK_ROWS)
            yield start, self._chunks[number][place:filled]
            start = number * _CHUNK_ROWS + filled

    def _first(
        self,
        row_D: NDArray[np.float32],
        cosines_K: NDArray[np.float32],
        kept_KD: NDArray[np.float32],
        first: int,
        error: float,
    ) -> int | None:
        for place in np.flatnonzero(cosines_K > self._bound - error).tolist():
            sure = cosines_K[place] > self._bound + error
            if sure or float(row_D.astype(np.float64) @ kept_KD[place].astype(np.float64)) > self._bound:
                return self._kept_labels[first + place]
        return None
