"""Text that is measured on, and rows that hold some of it.

A row is contaminated where one of its turns has ``num_words`` words in a row in common with a test text, or where a
whole test prompt of fewer words equals one of its user turns, or all before its last turn. Words are those of
`rose_ray.data.words`, so case, punctuation and spacing do not matter. Answers shorter than that say nothing: half of
all rows would hold a "yes".

Shapes: W words of a turn, G runs of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from rose_ray.data.conversation import Message
from rose_ray.data.words import ngrams, words

RUN_WORDS = 13
"""Words in a row that are no accident, as in the decontamination of GPT-3 (arXiv:2005.14165, appendix C)."""

_FACTOR = 0x9E3779B97F4A7C15
"""Odd, so that no bit of an earlier word is lost when it is multiplied."""

_MOST_WORDS = 1 << 17
"""Words remembered with their hash: a pool's rare ones are hashed again instead of filling memory."""


class KnownTestText:
    """Test texts, by their runs of words. Some 180 bytes a word.

    Args:
        num_words: Length of a run.
    """

    def __init__(self, num_words: int = RUN_WORDS) -> None:
        self.num_words = num_words
        self.names: list[str] = []
        self._runs: dict[str, tuple[int, ...]] = {}
        self._short: dict[str, tuple[int, ...]] = {}
        self._hashes = _RunHashes(num_words)

    def add(self, name: str, prompt: Sequence[str], others: Iterable[str] = ()) -> None:
        """Learn a test item.

        Args:
            name: Of the item, for reports: its file and row.
            prompt: Turns of its prompt.
            others: Answers, options, passages: text that counts only where it is long.
        """
        own = (len(self.names),)  # one tuple for all its runs: a tuple each would double the memory
        self.names.append(name)
        turns = [words(turn) for turn in prompt]
        whole = [word for turn in turns for word in turn]
        if 0 < len(whole) < self.num_words:
            _learn(self._short, " ".join(whole), own)
        for turn in [*turns, *map(words, others)]:
            if len(turn) >= self.num_words:
                self._hashes.add(turn)
            for run in ngrams(turn, self.num_words):
                _learn(self._runs, run, own)

    def find(self, turns: Sequence[Message]) -> str | None:
        """Return the name of a test item that a row holds text of; None where it holds none."""
        items = next(self._hits(turns), None)
        return None if items is None else self.names[items[0]]

    def find_all(self, turns: Sequence[Message]) -> set[str]:
        """Return the names of all test items that a row holds text of."""
        return {self.names[number] for items in self._hits(turns) for number in items}

    def _hits(self, turns: Sequence[Message]) -> Iterator[tuple[int, ...]]:
        found = [words(turn.content) for turn in turns]
        prompts = [found[place] for place, turn in enumerate(turns) if turn.role == "user"]
        prompts.append([word for turn in found[:-1] for word in turn])
        for prompt in prompts:
            if len(prompt) < self.num_words and (items := self._short.get(" ".join(prompt))) is not None:
                yield items
        for turn_words in found:
            for start in self._hashes.starts(turn_words):
                run = " ".join(turn_words[start : start + self.num_words])
                if (items := self._runs.get(run)) is not None:  # else another run of the same hash
                    yield items


def _learn(items_of: dict[str, tuple[int, ...]], text: str, own: tuple[int]) -> None:
    known = items_of.setdefault(text, own)
    if known[-1] != own[0]:
        items_of[text] = known + own


class _RunHashes:
    """Hashes of runs, 8 bytes each: most turns of a pool hold no known run, and are done with in a few array steps."""

    def __init__(self, num_words: int) -> None:
        self._num_words = num_words
        self._new: list[NDArray[np.uint64]] = []
        self._sorted_H = np.empty(0, dtype=np.uint64)
        self._of_word: dict[str, int] = {}

    def add(self, tokens: Sequence[str]) -> None:
        """Learn all runs of words."""
        self._new.append(self._hashed(tokens))

    def starts(self, tokens: Sequence[str]) -> list[int]:
        """Return where runs begin whose hash is known."""
        if self._new:
            self._sorted_H = np.concatenate([self._sorted_H, *self._new])
            self._new = []
            self._sorted_H.sort()  # in place, and equal ones stay: either would double its memory
        if len(tokens) < self._num_words or not len(self._sorted_H):
            return []
        values_G = self._hashed(tokens)
        places_G = np.searchsorted(self._sorted_H, values_G)
        places_G[places_G == len(self._sorted_H)] = 0
        starts: list[int] = np.flatnonzero(self._sorted_H[places_G] == values_G).tolist()
        return starts

    def _hashed(self, tokens: Sequence[str]) -> NDArray[np.uint64]:
        known = self._of_word
        values_W = np.array([known.get(word) or self._remember(word) for word in tokens], dtype=np.uint64)
        count = len(tokens) - self._num_words + 1
        total_G = np.zeros(count, dtype=np.uint64)
        for place in range(self._num_words):
            total_G = total_G * np.uint64(_FACTOR) + values_W[place : place + count]
        return total_G

    def _remember(self, word: str) -> int:
        value = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
        if len(self._of_word) < _MOST_WORDS:
            self._of_word[word] = value
        return value
