"""Equal rows by their digests: 16 bytes a row, whatever the texts weigh.

Shape suffixes: N rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

DIGEST_BYTES = 16

Words = npt.NDArray[np.uint64]
Places = npt.NDArray[np.int64]


def digest_words(digests: Iterable[bytes]) -> Words:
    """Return digests of `DIGEST_BYTES` bytes as uint64 [N, 2]."""
    return np.frombuffer(b"".join(digests), dtype=">u8").reshape(-1, 2).astype(np.uint64)


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


def is_sampled(row_id: str, fraction: float, seed: int) -> bool:
    """Whether a row belongs to a share of the pool: decided by its content and the seed alone."""
    if fraction >= 1.0:
        return True
    digest = hashlib.sha256(f"{seed}:{row_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < fraction
