"""Texts that say the same, or share a passage: words in a row, whatever their case and punctuation.

A passage is `PASSAGE_WORDS` words in a row, as in the decontamination of GPT-3 (arXiv:2005.14165, appendix C). Texts
that are too short for one count where they are equal. Words are runs of letters and digits, so a language that writes
no spaces has few of them and its passages are long.
"""

from __future__ import annotations

import difflib
import hashlib
import re
import unicodedata
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

PASSAGE_WORDS = 13
_WORD = re.compile(r"\w+")
_FACTOR = 0x9E3779B97F4A7C15
"""Odd, so that no bit of an earlier word is lost when it is multiplied."""


def words_of(text: str) -> list[str]:
    """Return the words of a text: NFKC, case folded, punctuation and white space left out."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def similarity(first: Sequence[str], second: Sequence[str], least: float = 0.0) -> float:
    """Return 2 M / (length + length), M the words in matching blocks (``difflib``); 1 for equal sequences.

    Args:
        first, second: Words.
        least: Where an upper bound is below it, that bound is returned: it costs less.
    """
    matcher = difflib.SequenceMatcher(None, first, second, autojunk=False)
    for bound in (matcher.real_quick_ratio, matcher.quick_ratio):
        if (most := bound()) < least:
            return most
    return matcher.ratio()


class Passages:
    """Passages and short texts of some owners, to look other texts up in.

    Memory: some 1.5 KB a passage. Hits by hash are checked word by word, so none is an accident.
    """

    def __init__(self) -> None:
        self._owners: dict[tuple[str, ...], set[str]] = {}
        self._hashes: set[int] = set()
        self._sorted_H: NDArray[np.uint64] | None = None
        self._word_hashes: dict[str, int] = {}

    def add(self, owner: str, text: str, *, whole: bool) -> None:
        """Add a text of an owner. ``whole``: where it is too short for a passage, look for equal texts."""
        words = words_of(text)
        if len(words) < PASSAGE_WORDS:
            if whole and words:
                self._owners.setdefault(tuple(words), set()).add(owner)
            return
        for start, value in enumerate(self._hashed(words).tolist()):
            self._hashes.add(value)
            self._owners.setdefault(tuple(words[start : start + PASSAGE_WORDS]), set()).add(owner)
        self._sorted_H = None

    def owners_of(self, text: str, *, whole: bool) -> set[str]:
        """Return the owners that share a passage with a text, or, where both are short and ``whole``, equal it."""
        words = words_of(text)
        if len(words) < PASSAGE_WORDS:
            return set(self._owners.get(tuple(words), ())) if whole else set()
        if self._sorted_H is None:
            self._sorted_H = np.array(sorted(self._hashes), dtype=np.uint64)
        if not len(self._sorted_H):
            return set()
        values_G = self._hashed(words)
        places_G = np.searchsorted(self._sorted_H, values_G)
        places_G[places_G == len(self._sorted_H)] = 0
        found: set[str] = set()
        for start in np.flatnonzero(self._sorted_H[places_G] == values_G).tolist():
            found |= self._owners.get(tuple(words[start : start + PASSAGE_WORDS]), set())
        return found

    def _hashed(self, words: Sequence[str]) -> NDArray[np.uint64]:
        """A number for every passage of the words."""
        known = self._word_hashes
        values = np.array([known.get(word) or self._remember(word) for word in words], dtype=np.uint64)
        count = len(words) - PASSAGE_WORDS + 1
        total_G = np.zeros(count, dtype=np.uint64)
        for place in range(PASSAGE_WORDS):
            total_G = total_G * np.uint64(_FACTOR) + values[place : place + count]
        return total_G

    def _remember(self, word: str) -> int:
        value = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
        if len(self._word_hashes) < _MOST_WORDS:
            self._word_hashes[word] = value
        return value


_MOST_WORDS = 1 << 20
"""Words remembered with their hash: a pool's rare ones are hashed again instead of filling memory."""


def strings_of(value: object) -> Iterator[tuple[str, str]]:
    """Yield every text in a parsed record with the key it stands under, those in lists under the list's key."""
    yield from _strings("", value)


def _strings(key: str, value: object) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        role = value.get("role")
        for name, item in value.items():
            yield from _strings(f"{role}.{name}" if isinstance(role, str) else str(name), item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(key, item)
