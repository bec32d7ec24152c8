"""What models are measured on: held-out pairs, questions with a known answer, prompts to answer."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from string import ascii_uppercase
from typing import Any, Literal

from rose_ray.config.evaluation import HeldOutConfig, TaskConfig
from rose_ray.data.conversation import Message
from rose_ray.data.preferences import PreferencePair
from rose_ray.data.tasks.rows import TaskRow, TaskSpec, read_task_rows
from rose_ray.errors import DataError, PairError
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


def check_apart(steering: Mapping[str, Sequence[PreferencePair]], benchmarks: Iterable[Benchmark]) -> None:
    """Refuse to measure on what steered a selection.

    Args:
        steering: The pairs of every target.
        benchmarks: To measure on.

    Raises:
        PairError: A benchmark holds a target's prompt; ids are listed.
    """
    prompts = {_last_turn(pair.prompt): name for name, pairs in steering.items() for pair in pairs}
    for benchmark in benchmarks:
        asked = [(pair.pair_id, _last_turn(pair.prompt)) for pair in benchmark.pairs]
        asked += [(question.item_id, question.text.strip()) for question in benchmark.questions]
        shared = [f"{item_id} (target {prompts[text]})" for item_id, text in asked if text in prompts]
        if shared:
            more = f" and {len(shared) - _NUM_LISTED} more" if len(shared) > _NUM_LISTED else ""
            raise PairError(
                f"evaluation {benchmark.name}: {len(shared)} of {len(asked)} items ask what a target's pairs ask: "
                f"{', '.join(shared[:_NUM_LISTED])}{more}. What steers a selection cannot measure it: take them out."
            )


def _last_turn(prompt: Sequence[Message]) -> str:
    return prompt[-1].content.strip() if prompt else ""


def read_task(config: TaskConfig, max_new_tokens: int) -> Benchmark:
    """Read questions, from the files that targets are made from too; ``max_new_tokens`` bounds exact answers.

    Raises:
        DataError: A file cannot be read; rows are of another kind, of several splits and none chosen, or none is left;
            ids stand twice. Files, rows and reasons are listed.
    """
    kind = "multiple_choice" if config.kind == "multiple_choice" else "exact_answer"
    spec = TaskSpec(kind, splits=None if config.splits is None else tuple(config.splits))
    rows = read_task_rows(expand(config.files), spec)
    questions = sorted((_question(row, config) for row in rows), key=lambda each: _place(config.name, each.item_id))
    repeated = [one.item_id for one, next_one in pairwise(questions) if one.item_id == next_one.item_id]
    if repeated:
        raise DataError(
            f"evaluation task {config.name}: ids stand twice: {', '.join(repeated[:_NUM_LISTED])}. Mend the file."
        )
    settings: dict[str, Any] = {"extract": config.extract, "max_new_tokens": max_new_tokens}
    if config.kind == "multiple_choice":
        settings = {"options": config.options}
    return Benchmark(
        config.name, config.kind, questions=tuple(questions[: config.max_items]), settings=tuple(settings.items())
    )


def _place(name: str, item_id: str) -> bytes:
    return hashlib.sha256(f"{name}:{item_id}".encode()).digest()


def _question(row: TaskRow, config: TaskConfig) -> Question:
    subtask = row.subtask or config.name
    if config.kind == "exact_match":
        return Question(row.row_id, subtask, row.question, answers=row.answers)
    if config.options == "letters":
        letters = tuple(ascii_uppercase[: len(row.options)])
        listed = "\n".join(f"{letter}. {option}" for letter, option in zip(letters, row.options, strict=True))
        return Question(row.row_id, subtask, f"{row.question}\n{listed}", letters, row.gold)
    # Published sets have rows with a choice twice: as a text it is one answer, right where the known one is.
    unique = tuple(dict.fromkeys(row.options))
    if len(unique) < 2:
        raise DataError(f"{row.where}: all choices are equal. Leave the row out, or ask for `options: letters`.")
    return Question(row.row_id, subtask, row.question, unique, unique.index(row.options[row.gold]))
