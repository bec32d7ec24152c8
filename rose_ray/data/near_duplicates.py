"""Texts that are nearly the same: by equal words; by MinHash of runs of words in `min_hash`.

Finders keep what they were told to keep and say which of it a new text resembles. Two texts without a word are
compared as they are.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from typing import Any

from rose_ray.data.words import words


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
    """Texts of equal words in equal order. Some 200 bytes a kept text."""

    def __init__(self) -> None:
        self._kept: dict[bytes, int] = {}

    def signature(self, text: str) -> bytes:
        """Return a digest of the words, 16 bytes."""
        return hashlib.blake2b("\0".join(text_words(text)).encode(), digest_size=16).digest()

    def find(self, signature: bytes) -> int | None:
        """See the base class."""
        return self._kept.get(signature)

    def keep(self, number: int, signature: bytes) -> None:
        """See the base class."""
        self._kept.setdefault(signature, number)

    def forget(self) -> None:
        """See the base class."""
        self._kept = {}


def text_words(text: str) -> list[str]:
    """Return a text's words; of one without a word its pieces between spaces."""
    return words(text) or text.split()
