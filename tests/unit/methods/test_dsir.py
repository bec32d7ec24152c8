"""DSIR against a slow form with dictionaries, and against numbers worked out by hand."""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from random import Random

import numpy as np
import pytest

from rose_ray.errors import PairError, ShapeError
from rose_ray.kernels.lexical import log_importance, ngram_buckets
from rose_ray.methods.seeded import row_gumbels
from tests.methods import make_method, make_pair, make_rows, score_parts, split
from tests.tiny import UNUSUAL, sentence

BUCKETS = 97
PAIRS = [
    make_pair("Water, stone!", "river green", subtask="one", number=0),
    make_pair("water apple", "winter", subtask="one", number=1),
    make_pair("coffee?", "silver market", subtask="two", number=2),
]


def a_pool() -> list[tuple[str, str]]:
    random = Random(1)
    return [(f"{sentence(random, 4)} {n}", f"{sentence(random, 9)} {UNUSUAL[n % len(UNUSUAL)]}") for n in range(40)]


def slow_buckets(text: str) -> Counter[int]:
    words = re.findall(r"\w+|[^\w\s]+", text.lower())
    ngrams = words + [" ".join(words[place : place + 2]) for place in range(len(words) - 1)]
    digests = [hashlib.blake2b(ngram.encode(), digest_size=8).hexdigest() for ngram in ngrams]
    return Counter(int(digest, 16) % BUCKETS for digest in digests)


def slow_weights(texts: list[str], target_texts: list[str], smoothing: str) -> list[float]:
    def probabilities(some: list[str]) -> list[float]:
        counts = Counter[int]()
        for text in some:
            counts += slow_buckets(text)
        added = 1 if smoothing == "laplace" else 0
        total = sum(counts.values()) + added * BUCKETS
        return [(counts[bucket] + added) / total + (1e-8 if smoothing == "epsilon" else 0) for bucket in range(BUCKETS)]

    target, raw = probabilities(target_texts), probabilities(texts)
    ratios = [math.log(p) - math.log(q) for p, q in zip(target, raw, strict=True)]
    return [sum(count * ratios[bucket] for bucket, count in slow_buckets(text).items()) for text in texts]


@pytest.mark.parametrize("smoothing", ["laplace", "epsilon"])
def test_agrees_with_the_slow_form(smoothing: str) -> None:
    texts, rows = [f"{q}\n{a}" for q, a in a_pool()], make_rows(a_pool())
    method = make_method("dsir", buckets=BUCKETS, sampling="top_k", smoothing=smoothing)
    found = score_parts(method, split(rows, 6), PAIRS)
    first = slow_weights(texts, ["Water, stone!\nriver green", "water apple\nwinter"], smoothing)
    second = slow_weights(texts, ["coffee?\nsilver market"], smoothing)
    # Sums of some twenty float64 logarithms, in another order.
    np.testing.assert_allclose(found, np.stack([first, second], axis=1), rtol=1e-11, atol=1e-11)


def test_worked_by_hand() -> None:
    # Three buckets. Target: 3 + 1, 0 + 1, 1 + 1 of 7. Pool: 1 + 1, 3 + 1, 0 + 1 of 7.
    found = log_importance(np.array([[3, 0, 1]]), np.array([1, 3, 0]), "laplace")
    np.testing.assert_allclose(found, [[math.log(2), -math.log(4), math.log(2)]], rtol=1e-14)  # one rounding each
    counts = np.array([2, 1, 0])
    assert (counts @ found[0]) == pytest.approx(2 * math.log(2) - math.log(4), abs=1e-14)  # 0 but for roundings


def test_buckets_are_of_words_and_of_neighbours_and_the_same_on_every_machine() -> None:
    assert ngram_buckets(["a", "b", "a"], 10_000) == Counter({3343: 2, 9333: 1, 5384: 1, 2770: 1})
    assert ngram_buckets([], 10) == Counter()


def test_gumbel_numbers_are_added_by_row_and_seed() -> None:
    rows = make_rows(a_pool())
    plain = score_parts(make_method("dsir", sampling="top_k"), [rows], PAIRS)
    drawn = score_parts(make_method("dsir", seed=5), split(rows, 3), PAIRS)
    np.testing.assert_allclose(drawn - plain, np.tile(row_gumbels(rows.row_ids, 5)[:, None], 2), atol=1e-12)
    assert not np.allclose(drawn, score_parts(make_method("dsir", seed=6), [rows], PAIRS))


def test_gumbel_top_k_draws_by_weight() -> None:
    weights = np.log(np.array([0.6, 0.3, 0.1]))
    ids = ["a", "b", "c"]
    first = Counter(int(np.argmax(weights + row_gumbels(ids, seed))) for seed in range(4000))
    # Three standard deviations of a share in 4,000 draws are at most 0.024.
    assert [first[number] / 4000 for number in range(3)] == pytest.approx([0.6, 0.3, 0.1], abs=0.024)


def test_pairs_without_a_word_are_refused() -> None:
    with pytest.raises(PairError, match="no word in the pairs of subtask 'two'"):
        score_parts(
            make_method("dsir"),
            [make_rows(a_pool())],
            [make_pair("a", "b", subtask="one"), make_pair(" ", " ", subtask="two")],
        )
    with pytest.raises(ShapeError, match="no n-gram"):
        log_importance(np.zeros((1, 3)), np.ones(3), "epsilon")
    with pytest.raises(ShapeError, match=r"expected \[T, B\]"):
        log_importance(np.zeros((1, 3)), np.ones(4), "laplace")
