"""Which samples go through the model together: sorted by length, bounded by tokens."""

from __future__ import annotations

from collections.abc import Sequence


def length_batches(lengths: Sequence[int], max_batch_tokens: int, *, multiple: int = 1) -> list[list[int]]:
    """Group samples of like length.

    Args:
        lengths: Tokens of each sample.
        max_batch_tokens: Bound on rows times longest row. A single group longer than that gets a batch of its own.
        multiple: Keep this many neighbours together (2 for the sides of a pair); divides ``len(lengths)``.

    Returns:
        Indices into ``lengths``, a list per batch, longest first. Depends on the lengths alone; ties keep their order.
    """
    assert len(lengths) % multiple == 0
    groups = [range(start, start + multiple) for start in range(0, len(lengths), multiple)]
    groups.sort(key=lambda group: -max(lengths[i] for i in group))
    batches: list[list[int]] = []
    longest = 0
    for group in groups:
        if not batches or (len(batches[-1]) + multiple) * longest > max_batch_tokens:
            batches.append([])
            longest = max(lengths[i] for i in group)
        batches[-1].extend(group)
    return batches


def padding_fraction(lengths: Sequence[int], batches: Sequence[Sequence[int]]) -> float:
    """Share of the positions in ``batches`` that are padding."""
    total = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    return 1 - sum(lengths[i] for batch in batches for i in batch) / total if total else 0.0
