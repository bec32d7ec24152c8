"""Random numbers that belong to rows: decided by a row's id and a seed, whatever shard or machine it is on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def row_words(row_ids: Sequence[str], seed: int) -> NDArray[np.uint64]:
    """Return 64 random bits a row: uint64 [N]."""
    digests = (hashlib.blake2b(f"{seed}:{row_id}".encode(), digest_size=8).digest() for row_id in row_ids)
    return np.frombuffer(b"".join(digests), dtype=">u8").astype(np.uint64)


def row_uniforms(row_ids: Sequence[str], seed: int) -> NDArray[np.float64]:
    """Return a number of the open interval (0, 1) a row: float64 [N]. The highest 52 of its bits count."""
    # The middles of 2**52 equal parts: neither 0 nor 1, so a logarithm of it and of 1 less it is finite.
    numbers_N: NDArray[np.float64] = ((row_words(row_ids, seed) >> np.uint64(12)).astype(np.float64) + 0.5) / 2.0**52
    return numbers_N


def row_gumbels(row_ids: Sequence[str], seed: int) -> NDArray[np.float64]:
    """Return a standard Gumbel number a row: float64 [N]. Added to log-weights, the k highest are a sample of k rows
    without replacement, drawn by weight (Kool et al., arXiv:1903.06059)."""
    numbers_N: NDArray[np.float64] = -np.log(-np.log(row_uniforms(row_ids, seed)))
    return numbers_N
