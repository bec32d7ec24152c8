"""Which samples go through the model together: sorted by length, bounded by tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from rose_ray.data.tokenize import Sample

BATCH_COST = 192
"""What a batch costs beside its positions, in positions: what is read or launched once a batch.

So weighed, a real pool in shards of 512 rows has some 4 % padding, however large batches may be. At no cost at all,
every length would be a batch of its own.
"""


def length_batches(lengths: Sequence[int], max_batch_tokens: int, *, multiple: int = 1) -> list[list[int]]:
    """Group samples of like length, at the least cost: positions, padding included, and `BATCH_COST` a batch.

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
    # Positions that a row of each group takes where that group is the first, so the longest, of its batch.
    widths_G = np.array([multiple * max(lengths[i] for i in group) for group in groups], dtype=np.int64)
    least_G = np.zeros(len(groups) + 1, dtype=np.int64)  # of the first groups, so many
    starts, low = [0] * (len(groups) + 1), 0
    for stop in range(1, len(groups) + 1):
        while low < stop - 1 and (stop - low) * widths_G[low] > max_batch_tokens:
            low += 1
        costs = least_G[low:stop] + np.arange(stop - low, 0, -1) * widths_G[low:stop] + BATCH_COST
        starts[stop] = low + int(costs.argmin())
        least_G[stop] = costs.min()
    batches, stop = list[list[int]](), len(groups)
    while stop:
        batches.append([index for group in groups[starts[stop] : stop] for index in group])
        stop = starts[stop]
    return batches[::-1]


@dataclass(frozen=True)
class DealtBatches:
    """What one of several ranks runs, in step with the others: all have equally many batches.

    Attributes:
        samples: Places of the rank's samples in the whole.
        batches: Places in ``samples``; an empty one only keeps the rank in step.
        filler: Tokens of the shortest sample, run where a batch is empty.
    """

    samples: list[int]
    batches: list[list[int]]
    filler: Sample


def deal_batches(samples: Sequence[Sample], max_batch_tokens: int, num_ranks: int) -> list[DealtBatches]:
    """Deal the batches of `length_batches` to ranks in turn, so that those run together are of like length.

    Args:
        samples: Of a shard.
        max_batch_tokens: As there.
        num_ranks: Ranks that share a model.
    """
    if not samples:
        return [DealtBatches([], [], Sample([], []))] * num_ranks
    lengths = [len(sample.input_ids) for sample in samples]
    batches = length_batches(lengths, max_batch_tokens)
    rounds = -(-len(batches) // num_ranks)
    filler = samples[min(range(len(samples)), key=lambda place: lengths[place])]
    dealt = []
    for rank in range(num_ranks):
        own = batches[rank::num_ranks]
        places = [place for batch in own for place in batch]
        starts = np.cumsum([0, *map(len, own)])
        numbered = [list(range(start, stop)) for start, stop in pairwise(starts.tolist())]
        dealt.append(DealtBatches(places, numbered + [[] for _ in range(rounds - len(own))], filler))
    return dealt


def padding_fraction(lengths: Sequence[int], batches: Sequence[Sequence[int]]) -> float:
    """Share of the positions in ``batches`` that are padding."""
    total = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    return 1 - sum(lengths[i] for batch in batches for i in batch) / total if total else 0.0
