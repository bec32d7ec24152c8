"""From labelled rows to preference pairs: the labelled answer against one that is wrong.

Pairs of a row are one shot: they are taken or left together.
"""

from __future__ import annotations

import hashlib
import logging
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random

from rose_ray.data.asked import Asked, asked_by_row
from rose_ray.data.conversation import Message
from rose_ray.data.preferences import PreferencePair
from rose_ray.data.tasks.answers import final_answer, is_same_answer, normalized_answer
from rose_ray.data.tasks.rows import TaskRow, TaskSpec, read_task_rows
from rose_ray.data.transcripts import render_transcript
from rose_ray.errors import PairError, RowError
from rose_ray.filesystem import Location

_CALCULATOR = re.compile(r"<<[^<>]*>>")
_OPTION_LABEL = re.compile(r"^\(([A-Z])\)", re.MULTILINE)
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[\u3002\uff01\uff1f])\s*|\s*\n+\s*")
_NUM_LISTED = 20

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TaskPair:
    """A pair and the labelled row it was made from.

    Attributes:
        pair: Its id is the row's with the wrong side's letter or number behind.
        shot: Id of the row.
        asked: What the row asks.
    """

    pair: PreferencePair
    shot: str
    asked: Asked


def read_task_pairs(
    locations: Sequence[Location],
    task: TaskSpec,
    *,
    target: str,
    subtask: str | None = None,
    subtask_field: str | None = None,
    samples: Mapping[str, Sequence[str]] | None = None,
) -> list[TaskPair]:
    """Read labelled rows and make their pairs, in file order.

    Args:
        locations: Files, in order.
        task: What they hold.
        target: Name for messages, and of the subtask of rows that name none.
        subtask: Subtask of every pair.
        subtask_field: Key of the record that names its subtask.
        samples: A model's answers by row id, where ``task.rejected`` is ``samples``.

    Raises:
        DataError: A file cannot be read.
        PairError: Rows that do not fit the kind of task, name no subtask, or give no pair. Files and rows are named.
    """
    rows = _named_rows(locations, task, target, subtask, subtask_field)
    problems: list[str] = []
    pairs: list[TaskPair] = []
    others = _Others(rows, task)
    num_equal = num_right = 0
    for row in rows:
        try:
            wrong = list(_wrong_sides(row, task, others, samples))
        except RowError as error:
            problems.append(f"{row.where}: {error}")
            continue
        num_equal += len(row.options) - 1 - len(wrong) if row.options and task.rejected_per_row is None else 0
        num_right += task.rejected == "samples" and not wrong
        pairs += [_pair(row, task, label, answer) for label, answer in wrong]
    if problems:
        more = f"\n  ... and {len(problems) - _NUM_LISTED} more" if len(problems) > _NUM_LISTED else ""
        raise PairError(
            f"target {target}: {len(problems)} of {len(rows)} rows give no pair:\n  "
            + "\n  ".join(problems[:_NUM_LISTED])
            + more
        )
    if num_equal:
        _log.info("target %s: %d options are passed over, for they equal the labelled one", target, num_equal)
    if num_right:
        _log.info("target %s: %d of %d rows give no pair, for no sample is wrong", target, num_right, len(rows))
    return pairs


def read_questions(
    locations: Sequence[Location],
    task: TaskSpec,
    *,
    target: str,
    subtask: str | None = None,
    subtask_field: str | None = None,
) -> dict[str, tuple[Message, ...]]:
    """Return the prompt of every labelled row by its id. Arguments and errors are those of `read_task_pairs`."""
    questions: dict[str, tuple[Message, ...]] = {}
    for row in _named_rows(locations, task, target, subtask, subtask_field):
        if row.row_id in questions:
            raise PairError(f"target {target}: {row.where}: the id {row.row_id!r} stands twice. Mend the file.")
        questions[row.row_id] = (Message("user", task_prompt(row, task)),)
    return questions


def _named_rows(
    locations: Sequence[Location], task: TaskSpec, target: str, subtask: str | None, field: str | None
) -> list[TaskRow]:
    return [replace(row, subtask=subtask or _subtask(row, field, target)) for row in read_task_rows(locations, task)]


def task_prompt(row: TaskRow, task: TaskSpec) -> str:
    """Return what a row asks, as the user's turn."""
    lines = [task.instruction.replace("{subtask}", row.subtask or ""), ""] if task.instruction else []
    lines.append(row.question)
    if row.options:
        lines += [
            f"{letter}. {option.strip()}" for letter, option in zip(string.ascii_uppercase, row.options, strict=False)
        ]
        lines.append("Answer:")
    return "\n".join(lines)


def row_asked(row: TaskRow, task: TaskSpec) -> Asked:
    """Return what a row asks, with its instruction and without."""
    return asked_by_row(row, (task_prompt(row, task), task_prompt(row, replace(task, instruction=None))))


def _subtask(row: TaskRow, field: str | None, target: str) -> str:
    if field is None:
        return row.subtask or target
    name = row.value.get(field)
    if not isinstance(name, (str, int)) or isinstance(name, bool) or not str(name).strip():
        raise PairError(f"target {target}: {row.where} names no subtask at {field!r}. Mend it or the field's name.")
    return str(name)


def _pair(row: TaskRow, task: TaskSpec, label: str, rejected: str) -> TaskPair:
    prompt = (Message("user", task_prompt(row, task)),)
    chosen = _form(row, row.gold, task) if row.options else _stated(row.answers[0], task)
    pair = PreferencePair(
        pair_id=f"{row.row_id}/{label}",
        subtask=row.subtask or "",
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        raw_prompt=render_transcript(prompt),
        raw_chosen=chosen,
        raw_rejected=rejected,
    )
    return TaskPair(pair, row.row_id, row_asked(row, task))


