"""How much of two texts is the same."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


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
