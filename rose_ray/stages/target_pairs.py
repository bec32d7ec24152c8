"""All pairs of a target: preference files as they are, and labelled rows of tasks made into pairs."""

from __future__ import annotations

from rose_ray.config.target import PairInput, TargetConfig
from rose_ray.config.task import TaskInput
from rose_ray.data.preferences import PreferencePair, check_pairs, read_pairs, take_shots
from rose_ray.data.tasks.pairs import TaskPair, read_task_pairs
from rose_ray.data.tasks.rows import TaskSpec
from rose_ray.data.tasks.samples import read_samples
from rose_ray.filesystem import expand


def read_target_pairs(target: TargetConfig) -> list[PreferencePair]:
    """Read and check all pairs of a target.

    Shots are counted in pairs; of a task in labelled rows, whose pairs stay together.

    Raises:
        DataError: A file cannot be read.
        PairError: Pairs that cannot be used, or too few of them.
    """
    pairs: list[PreferencePair] = []
    shots: dict[str, str] = {}
    for entry in target.pairs:
        if entry.task is None:
            pairs += read_pairs(
                expand(entry.files),
                target=target.name,
                format=entry.format,
                subtask=entry.subtask,
                subtask_field=entry.subtask_field,
                subtask_blocks=entry.subtask_blocks,
            )
            continue
        for made in _task_pairs(entry, entry.task, target.name):
            pairs.append(made.pair)
            shots[made.pair.pair_id] = made.shot
    check_pairs(pairs, target=target.name)
    return take_shots(pairs, target.shots, target=target.name, shot_of=shots)


def _task_pairs(entry: PairInput, task: TaskInput, target: str) -> list[TaskPair]:
    return read_task_pairs(
        expand(entry.files),
        task_spec(task),
        target=target,
        subtask=entry.subtask,
        subtask_field=entry.subtask_field,
        samples=read_samples(expand(task.samples)) if task.samples else None,
    )


def task_spec(task: TaskInput) -> TaskSpec:
    """Return the settings of a task with the defaults of its kind filled in."""
    return TaskSpec(
        kind=task.kind,
        answer=task.answer_form,
        rejected=task.wrong_side,
        rejected_per_row=task.rejected_per_row,
        split=task.split,
        instruction=task.instruction,
        document_field=task.document_field,
        summary_field=task.summary_field,
        seed=task.seed,
    )
