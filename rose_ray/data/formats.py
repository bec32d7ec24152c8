"""Pool formats: from the many shapes of a record to one conversation.

=================  =========================================================================================
messages           ``messages``: [{role, content}]; content is text or a list of text parts
prompt_completion  ``prompt``, ``completion``: text or messages
alpaca             ``instruction``, ``output`` or ``response``, perhaps ``input`` or ``context``, ``history``
sharegpt           ``conversations``: [{from, value}]
=================  =========================================================================================

Each may also hold ``system`` (becomes a system turn) and ``tools``. An assistant's tool calls become text:
the value of a ``function_call`` turn as it is, ``tool_calls`` as canonical JSON behind the content.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rose_ray.data.conversation import ROLES, Conversation, Message, canonical_tools
from rose_ray.data.strict_json import canonical_text, kind_of
from rose_ray.errors import DataError, RowError

SAMPLE_ROWS = 100
"""Records that `detect_format` is meant to see."""

_KEY_SETS: dict[str, tuple[frozenset[str], ...]] = {
    "messages": (frozenset({"messages"}),),
    "prompt_completion": (frozenset({"prompt", "completion"}),),
    "alpaca": (frozenset({"instruction", "output"}), frozenset({"instruction", "response"})),
    "sharegpt": (frozenset({"conversations"}),),
}
POOL_FORMATS = tuple(_KEY_SETS)
"""Names of the formats."""

_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "system": "system",
    "observation": "tool",
    "tool": "tool",
}
_MEDIA_KEYS = ("images", "image", "audios", "audio", "videos", "video")


def detect_format(values: Sequence[Mapping[str, Any]], *, file: str) -> str:
    """Return the one format that every record fits.

    Args:
        values: The first records of the file, `SAMPLE_ROWS` of them.
        file: Name for messages.

    Raises:
        DataError: A record fits no format or several, or two records fit different ones.
    """
    seen: dict[str, int] = {}
    for number, value in enumerate(values, start=1):
        fitting = fitting_formats(value)
        if len(fitting) != 1:
            fits = f"fit {' and '.join(fitting)}" if fitting else "fit no format"
            raise DataError(f"{file}: the keys {sorted(value)} of record {number} {fits}. {_advice(value)}")
        seen.setdefault(fitting[0], number)
    if len(seen) != 1:
        mixture = ", ".join(f"{name} (record {number})" for name, number in seen.items()) or "no record"
        raise DataError(f"{file}: expected records of one format, found {mixture}. {_advice({})}")
    return next(iter(seen))


def fitting_formats(value: Mapping[str, Any]) -> list[str]:
    """Return the formats whose keys a record has; null counts only where nothing fits without it."""
    filled = {key for key, content in value.items() if content is not None}
    for keys in (filled, set(value)):
        fitting = [name for name, sets in _KEY_SETS.items() if any(needed <= keys for needed in sets)]
        if fitting:
            return fitting
    return []


def to_conversation(value: Mapping[str, Any], format_name: str) -> Conversation:
    """Return a record as a conversation, not yet validated.

    Args:
        value: The parsed record.
        format_name: One of `POOL_FORMATS`.

    Raises:
        RowError: ``unknown_schema`` (a key is missing or of the wrong type), ``unknown_role``,
            ``unsupported_content`` (images and the like).
    """
    readers: dict[str, Callable[[Mapping[str, Any]], tuple[Message, ...]]] = {
        "messages": lambda record: parse_turns(required(record, "messages", list)),
        "prompt_completion": _prompt_completion_messages,
        "alpaca": _alpaca_messages,
        "sharegpt": lambda record: parse_turns(required(record, "conversations", list)),
    }
    for key in _MEDIA_KEYS:
        if value.get(key):
            raise RowError("unsupported_content", f"the record has {key!r}; only text can be used")
    return Conversation(with_system(value, readers[format_name](value)), canonical_tools(value.get("tools")))


def required(value: Mapping[str, Any], key: str, *kinds: type) -> Any:
    """Return ``value[key]`` if it has one of the types.

    Raises:
        RowError: ``unknown_schema``.
    """
    content = value.get(key)
    if key not in value:
        raise RowError("unknown_schema", f"expected the key {key!r}, found {sorted(value)}")
    if not isinstance(content, kinds):
        expected = " or ".join(kind_of(kind()) for kind in kinds)
        raise RowError("unknown_schema", f"expected {expected} at {key!r}, found {kind_of(content)}")
    return content


def with_system(value: Mapping[str, Any], messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """Put the record's ``system`` text, if it has one, in front.

    Raises:
        RowError: ``unknown_schema``: it is no text, or the messages open with a system turn of their own.
    """
    if value.get("system") is None:
        return messages
    text: str = required(value, "system", str)
    if not text.strip():
        return messages
    if messages and messages[0].role == "system":
        raise RowError("unknown_schema", "the record has 'system' and a system turn; expected one of them")
    return (Message("system", text), *messages)


def parse_turns(turns: Sequence[Any]) -> tuple[Message, ...]:
    """Return turns written as {role, content} or as {from, value}.

    Raises:
        RowError: ``unknown_schema``, ``unknown_role``, ``unsupported_content``.
    """
    return tuple(_turn(turn, number) for number, turn in enumerate(turns, start=1))


def _turn(turn: Any, number: int) -> Message:
    if isinstance(turn, dict) and isinstance(turn.get("role"), str):
        return _role_content(turn, number)
    if isinstance(turn, dict) and isinstance(turn.get("from"), str):
        return _from_value(turn, number)
    found = f"an object with {sorted(turn)}" if isinstance(turn, dict) else kind_of(turn)
    raise RowError("unknown_schema", f"turn {number}: expected {{role, content}} or {{from, value}}, found {found}")


def _from_value(turn: Mapping[str, Any], number: int) -> Message:
    speaker, text = turn["from"], turn.get("value")
    if speaker not in _SHAREGPT_ROLES:
        raise RowError("unknown_role", f"turn {number} is from {speaker!a}, expected one of {sorted(_SHAREGPT_ROLES)}")
    if not isinstance(text, str):
        raise RowError("unknown_schema", f"turn {number}: expected a string at 'value', found {kind_of(text)}")
    return Message(_SHAREGPT_ROLES[speaker], text, is_call=speaker == "function_call")


def _role_content(turn: Mapping[str, Any], number: int) -> Message:
    role, content = turn["role"], turn.get("content")
    if role not in ROLES:
        raise RowError("unknown_role", f"turn {number} has the role {role!a}, expected one of {list(ROLES)}")
    calls = turn.get("tool_calls") or turn.get("function_call") if role == "assistant" else None
    # An answer that is null is an empty answer, which has a reason of its own.
    text = "" if content is None and role == "assistant" else _content_text(content, number)
    if calls:
        text = "\n".join(part for part in (text, canonical_text(calls)) if part)
    return Message(role, text, is_call=bool(calls))


def _content_text(content: Any, number: int) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RowError("unknown_schema", f"turn {number}: expected text at 'content', found {kind_of(content)}")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else kind_of(part)
        text = (part.get("text") or part.get("value")) if isinstance(part, dict) else None
        if kind != "text" or not isinstance(text, (str, type(None))):
            raise RowError("unsupported_content", f"turn {number}: expected parts of type 'text', found {kind!a}")
        texts.append(text or "")
    return "".join(texts)


def _prompt_completion_messages(value: Mapping[str, Any]) -> tuple[Message, ...]:
    messages: list[Message] = []
    for key, role in (("prompt", "user"), ("completion", "assistant")):
        side = required(value, key, str, list)
        messages += [Message(role, side)] if isinstance(side, str) else parse_turns(side)
    return tuple(messages)


def _alpaca_messages(value: Mapping[str, Any]) -> tuple[Message, ...]:
    instruction: str = required(value, "instruction", str)
    addition = _one_of(value, "input", "context") or ""
    answer = _one_of(value, "output", "response")
    if answer is None:
        raise RowError("unknown_schema", f"expected the key 'output' or 'response', found {sorted(value)}")
    prompt = "\n\n".join(text for text in (instruction, addition) if text.strip())
    return (*_history(value), Message("user", prompt), Message("assistant", answer))


def _one_of(value: Mapping[str, Any], *keys: str) -> str | None:
    filled = [key for key in keys if value.get(key) not in (None, "")] or [k for k in keys if value.get(k) == ""][:1]
    if len(filled) > 1:
        raise RowError("unknown_schema", f"expected one of {' and '.join(map(repr, keys))}, found text in both")
    return str(required(value, filled[0], str)) if filled else None


def _history(value: Mapping[str, Any]) -> list[Message]:
    messages = []
    for exchange in value.get("history") or []:
        if not (isinstance(exchange, list) and len(exchange) == 2 and all(isinstance(text, str) for text in exchange)):
            raise RowError("unknown_schema", "expected 'history' as pairs of question and answer")
        messages += [Message("user", exchange[0]), Message("assistant", exchange[1])]
    return messages


def _advice(value: Mapping[str, Any]) -> str:
    if {"chosen", "rejected"} <= set(value):
        return "These look like preference pairs, which belong under `targets`."
    known = "; ".join(f"{name}: {' or '.join('+'.join(sorted(s)) for s in sets)}" for name, sets in _KEY_SETS.items())
    return f"Formats and their keys: {known}. Set `format:` to choose one, or convert the file."
