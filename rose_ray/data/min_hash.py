"""Texts that are nearly the same by MinHash of runs of words."""

from __future__ import annotations

import numpy as np
from datasketch import MinHash, MinHashLSH

from rose_ray.data.near_duplicates import NearDuplicateFinder, text_words
from rose_ray.data.words import ngrams

_FAVOUR_RECALL = (0.1, 0.9)
"""Weights of false positives and negatives in the choice of bands: what the bands find is checked again anyway."""


class SimilarShingles(NearDuplicateFinder):
    """Texts whose sets of word runs have a Jaccard similarity of at least ``threshold``, as MinHash estimates it.

    The estimate's standard error is sqrt(s (1 - s) / num_hashes) at similarity s: 0.035 at 0.8 with 128. Locality
    sensitive hashing proposes, the estimate decides. A text shorter than a run is one run. Some 6 kB a kept text.

    Args:
        threshold: Between 0 and 1.
        shingle_words: Words of a run.
        num_hashes: Hash functions.
    """

    def __init__(self, threshold: float, shingle_words: int, num_hashes: int) -> None:
        self._threshold, self._size, self._num_hashes = threshold, shingle_words, num_hashes
        # The seed and scheme are fixed: signatures of equal texts are equal wherever they are made.
        self._empty = MinHash(num_perm=num_hashes, seed=1, scheme="affine32")
        self.forget()

    def signature(self, text: str) -> np.ndarray:
        """Return the smallest hash values, uint32 [num_hashes]."""
        tokens = text_words(text)
        shingles = set(ngrams(tokens, self._size)) or {" ".join(tokens)}
        sketch = self._empty.copy()
        sketch.update_batch([shingle.encode() for shingle in sorted(shingles)])
        values: np.ndarray = sketch.hashvalues
        return values

    def find(self, signature: np.ndarray) -> int | None:
        """See the base class."""
        for number in sorted(self._index.query(self._sketch(signature)), key=self._place.__getitem__):
            if similarity(signature, self._kept[number]) >= self._threshold:
                return int(number)
        return None

    def keep(self, number: int, signature: np.ndarray) -> None:
        """See the base class."""
        self._index.insert(number, self._sketch(signature), check_duplication=False)
        self._kept[number] = signature
        self._place[number] = len(self._place)

    def forget(self) -> None:
        """See the base class."""
        self._index = MinHashLSH(threshold=self._threshold, num_perm=self._num_hashes, weights=_FAVOUR_RECALL)
        self._kept: dict[int, np.ndarray] = {}
        self._place: dict[int, int] = {}

    def _sketch(self, signature: np.ndarray) -> MinHash:
        return MinHash(hashvalues=signature, permutations=self._empty.permutations, scheme="affine32")


def similarity(one: np.ndarray, other: np.ndarray) -> float:
    """Estimate the Jaccard similarity of two sets from their signatures, each [num_hashes]: the share that agrees."""
    return float(np.mean(one == other))
