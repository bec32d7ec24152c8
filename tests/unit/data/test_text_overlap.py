"""Passages, words and similarity, against definitions written out."""

from __future__ import annotations

from random import Random

import pytest

from rose_ray.data.text_overlap import PASSAGE_WORDS, Passages, similarity, strings_of, words_of
from tests.tiny import sentence

FEW_WORDS = ["a", "b", "c"]
"""So few that passages repeat and nearly repeat all the time."""


def plain_owners(texts: dict[str, str], text: str) -> set[str]:
    def passages(one: str) -> set[tuple[str, ...]]:
        words = words_of(one)
        return {tuple(words[i : i + PASSAGE_WORDS]) for i in range(len(words) - PASSAGE_WORDS + 1)}

    return {owner for owner, own in texts.items() if passages(own) & passages(text)}


def test_words_leave_out_case_punctuation_and_form() -> None:
    assert words_of("Grüße, STRASSE\tx_1 — ﬁne!") == ["grüsse", "strasse", "x_1", "fine"]


@pytest.mark.parametrize("seed", range(5))
def test_owners_are_those_that_share_thirteen_words(seed: int) -> None:
    random = Random(seed)
    texts = {f"t{n}": sentence(random, random.randint(1, 40), FEW_WORDS) for n in range(30)}
    passages = Passages()
    for owner, text in texts.items():
        passages.add(owner, text, whole=False)
    found = 0
    for _ in range(200):
        text = sentence(random, 18, FEW_WORDS)
        text = text if random.random() < 0.5 else f"{texts['t3'][:30]} {text}"
        expected = plain_owners(texts, text)
        assert passages.owners_of(text, whole=False) == expected
        found += bool(expected)
    some = texts["t1"]
    assert passages.owners_of(some, whole=False) == plain_owners(texts, some)


def test_short_texts_count_where_they_are_equal_and_whole() -> None:
    passages = Passages()
    passages.add("prompt", "Why is the sky blue?", whole=True)
    passages.add("answer", "Yes.", whole=False)
    assert passages.owners_of("why is the SKY blue", whole=True) == {"prompt"}
    assert passages.owners_of("why is the SKY blue", whole=False) == set()
    assert passages.owners_of("Yes", whole=True) == set() and passages.owners_of("", whole=True) == set()


def test_a_hit_by_hash_alone_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Passages, "_remember", lambda self, word: 7)
    passages = Passages()
    passages.add("one", " ".join("abcdefghijklm"), whole=True)
    assert passages.owners_of(" ".join("nopqrstuvwxyz"), whole=True) == set()
    assert passages.owners_of(" ".join("abcdefghijklm"), whole=True) == {"one"}


def test_similarity_is_the_part_of_matching_words() -> None:
    assert similarity(["a", "b", "c", "d"], ["a", "b", "c", "e"]) == pytest.approx(0.75)
    assert similarity(["a"], ["a"]) == 1.0
    assert similarity(["a", "b"], ["c", "d"], least=0.9) < 0.9


def test_strings_come_with_their_keys_and_roles() -> None:
    record = {"id": "x", "messages": [{"role": "user", "content": "Hi"}], "options": ["a", 3], "more": {"q": "z"}}
    assert list(strings_of(record)) == [
        ("id", "x"),
        ("user.role", "user"),
        ("user.content", "Hi"),
        ("options", "a"),
        ("q", "z"),
    ]