def _wrong_sides(
    row: TaskRow, task: TaskSpec, others: _Others, samples: Mapping[str, Sequence[str]] | None
) -> list[tuple[str, str]]:
    if task.rejected == "options":
        wrong = list(_other_options(row, task))
    elif task.rejected == "other_rows":
        wrong = others.of(row)
    elif task.rejected == "samples":
        wrong = _wrong_samples(row, task, samples or {})
    elif task.rejected == "lead":
        wrong = [("lead", _lead(row))]
    else:
        wrong = [("shuffled", _shuffled(row, task.seed))]
    return wrong[: task.rejected_per_row]


def _other_options(row: TaskRow, task: TaskSpec) -> Iterator[tuple[str, str]]:
    gold = " ".join(row.options[row.gold].split())
    found = False
    for place, option in enumerate(row.options):
        if " ".join(option.split()) != gold:
            found = True
            yield string.ascii_uppercase[place], _form(row, place, task)
    if not found:
        raise RowError("equal_options", "every option equals the labelled one")


def _form(row: TaskRow, place: int, task: TaskSpec) -> str:
    letter, text = string.ascii_uppercase[place], row.options[place].strip()
    return {"letter": letter, "text": text, "letter_and_text": f"{letter}. {text}"}[task.answer]


def _final(answer: str, task: TaskSpec) -> str:
    """What is compared: a worked solution's conclusion, a summary whole."""
    return final_answer(answer) if task.kind == "exact_answer" else answer


def _stated(answer: str, task: TaskSpec) -> str:
    """An answer as it is trained on: without the marks of a calculator, and without its reasoning where asked."""
    if task.kind != "exact_answer":
        return answer
    return final_answer(answer) if task.answer == "final" else _CALCULATOR.sub("", answer)


class _Others:
    """Answers of other rows of the same subtask, drawn so that rows that come later change few draws."""

    def __init__(self, rows: Sequence[TaskRow], task: TaskSpec) -> None:
        self._task = task
        self._by_subtask: dict[str | None, dict[str, str]] = {}
        for row in rows if task.rejected == "other_rows" else ():
            answer = row.answers[0]
            # One answer of each kind: what most rows say is not drawn more often than what one says.
            self._by_subtask.setdefault(row.subtask, {}).setdefault(normalized_answer(_final(answer, task)), answer)

    def of(self, row: TaskRow) -> list[tuple[str, str]]:
        """Wrong answers to a row, numbered from 1."""
        known = self._by_subtask[row.subtask]
        golds = [_final(answer, self._task) for answer in row.answers]
        allowed = _listed_labels(row, golds[0])
        drawn = []
        for form in sorted(known, key=lambda form: self._draw(row, form)):
            final = _final(known[form], self._task)
            if (allowed is None or final in allowed) and not is_same_answer(final, golds):
                drawn.append(_stated(known[form], self._task))
                if len(drawn) == (self._task.rejected_per_row or 1):
                    break
        if not drawn:
            raise RowError(
                "no_other_answer",
                f"no other row of subtask {row.subtask!r} has an answer that differs from {golds[0]!r}; add rows",
            )
        return [(str(number), answer) for number, answer in enumerate(drawn, start=1)]

    def _draw(self, row: TaskRow, form: str) -> bytes:
        text = "\0".join((str(self._task.seed), row.row_id, form))
        return hashlib.sha256(text.encode()).digest()


def _listed_labels(row: TaskRow, gold: str) -> set[str] | None:
    """The labels, ``(A)`` and so on, that a question lists, where its answer is one of several; None elsewhere."""
    labels = {f"({letter})" for letter in _OPTION_LABEL.findall(row.question)}
    return labels if gold in labels and len(labels) > 1 else None


def _wrong_samples(row: TaskRow, task: TaskSpec, samples: Mapping[str, Sequence[str]]) -> list[tuple[str, str]]:
    if row.row_id not in samples:
        raise RowError("no_sample", f"the samples have no row {row.row_id!r}; sample again")
    golds = [final_answer(answer) for answer in row.answers]
    wrong: dict[str, str] = {}
    for sample in samples[row.row_id]:
        final = final_answer(sample)
        if final and not is_same_answer(final, golds):
            wrong.setdefault(normalized_answer(final), _stated(sample.strip(), task))
    first = list(wrong.values())[: task.rejected_per_row or 1]
    return [(str(number), answer) for number, answer in enumerate(first, start=1)]


def sentences(text: str) -> list[str]:
    """Return the sentences of a text, by their closing marks and line ends."""
    return [sentence for sentence in _SENTENCE_END.split(text.strip()) if sentence]


def _lead(row: TaskRow) -> str:
    """The first sentences of the document, as many as come nearest to the reference's number of words."""
    reference = row.answers[0]
    wanted = len(reference.split())
    taken, count = "", 0
    for sentence in sentences(row.question):
        size = len(sentence.split())
        if taken and abs(count + size - wanted) > abs(count - wanted):
            break
        taken, count = f"{taken} {sentence}".strip(), count + size
    if normalized_answer(taken) == normalized_answer(reference):
        raise RowError("lead_is_summary", "the document begins with its reference summary; use rejected: shuffled")
    return taken


def _shuffled(row: TaskRow, seed: int) -> str:
    """The reference's sentences in another order."""
    parts = sentences(row.answers[0])
    if len(set(parts)) < 2:
        raise RowError("one_sentence", "the reference is one sentence, which has no other order; use rejected: lead")
    random = Random(f"{seed}\0{row.row_id}")
    order = random.sample(parts, len(parts))
    return " ".join(order if order != parts else [*parts[1:], parts[0]])
