"""Scores from counts of words: BM25 and the importance weights of hashed n-grams.

Shapes: Q terms of the queries, V queries, B buckets, T distributions, K terms or buckets of one text.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rose_ray.errors import ShapeError

EPSILON = 1e-8
"""What DSIR's released code adds to probabilities before it takes logarithms."""


def inverse_document_frequencies(documents_with_Q: NDArray[Any], num_documents: int) -> NDArray[np.float64]:
    """Return ``log(1 + (N - n + 0.5) / (n + 0.5))`` for terms that n of N documents hold: float64 [Q], never negative.

    The variant that Lucene took up (Kamphuis et al., ECIR 2020): the original one is negative for frequent terms.
    """
    with_Q = documents_with_Q.astype(np.float64)
    found_Q: NDArray[np.float64] = np.log1p((num_documents - with_Q + 0.5) / (with_Q + 0.5))
    return found_Q


def bm25_scores(
    counts_K: NDArray[Any],
    idf_K: NDArray[np.float64],
    query_counts_KV: NDArray[Any],
    length: int,
    mean_length: float,
    *,
    k1: float,
    b: float,
) -> NDArray[np.float64]:
    """Return one document's BM25 score for every query: float64 [V].

    ``sum over terms of q * idf * f / (f + k1 * (1 - b + b * length / mean_length))`` with f occurrences in the document
    and q in the query (Robertson and Zaragoza 2009). The constant factor ``k1 + 1`` of some variants is left out.

    Args:
        counts_K: How often the document holds each of its terms that any query has.
        idf_K: Of these terms.
        query_counts_KV: How often each query has them.
        length: Terms of the document, all counted.
        mean_length: Of all documents.
        k1: How soon a term's repetitions stop to count.
        b: How much longer documents are held back; 0 not at all.

    Raises:
        ShapeError: The arrays differ in their terms.
    """
    if not len(counts_K) == len(idf_K) == len(query_counts_KV):
        raise ShapeError(f"{len(counts_K)} counts, {len(idf_K)} idf and {len(query_counts_KV)} query rows of terms")
    frequency_K = counts_K.astype(np.float64)
    weight_K = idf_K * frequency_K / (frequency_K + k1 * (1.0 - b + b * length / mean_length))
    scores_V: NDArray[np.float64] = (weight_K[:, None] * query_counts_KV).sum(axis=0)
    return scores_V


def ngram_buckets(words: Sequence[str], num_buckets: int) -> Counter[int]:
    """Return how often the hashed uni- and bigrams of a text fall into each bucket (DSIR, arXiv:2302.03169).

    The hash is the first 8 bytes of BLAKE2b of the n-gram, its words joined by a space, in UTF-8: the same everywhere.
    """
    ngrams = Counter(words)
    ngrams.update(f"{first} {second}" for first, second in pairwise(words))
    buckets: Counter[int] = Counter()
    for ngram, count in ngrams.items():
        digest = hashlib.blake2b(ngram.encode(), digest_size=8).digest()
        buckets[int.from_bytes(digest, "big") % num_buckets] += count
    return buckets


def log_importance(target_TB: NDArray[Any], raw_B: NDArray[Any], smoothing: str) -> NDArray[np.float64]:
    """Return ``log p_target - log p_raw`` of every bucket: float64 [T, B].

    Args:
        target_TB: Counts of n-grams of the targets' texts.
        raw_B: The same of the whole pool.
        smoothing: ``laplace``: 1 is added to every count of either side; ``epsilon``: 1e-8 to every probability.

    Raises:
        ShapeError: The buckets differ, or a side has no n-gram at all.
    """
    if target_TB.ndim != 2 or target_TB.shape[1:] != raw_B.shape:
        raise ShapeError(f"buckets of shape {target_TB.shape} and {raw_B.shape}; expected [T, B] and [B]")
    counts_SB = np.vstack([target_TB, raw_B[None]]).astype(np.float64)
    if smoothing == "laplace":
        counts_SB += 1.0
    totals_S = counts_SB.sum(axis=1, keepdims=True)
    if not totals_S.all():
        raise ShapeError("a side has no n-gram: its texts have no word")
    logs_SB = np.log(counts_SB / totals_S + (EPSILON if smoothing == "epsilon" else 0.0))
    return np.asarray(logs_SB[:-1] - logs_SB[-1])
