"""Files of test text: tasks, preference pairs, conversations, records with known keys, plain text.

A prompt is the whole of what is asked; other texts, such as answers, options and passages, stand beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rose_ray.data.conversation import Message
from rose_ray.data.formats import fitting_formats, parse_turns, to_conversation
from rose_ray.data.pair_formats import pair_content, pair_format
from rose_ray.data.records import RejectedRecord
from rose_ray.data.tasks.files import iter_labelled
from rose_ray.data.transcripts import is_transcript, parse_transcript
from rose_ray.errors import DataError, PairError, RowError
from rose_ray.filesystem import Location

PROMPT_KEYS = ("prompt", "question", "Question", "input", "instruction", "document", "text")
"""Keys whose text is a prompt; the first that a record has counts."""

OTHER_KEYS = (
    "context",
    "choices",
    "answer",
    "answers",
    "target",
    "golden_answer",
    "canonical_solution",
    "summary",
    "reference",
    "Best Answer",
)
"""Keys of further text."""

_NUM_LISTED = 20


@dataclass(frozen=True)
class MeasuredItem:
    """One test item.

    Attributes:
        name: File and row.
        prompt: Turns of its prompt.
        others: Further texts.
    """

    name: str
    prompt: tuple[str, ...]
    others: tuple[str, ...]


def read_test_items(
    locations: Sequence[Location], *, fields: Sequence[str] | None = None, split: str | None = None
) -> Iterator[MeasuredItem]:
    """Yield the items of files of test text, in order.

    Args:
        locations: Files.
        fields: Keys whose text counts, each as a prompt of its own; known keys where None.
        split: Rows of this split only.

    Raises:
        DataError: A file cannot be read, has no row of the split, or has rows without test text; rows are named.
    """
    for location in locations:
        problems: list[str] = []
        num_items = 0
        for record in iter_labelled(location):
            name = f"{record.file} row {record.place}"
            try:
                if isinstance(record.value, RejectedRecord):
                    raise RowError(record.value.reason, record.value.detail)
                if split is not None and record.value.get("split") != split:
                    continue
                num_items += 1
                yield from _items(name, record.value, fields)
            except RowError as error:
                problems.append(f"{name}: {error}")
        if problems:
            more = f"\n  ... and {len(problems) - _NUM_LISTED} more" if len(problems) > _NUM_LISTED else ""
            raise PairError(
                f"{location.name}: {len(problems)} rows hold no test text:\n  "
                + "\n  ".join(problems[:_NUM_LISTED])
                + f"{more}\nName the keys that hold it (`decontaminate.fields`; `doctor --test-field`), or mend the "
                "file."
            )
        if not num_items:
            raise DataError(
                f"{location.name}: no row of split {split!r}. Check `decontaminate.split` or `--test-split`."
            )


def _items(name: str, value: Mapping[str, Any], fields: Sequence[str] | None) -> Iterator[MeasuredItem]:
    if fields is not None:
        for field in fields:
            texts = _texts(value.get(field))
            if not texts:
                raise RowError("no_test_text", f"expected text at {field!r}, found the keys {sorted(value)}")
            yield from (MeasuredItem(name, (text,), ()) for text in texts)
    elif "chosen" in value and "rejected" in value:
        content = pair_content(value, pair_format(value))
        yield MeasuredItem(name, _contents(content.prompt), (content.chosen, content.rejected))
    elif (formats := fitting_formats(value)) and "question" not in value:
        turns = to_conversation(value, formats[0]).messages
        yield MeasuredItem(name, _contents(turns[:-1]), _contents(turns[-1:]))
    else:
        key = next((key for key in PROMPT_KEYS if value.get(key)), None)
        if key is None:
            raise RowError("no_test_text", f"expected one of the keys {', '.join(PROMPT_KEYS)}, found {sorted(value)}")
        others = tuple(text for key in OTHER_KEYS for text in _texts(value.get(key)))
        yield MeasuredItem(name, _prompt(value[key], key), others)


def _prompt(prompt: Any, key: str) -> tuple[str, ...]:
    if isinstance(prompt, list):
        return _contents(parse_turns(prompt))
    if not isinstance(prompt, str):
        raise RowError("no_test_text", f"expected text or messages at {key!r}")
    return _contents(parse_transcript(prompt)) if is_transcript(prompt) else (prompt,)


def _contents(turns: Sequence[Message]) -> tuple[str, ...]:
    return tuple(turn.content for turn in turns)


def _texts(value: Any) -> list[str]:
    if isinstance(value, Mapping):  # SQuAD's answers
        value = value.get("text")
    found = value if isinstance(value, list) else [value]
    return [text for text in found if isinstance(text, str) and text.strip()]
