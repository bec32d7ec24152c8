"""Identity of a row, and which conversations are refused."""

import hashlib

import pytest

from rose_ray.data.conversation import (
    Conversation,
    Message,
    canonical_json,
    canonical_tools,
    parse_conversation,
    row_id,
    validate_conversation,
)
from rose_ray.errors import RowError

LETTERS = {"s": "system", "u": "user", "a": "assistant", "t": "tool", "x": "narrator"}


def _conversation(turns: str) -> Conversation:
    """``c`` is a call by the assistant, ``e`` an empty answer."""
    content = {"e": " \n", "c": "{}"}
    return Conversation(
        tuple(
            Message(LETTERS.get(letter, "assistant"), content.get(letter, f"turn {i}"), is_call=letter == "c")
            for i, letter in enumerate(turns)
        )
    )


@pytest.mark.parametrize("turns", ["ua", "sua", "ssua", "uaua", "ucta", "uctta", "uctcta", "ucctta", "uca", "uctaua"])
def test_orders_that_are_fine(turns):
    validate_conversation(_conversation(turns))


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ("", "empty_messages"),
        ("xua", "unknown_role"),
        ("u", "no_assistant_turn"),
        ("su", "no_assistant_turn"),
        ("ue", "empty_answer"),
        ("ueua", "empty_answer"),
        ("a", "wrong_role_order"),
        ("au", "wrong_role_order"),
        ("sa", "wrong_role_order"),
        ("uau", "wrong_role_order"),
        ("uua", "wrong_role_order"),
        ("uaa", "wrong_role_order"),
        ("usa", "wrong_role_order"),
        ("uta", "wrong_role_order"),
        ("uctua", "wrong_role_order"),
        ("uct", "wrong_role_order"),
    ],
)
def test_orders_that_are_refused(turns, reason):
    with pytest.raises(RowError) as caught:
        validate_conversation(_conversation(turns))
    assert caught.value.reason == reason


def test_canonical_json_is_fixed():
    conversation = Conversation((Message("user", ' é"\n'), Message("assistant", "x")), tools='[{"name":"f"}]')
    text = (
        '{"messages":[{"content":" é\\"\\n","role":"user"},{"content":"x","role":"assistant"}],'
        '"tools":"[{\\"name\\":\\"f\\"}]"}'
    )
    assert canonical_json(conversation) == text
    assert parse_conversation(text) == conversation
    assert row_id(conversation) == hashlib.sha256(text.encode()).hexdigest()[:32]


def test_identity_is_roles_contents_and_tools():
    def one(role="user", content="q", tools=None, is_call=False):
        return row_id(Conversation((Message(role, content), Message("assistant", "a", is_call)), tools))

    different = [one(), one(role="system"), one(content="q "), one(tools="[1]")]
    assert len(set(different)) == len(different)
    assert one(is_call=True) == one()


@pytest.mark.parametrize("text", ["{}", '{"messages": [{"role": "user"}]}', '{"messages": 3}'])
def test_not_a_stored_conversation(text):
    with pytest.raises(RowError, match="not_a_conversation"):
        parse_conversation(text)


def test_tools_in_one_form():
    assert (
        canonical_tools('[{"b": 1,  "a": "\\u00e9"}]') == canonical_tools([{"a": "é", "b": 1}]) == '[{"a":"é","b":1}]'
    )
    assert canonical_tools("search(query)") == "search(query)"
    assert [canonical_tools(nothing) for nothing in (None, "", " ", "[]", [], "null", {})] == [None] * 7
    with pytest.raises(RowError, match="unknown_schema"):
        canonical_tools(3)
