"""Words of texts in several scripts."""

from __future__ import annotations

import pytest

from rose_ray.data.words import ngrams, words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It's 3.5 -- OK?", ["it", "s", "3", "5", "ok"]),
        (
            "\uff26\uff35\uff2c\uff2c\u00a0Straße\n_x_",
            ["full", "strasse", "x"],
        ),  # NFKC narrows wide letters; ß folds to ss
        ("কলকাতা শহর", ["কলকাতা", "শহর"]),  # vowel signs stay with their letters
        ("東京はcity", ["東", "京", "は", "city"]),
        ("... !?", []),
    ],
)
def test_words(text: str, expected: list[str]) -> None:
    assert words(text) == expected


def test_ngrams() -> None:
    assert ngrams(["a", "b", "c"], 2) == ["a b", "b c"]
    assert ngrams(["a"], 2) == []
