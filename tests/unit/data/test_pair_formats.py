"""From the shapes of a preference record to prompt and answers."""

import pytest

from rose_ray.data.conversation import Message
from rose_ray.data.pair_formats import pair_content, pair_format
from rose_ray.errors import RowError

USER = {"role": "user", "content": "q"}
GOOD = {"role": "assistant", "content": " good"}
BAD = {"role": "assistant", "content": "bad "}
RAW = "\n\nHuman: q\n\nAssistant:"


def _read(value):
    return pair_content(value, pair_format(value))


@pytest.mark.parametrize(
    "value",
    [
        {"prompt": "q", "chosen": " good", "rejected": "bad "},
        {"prompt": [USER], "chosen": " good", "rejected": "bad "},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [USER], "chosen": GOOD, "rejected": BAD},
        {"prompt": "q", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": " good"},
            "rejected": {"from": "gpt", "value": "bad "},
        },
    ],
)
def test_one_pair_in_many_shapes(value):
    content = _read(value)
    assert content.prompt == (Message("user", "q"),)
    assert (content.chosen, content.rejected) == (" good", "bad ")
    assert (content.raw_prompt, content.raw_chosen, content.raw_rejected) == (RAW, " good", "bad ")
    assert content.tools is None


@pytest.mark.parametrize(
    "value",
    [
        {"prompt": RAW, "chosen": " good", "rejected": "bad "},
        {"prompt": RAW, "chosen": RAW + " good", "rejected": RAW + "bad "},
        {"chosen": RAW + " good", "rejected": RAW + "bad "},
    ],
)
def test_transcripts_are_stripped_for_messages_and_kept_raw(value):
    content = _read(value)
    assert content.prompt == (Message("user", "q"),)
    assert (content.chosen, content.rejected) == ("good", "bad")
    assert (content.raw_prompt, content.raw_chosen, content.raw_rejected) == (RAW, " good", "bad ")


def test_prompt_messages_come_before_the_transcript():
    messages = [{"role": "user", "content": "q\n\nHuman: still q"}]
    raw = "\n\nHuman: q\n\nHuman: still q\n\nAssistant:"
    content = _read({"prompt": raw, "prompt_messages": messages, "chosen": "a", "rejected": "b"})
    assert content.prompt == (Message("user", "q\n\nHuman: still q"),)
    assert content.raw_prompt == raw


def test_system_and_tools():
    content = _read({"prompt": "q", "system": "s", "tools": [{"name": "f"}], "chosen": "a", "rejected": "b"})
    assert content.prompt == (Message("system", "s"), Message("user", "q"))
    assert content.raw_prompt == "\n\nSystem: s" + RAW
    assert content.tools == '[{"name":"f"}]'


def test_authors_entry():
    entry = {
        "prompt": RAW,
        "responses": ["x", "y"],
        "pairs": [[0, 1]],
        "sft_target": " a",
        "rejected_target": " b",
    }
    content = pair_content(entry, "rose_authors")
    assert (content.chosen, content.raw_chosen, content.rejected) == ("a", " a", "b")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"prompt": "q", "chosen": "a"}, "unknown_schema"),
        ({"prompt": "q", "chosen": "a", "rejected": None}, "unknown_schema"),
        ({"prompt": "q", "conversations": [], "chosen": "a", "rejected": "b"}, "unknown_schema"),
        ({"prompt": "q", "chosen": 1, "rejected": "b"}, "unknown_schema"),
        ({"chosen": "a", "rejected": "b"}, "unknown_schema"),
        ({"chosen": [USER, GOOD], "rejected": "b"}, "unknown_schema"),
        ({"prompt": "\n\nHuman: q", "chosen": "a", "rejected": "b"}, "unfinished_transcript"),
        ({"chosen": RAW + " a", "rejected": "\n\nHuman: other\n\nAssistant: b"}, "different_prompts"),
        ({"chosen": [USER, GOOD], "rejected": [{**USER, "content": "p"}, BAD]}, "different_prompts"),
        ({"prompt": "p", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "different_prompts"),
        ({"prompt": RAW, "chosen": "\n\nHuman: other\n\nAssistant: a", "rejected": "b"}, "different_prompts"),
        ({"prompt": [USER], "chosen": [GOOD, USER], "rejected": [BAD]}, "wrong_role_order"),
        ({"prompt": [USER], "chosen": [], "rejected": [BAD]}, "wrong_role_order"),
        ({"prompt": [USER, GOOD], "chosen": "a", "rejected": "b"}, "wrong_role_order"),
        ({"prompt": [USER, USER], "chosen": "a", "rejected": "b"}, "wrong_role_order"),
        ({"prompt": [], "chosen": "a", "rejected": "b"}, "wrong_role_order"),
        ({"prompt": [{"role": "x", "content": "q"}], "chosen": "a", "rejected": "b"}, "unknown_role"),
    ],
)
def test_records_that_are_no_pairs(value, reason):
    with pytest.raises(RowError) as caught:
        _read(value)
    assert caught.value.reason == reason
