"""JSON read strictly: whatever a lenient reader would change or drop is refused with a reason.

Python's reader keeps the last of two equal keys, takes ``NaN`` for a number and lets half a surrogate pair
through. Each of these would make a record differ from its own text.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any

from rose_ray.errors import RowError

_SPACE = re.compile(r"[ \t\n\r]*")
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(text: str) -> Any:
    """Return the value of ``text``: one JSON value with nothing but white space around it.

    Raises:
        RowError: ``not_json``, ``duplicate_key`` or ``invalid_unicode``.
    """
    start = _skip_space(text, 0)
    value, end = _strict_value(text, start)
    end = _skip_space(text, end)
    if end != len(text):
        raise RowError("not_json", f"more text after the value, {_position(text, end)}")
    return value


def parse_object(text: str) -> dict[str, Any]:
    """Return the object in ``text``.

    Raises:
        RowError: As `parse_json`, or ``not_object``.
    """
    return as_object(parse_json(text))


def as_object(value: Any) -> dict[str, Any]:
    """Return ``value`` if it is an object.

    Raises:
        RowError: ``not_object``.
    """
    if not isinstance(value, dict):
        raise RowError("not_object", f"expected a JSON object, found {kind_of(value)}")
    return value


def iter_array(text: str) -> Iterator[tuple[str, Any]]:
    """Yield the exact source text of every element of an array, with its value, or the `RowError` that
    refuses it.

    Raises:
        RowError: ``not_array``: the text is no array. ``not_json``: no element can be found after this point.
    """
    position = _skip_space(text, 0)
    if text[position : position + 1] != "[":
        raise RowError("not_array", _what_instead(text, position))
    position = _skip_space(text, position + 1)
    closed = text[position : position + 1] == "]"
    while not closed:
        value, end = _element(text, position)
        yield text[position:end], value
        end = _skip_space(text, end)
        mark = text[end : end + 1]
        if mark not in (",", "]"):
            raise RowError("not_json", f"expected ',' or ']' {_position(text, end)}, found {mark or 'the end'!r}")
        closed = mark == "]"
        position = end if closed else _skip_space(text, end + 1)
    rest = _skip_space(text, position + 1)
    if rest != len(text):
        raise RowError("not_json", f"more text after the array, {_position(text, rest)}")


def canonical_text(value: Any) -> str:
    """Return JSON with sorted keys, no spaces and characters as they are: equal values give equal texts."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def without_key(text: str, key: str) -> str:
    """Return the text of an object without one of its keys; all else stays as it is written.

    Args:
        text: One JSON object, its keys different.
        key: Key to leave out.
    """
    start = position = _skip_space(text, 0) + 1
    while text[_skip_space(text, position)] != "}":
        name, end = _LENIENT.raw_decode(text, _skip_space(text, position))
        _, end = _LENIENT.raw_decode(text, _skip_space(text, _skip_space(text, end) + 1))
        following = _skip_space(text, end)
        last = text[following] == "}"
        if name == key:  # with the comma behind it, or the one before it where it is the last
            before = text[:position] if not last or position == start else text[: position - 1]
            return before + text[end if last else following + 1 :]
        position = following if last else following + 1
    return text


def kind_of(value: Any) -> str:
    """Return the JSON name of a value's type, for messages."""
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise RowError("duplicate_key", f"the key {twice!a} stands twice in one object")
    return content


def _no_constant(name: str) -> Any:
    raise RowError("not_json", f"{name} is not JSON")


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise RowError("not_json", f"the number {digits[:40]} is beyond the range of a double")
    return number


_STRICT = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_no_constant, parse_float=_finite)
_LENIENT = json.JSONDecoder(parse_int=str, parse_float=str)


def _strict_value(text: str, start: int) -> tuple[Any, int]:
    try:
        value, end = _STRICT.raw_decode(text, start)
        if _SURROGATE_ESCAPE.search(text, start, end):
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise RowError("not_json", f"{error.msg}, {_position(text, error.pos)}") from error
    except UnicodeEncodeError as error:
        raise RowError("invalid_unicode", "a string holds half of a surrogate pair") from error
    except RowError:
        raise
    except RecursionError as error:
        raise RowError("not_json", "nested too deeply to read") from error
    except ValueError as error:
        raise RowError("not_json", f"a number that cannot be read: {error}") from error
    return value, end


def _element(text: str, start: int) -> tuple[Any, int]:
    try:
        return _strict_value(text, start)
    except RowError as refused:
        try:
            _, end = _LENIENT.raw_decode(text, start)
        except (ValueError, RecursionError):
            raise refused from None
        return refused, end


def _skip_space(text: str, start: int) -> int:
    match = _SPACE.match(text, start)
    return match.end() if match else start


def _position(text: str, place: int) -> str:
    line = text.count("\n", 0, place) + 1
    return f"line {line} column {place - text.rfind(chr(10), 0, place)}"


def _what_instead(text: str, start: int) -> str:
    try:
        value, end = _strict_value(text, start)
    except RowError as error:
        return str(error)
    if _skip_space(text, end) != len(text):
        first = kind_of(value)
        return f"several JSON values, the first {first}: one object a line belongs in a .jsonl file"
    return kind_of(value)
