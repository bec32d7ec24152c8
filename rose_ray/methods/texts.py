"""What of a conversation and of a pair is text to methods that compare words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from rose_ray.data.conversation import Message
from rose_ray.data.preferences import PreferencePair
from rose_ray.methods.interface import PoolRows

TargetText = Literal["prompt_and_chosen", "prompt", "chosen"]


def row_texts(rows: PoolRows) -> list[str]:
    """Return each row's text: the contents of all its turns, a line each."""
    return [_joined(conversation.messages) for conversation in rows.conversations]


def pair_texts(pairs: Sequence[PreferencePair], which: TargetText) -> list[str]:
    """Return each pair's text: of its prompt, of its chosen answer, or of both."""
    texts = []
    for pair in pairs:
        prompt = _joined(pair.prompt) if which != "chosen" else ""
        chosen = pair.chosen if which != "prompt" else ""
        texts.append("\n".join(part for part in (prompt, chosen) if part))
    return texts


def _joined(messages: Iterable[Message]) -> str:
    return "\n".join(message.content for message in messages)
