"""Drafts picked so that the length of an answer says nothing about its family."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from rose_ray.demo.families import Exchange

SHORTEST_ANSWER_TOKENS = 24
LONGEST_ANSWER_TOKENS = 43

_DRAFTS_PER_ROW = 1000


def answer_lengths(num_rows: int) -> list[int]:
    """Return the answer lengths, in tokens, that every family of ``num_rows`` rows has: spread evenly."""
    span = LONGEST_ANSWER_TOKENS - SHORTEST_ANSWER_TOKENS + 1
    return [SHORTEST_ANSWER_TOKENS + i % span for i in range(num_rows)]


def drafts_of_length(
    draft: Callable[[], Exchange],
    lengths: Sequence[int],
    num_tokens: Callable[[str], int],
    taken: set[Exchange],
) -> list[Exchange]:
    """Draw drafts until every length is met once by a draft that is not taken yet.

    Args:
        draft: Draws one exchange.
        lengths: Answer lengths in tokens, repeats allowed.
        num_tokens: Measures an answer.
        taken: Exchanges that are used already; the new ones are added.

    Returns:
        As many exchanges as ``lengths``, in the order drawn; their lengths are ``lengths`` as a multiset.
    """
    wanted = Counter(lengths)
    found: list[Exchange] = []
    for _ in range(_DRAFTS_PER_ROW * len(lengths)):
        if len(found) == len(lengths):
            return found
        exchange = draft()
        length = num_tokens(exchange.answer)
        if wanted[length] > 0 and exchange not in taken:
            wanted[length] -= 1
            taken.add(exchange)
            found.append(exchange)
    assert len(found) == len(lengths), f"no draft has one of the lengths {sorted(+wanted)}"
    return found
