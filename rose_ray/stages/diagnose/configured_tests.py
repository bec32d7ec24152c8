"""Test texts that a configuration names by itself: what its selections keep out and what its evaluation measures on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rose_ray.config.job import JobConfig
from rose_ray.config.target import PairInput, TargetConfig
from rose_ray.data.contamination import KnownTestText
from rose_ray.data.tasks.rows import TaskSpec, read_task_rows
from rose_ray.data.test_items import read_test_items
from rose_ray.errors import DataError
from rose_ray.filesystem import expand
from rose_ray.stages.target_pairs import read_target_pairs, task_spec

_Item = tuple[str, list[str], list[str]]
"""Name, turns of the prompt, further texts."""

_Reader = Callable[[], Iterator[_Item]]


@dataclass(frozen=True)
class ConfiguredTests:
    """What could be read.

    Attributes:
        known: All texts; None where the configuration names none, or none can be read.
        counts: How many by the key that names them.
        unread: Why not, by the key.
    """

    known: KnownTestText | None
    counts: dict[str, int]
    unread: dict[str, str]

    def lines(self) -> Iterator[str]:
        """Tell people."""
        if self.counts:
            named = ", ".join(f"{key} {count:,}" for key, count in self.counts.items())
            yield f"test texts of the configuration: {named}; --test looks for others instead"
        for key, reason in self.unread.items():
            yield f"not told: overlap with {key}: {reason}"


def configured_tests(config: JobConfig) -> ConfiguredTests:
    """Read the files of ``selection.decontaminate``, ``evaluation.held_out`` and ``evaluation.tasks``.

    A file that cannot be read, or does not fit its key, is told and hides no other.
    """
    known, counts, unread = KnownTestText(), dict[str, int](), dict[str, str]()
    for key, read in _readers(config).items():
        try:
            items = list(read())
        except DataError as error:
            unread[key] = str(error)
            continue
        counts[key] = len(items)
        for name, prompt, others in items:
            known.add(name, prompt, others)
    return ConfiguredTests(known if counts else None, counts, unread)


def _readers(config: JobConfig) -> dict[str, _Reader]:
    readers: dict[str, _Reader] = {}
    selections = {f"targets.{number}.selection": target.selection for number, target in enumerate(config.targets)}
    if config.training_set is not None:
        selections["training_set.selection"] = config.training_set.selection
    known_files = set()
    for key, selection in selections.items():
        wanted = selection.decontaminate
        if wanted is None or not wanted.files:
            continue
        same = (tuple(wanted.files), tuple(wanted.fields or ()), wanted.split)
        if same not in known_files:  # many targets keep the same files out
            known_files.add(same)
            readers[f"{key}.decontaminate.files"] = _texts(wanted.files, wanted.fields, wanted.split)
    if config.evaluation is not None:
        for number, held_out in enumerate(config.evaluation.held_out):
            for place, entry in enumerate(held_out.pairs):
                key = f"evaluation.held_out.{number}.pairs.{place}"
                readers[key] = _pairs(entry) if entry.task is None else _rows(entry.files, task_spec(entry.task))
        for number, task in enumerate(config.evaluation.tasks):
            kind = "multiple_choice" if task.kind == "multiple_choice" else "exact_answer"
            spec = TaskSpec(kind, splits=None if task.splits is None else tuple(task.splits))
            readers[f"evaluation.tasks.{number}"] = _rows(task.files, spec)
    return readers


def _texts(files: list[str], fields: list[str] | None, split: str | None) -> _Reader:
    def read() -> Iterator[_Item]:
        for item in read_test_items(expand(files), fields=fields, split=split):
            yield item.name, list(item.prompt), list(item.others)

    return read


def _pairs(entry: PairInput) -> _Reader:
    def read() -> Iterator[_Item]:
        for pair in read_target_pairs(TargetConfig(name="held_out", pairs=[entry]), checked=False):
            yield f"pair {pair.pair_id}", [turn.content for turn in pair.prompt], [pair.chosen, pair.rejected]

    return read


def _rows(files: list[str], spec: TaskSpec) -> _Reader:
    def read() -> Iterator[_Item]:
        for row in read_task_rows(expand(files), spec):
            yield row.where, [row.question], [*row.options, *row.answers]

    return read
