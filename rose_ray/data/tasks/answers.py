"""Whether an answer is the labelled one, written differently. In doubt it is: a pair needs a side that is wrong."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation

from rose_ray.data.words import words

_ARTICLES = frozenset(("a", "an", "the"))
_NUMBER = re.compile(r"[-+\u2212]?\s*[$€£]?\s*[-+]?(?:\d+(?:[,\u00a0 ]\d{3})*|\d*)(?:\.\d+)?\s*%?")
_CONCLUSION = re.compile(r"(?:####|\banswer is:?)[ \t]*(?=\S)", re.IGNORECASE)
_LONGEST_CONTAINED = 12
"""Words of the shorter answer up to which an answer inside another counts as the same."""


def final_answer(text: str) -> str:
    """Return what a worked solution concludes: the rest of the line behind the last ``####`` or ``answer is``.

    The whole text, without outer white space, where neither occurs.
    """
    found = list(_CONCLUSION.finditer(text))
    if not found:
        return text.strip()
    return text[found[-1].end() :].splitlines()[0].strip().removesuffix(".").strip()


def normalized_answer(text: str) -> str:
    """Return one form for answers that say the same.

    Numbers in one notation (``$1,000.00`` is ``1000``; the sign counts); else words (`rose_ray.data.words.words`)
    without the English articles, unless nothing else is there; else, where an answer has no word (brackets, signs), the
    characters without spaces.
    """
    number = _number(text)
    if number is not None:
        return number
    found = words(text)
    without = [word for word in found if word not in _ARTICLES]
    return " ".join(without or found) or "".join(unicodedata.normalize("NFKC", text).split())


def is_same_answer(answer: str, golds: Sequence[str]) -> bool:
    """Whether an answer says what one of the labelled ones says.

    Equal when normalised, or one holds the other as words in a row (``in 1971`` and ``1971``; a number only as a whole
    one). Errs on the side of equal.
    """
    own = normalized_answer(answer)
    return any(_agree(own, normalized_answer(gold)) for gold in golds)


def _agree(one: str, other: str) -> bool:
    if one == other:
        return True
    shorter, longer = sorted((one.split(" "), other.split(" ")), key=len)
    if not 0 < len(shorter) <= _LONGEST_CONTAINED or not any(map(str.isalnum, "".join(shorter))):
        return False
    return f" {' '.join(shorter)} " in f" {' '.join(longer)} "


def _number(text: str) -> str | None:
    plain = unicodedata.normalize("NFKC", text).strip().rstrip(".")
    if not any(character.isdigit() for character in plain) or not _NUMBER.fullmatch(plain):
        return None
    digits = re.sub(r"[^\d.\-\u2212]", "", plain).replace("\u2212", "-")
    try:
        value = Decimal(digits)
    except InvalidOperation:
        return None
    text = format(value.normalize(), "f")
    return "0" if value == 0 else text
