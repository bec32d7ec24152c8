"""What an evaluation needs, looked at before anything is computed: what it reads, the judges' keys, its budgets.

None of what it reads may have steered a selection.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from rose_ray.config.evaluation import EvaluationConfig, HeldOutConfig
from rose_ray.config.job import JobConfig
from rose_ray.config.target import TargetConfig
from rose_ray.data.asked import Asked
from rose_ray.data.tasks.rows import read_task_rows
from rose_ray.errors import ConfigError
from rose_ray.evaluate.benchmarks import (
    Benchmark,
    answers_benchmark,
    check_apart,
    held_out_benchmark,
    read_task,
    task_asked,
)
from rose_ray.evaluate.endpoint import endpoint_key
from rose_ray.evaluate.few_shot import check_file_is_a_test, check_rows_are_a_test
from rose_ray.evaluate.trials import budget_sizes, selection_of_size
from rose_ray.filesystem import expand
from rose_ray.stages.held_out import check_held_out
from rose_ray.stages.selection_check import check_selection
from rose_ray.stages.target_pairs import read_target_asked, read_target_pairs, task_spec


@dataclass(frozen=True)
class _Files:
    """Files of an evaluation: the key that names them, and the splits that are read of them."""

    key: str
    files: list[str]
    splits: list[str] | None


def check_inputs(config: JobConfig, settings: EvaluationConfig) -> list[Benchmark]:
    """Look at all that an evaluation needs besides pool, model and cluster, and return what models are measured on.

    Raises:
        ConfigError: The key of a judge is not in the environment.
        RoseError: As `checked_benchmarks`.
    """
    for judge in settings.judges:
        endpoint_key(judge)
    return checked_benchmarks(config, settings)


def check_budgets(config: JobConfig, settings: EvaluationConfig, sources: Mapping[str, int]) -> None:
    """Refuse budgets that this pool cannot give, whatever the scores will be.

    Args:
        config: With every target.
        settings: The `evaluation` block.
        sources: Unique rows of the pool by source.

    Raises:
        ConfigError: A count is above the pool, or above what an arm's rules on sources leave.
    """
    total = sum(sources.values())
    above = [str(count) for count in settings.counts if count > total]
    if above:
        raise ConfigError(
            f"evaluation.counts: {', '.join(above)} are above the {total:,} unique rows of the pool. Lower them."
        )
    arms = [each for each in config.targets if settings.arms is None or each.name in settings.arms]
    for size in budget_sizes(settings, total, total).values():
        for arm in arms if size < total else ():  # the whole pool needs no selection
            check_selection(f"evaluation budget ({arm.name})", selection_of_size(arm.selection, size), sources)


def checked_benchmarks(config: JobConfig, settings: EvaluationConfig) -> list[Benchmark]:
    """Read everything that models are measured on, and refuse what a target's pairs come from.

    Args:
        config: With every target.
        settings: The `evaluation` block.

    Raises:
        ConfigError: A file is a target's as well.
        DataError: A file, a row or a pair cannot be used, is a few-shot example, or asks what a target's pairs ask.
    """
    for target in config.targets:
        for entry in _files(settings):
            check_held_out(target, expand(entry.files), key=entry.key, splits=entry.splits)
    for held_out_set in settings.held_out:
        _check_is_a_test(held_out_set)
    held_out = [held_out_benchmark(entry, read_target_pairs(_as_target(entry))) for entry in settings.held_out]
    steering = {target.name: read_target_asked(target).values() for target in config.targets}
    check_apart(steering, _measured(settings, held_out))
    answered = [answers_benchmark(entry, settings.max_prompts, settings.max_new_tokens) for entry in held_out]
    tasks = [read_task(task, settings.max_new_tokens) for task in settings.tasks]
    reads_answers = any(judge.kind != "cross_entropy" for judge in settings.judges)
    return [*held_out, *tasks, *(answered if reads_answers else [])]


def held_out_prompts(settings: EvaluationConfig) -> dict[str, dict[str, str]]:
    """Return the prompt of every held-out pair, by name of the set and pair id.

    Raises:
        DataError: A file cannot be read, or a pair cannot be used.
    """
    return {
        entry.name: {pair.pair_id: pair.raw_prompt for pair in read_target_pairs(_as_target(entry))}
        for entry in settings.held_out
    }


def _files(settings: EvaluationConfig) -> Iterator[_Files]:
    for number, held_out in enumerate(settings.held_out):
        for place, entry in enumerate(held_out.pairs):
            split = None if entry.task is None else entry.task.split
            key = f"evaluation.held_out.{number}.pairs.{place}.files"
            yield _Files(key, entry.files, None if split is None else [split])
    for number, task in enumerate(settings.tasks):
        yield _Files(f"evaluation.tasks.{number}.files", task.files, task.splits)


def _check_is_a_test(held_out: HeldOutConfig) -> None:
    what = f"evaluation {held_out.name}"
    for entry in held_out.pairs:
        if entry.task is None:
            for location in expand(entry.files):
                check_file_is_a_test(location.name, what)
        else:
            rows = read_task_rows(expand(entry.files), task_spec(entry.task))
            check_rows_are_a_test(rows, what, is_named=entry.task.split is not None, setting="task.split: {}")


def _measured(settings: EvaluationConfig, held_out: list[Benchmark]) -> dict[str, dict[str, Asked]]:
    measured = {}
    for entry, benchmark in zip(settings.held_out, held_out, strict=True):
        asked = read_target_asked(_as_target(entry))
        measured[entry.name] = {pair.pair_id: asked[pair.pair_id] for pair in benchmark.pairs}
    return measured | {task.name: task_asked(task) for task in settings.tasks}


def _as_target(entry: HeldOutConfig) -> TargetConfig:
    return TargetConfig(name=entry.name, pairs=entry.pairs)
