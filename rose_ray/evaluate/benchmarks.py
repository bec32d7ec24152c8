"""What models are measured on: held-out pairs, questions with a known answer, prompts to answer."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from string import ascii_uppercase
from typing import Any, Literal

from rose_ray.config.evaluation import HeldOutConfig, TaskConfig
from rose_ray.data.asked import Asked, KnownQuestions
from rose_ray.data.preferences import PreferencePair
from rose_ray.data.tasks.pairs import row_asked, task_prompt
from rose_ray.data.tasks.rows import TaskRow, TaskSpec, read_task_rows
from rose_ray.errors import DataError, PairError
from rose_ray.evaluate.few_shot import check_rows_are_a_test
from rose_ray.filesystem import expand
from rose_ray.stores.manifest import artefact_key

_NUM_LISTED = 20

Kind = Literal["pairs", "multiple_choice", "exact_match", "answers"]


@dataclass(frozen=True)
class Question:
    """A prompt with a known answer.

    Attributes:
        item_id: The record's ``id``, or its file's name and place.
        subtask: Subject, language or kind of problem where the record names one, else the benchmark's name.
        text: What the model is asked.
        options: What it may answer; empty for exact match.
        gold: Place of the right option; -1 for exact match.
        answers: Every right answer, for exact match.
    """

    item_id: str
    subtask: str
    text: str
    options: tuple[str, ...] = ()
    gold: int = -1
    answers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Benchmark:
    """One set of items, and how they are measured.

    Attributes:
        name: As configured.
        kind: ``answers`` are prompts of pairs, answered for the judges.
        pairs: Of ``pairs`` and ``answers``.
        questions: Of the others.
        settings: What else decides the numbers.
    """

    name: str
    kind: Kind
    pairs: tuple[PreferencePair, ...] = ()
    questions: tuple[Question, ...] = ()
    settings: tuple[tuple[str, Any], ...] = ()

    @property
    def digest(self) -> str:
        """16 hex digits that stand for kind, settings and every item."""
        pairs: list[Any] = [
            [p.pair_id, p.subtask, [[m.role, m.content] for m in p.prompt], p.chosen, p.rejected, p.tools]
            for p in self.pairs
        ]
        questions: list[Any] = [list(vars(question).values()) for question in self.questions]
        content = {"kind": self.kind, "settings": dict(self.settings), "pairs": pairs, "questions": questions}
        return artefact_key(content)


def held_out_benchmark(config: HeldOutConfig, pairs: Sequence[PreferencePair]) -> Benchmark:
    """Return the pairs to measure on, in an order that depends on their ids alone."""
    chosen = sorted(pairs, key=lambda pair: _place(config.name, pair.pair_id))
    return Benchmark(config.name, "pairs", pairs=tuple(chosen[: config.max_pairs]))


def answers_benchmark(held_out: Benchmark, max_prompts: int, max_new_tokens: int) -> Benchmark:
    """Return the prompts of held-out pairs that are answered for the judges: one pair of each prompt."""
    first: dict[str, PreferencePair] = {}
    for pair in held_out.pairs:
        first.setdefault(pair.raw_prompt, pair)
    pairs = tuple(first.values())[:max_prompts]
    return Benchmark(held_out.name, "answers", pairs=pairs, settings=(("max_new_tokens", max_new_tokens),))


def check_apart(steering: Mapping[str, Iterable[Asked]], measured: Mapping[str, Mapping[str, Asked]]) -> None:
    """Refuse to measure on what steered a selection.

    Args:
        steering: What the pairs of every target ask.
        measured: What the items of every benchmark ask, by its name and their ids.

    Raises:
        PairError: A benchmark asks what a target's pairs ask; ids are listed.
    """
    known = KnownQuestions()
    for target, questions in steering.items():
        for asked in questions:
            known.add(asked, target)
    for name, items in measured.items():
        found = {item_id: known.find(asked) for item_id, asked in items.items()}
        shared = [f"{item_id} (target {target})" for item_id, target in found.items() if target is not None]
        if shared:
            more = f" and {len(shared) - _NUM_LISTED} more" if len(shared) > _NUM_LISTED else ""
            raise PairError(
                f"evaluation {name}: {len(shared)} of {len(items)} items ask what a target's pairs ask: "
                f"{', '.join(shared[:_NUM_LISTED])}{more}. What steers a selection cannot measure it: take them out "
                "(of a task by `leave_out`)."
            )


def read_task(config: TaskConfig, max_new_tokens: int) -> Benchmark:
    """Read questions, from the files that targets are made from too; ``max_new_tokens`` bounds exact answers.

    Raises:
        DataError: A file cannot be read; rows are of another kind, few-shot examples, of several splits or one to train
            on and none chosen, or none is left; ids stand twice, or are left out and not there. Files, rows and reasons
            are listed.
    """
    questions = [_question(row, config) for row in _rows(config)]
    settings: dict[str, Any] = {"extract": config.extract, "max_new_tokens": max_new_tokens}
    if config.kind == "multiple_choice":
        settings = {"options": config.options}
    return Benchmark(config.name, config.kind, questions=tuple(questions), settings=tuple(settings.items()))


def task_asked(config: TaskConfig) -> dict[str, Asked]:
    """Return what the questions of `read_task` ask, by their ids; raises as it does."""
    return {row.row_id: row_asked(row, _spec(config)) for row in _rows(config)}


def _spec(config: TaskConfig) -> TaskSpec:
    kind = "multiple_choice" if config.kind == "multiple_choice" else "exact_answer"
    return TaskSpec(kind, splits=None if config.splits is None else tuple(config.splits))


def _rows(config: TaskConfig) -> list[TaskRow]:
    """The rows to measure on, in an order that depends on their ids alone."""
    rows = read_task_rows(expand(config.files), _spec(config))
    task = f"evaluation task {config.name}"
    check_rows_are_a_test(rows, task, is_named=config.splits is not None, setting="splits: [{}]")
    rows.sort(key=lambda row: _place(config.name, row.row_id))
    repeated = [one.row_id for one, next_one in pairwise(rows) if one.row_id == next_one.row_id]
    if repeated:
        raise DataError(f"{task}: ids stand twice: {', '.join(repeated[:_NUM_LISTED])}. Mend the file.")
    left_out = set(config.leave_out)
    if unknown := sorted(left_out - {row.row_id for row in rows}):
        raise DataError(f"{task}: leave_out: no row has the id {', '.join(unknown[:_NUM_LISTED])}. Take it out.")
    rows = [row for row in rows if row.row_id not in left_out]
    if not rows:
        raise DataError(f"{task}: leave_out leaves none of {len(left_out)} rows. Leave out fewer.")
    return rows[: config.max_items]


def _place(name: str, item_id: str) -> bytes:
    return hashlib.sha256(f"{name}:{item_id}".encode()).digest()


def _question(row: TaskRow, config: TaskConfig) -> Question:
    subtask = row.subtask or config.name
    if config.kind == "exact_match":
        return Question(row.row_id, subtask, row.question, answers=row.answers)
    if config.options == "letters":
        letters = tuple(ascii_uppercase[: len(row.options)])
        return Question(row.row_id, subtask, task_prompt(row, _spec(config)), letters, row.gold)
    # Published sets have rows with a choice twice: as a text it is one answer, right where the known one is.
    unique = tuple(dict.fromkeys(row.options))
    if len(unique) < 2:
        raise DataError(f"{row.where}: all choices are equal. Leave the row out, or ask for `options: letters`.")
    return Question(row.row_id, subtask, row.question, unique, unique.index(row.options[row.gold]))
