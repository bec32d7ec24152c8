r"""Transcripts as Anthropic's HH data writes them: ``"\n\nHuman: ...\n\nAssistant: ..."`` in one text.

Turns are cut at ``\n\nHuman:``, ``\n\nAssistant:``, ``\n\nSystem:`` and freed of outer white space. Where one
side speaks twice in a row, as some HH prompts do, the turns become one message with a blank line between.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from rose_ray.data.conversation import Message
from rose_ray.errors import RowError

ANSWER_MARK = "\n\nAssistant:"
"""What stands before an answer."""

_MARK = re.compile(r"\n\n(Human|Assistant|System):")
_OPENING = re.compile(r"\n\n(Human|System):|\s*(Human|System):.*\n\nAssistant:", re.DOTALL)
_ROLES = {"Human": "user", "Assistant": "assistant", "System": "system"}
_SPEAKERS = {"user": "Human", "assistant": "Assistant", "system": "System", "tool": "Tool"}


def is_transcript(text: str) -> bool:
    """Whether a text opens as a transcript does."""
    return _OPENING.match(text) is not None


def parse_transcript(text: str) -> tuple[Message, ...]:
    """Return the turns of a transcript that ends with the mark before an answer, the answer left out.

    Raises:
        RowError: ``unfinished_transcript``: it does not end with that mark.
    """
    if not text.rstrip().endswith(ANSWER_MARK):
        raise RowError(
            "unfinished_transcript", f"expected the prompt to end with {ANSWER_MARK!r}, found {text[-40:]!a}"
        )
    # What stands before the first mark is white space: see `is_transcript`.
    pieces = _MARK.split("\n\n" + text.strip())[1:-2]
    messages: list[Message] = []
    for speaker, content in zip(pieces[::2], pieces[1::2], strict=True):
        role = _ROLES[speaker]
        if messages and messages[-1].role == role:
            content = f"{messages.pop().content}\n\n{content.strip()}"
        messages.append(Message(role, content.strip()))
    return tuple(messages)


def split_answer(text: str) -> tuple[str, str]:
    """Cut a transcript behind its last ``Assistant:`` and return prompt and answer, both exact.

    Raises:
        RowError: ``unknown_schema``: it is no transcript, or nobody answers.
    """
    cut = text.rfind(ANSWER_MARK) + len(ANSWER_MARK)
    if not is_transcript(text) or cut < len(ANSWER_MARK):
        raise RowError("unknown_schema", f"expected a transcript with 'Human:' and 'Assistant:', found {text[:40]!a}")
    return text[:cut], text[cut:]


def render_transcript(messages: Sequence[Message]) -> str:
    """Return messages as a transcript prompt, ending with the mark before an answer."""
    return "".join(f"\n\n{_SPEAKERS[message.role]}: {message.content}" for message in messages) + ANSWER_MARK
