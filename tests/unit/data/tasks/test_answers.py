"""Answers that say the same, and those that do not."""

from __future__ import annotations

import pytest

from rose_ray.data.tasks.answers import final_answer, is_same_answer, normalized_answer


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2 + 2 = 4\n#### 4", "4"),
        ("Let's think. So the answer is (B).", "(B)"),
        ("The answer is no. But wait. So the answer is yes.", "yes"),
        (" plain \n", "plain"),
    ],
)
def test_final_answer(text: str, expected: str) -> None:
    assert final_answer(text) == expected


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("$1,000.00", "1000"),
        ("007", "7"),
        ("\u22125", "-5"),
        ("The Eiffel Tower!", "eiffel tower"),
        ("(A)", "a"),
        ("[ ( ) ]", "[()]"),
        ("0", "-0.0"),
    ],
)
def test_written_differently(one: str, other: str) -> None:
    assert normalized_answer(one) == normalized_answer(other)


@pytest.mark.parametrize(("one", "other"), [("-35", "35"), (") ]", ") )"), ("valid", "invalid"), ("(A)", "(B)")])
def test_different(one: str, other: str) -> None:
    assert normalized_answer(one) != normalized_answer(other)
    assert not is_same_answer(one, [other]) and not is_same_answer(other, [one])


def test_an_answer_inside_another_counts_as_the_same() -> None:
    assert is_same_answer("in 1971", ["12 May 1971", "1971"])
    assert is_same_answer("It is Paris, of course", ["Paris"])
    assert not is_same_answer("19711", ["1971"])
    assert not is_same_answer(")", [") ]"])  # signs alone are no words: a part of them is another answer
