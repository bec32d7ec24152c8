"""ROUGE-L of two texts.

Shapes: N words of the reference.
"""

from __future__ import annotations

import re

import numpy as np

_WORD = re.compile(r"\w+")


def rouge_l(candidate: str, reference: str) -> float:
    """F1 of the longest common subsequence of words, in [0, 1] (Lin 2004, with equal weights and without stemming).

    Words are runs of letters, digits and underscores, without case. 0 where either text has none.
    """
    ours, theirs = _words(candidate), _words(reference)
    if not ours or not theirs:
        return 0.0
    numbers = {word: number for number, word in enumerate(dict.fromkeys([*ours, *theirs]))}
    theirs_N = np.array([numbers[word] for word in theirs])
    best_N = np.zeros(len(theirs_N) + 1, dtype=np.int64)
    for word in ours:
        # One row of the usual table: extend the diagonal where words agree, else the better neighbour. What comes from
        # the left is a running maximum.
        extended_N = np.where(theirs_N == numbers[word], best_N[:-1] + 1, best_N[1:])
        best_N[1:] = np.maximum.accumulate(extended_N)
    common = int(best_N[-1])
    return 2 * common / (len(ours) + len(theirs))


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())
