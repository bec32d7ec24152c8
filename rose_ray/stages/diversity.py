"""Rows that a selection passes over because their vector points where that of a better row does.

Shapes: N rows, D numbers of a vector.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import MappingProxyType

import numpy as np

from rose_ray.kernels.diversity import CosineFilter, unit_vectors
from rose_ray.kernels.feature_matrix import FeatureMatrix
from rose_ray.kernels.ranking import Positions
from rose_ray.kernels.sign_cosines import SignCosines, sign_rows
from rose_ray.stages.gates import Refused, TellingGate

TOO_SIMILAR, NO_VECTOR = "too_similar", "no_vector"

ReadVectors = Callable[[Positions], Iterable[tuple[Positions, FeatureMatrix]]]
"""Gives positions and vectors [N, D] of rows at positions that ascend, in parts and any order; not of rows without."""


class DiversityGate(TellingGate):
    """Lets rows through whose largest cosine with the rows taken before is at most a bound.

    It holds the vectors of rows that were taken and of those looked at and not yet decided: as many as the budget buys.

    Args:
        read: Reads rows' vectors.
        max_cosine: The bound, in (0, 1).
    """

    counted = MappingProxyType({TOO_SIMILAR: "too_similar", NO_VECTOR: "without_vector"})

    def __init__(self, read: ReadVectors, max_cosine: float) -> None:
        self._read = read
        self._max_cosine = max_cosine
        self._filter = CosineFilter(max_cosine)
        self._signs: int | None = None
        self._without: set[int] = set()
        self._seen: set[int] = set()
        self.refused = {}

    def restart(self) -> None:
        """Forget what was taken and refused; vectors of refused rows are read again."""
        self._filter.restart()
        self.refused = {}

    def knows(self, position: int) -> bool:
        """Whether the row's vector is here, or there is none."""
        return position in self._filter or position in self._without

    def look(self, positions: Positions) -> None:
        """Read rows' vectors."""
        found: dict[int, np.ndarray] = {}
        for places, vectors in self._read(np.sort(positions)):
            rows_NX, good_N = self._compared(vectors)
            # Rows of their own: a view would keep the vectors of its whole shard.
            found.update((int(place), rows_NX[row].copy()) for row, place in enumerate(places) if good_N[row])
        for position in positions.tolist():  # in the order of choice
            if position in found:
                self._filter.add(position, found.pop(position))
            else:
                self._without.add(position)
            self._seen.add(position)

    def _compared(self, vectors: FeatureMatrix) -> tuple[np.ndarray, np.ndarray]:
        """Return rows in the form that the filter compares, and which of them have a direction."""
        bits_NC = vectors.sign_bits
        if bits_NC is None:
            return unit_vectors(vectors.restored())
        if self._signs is None:
            self._signs, self._filter = vectors.dim, CosineFilter(self._max_cosine, SignCosines(vectors.dim))
        assert vectors.scales_N is not None
        if vectors.exact_NE is None:
            return sign_rows(bits_NC, vectors.scales_N, None)
        assert vectors.exact_NE.shape[1] == 1  # what a deflated projection keeps
        return sign_rows(bits_NC, vectors.scales_N, vectors.last_N)

    def admits(self, position: int) -> bool:
        """Whether the row has a vector that is unlike those taken."""
        if position in self._without:
            self.refused[position] = Refused(NO_VECTOR, "")
            return False
        match = self._filter.find(position)
        if match is not None:
            self._filter.drop(position)
            self.refused[position] = Refused(TOO_SIMILAR, match)
        return match is None

    def drop(self, position: int) -> None:
        """Free the vector of a row that another gate refused."""
        if position in self._filter:
            self._filter.drop(position)

    def take(self, position: int) -> None:
        """Learn that a row was chosen."""
        self._filter.keep(position)

    @property
    def num_known(self) -> int:
        """Rows that were looked at."""
        return len(self._seen)
