"""The normalised conversation: what every pool format becomes, and what identifies a row.

Two records are the same row when roles, contents and tools agree, whatever else they hold and however they
are written down.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rose_ray.data.strict_json import canonical_text, kind_of, parse_json, parse_object
from rose_ray.errors import RowError

ROLES = ("system", "user", "assistant", "tool")
"""Every role a message can have."""

_ROW_ID_LENGTH = 32
_FOLLOWERS = {"system": ("system", "user"), "user": ("assistant",), "tool": ("assistant", "tool")}


@dataclass(frozen=True)
class Message:
    """One turn.

    Attributes:
        role: One of `ROLES`.
        content: Text, exactly as in the record.
        is_call: The assistant calls a tool here, so it may speak again at once. Known while a record is read;
            not part of the identity and not stored.
    """

    role: str
    content: str
    is_call: bool = field(default=False, compare=False)


@dataclass(frozen=True)
class Conversation:
    """A whole exchange.

    Attributes:
        messages: Turns in order.
        tools: Descriptions of the tools the assistant may call, as canonical JSON where they are JSON; None
            if none.
    """

    messages: tuple[Message, ...]
    tools: str | None = None


def canonical_json(conversation: Conversation) -> str:
    """Return the one text that stands for a conversation: sorted keys, no spaces, characters as they are."""
    content: dict[str, Any] = {
        "messages": [{"content": message.content, "role": message.role} for message in conversation.messages]
    }
    if conversation.tools is not None:
        content["tools"] = conversation.tools
    return canonical_text(content)


def parse_conversation(text: str) -> Conversation:
    """Return the conversation that `canonical_json` wrote.

    Raises:
        RowError: ``not_a_conversation``, or the text is not JSON.
    """
    content = parse_object(text)
    try:
        messages = tuple(Message(turn["role"], turn["content"]) for turn in content["messages"])
    except (KeyError, TypeError) as error:
        raise RowError("not_a_conversation", f"expected messages with role and content: {error!r}") from error
    return Conversation(messages, content.get("tools"))


def row_id(conversation: Conversation) -> str:
    """Return 32 hex digits of the SHA-256 of the canonical JSON."""
    return hashlib.sha256(canonical_json(conversation).encode()).hexdigest()[:_ROW_ID_LENGTH]


def canonical_tools(tools: Any) -> str | None:
    """Return tool descriptions in one form, whether they came as JSON or as text that holds JSON.

    Text that is not JSON stays as it is. Nothing, an empty text and an empty list all mean no tools.

    Raises:
        RowError: ``unknown_schema``: neither text nor JSON array nor object.
    """
    if isinstance(tools, str):
        try:
            tools = parse_json(tools) if tools.strip() else None
        except RowError:
            return str(tools)
    elif tools is not None and not isinstance(tools, (list, dict)):
        raise RowError("unknown_schema", f"expected tools as text, array or object, found {kind_of(tools)}")
    return None if tools is None or tools in ([], {}) else canonical_text(tools)


def validate_conversation(conversation: Conversation) -> None:
    """Refuse a conversation that cannot be trained on.

    Raises:
        RowError: ``empty_messages``, ``unknown_role``, ``no_assistant_turn``, ``empty_answer`` (an assistant
            turn of white space), ``wrong_role_order`` (see `check_role_order`).
    """
    messages = conversation.messages
    if not messages:
        raise RowError("empty_messages", "expected at least a user and an assistant turn, found none")
    for turn, message in enumerate(messages, start=1):
        if message.role not in ROLES:
            raise RowError("unknown_role", f"turn {turn} has the role {message.role!a}, expected one of {list(ROLES)}")
    if all(message.role != "assistant" for message in messages):
        raise RowError("no_assistant_turn", f"expected an answer, found the roles {_roles(messages)}")
    for turn, message in enumerate(messages, start=1):
        if message.role == "assistant" and not message.content.strip():
            raise RowError("empty_answer", f"turn {turn} of {len(messages)}, by the assistant, holds no text")
    check_role_order(messages)


def check_role_order(messages: Sequence[Message]) -> None:
    """Refuse turns in an order no chat takes.

    System turns may open it; then the user speaks, then the assistant. Behind the assistant come the user or
    a tool, behind a tool more tools or the assistant; the assistant follows itself only behind a call. It has
    the last word.

    Raises:
        RowError: ``wrong_role_order``.
    """
    allowed: tuple[str, ...] = ("system", "user")
    for turn, message in enumerate(messages, start=1):
        if message.role not in allowed:
            raise RowError(
                "wrong_role_order",
                f"turn {turn} is by {message.role}, expected {' or '.join(allowed)}: {_roles(messages)}",
            )
        behind_assistant = ("user", "tool", "assistant") if message.is_call else ("user", "tool")
        allowed = _FOLLOWERS.get(message.role, behind_assistant)
    if messages[-1].role != "assistant":
        raise RowError("wrong_role_order", f"expected the assistant's turn last: {_roles(messages)}")


def _roles(messages: Sequence[Message]) -> str:
    roles = [message.role for message in messages]
    return ", ".join(roles if len(roles) <= 12 else [*roles[:11], f"... ({len(roles)} turns)"])
