"""Formats of preference pairs: from a record to prompt, chosen and rejected answer.

============  ==============================================================================================
explicit      ``prompt`` (text, transcript or messages), ``chosen``, ``rejected`` (text or messages);
              messages in ``prompt_messages``, where given, stand for a prompt that is text
implicit      ``chosen``, ``rejected``: messages, or whole transcripts, that differ in the last answer only
sharegpt      ``conversations``, and ``chosen``, ``rejected`` as one turn each
rose_authors  one JSON object, prompt transcript -> {responses, pairs, sft_target, rejected_target}; the pair
              is (sft_target, rejected_target), as in the authors' released code
============  ==============================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rose_ray.data.conversation import Message, canonical_tools, check_role_order
from rose_ray.data.formats import parse_turns, required, with_system
from rose_ray.data.transcripts import is_transcript, parse_transcript, render_transcript, split_answer
from rose_ray.errors import RowError

PAIR_FORMATS = ("explicit", "implicit", "sharegpt", "rose_authors")
"""Names of the formats."""


@dataclass(frozen=True)
class PairContent:
    r"""What a record says, before it has an id and a subtask.

    Attributes:
        prompt: Messages up to the answer.
        chosen, rejected: The answers. From a transcript without outer white space, which belongs to its
            layout; otherwise exact.
        raw_prompt: The source's transcript up to ``"\n\nAssistant:"``, untouched; rendered in that form where
            the source has none.
        raw_chosen, raw_rejected: The answers, untouched.
        tools: As in `Conversation`.
    """

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    raw_prompt: str
    raw_chosen: str
    raw_rejected: str
    tools: str | None = None


def pair_format(value: Mapping[str, Any]) -> str:
    """Return the format whose keys a record has.

    Raises:
        RowError: ``unknown_schema``.
    """
    keys = {key for key, content in value.items() if content is not None}
    prompts = sorted({"prompt", "conversations"} & keys)
    if not {"chosen", "rejected"} <= keys or len(prompts) > 1:
        raise RowError(
            "unknown_schema",
            f"expected chosen and rejected, with prompt, with conversations, or alone; found {sorted(value)}",
        )
    return {"prompt": "explicit", "conversations": "sharegpt"}[prompts[0]] if prompts else "implicit"


def pair_content(value: Mapping[str, Any], format_name: str) -> PairContent:
    """Read a record.

    Args:
        value: The parsed record; for ``rose_authors`` one entry of the file with its prompt under ``prompt``.
        format_name: One of `PAIR_FORMATS`.

    Raises:
        RowError: The record does not fit the format, or its turns stand in a wrong order.
    """
    readers: dict[str, Callable[[Mapping[str, Any]], PairContent]] = {
        "explicit": _explicit,
        "implicit": _implicit,
        "sharegpt": _sharegpt,
        "rose_authors": _rose_authors,
    }
    content = readers[format_name](value)
    turns = (*content.prompt, Message("assistant", content.chosen))
    check_role_order(turns)
    return content


def _explicit(value: Mapping[str, Any]) -> PairContent:
    prompt = required(value, "prompt", str, list)
    is_text = isinstance(prompt, str)
    is_raw = is_text and is_transcript(prompt)
    if value.get("prompt_messages") is not None and is_text:
        messages = parse_turns(required(value, "prompt_messages", list))
    elif is_raw:
        messages = parse_transcript(prompt)
    else:
        messages = (Message("user", prompt),) if is_text else parse_turns(prompt)
    messages = with_system(value, messages)
    return _content(value, messages, prompt if is_raw else render_transcript(messages), is_raw)


def _sharegpt(value: Mapping[str, Any]) -> PairContent:
    messages = with_system(value, parse_turns(required(value, "conversations", list)))
    return _content(value, messages, render_transcript(messages), is_raw=False)


def _rose_authors(value: Mapping[str, Any]) -> PairContent:
    chosen, rejected = (required(value, key, str) for key in ("sft_target", "rejected_target"))
    return _explicit({"prompt": value["prompt"], "chosen": chosen, "rejected": rejected})


def _implicit(value: Mapping[str, Any]) -> PairContent:
    chosen, rejected = (required(value, key, str, list) for key in ("chosen", "rejected"))
    if isinstance(chosen, str) and isinstance(rejected, str):
        (raw_prompt, raw_chosen), (other, raw_rejected) = split_answer(chosen), split_answer(rejected)
        _same_prompt(raw_prompt, other)
        messages = with_system(value, parse_transcript(raw_prompt))
        return PairContent(
            messages,
            raw_chosen.strip(),
            raw_rejected.strip(),
            raw_prompt,
            raw_chosen,
            raw_rejected,
            _tools(value),
        )
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise RowError("unknown_schema", "one side is text, the other messages; expected both alike")
    messages, other_messages = parse_turns(chosen)[:-1], parse_turns(rejected)[:-1]
    _same_prompt(messages, other_messages)
    return _explicit({**value, "prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]})


def _same_prompt(chosen: Any, rejected: Any) -> None:
    if chosen != rejected:
        raise RowError("different_prompts", "the two sides differ before their last answer; expected one prompt")


def _content(value: Mapping[str, Any], prompt: tuple[Message, ...], raw_prompt: str, is_raw: bool) -> PairContent:
    raw_chosen, raw_rejected = (_answer(value, key, prompt, raw_prompt) for key in ("chosen", "rejected"))
    chosen, rejected = (text.strip() if is_raw else text for text in (raw_chosen, raw_rejected))
    return PairContent(prompt, chosen, rejected, raw_prompt, raw_chosen, raw_rejected, _tools(value))


def _answer(value: Mapping[str, Any], key: str, prompt: tuple[Message, ...], raw_prompt: str) -> str:
    side = required(value, key, str, list, dict)
    if isinstance(side, str):
        if not is_transcript(side):
            return side
        before, answer = split_answer(side)
        _same_prompt(before, raw_prompt)
        return answer
    turns = parse_turns(side if isinstance(side, list) else [side])
    if not turns or turns[-1].role != "assistant":
        raise RowError("wrong_role_order", f"expected {key!r} to end with the assistant's turn")
    if len(turns) > 1:
        _same_prompt(turns[:-1], prompt)
    return turns[-1].content


def _tools(value: Mapping[str, Any]) -> str | None:
    return canonical_tools(value.get("tools"))
