"""Rows that hold test text, against comparing every run of words with every other."""

from __future__ import annotations

from random import Random

import pytest

from rose_ray.data.contamination import KnownTestText
from rose_ray.data.conversation import Message
from rose_ray.data.words import words
from tests.tiny import WORDS, sentence

LONG = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"


def known(*prompts: str, others: tuple[str, ...] = (), num_words: int = 13) -> KnownTestText:
    text = KnownTestText(num_words)
    for number, prompt in enumerate(prompts):
        text.add(f"item {number}", [prompt], others)
    return text


def turns(*contents: str) -> list[Message]:
    return [Message(("user", "assistant")[number % 2], content) for number, content in enumerate(contents)]


def test_thirteen_words_in_a_row_in_any_turn() -> None:
    text = known("unrelated", LONG)
    thirteen = " ".join(LONG.split()[1:])
    assert text.find(turns("q", f"Well: {thirteen.upper()}!")) == "item 1"
    assert text.find(turns(f"x {thirteen}", "a")) == "item 1"
    assert text.find(turns(" ".join(LONG.split()[:12]), "a")) is None
    assert text.find(turns(" ".join(LONG.split()[:7]), " ".join(LONG.split()[7:]))) is None  # over two turns


def test_short_prompts_must_be_the_whole_prompt() -> None:
    text = known("What is it?")
    assert text.find(turns("what is IT", "a")) == "item 0"
    assert text.find(turns("Hello", "Hi", "What is it?", "a")) == "item 0"
    assert text.find(turns("So what is it?", "a")) is None
    assert text.find(turns("q", "What is it?")) is None  # an answer is no prompt


def test_a_prompt_of_several_turns_is_one_prompt() -> None:
    text = KnownTestText(13)
    text.add("talk", ["Hi", "Hello", "And you?"])
    assert text.find(turns("Hi", "Hello", "And you?", "Fine")) == "talk"
    assert text.find(turns("Hi", "Fine")) is None and text.find(turns("And you?", "Fine")) is None


def test_answers_count_where_they_are_long() -> None:
    text = known("p", others=("yes", LONG))
    assert text.find(turns("yes", "yes")) is None
    assert text.find(turns("q", LONG)) == "item 0"


def test_all_items_that_a_row_holds_text_of() -> None:
    text = known(LONG, f"so {LONG}", "What is it?", "what IS it")
    assert text.find_all(turns(LONG, "a")) == {"item 0", "item 1"}
    assert text.find_all(turns(f"so {LONG}", "a")) == {"item 0", "item 1"}
    assert text.find_all(turns("What is it?", "a")) == {"item 2", "item 3"}
    assert text.find_all(turns("What is it?", LONG)) == {"item 0", "item 1", "item 2", "item 3"}
    assert text.find_all(turns("q", "What is it?")) == set() and text.find(turns(LONG)) == "item 0"


def test_texts_may_be_added_after_looking() -> None:
    text = known("unrelated", LONG)
    assert text.find(turns("q", f"{LONG[4:]} fifteen")) == "item 1"
    text.add("later", [f"{LONG[4:]} fifteen"])
    assert text.find_all(turns("q", f"{LONG[8:]} fifteen")) == {"later"}


def test_a_hit_by_hash_alone_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rose_ray.data.contamination._RunHashes._remember", lambda self, word: 7)
    text = known(" ".join("abcdefghijklm"))
    assert text.find(turns("q", " ".join("nopqrstuvwxyz"))) is None
    assert text.find(turns("q", " ".join("abcdefghijklm"))) == "item 0"


@pytest.mark.parametrize("size", [3, 5])
def test_against_every_pair_of_runs(size: int) -> None:
    random = Random(size)
    few = WORDS[:4]  # so that runs meet by chance
    prompts = [sentence(random, random.randint(1, 8), few) for _ in range(6)]
    text = known(*prompts, num_words=size)

    def slow(row: list[Message]) -> set[str]:
        held = set()
        for turn in row:
            tokens = words(turn.content)
            for number, prompt in enumerate(map(words, prompts)):
                for i in range(len(tokens) - size + 1):
                    for j in range(len(prompt) - size + 1):
                        if tokens[i : i + size] == prompt[j : j + size]:
                            held.add(f"item {number}")
                if turn.role == "user" and len(prompt) < size and tokens == prompt:
                    held.add(f"item {number}")
        return held

    rows = [turns(sentence(random, random.randint(1, 6), few), sentence(random, 4, few)) for _ in range(300)]
    found = [text.find_all(row) for row in rows]
    assert found == [slow(row) for row in rows]
    assert all((text.find(row) or "none") in (own or {"none"}) for row, own in zip(rows, found, strict=True))
    assert 0 < sum(map(bool, found)) < 300
