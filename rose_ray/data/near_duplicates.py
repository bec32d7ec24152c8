"""Texts that are nearly the same: by equal words, or by MinHash of runs of words.

Both finders keep what they were told to keep and say which of it a new text resembles. Two texts without a word are
compared as they are.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from datasketch import MinHash, MinHashLSH

from rose_ray.data.words import ngrams, words

_FAVOUR_RECALL = (0.1, 0.9)
"""Weights of false positives and negatives in the choice of bands: what the bands find is checked again anyway."""


class NearDuplicateFinder(ABC):
    """Remembers signatures of texts by number, and finds one that resembles another."""

    @abstractmethod
    def signature(self, text: str) -> Any:
        """Return what is compared of a text."""

    @abstractmethod
    def find(self, signature: Any) -> int | None:
        """Return the number of the text kept first among those that resemble this one; None where there is none."""

    @abstractmethod
    def keep(self, number: int, signature: Any) -> None:
        """Remember a text."""

    @abstractmethod
    def forget(self) -> None:
        """Forget all texts."""


class EqualWords(NearDuplicateFinder):
    """Texts of equal words in equal order. Some 150 bytes a kept text."""

    def __init__(self) -> None:
        self._kept: dict[bytes, int] = {}

    def signature(self, text: str) -> bytes:
        """Return a digest of the words, 16 bytes."""
        return hashlib.blake2b("\0".join(_tokens(text)).encode(), digest_size=16).digest()

    def find(self, signature: bytes) -> int | None:
        """See the base class."""
        return self._kept.get(signature)

    def keep(self, number: int, signature: bytes) -> None:
        """See the base class."""
        self._kept.setdefault(signature, number)

    def forget(self) -> None:
        """See the base class."""
        self._kept = {}


class SimilarShingles(NearDuplicateFinder):
    """Texts whose sets of word runs have a Jaccard similarity of at least ``threshold``, as MinHash estimates it.

    The estimate's standard error is sqrt(s (1 - s) / num_hashes) at similarity s: 0.035 at 0.8 with 128. Locality
    sensitive hashing proposes, the estimate decides. A text shorter than a run is one run. Some kilobytes a kept text.

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
        tokens = _tokens(text)
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


def _tokens(text: str) -> list[str]:
    return words(text) or text.split()
