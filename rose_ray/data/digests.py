"""Equal rows by their digests: 16 bytes a row, whatever the texts weigh.

Shape suffixes: N rows.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rose_ray.errors import AlteredFileError

DIGEST_BYTES = 16

_NO_DIGIT = 255
_DIGIT_VALUES = np.full(256, _NO_DIGIT, dtype=np.uint8)
_DIGIT_VALUES[np.frombuffer(b"0123456789abcdef", dtype=np.uint8)] = np.arange(16)

Words = npt.NDArray[np.uint64]
Places = npt.NDArray[np.int64]


def digest_words(digests: Iterable[bytes]) -> Words:
    """Return digests of `DIGEST_BYTES` bytes as uint64 [N, 2]."""
    return np.frombuffer(b"".join(digests), dtype=">u8").reshape(-1, 2).astype(np.uint64)


def row_id_words(row_ids: pa.Array | pa.ChunkedArray) -> Words:
    """Return row ids, hex digests of `DIGEST_BYTES` bytes, as uint64 [N, 2]. Words sort as the ids do.

    Raises:
        AlteredFileError: One is not 32 hex digits in lower case.
    """
    column = row_ids.combine_chunks() if isinstance(row_ids, pa.ChunkedArray) else row_ids
    if len(column) == 0:
        return digest_words([])
    _, offsets, characters = column.buffers()
    start = column.offset
    offsets_N = np.frombuffer(offsets, dtype=np.int32)[start : start + len(column) + 1]
    digits = np.frombuffer(characters, dtype=np.uint8)[offsets_N[0] : offsets_N[-1]]
    values = _DIGIT_VALUES[digits]
    if (np.diff(offsets_N) != 2 * DIGEST_BYTES).any() or (values == _NO_DIGIT).any():
        bad = next(each for each in column.to_pylist() if not re.fullmatch("[0-9a-f]{32}", each))
        raise AlteredFileError(f"row id {bad!r}: expected 32 hex digits. Its file was altered; make it again.")
    pairs = values.reshape(-1, 2)
    return (pairs[:, 0] << 4 | pairs[:, 1]).view(">u8").reshape(-1, 2).astype(np.uint64)


def first_places(words_N2: Words) -> Places:
    """Return, for every row, the place of the first row with the same digest: int64 [N].

    A row is the first of its kind where the result is its own place. Memory: some 50 bytes a row.
    """
    num_rows = len(words_N2)
    # lexsort is stable, so the earliest row of a kind comes first among its equals.
    order_N = np.lexsort((words_N2[:, 1], words_N2[:, 0]))
    sorted_N2 = words_N2[order_N]
    starts_N = np.ones(num_rows, dtype=bool)
    starts_N[1:] = (sorted_N2[1:] != sorted_N2[:-1]).any(axis=1)
    kinds_N = np.cumsum(starts_N) - 1
    first_N = np.empty(num_rows, dtype=np.int64)
    first_N[order_N] = order_N[np.flatnonzero(starts_N)][kinds_N]
    return first_N


class DigestIndex:
    """Finds digests among those given. Some 24 bytes a digest are kept, some 50 while it is made.

    Args:
        words_N2: All different.
    """

    def __init__(self, words_N2: Words) -> None:
        self._order_N = np.lexsort((words_N2[:, 1], words_N2[:, 0]))
        self._high_N, self._low_N = words_N2[self._order_N, 0], words_N2[self._order_N, 1]

    def places(self, words_M2: Words) -> Places:
        """Return the place of each digest among those given at first, -1 where it is not there: int64 [M]."""
        first_M = np.searchsorted(self._high_N, words_M2[:, 0], side="left")
        end_M = np.searchsorted(self._high_N, words_M2[:, 0], side="right")
        places_M = np.full(len(words_M2), -1, dtype=np.int64)
        # Hardly ever more than one: digests that share their first half.
        for step in range(int((end_M - first_M).max(initial=0))):
            rows = np.flatnonzero(first_M + step < end_M)
            at = first_M[rows] + step
            same = self._low_N[at] == words_M2[rows, 1]
            places_M[rows[same]] = self._order_N[at[same]]
        return places_M


def is_sampled(row_id: str, fraction: float, seed: int) -> bool:
    """Whether a row belongs to a share of the pool: decided by its content and the seed alone."""
    if fraction >= 1.0:
        return True
    digest = hashlib.sha256(f"{seed}:{row_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < fraction
