"""Transcripts to messages and back."""

import pytest

from rose_ray.data.conversation import Message
from rose_ray.data.transcripts import is_transcript, parse_transcript, render_transcript, split_answer
from rose_ray.errors import RowError


def _pairs(messages):
    return [(message.role, message.content) for message in messages]


def test_turns():
    text = "\n\nSystem: Be kind.\n\nHuman: a\n\nb\n\nAssistant: c\n\nHuman: d \n\n\nAssistant:"
    assert _pairs(parse_transcript(text)) == [
        ("system", "Be kind."),
        ("user", "a\n\nb"),
        ("assistant", "c"),
        ("user", "d"),
    ]


def test_two_turns_of_one_side_become_one_message():
    text = "\n\nHuman: a\n\nAssistant: b\n\nAssistant: c\n\nHuman: d\n\nAssistant:"
    assert _pairs(parse_transcript(text)) == [("user", "a"), ("assistant", "b\n\nc"), ("user", "d")]


def test_rendering_is_the_inverse():
    messages = (Message("system", "s"), Message("user", "u"), Message("assistant", "a"), Message("user", "v"))
    text = render_transcript(messages)
    assert text == "\n\nSystem: s\n\nHuman: u\n\nAssistant: a\n\nHuman: v\n\nAssistant:"
    assert parse_transcript(text) == messages


def test_answers_are_split_off_exactly():
    assert split_answer("\n\nHuman: q\n\nAssistant:  a\n") == ("\n\nHuman: q\n\nAssistant:", "  a\n")
    with pytest.raises(RowError, match="unknown_schema"):
        split_answer("plain text")
    with pytest.raises(RowError, match="unknown_schema"):
        split_answer("\n\nHuman: q")


def test_what_is_a_transcript():
    assert is_transcript("\n\nHuman: q")
    assert is_transcript("Human: q\n\nAssistant:")
    assert not is_transcript("Human: a word with a colon")
    assert not is_transcript("Say:\n\nHuman: q\n\nAssistant:")
    assert _pairs(parse_transcript("Human: q\n\nAssistant:")) == [("user", "q")]


def test_an_unfinished_prompt_is_refused():
    with pytest.raises(RowError, match="unfinished_transcript"):
        parse_transcript("\n\nHuman: q")
