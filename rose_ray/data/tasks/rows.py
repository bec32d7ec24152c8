"""Labelled rows: from a record to question, options and labelled answers, by kind of task."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rose_ray.data.records import RejectedRecord
from rose_ray.data.strict_json import kind_of
from rose_ray.data.tasks.files import LabelledRecord, iter_labelled
from rose_ray.errors import PairError, RowError
from rose_ray.filesystem import Location

_SUBTASK_KEYS = ("task", "subtask", "subject", "language", "category")
_QUESTIONS, _ANSWERS = ("question", "input"), ("answers", "answer", "target")
_NUM_LISTED = 20
_KEYS: dict[str, str] = {
    "multiple_choice": "question, choices (a list), answer (a letter, a number from 0, or the choice itself)",
    "exact_answer": "question or input, and answer, answers or target; context may stand beside them",
}


@dataclass(frozen=True)
class TaskSpec:
    """What rows are and how pairs are made from them; ``rose_ray.config.task.TaskInput`` says what each value means.

    What reads rows alone goes by ``kind``, ``splits``, ``document_field`` and ``summary_field``.

    Attributes:
        kind: ``multiple_choice``, ``exact_answer`` or ``summarization``.
        answer: ``letter``, ``text``, ``letter_and_text``; ``full``, ``final``.
        rejected: ``options``, ``other_rows``, ``samples``, ``lead``, ``shuffled``.
        rejected_per_row: Most pairs of a row; None for all.
        splits: Whose rows are taken; None where there is but one.
        instruction, document_field, summary_field, seed: As configured.
    """

    kind: str
    answer: str = "full"
    rejected: str = ""
    rejected_per_row: int | None = None
    splits: tuple[str, ...] | None = None
    instruction: str | None = None
    document_field: str = "document"
    summary_field: str = "summary"
    seed: int = 0


@dataclass(frozen=True)
class TaskRow:
    """One labelled row.

    Attributes:
        row_id: The record's ``id`` as text, or its file's name and place.
        subtask: Subject, language, kind of problem; None where the record names none.
        split: As the record or its file says; None where neither does.
        file: Of the row; of a member of an archive, ``ARCHIVE:MEMBER``.
        where: File and row, for messages.
        question: Question with its context, behind its file's instruction; or the text to sum up.
        options: Of a multiple choice, in order; else empty.
        gold: Place of the right option.
        answers: Every labelled answer; the first is the one that is trained on.
        value: The whole record.
    """

    row_id: str
    subtask: str | None
    split: str | None
    file: str
    where: str
    question: str
    options: tuple[str, ...]
    gold: int
    answers: tuple[str, ...]
    value: Mapping[str, Any]


def read_task_rows(locations: Sequence[Location], task: TaskSpec) -> list[TaskRow]:
    """Read labelled rows, in file order.

    Raises:
        DataError: A file cannot be read.
        PairError: Rows that do not fit the kind of task; several splits and none chosen; no row of those chosen. Files
            and rows are named.
    """
    rows: list[TaskRow] = []
    splits: dict[str | None, str] = {}
    for location in locations:
        problems: list[str] = []
        for record in iter_labelled(location):
            try:
                split = _split(record)
                splits.setdefault(split, f"{record.file} row {record.place}")
                if task.splits is None or split in task.splits:
                    rows.append(task_row(record, task))
            except RowError as error:
                problems.append(f"{record.file} row {record.place}: {error}")
        if problems:
            more = f"\n  ... and {len(problems) - _NUM_LISTED} more" if len(problems) > _NUM_LISTED else ""
            listed = "\n  ".join(problems[:_NUM_LISTED])
            raise PairError(
                f"{location.name}: {len(problems)} rows do not fit task kind {task.kind}:\n  {listed}{more}\n"
                "Mend the file, or check the task's `kind`."
            )
    found = ", ".join(f"{split or 'none'} ({where})" for split, where in splits.items())
    if task.splits is None and len(splits) > 1:
        raise PairError(
            f"{_names(locations)}: rows of {len(splits)} splits, first of each: {found}. Choose by `task.split` "
            "(in an evaluation `splits`), so that what pairs are made from and what is measured on stay apart."
        )
    if not rows:
        wanted = " or ".join(map(repr, task.splits or ()))
        raise PairError(f"{_names(locations)}: no row of split {wanted}; found {found}. Choose among these.")
    return rows


def task_row(record: LabelledRecord, task: TaskSpec) -> TaskRow:
    """Read one record.

    Raises:
        RowError: It does not fit the kind of task; the reason says how.
    """
    if isinstance(record.value, RejectedRecord):
        raise RowError(record.value.reason, record.value.detail)
    value = record.value
    options: tuple[str, ...] = ()
    answers: tuple[str, ...]
    gold = 0
    if task.kind == "multiple_choice":
        question = _filled(_one_of(value, ("question",), task.kind), "question")
        options, gold = _choices(value)
        answers = (options[gold],)
    elif task.kind == "exact_answer":
        if "choices" in value:
            raise RowError("wrong_task", "the record has choices: it is a row of kind multiple_choice")
        question = _filled(_one_of(value, _QUESTIONS, task.kind), "question")
        context = value.get("context")
        if context is not None and not isinstance(context, str):
            raise RowError("wrong_task", f"expected context as text, found {kind_of(context)}")
        if context and context.strip():
            question = f"{context}\n\nQuestion: {question}"
        if record.instruction:
            question = f"{record.instruction}\n\n{question}"
        answers = _answers(value)
    else:
        for field in (task.document_field, task.summary_field):
            if field not in value:
                raise RowError("wrong_task", f"expected the key {field!r}, found {sorted(value)}")
        question = _filled(value[task.document_field], task.document_field)
        answers = (_filled(value[task.summary_field], task.summary_field),)
    own = value.get("id")
    row_id = f"{record.stem}/{record.place}" if not _is_label(own) else str(own)
    if own is None and value.get("split"):
        row_id = f"{record.stem}/{value['split']}/{record.place}"
    subtask = next((str(value[key]) for key in _SUBTASK_KEYS if _is_label(value.get(key))), None)
    where = f"{record.file} row {record.place}"
    return TaskRow(row_id, subtask, _split(record), record.file, where, question, options, gold, answers, value)


def _choices(value: Mapping[str, Any]) -> tuple[tuple[str, ...], int]:
    choices, answer = (_one_of(value, (key,), "multiple_choice") for key in ("choices", "answer"))
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise RowError("wrong_task", f"expected choices as a list of texts, found {kind_of(choices)}")
    if len(choices) < 2:
        raise RowError("one_option", f"expected two options or more, found {len(choices)}: nothing to prefer it to")
    if len(choices) > len(string.ascii_uppercase):
        raise RowError("too_many_options", f"expected at most 26 options, found {len(choices)}")
    letters = string.ascii_uppercase[: len(choices)]
    empty = [letter for letter, choice in zip(letters, choices, strict=True) if not choice.strip()]
    if empty:
        raise RowError("empty_option", f"option {', '.join(empty)} of {len(choices)} holds no text")
    if isinstance(answer, str) and len(answer.strip()) == 1 and answer.strip().upper() in letters:
        return tuple(choices), letters.index(answer.strip().upper())
    if type(answer) is int and 0 <= answer < len(choices):
        return tuple(choices), answer
    # A letter comes first: choices may be letters themselves, in another order.
    if isinstance(answer, str) and answer.strip() in (stripped := [choice.strip() for choice in choices]):
        return tuple(choices), stripped.index(answer.strip())
    raise RowError(
        "no_such_option",
        f"the answer key {answer!r} matches no option; expected a letter from A to {letters[-1]}, a whole number "
        f"from 0 to {len(choices) - 1}, or the text of an option",
    )


def _answers(value: Mapping[str, Any]) -> tuple[str, ...]:
    found = _one_of(value, _ANSWERS, "exact_answer")
    if isinstance(found, dict) and isinstance(found.get("text"), list):  # SQuAD's form
        found = found["text"]
    many = found if isinstance(found, list) else [found]
    if not many:
        raise RowError("no_answer", "expected at least one answer, found an empty list")
    plain = [str(answer) if type(answer) in (int, float) else answer for answer in many]
    return tuple(dict.fromkeys(_filled(answer, "answer") for answer in plain))


def _one_of(value: Mapping[str, Any], keys: Sequence[str], kind: str) -> Any:
    for key in keys:
        if value.get(key) is not None:
            return value[key]
    raise RowError("wrong_task", f"a row of kind {kind} has {_KEYS[kind]}; found the keys {sorted(value)}")


def _filled(text: Any, what: str) -> str:
    if not isinstance(text, str):
        raise RowError("wrong_task", f"expected {what} as text, found {kind_of(text)}")
    if not text.strip():
        raise RowError(f"empty_{what}", f"the {what} holds no text")
    return text.strip()


def _split(record: LabelledRecord) -> str | None:
    split = None if isinstance(record.value, RejectedRecord) else record.value.get("split")
    return split if isinstance(split, str) and split else None


def _is_label(value: Any) -> bool:
    return (isinstance(value, str) and bool(value.strip())) or type(value) is int


def _names(locations: Sequence[Location]) -> str:
    return ", ".join(location.name for location in locations[:3]) + (" ..." if len(locations) > 3 else "")
