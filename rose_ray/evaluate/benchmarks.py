"""What models are measured on: held-out pairs, questions with a known answer, prompts to answer."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rose_ray.config.evaluation import HeldOutConfig, TaskConfig
from rose_ray.data.conversation import Message
from rose_ray.data.preferences import PreferencePair
from rose_ray.data.records import RejectedRecord, iter_records
from rose_ray.data.strict_json import kind_of
from rose_ray.errors import ConfigError, DataError, PairError
from rose_ray.filesystem import expand
from rose_ray.stores.manifest import artefact_key

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_NUM_LISTED = 20

Kind = Literal["pairs", "multiple_choice", "exact_match", "answers"]


@dataclass(frozen=True)
class Question:
    """A prompt with a known answer.

    Attributes:
        item_id: The record's ``id``, or its file and row.
        subtask: The record's ``task`` or ``subtask``, else the benchmark's name.
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
    """Read questions; ``max_new_tokens`` bounds the answers of ``exact_match``.

    A record has ``question`` or ``input``, for a passage ``context``, and ``id``, ``task`` or ``subtask``, ``split``
    where it likes. For ``multiple_choice`` it has ``choices`` and ``answer``: a letter, a place from 0, or else the
    text of a choice. For ``exact_match`` it has ``answer`` or ``target``, or several in ``answers``.

    Raises:
        DataError: A file cannot be read, or rows are of another kind; files, rows and reasons are listed.
        ConfigError: Records of several splits, and none chosen; or none left.
    """
    questions: list[Question] = []
    problems: list[str] = []
    splits: dict[str, int] = {}
    for location in expand(config.files):
        for record in iter_records(location):
            where = f"{location.name} row {record.place}"
            if isinstance(record, RejectedRecord):
                problems.append(f"{where}: {record.reason}: {record.detail}")
                continue
            split = str(record.value.get("split", ""))
            splits[split] = splits.get(split, 0) + 1
            if config.splits is not None and split not in config.splits:
                continue
            try:
                questions.append(_question(record.value, config, where))
            except DataError as error:
                problems.append(f"{where}: {error}")
    found = ", ".join(f"{name or 'none'}: {count}" for name, count in splits.items())
    if problems:
        more = f"\n  ... and {len(problems) - _NUM_LISTED} more" if len(problems) > _NUM_LISTED else ""
        listed = "\n  ".join(problems[:_NUM_LISTED])
        raise DataError(
            f"evaluation task {config.name}: {len(problems)} rows are no questions of kind {config.kind}:\n  "
            f"{listed}{more}\nMend the file, or `kind`."
        )
    if config.splits is None and len(splits) > 1:
        raise ConfigError(
            f"evaluation task {config.name}: its records are of several splits ({found}). Set `splits`: a few-shot "
            "split is not measured on."
        )
    if not questions:
        raise ConfigError(f"evaluation task {config.name}: no record of splits {config.splits}; found {found}.")
    ids = [question.item_id for question in questions]
    if len(set(ids)) < len(ids):
        repeated = sorted({item_id for item_id in ids if ids.count(item_id) > 1})[:_NUM_LISTED]
        raise DataError(f"evaluation task {config.name}: ids stand twice: {', '.join(repeated)}. Mend the file.")
    questions.sort(key=lambda question: _place(config.name, question.item_id))
    settings: dict[str, Any] = {"extract": config.extract, "max_new_tokens": max_new_tokens}
    if config.kind == "multiple_choice":
        settings = {"options": config.options}
    return Benchmark(
        config.name, config.kind, questions=tuple(questions[: config.max_items]), settings=tuple(settings.items())
    )


def _place(name: str, item_id: str) -> bytes:
    return hashlib.sha256(f"{name}:{item_id}".encode()).digest()


def _question(record: Mapping[str, Any], config: TaskConfig, where: str) -> Question:
    asked = record.get("question", record.get("input"))
    if not isinstance(asked, str) or not asked.strip():
        raise DataError(f"expected text at 'question' or 'input', found {kind_of(asked)}")
    context = record.get("context")
    if context is not None and not isinstance(context, str):
        raise DataError(f"expected text at 'context', found {kind_of(context)}")
    text = f"{context}\n\n{asked}" if context else asked
    item_id = str(record.get("id", where))
    subtask = str(record.get("task", record.get("subtask", config.name)))
    if config.kind == "exact_match":
        return Question(item_id, subtask, text, answers=_answers(record))
    options = _options(record)
    gold = _gold(record.get("answer"), options)
    if config.options == "letters":
        listed = "\n".join(f"{LETTERS[i]}. {option}" for i, option in enumerate(options))
        return Question(item_id, subtask, f"{text}\n{listed}", tuple(LETTERS[: len(options)]), gold)
    # Published sets have rows with a choice twice: as a text it is one answer, right where the known one is.
    unique = tuple(dict.fromkeys(options))
    if len(unique) < 2:
        raise DataError("all choices are equal")
    return Question(item_id, subtask, text, unique, unique.index(options[gold]))


def _options(record: Mapping[str, Any]) -> tuple[str, ...]:
    options = record.get("choices")
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise DataError(f"expected a list of texts at 'choices', found {kind_of(options)}")
    if not 2 <= len(options) <= len(LETTERS):
        raise DataError(f"expected 2 to {len(LETTERS)} choices, found {len(options)}")
    if any(not option.strip() for option in options):
        raise DataError("a choice is empty")
    return tuple(options)


def _gold(answer: Any, options: Sequence[str]) -> int:
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(options):
        return answer
    # A letter comes first: choices may be letters themselves, in another order.
    if isinstance(answer, str) and len(answer) == 1 and answer in LETTERS[: len(options)]:
        return LETTERS.index(answer)
    if isinstance(answer, str) and answer in options:
        return options.index(answer)
    raise DataError(f"the answer {answer!r} is none of the {len(options)} choices, their letters or places from 0")


def _answers(record: Mapping[str, Any]) -> tuple[str, ...]:
    several = record.get("answers")
    if isinstance(several, Mapping):  # as SQuAD has them
        several = several.get("text")
    answers = several if several is not None else [record.get("answer", record.get("target"))]
    if not isinstance(answers, list) or not answers or not all(isinstance(a, str) and a.strip() for a in answers):
        raise DataError("expected text at 'answer' or 'target', or a list of texts at 'answers'")
    return tuple(answers)
