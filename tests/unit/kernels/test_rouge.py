"""ROUGE-L against the table written out."""

from __future__ import annotations

from random import Random

import pytest

from rose_ray.kernels.rouge import rouge_l

ROUNDING = 1e-12


def _slow(ours: list[str], theirs: list[str]) -> float:
    table = [[0] * (len(theirs) + 1) for _ in range(len(ours) + 1)]
    for i, a in enumerate(ours, start=1):
        for j, b in enumerate(theirs, start=1):
            table[i][j] = table[i - 1][j - 1] + 1 if a == b else max(table[i - 1][j], table[i][j - 1])
    return 2 * table[-1][-1] / (len(ours) + len(theirs))


def test_equals_the_table() -> None:
    random = Random(0)
    for _ in range(50):
        ours, theirs = (random.choices("abcd", k=random.randint(1, 12)) for _ in range(2))
        assert rouge_l(" ".join(ours), " ".join(theirs)) == pytest.approx(_slow(ours, theirs), abs=ROUNDING)


def test_by_hand() -> None:
    # "the cat" is common: 2 of 3 words and 2 of 5
    assert rouge_l("The dog, cat", "the big old black cat") == pytest.approx(2 * 2 / 8, abs=ROUNDING)
    assert rouge_l("Same words.", "same WORDS!") == 1.0
    assert rouge_l("", "a") == rouge_l("!", "a") == 0.0
