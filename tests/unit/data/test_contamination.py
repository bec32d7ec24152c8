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


@pytest.mark.parametrize("size", [3, 5])
def test_against_every_pair_of_runs(size: int) -> None:
    random = Random(size)
    few = WORDS[:4]  # so that runs meet by chance
    prompts = [sentence(random, random.randint(1, 8), few) for _ in range(6)]
    text = known(*prompts, num_words=size)

    def slow(row: list[Message]) -> bool:
        for turn in row:
            tokens = words(turn.content)
            for prompt in map(words, prompts):
                for i in range(len(tokens) - size + 1):
                    for j in range(len(prompt) - size + 1):
                        if tokens[i : i + size] == prompt[j : j + size]:
                            return True
                if turn.role == "user" and len(prompt) < size and tokens == prompt:
                    return True
        return False

    rows = [turns(sentence(random, random.randint(1, 6), few), sentence(random, 4, few)) for _ in range(300)]
    found = [text.find(row) is not None for row in rows]
    assert found == [slow(row) for row in rows]
    assert 0 < sum(found) < 300
