"""From the shapes of a record to a conversation."""

import pytest

from rose_ray.data.conversation import Conversation, Message, validate_conversation
from rose_ray.data.formats import POOL_FORMATS, detect_format, to_conversation
from rose_ray.errors import DataError, RowError

EXAMPLES = {
    "messages": {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    "prompt_completion": {"prompt": "q", "completion": "a"},
    "alpaca": {"instruction": "q", "input": "", "output": "a"},
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
}


def _turns(value, format_name):
    return [(message.role, message.content) for message in to_conversation(value, format_name).messages]


@pytest.mark.parametrize("format_name", POOL_FORMATS)
def test_every_format_gives_the_same_conversation(format_name):
    value = {"id": 7, "extra": [1], **EXAMPLES[format_name]}
    expected = Conversation((Message("user", "q"), Message("assistant", "a")))
    assert to_conversation(value, format_name) == expected
    assert detect_format([value] * 3, file="f") == format_name


def test_detection_refuses_mixtures_strangers_and_ambiguity():
    with pytest.raises(DataError, match=r"pool\.jsonl: .*messages \(record 1\), alpaca \(record 2\)"):
        detect_format([EXAMPLES["messages"], EXAMPLES["alpaca"]], file="pool.jsonl")
    with pytest.raises(DataError, match=r"\['answer', 'question'\] of record 2 fit no format.*format:"):
        detect_format([EXAMPLES["alpaca"], {"question": "q", "answer": "a"}], file="f")
    with pytest.raises(DataError, match="fit messages and prompt_completion"):
        detect_format([{**EXAMPLES["messages"], **EXAMPLES["prompt_completion"]}], file="f")
    with pytest.raises(DataError, match="preference pairs"):
        detect_format([{"prompt": "q", "chosen": "a", "rejected": "b"}], file="f")
    with pytest.raises(DataError, match="no record"):
        detect_format([], file="f")


def test_columns_of_null_do_not_count_unless_nothing_else_does():
    assert detect_format([{**EXAMPLES["alpaca"], "messages": None}], file="f") == "alpaca"
    assert detect_format([EXAMPLES["messages"], {"messages": None}], file="f") == "messages"


def test_messages_with_parts_and_tool_calls():
    call = [{"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}]
    value = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "value": "two"}]},
            {"role": "assistant", "content": None, "tool_calls": call},
            {"role": "assistant", "content": "Wait.", "tool_calls": call},
            {"role": "tool", "content": "3"},
            {"role": "assistant", "content": "Three."},
        ],
        "tools": '[{"name": "f"}]',
    }
    conversation = to_conversation(value, "messages")
    rendered = '[{"function":{"arguments":"{\\"x\\": 1}","name":"f"},"type":"function"}]'
    assert [message.content for message in conversation.messages] == [
        "one two",
        rendered,
        f"Wait.\n{rendered}",
        "3",
        "Three.",
    ]
    assert conversation.tools == '[{"name":"f"}]'
    validate_conversation(conversation)


def test_prompt_completion_with_messages_on_either_side():
    user, assistant = EXAMPLES["messages"]["messages"]
    expected = [("user", "q"), ("assistant", "a")]
    assert _turns({"prompt": [user], "completion": "a"}, "prompt_completion") == expected
    assert _turns({"prompt": "q", "completion": [assistant]}, "prompt_completion") == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"instruction": "do", "input": "this", "output": "a"}, "do\n\nthis"),
        ({"instruction": "do", "input": " ", "output": "a"}, "do"),
        ({"instruction": "do", "input": None, "output": "a"}, "do"),
        ({"instruction": "do", "context": "this", "response": "a"}, "do\n\nthis"),
        ({"instruction": "do ", "input": "", "context": "x", "response": "a", "output": None}, "do \n\nx"),
    ],
)
def test_alpaca_variants(value, expected):
    assert _turns(value, "alpaca") == [("user", expected), ("assistant", "a")]


def test_alpaca_history_and_system():
    value = {"instruction": "q", "output": "a", "system": "Be brief.", "history": [["q0", "a0"]]}
    assert _turns(value, "alpaca") == [
        ("system", "Be brief."),
        ("user", "q0"),
        ("assistant", "a0"),
        ("user", "q"),
        ("assistant", "a"),
    ]


def test_sharegpt_with_tools():
    value = {
        "system": "Help.",
        "tools": [{"name": "f"}],
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": '{"name": "f"}'},
            {"from": "observation", "value": "{}"},
            {"from": "gpt", "value": "a"},
        ],
    }
    conversation = to_conversation(value, "sharegpt")
    assert [message.role for message in conversation.messages] == [
        "system",
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    assert conversation.messages[2].content == '{"name": "f"}'
    assert conversation.tools == '[{"name":"f"}]'
    validate_conversation(conversation)


@pytest.mark.parametrize(
    ("format_name", "value", "reason"),
    [
        ("messages", {"text": "q"}, "unknown_schema"),
        ("messages", {"messages": "q"}, "unknown_schema"),
        ("messages", {"messages": None}, "unknown_schema"),
        ("messages", {"messages": ["q"]}, "unknown_schema"),
        ("messages", {"messages": [{"content": "q"}]}, "unknown_schema"),
        ("messages", {"messages": [{"role": "user"}]}, "unknown_schema"),
        ("messages", {"messages": [{"role": "user", "content": {"a": 1}}]}, "unknown_schema"),
        (
            "messages",
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "unsupported_content",
        ),
        ("messages", {"messages": [{"role": "user", "content": ["q"]}]}, "unsupported_content"),
        ("messages", {**EXAMPLES["messages"], "images": ["a.png"]}, "unsupported_content"),
        ("messages", {**EXAMPLES["messages"], "tools": 3}, "unknown_schema"),
        ("prompt_completion", {"prompt": "q"}, "unknown_schema"),
        ("prompt_completion", {"prompt": "q", "completion": 3}, "unknown_schema"),
        ("alpaca", {"instruction": "q"}, "unknown_schema"),
        ("alpaca", {"instruction": 3, "output": "a"}, "unknown_schema"),
        ("alpaca", {"instruction": "q", "output": "a", "response": "b"}, "unknown_schema"),
        ("alpaca", {"instruction": "q", "output": "a", "history": [["q"]]}, "unknown_schema"),
        ("alpaca", {"instruction": "q", "output": "a", "system": 3}, "unknown_schema"),
        ("sharegpt", {"conversations": [{"from": "bing", "value": "q"}]}, "unknown_role"),
        ("sharegpt", {"conversations": [{"from": "human", "value": None}]}, "unknown_schema"),
        ("sharegpt", {"system": "x", "conversations": [{"from": "system", "value": "y"}]}, "unknown_schema"),
    ],
)
def test_rows_that_do_not_fit(format_name, value, reason):
    with pytest.raises(RowError) as caught:
        to_conversation(value, format_name)
    assert caught.value.reason == reason


def test_the_message_names_what_was_found_and_expected():
    with pytest.raises(RowError, match=r"expected the key 'completion', found \['prompt', 'text'\]"):
        to_conversation({"prompt": "q", "text": "t"}, "prompt_completion")


def test_a_null_answer_is_an_empty_answer():
    value = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": None}]}
    with pytest.raises(RowError, match="empty_answer"):
        validate_conversation(to_conversation(value, "messages"))
