"""Steering and held-out pairs of the protocol, and the pool without the rows of its control."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from rose_ray.config.target import TargetConfig
from rose_ray.data.preferences import PreferencePair, read_pairs
from rose_ray.data.tokenize import Tokeniser
from rose_ray.errors import ConfigError, PairError
from rose_ray.filesystem import locate
from rose_ray.stages.bank import encode_pairs

CONTROL = "control"
CONTROL_SOURCE = "gpteacher_codegen"
"""Code: no other source of the pool looks like it, and it is a twelfth of the rows."""

PREFERENCES: Mapping[str, Sequence[tuple[str, str]]] = {
    "hh": (("helpful", "hh_helpful"), ("harmless", "hh_harmless")),
    "se": (("se", "se"),),
    "shp": (("shp", "shp"),),
}
"""Subtasks of a task, each with the stem of its files."""

TASKS = (*PREFERENCES, CONTROL)

MOST_TOKENS = 512
"""Of either side of a held-out pair: measuring is half of what all this costs."""

Inputs = dict[str, list[dict[str, Any]]]
"""Entries of a configuration by task."""


@dataclass(frozen=True)
class TaskPairs:
    """Pairs of every task, written to files.

    Attributes:
        pool: The pool without the control's rows.
        steering: ``pairs`` of the targets.
        held_out: ``held_out`` of the evaluation.
        left_out: Pairs passed over, by file: too long for the model, or held out and of more than `MOST_TOKENS`, or
            asking what another pair asks.
    """

    pool: Path
    steering: Inputs
    held_out: Inputs
    left_out: dict[str, int]


def write_pairs(
    data: Path, folder: Path, tokeniser: Tokeniser, tasks: Sequence[str], num_shots: int, num_held_out: int, draw: int
) -> TaskPairs:
    """Write so many steering pairs of each subtask, and so many held-out ones in a random order.

    Args:
        data: Shared folder with ``data/``.
        folder: Where to.
        tokeniser: Of the model: one pair that it does not take would stop the evaluation.
        tasks: Of `TASKS`.
        num_shots: Steering pairs of each subtask.
        num_held_out: Pairs of each held-out set.
        draw: Chooses the steering pairs, the first of their file in draw 0, and the control's. The held-out pairs of
            the preference files are the same in every draw, less those that ask what a steering pair asks.

    Raises:
        ConfigError: A file has too few pairs that can be used.
    """
    pool = data / "data/pool/pool.jsonl.gz"
    made = hold_back(pool, folder, num_steering=2 * num_shots, num_held_out=_with_spare(num_held_out), draw=draw)
    preferences = data / "data/preferences"
    files = {
        stem: (preferences / f"{stem}_val.jsonl.gz", preferences / f"{stem}_test.jsonl.gz")
        for subtasks in PREFERENCES.values()
        for _, stem in subtasks
    } | {CONTROL: (made["control_val"], made["control_test"])}
    subtasks_of = {**PREFERENCES, CONTROL: ((CONTROL, CONTROL),)}
    chooser = _Chooser(folder, tokeniser)
    steering: Inputs = {
        task: [
            {"files": [str(chooser.steering(files[stem][0], num_shots, draw))], "subtask": name}
            for name, stem in subtasks_of[task]
        ]
        for task in tasks
    }
    held_out: Inputs = {
        task: [
            {"name": stem, "pairs": [{"files": [str(chooser.held_out(files[stem][1], num_held_out))]}]}
            for _, stem in subtasks_of[task]
        ]
        for task in tasks
    }
    return TaskPairs(made["pool"], steering, held_out, chooser.left_out)


def _with_spare(num_held_out: int) -> int:
    """Some rows are too long."""
    return 5 * num_held_out // 3


def hold_back(pool: Path, folder: Path, *, num_steering: int, num_held_out: int, draw: int = 0) -> dict[str, Path]:
    """Write the control's pairs, and the pool without the rows that their answers, chosen or rejected, come from.

    Args:
        pool: Gzipped JSONL of conversations with a source.
        folder: Where to.
        num_steering: Rows of the source that become pairs to steer by.
        num_held_out: And to measure on.
        draw: Which.

    Returns:
        Paths of ``pool``, ``control_val`` and ``control_test``.
    """
    with gzip.open(pool, "rt", encoding="utf-8") as file:
        lines = file.readlines()
    rows = [json.loads(line) for line in lines]
    random = Random(draw)
    own = [place for place, row in enumerate(rows) if row["source"] == CONTROL_SOURCE and len(row["messages"]) == 2]
    held = random.sample(own, num_steering + num_held_out)
    answers = [row["messages"][-1]["content"] for row in rows]
    others = {place: answers[place] for place, row in enumerate(rows) if row["source"] != CONTROL_SOURCE}
    left_out = set(held)
    pairs = []
    for place in held:
        row = rows[place]
        prompt, answer = row["messages"][0]["content"], answers[place]
        # Of like length, so that length does not tell the sides apart.
        sample = random.sample(list(others), min(200, len(others)))
        drawn = [other for other in sample if others[other].strip() != answer.strip()]
        rejected = min(drawn, key=lambda other: abs(len(others[other]) - len(answer)))
        left_out.add(rejected)
        pairs.append({"id": row["id"], "prompt": prompt, "chosen": answer, "rejected": others[rejected]})
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / f"{name}.jsonl" for name in ("pool", "control_val", "control_test")}
    paths["pool"].write_text("".join(line for place, line in enumerate(lines) if place not in left_out), "utf-8")
    for name, part in (("control_val", pairs[:num_steering]), ("control_test", pairs[num_steering:])):
        paths[name].write_text("".join(json.dumps(pair) + "\n" for pair in part), "utf-8")
    return paths


class _Chooser:
    """Writes pairs that can be used, and counts those passed over.

    Steering pairs are chosen before any that are held out.
    """

    def __init__(self, folder: Path, tokeniser: Tokeniser) -> None:
        self.folder = folder
        self.tokeniser = tokeniser
        self.left_out: dict[str, int] = {}
        self._asked: set[str] = set()

    def steering(self, path: Path, number: int, draw: int) -> Path:
        """Pairs of a draw: of draw 0 the first of the file."""
        pairs = _pairs_and_lines(path)
        if draw:
            Random(draw).shuffle(pairs)
        taken = self._take(path, pairs, number)
        self._asked |= {_asks(pairs[place][0]) for place in taken}
        return self._write(path, [pairs[place][1] for place in taken])

    def held_out(self, path: Path, number: int) -> Path:
        """Pairs in a random order, one a prompt: intervals take items as independent.

        None asks what a steering pair asks: the evaluation would refuse it.
        """
        pairs = _pairs_and_lines(path)
        Random(0).shuffle(pairs)
        return self._write(path, [pairs[place][1] for place in self._take(path, pairs, number, one_a_prompt=True)])

    def _take(
        self, path: Path, pairs: Sequence[tuple[PreferencePair, str]], number: int, *, one_a_prompt: bool = False
    ) -> list[int]:
        taken: list[int] = []
        asked = set(self._asked)
        passed_over = 0
        for place, (pair, _) in enumerate(pairs):
            if len(taken) == number:
                break
            if _asks(pair) not in asked and self._fits(pair, MOST_TOKENS if one_a_prompt else None):
                taken.append(place)
                if one_a_prompt:
                    asked.add(_asks(pair))
            else:
                passed_over += 1
        if len(taken) < number:
            raise ConfigError(
                f"{path}: {len(taken)} of {len(pairs)} pairs can be used, {number} wanted. Lower --shots or --held-out."
            )
        self.left_out[path.name] = passed_over
        return taken

    def _fits(self, pair: PreferencePair, most_tokens: int | None) -> bool:
        target = TargetConfig.model_validate({"name": "fits", "pairs": [{"files": ["-"]}]})
        try:
            (encoded,) = encode_pairs([pair], self.tokeniser, target)
        except PairError:
            return False
        lengths = (len(encoded.chosen.input_ids), len(encoded.rejected.input_ids))
        return most_tokens is None or max(lengths) <= most_tokens

    def _write(self, path: Path, lines: Sequence[str]) -> Path:
        written = self.folder / f"{path.name.split('.')[0]}-taken.jsonl"
        written.write_text("".join(lines), "utf-8")
        return written


def _pairs_and_lines(path: Path) -> list[tuple[PreferencePair, str]]:
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        lines = [line for line in file if line.strip()]
    return list(zip(read_pairs([locate(str(path))], target=path.name), lines, strict=True))


def _asks(pair: PreferencePair) -> str:
    return pair.prompt[-1].content.strip() if pair.prompt else ""
