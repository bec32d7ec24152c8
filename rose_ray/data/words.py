"""Words of a text, for comparing texts whatever their case, punctuation, width and spacing."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import cache

_ONE_EACH = "\u0e00-\u0e7f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
"""Thai, kana and Han: written without spaces, so every character counts as a word."""


def words(text: str) -> list[str]:
    """Return the words of a text in order: NFKC, case folded, without punctuation and symbols.

    A word is a run of letters, digits and the marks that belong to them; a character of a script without spaces (Thai,
    kana, Han) is a word of its own. ``"It's 3.5"`` gives ``["it", "s", "3", "5"]``.
    """
    return _pattern().findall(unicodedata.normalize("NFKC", text).casefold())


def ngrams(tokens: Sequence[str], size: int) -> list[str]:
    """Return every run of ``size`` words, joined by spaces; [] where there are fewer."""
    return [" ".join(tokens[start : start + size]) for start in range(len(tokens) - size + 1)]


@cache
def _pattern() -> re.Pattern[str]:
    # Python's \w leaves out combining marks, without which Bengali or Telugu words would fall apart.
    marks = "".join(chr(code) for code in range(0x10000) if unicodedata.category(chr(code)) in ("Mn", "Mc", "Me"))
    letter = f"[^\\W_{_ONE_EACH}]"
    return re.compile(f"[{_ONE_EACH}]|{letter}(?:{letter}|[{marks}])*")
