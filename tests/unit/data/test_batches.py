"""Which samples go through the model together."""

from __future__ import annotations

from itertools import product
from random import Random

import numpy as np
import pytest

from rose_ray.data.batches import BATCH_COST, deal_batches, length_batches, padding_fraction
from rose_ray.data.tokenize import Sample


def test_every_sample_is_in_one_batch_and_none_is_over_the_bound() -> None:
    random = Random(0)
    for _ in range(50):
        lengths = [random.randint(1, 60) for _ in range(random.randint(1, 40))]
        bound = random.randint(10, 200)
        batches = length_batches(lengths, bound)
        assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
        for batch in batches:
            assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= bound


def cost(lengths: list[int], batches: list[list[int]]) -> int:
    return sum(len(batch) * max(lengths[i] for i in batch) + BATCH_COST for batch in batches)


def test_no_other_cut_of_the_sorted_samples_costs_less() -> None:
    random = Random(2)
    for _ in range(30):
        lengths = [random.choice((3, 40, 200, 201, 900)) + random.randint(0, 9) for _ in range(random.randint(1, 9))]
        bound = random.choice((300, 1000, 5000))
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        least = min(
            cost(lengths, batches)
            for cuts in product((False, True), repeat=len(order) - 1)
            for batches in [cut_up(order, cuts)]
            if all(len(batch) == 1 or len(batch) * lengths[batch[0]] <= bound for batch in batches)
        )
        assert cost(lengths, length_batches(lengths, bound)) == least


def cut_up(order: list[int], cuts: tuple[bool, ...]) -> list[list[int]]:
    batches = [[order[0]]]
    for index, begins in zip(order[1:], cuts, strict=True):
        if begins:
            batches.append([])
        batches[-1].append(index)
    return batches


@pytest.mark.parametrize("bound", [2048, 4096, 16_384, 65_536])
def test_padding_stays_low_however_large_batches_may_be(bound: int) -> None:
    # Lengths as instruction pools have them: median 120, one in seven above 300.
    lengths = np.random.default_rng(0).lognormal(np.log(120), 0.9, 512).astype(int).clip(8, 2048).tolist()
    assert padding_fraction(lengths, length_batches(lengths, bound)) < 0.05


def test_longest_first_and_ties_keep_their_order() -> None:
    assert length_batches([3, 9, 3, 9, 5], 18) == [[1, 3], [4, 0, 2]]
    assert length_batches([4, 4, 4], 100) == [[0, 1, 2]]


def test_a_sample_over_the_bound_goes_alone() -> None:
    assert length_batches([50, 2, 3], 10) == [[0], [2, 1]]


def test_sides_of_a_pair_stay_together_in_their_order() -> None:
    random = Random(1)
    lengths = [random.randint(1, 30) for _ in range(24)]
    for bound in (1, 40, 100, 10**6):
        for batch in length_batches(lengths, bound, multiple=2):
            assert all(odd == even + 1 and even % 2 == 0 for even, odd in zip(batch[::2], batch[1::2], strict=True))


def test_no_samples_make_no_batches() -> None:
    assert length_batches([], 10) == []
    assert padding_fraction([], []) == 0.0


def test_padding_fraction() -> None:
    assert padding_fraction([4, 2, 6], [[0, 1], [2]]) == pytest.approx(1 - 12 / 14)


@pytest.mark.parametrize(("num_samples", "num_ranks"), [(0, 2), (1, 3), (7, 2), (40, 3), (40, 4)])
def test_dealt_batches_hold_every_sample_once_and_keep_ranks_in_step(num_samples: int, num_ranks: int) -> None:
    random = Random(num_samples)
    samples = [Sample([1] * random.randint(4, 60), []) for _ in range(num_samples)]
    dealt = deal_batches(samples, 128, num_ranks)
    assert len(dealt) == num_ranks
    assert sorted(place for each in dealt for place in each.samples) == list(range(num_samples))
    assert len({len(each.batches) for each in dealt}) == 1
    for each in dealt:
        assert [place for batch in each.batches for place in batch] == list(range(len(each.samples)))
        for batch in each.batches:
            lengths = [len(samples[each.samples[place]].input_ids) for place in batch]
            assert not batch or len(batch) * max(lengths) <= 128
        assert all(len(each.filler.input_ids) <= len(sample.input_ids) for sample in samples)
    whole = length_batches([len(sample.input_ids) for sample in samples], 128)
    parts = [[each.samples[place] for place in batch] for each in dealt for batch in each.batches if batch]
    assert sorted(parts) == sorted(whole)  # the same batches as for one rank
