"""Near-duplicates against sets of word runs compared one pair at a time."""

from __future__ import annotations

from random import Random

import pytest

from rose_ray.data.min_hash import SimilarShingles, similarity
from rose_ray.data.near_duplicates import EqualWords, NearDuplicateFinder
from rose_ray.data.words import words
from tests.tiny import WORDS, sentence


def first_of(texts: list[str], finder: NearDuplicateFinder) -> list[int]:
    """The text that each one resembles, itself where it is the first of its kind; only firsts are kept."""
    found = []
    for number, text in enumerate(texts):
        signature = finder.signature(text)
        kept = finder.find(signature)
        if kept is None:
            finder.keep(number, signature)
        found.append(number if kept is None else kept)
    return found


def jaccard(one: str, other: str, size: int) -> float:
    """Share of word runs that two texts have in common."""
    runs = []
    for text in (one, other):
        tokens = words(text)
        runs.append({tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)} or {tuple(tokens)})
    return len(runs[0] & runs[1]) / len(runs[0] | runs[1])


def test_equal_words() -> None:
    texts = ["Hello, World!", "hello   world", "hello worlds", "!!!", "???", "  hello-world ", "!!!"]
    assert first_of(texts, EqualWords()) == [0, 0, 2, 3, 4, 0, 3]


def test_runs_of_words_against_sets() -> None:
    random = Random(0)
    texts = [sentence(random, 60, WORDS) for _ in range(12)]
    for number in range(12):
        changed = texts[number].split()
        changed[number % 2 * 59] = "changed"  # the first or the last word: 2 of 112 different runs
        texts.append(" ".join(changed).upper())
        texts.append(" ".join(texts[number].split()[:30] + sentence(random, 30, WORDS).split()))  # half of it
    size, threshold = 5, 0.8
    expected = []
    for number, text in enumerate(texts):
        like = [other for other in dict.fromkeys(expected) if jaccard(text, texts[other], size) >= threshold]
        expected.append(like[0] if like else number)
    values = [jaccard(a, b, size) for i, a in enumerate(texts) for b in texts[:i]]
    # Nothing lies within four standard errors (0.035 at the threshold with 128 hashes) of where estimates could err.
    assert not [value for value in values if 0.6 < value < 0.94]
    assert first_of(texts, SimilarShingles(threshold, size, 128)) == expected
    assert 1 < len(set(expected)) < len(texts)


def test_the_estimate_is_near_the_similarity() -> None:
    random = Random(1)
    base = sentence(random, 200).split()
    finder = SimilarShingles(0.5, 3, 1024)
    for kept in (180, 140, 100):
        other = " ".join(base[:kept])
        estimate = similarity(finder.signature(" ".join(base)), finder.signature(other))
        true = jaccard(" ".join(base), other, 3)
        # Four standard errors of a share of 1,024 hash functions.
        assert abs(estimate - true) < 4 * (true * (1 - true) / 1024) ** 0.5


def test_short_texts_and_texts_without_words() -> None:
    texts = ["Yes", "yes!", "no", "\u263a", "\u263a", "\u2639"]
    assert first_of(texts, SimilarShingles(0.8, 5, 64)) == [0, 0, 2, 3, 3, 5]


@pytest.mark.parametrize("threshold", [0.05, 0.5, 0.99])
def test_a_text_resembles_itself_at_any_threshold(threshold: float) -> None:
    text = sentence(Random(2), 40)
    finder = SimilarShingles(threshold, 5, 128)
    assert first_of([text, text], finder) == [0, 0]
    finder.forget()
    assert first_of([text], finder) == [0]


def test_the_text_kept_first_is_named() -> None:
    finder = SimilarShingles(0.3, 1, 128)
    for number, text in ((7, "a b c d"), (3, "a b c e")):
        finder.keep(number, finder.signature(text))
    assert finder.find(finder.signature("a b c d")) == 7
