"""All pairs of a target: preference files as they are, and labelled rows of tasks made into pairs."""

from __future__ import annotations

from rose_ray.config.target import PairInput, TargetConfig
from rose_ray.config.task import TaskInput
from rose_ray.data.asked import Asked, asked_by_text
from rose_ray.data.conversation import Message
from rose_ray.data.preferences import PreferencePair, Shot, check_pairs, read_pairs, shots_of_pairs, take_shots
from rose_ray.data.tasks.pairs import TaskPair, read_questions, read_task_pairs
from rose_ray.data.tasks.rows import TaskSpec
from rose_ray.data.tasks.samples import read_samples
from rose_ray.errors import ConfigError, PairError
from rose_ray.filesystem import expand


def read_target_pairs(target: TargetConfig, *, checked: bool = True) -> list[PreferencePair]:
    """Read and check all pairs of a target.

    Shots are counted in pairs; of a task in labelled rows, whose pairs stay together. A target whose method looks at no
    pair may have none.

    Args:
        target: Names the files.
        checked: False to get pairs as well that `check_pairs` refuses.

    Raises:
        DataError: A file cannot be read.
        PairError: Pairs that cannot be used, or too few of them.
    """
    return _read(target, checked)[0]


def read_target_shots(target: TargetConfig, *, checked: bool = True) -> tuple[list[PreferencePair], list[Shot]]:
    """Return what `read_target_pairs` does, and the shot that each pair is part of."""
    pairs, made = _read(target, checked)
    return pairs, shots_of_pairs(pairs, {pair_id: each.shot for pair_id, each in made.items()})


def read_target_asked(target: TargetConfig) -> dict[str, Asked]:
    """Return what each pair of a target asks, its last turn, by pair id. Errors are those of `read_target_pairs`."""
    pairs, made = _read(target, checked=True)
    return {pair.pair_id: made[pair.pair_id].asked if pair.pair_id in made else _last_turn(pair) for pair in pairs}


def _last_turn(pair: PreferencePair) -> Asked:
    return asked_by_text(pair.prompt[-1].content if pair.prompt else "")


def _read(target: TargetConfig, checked: bool) -> tuple[list[PreferencePair], dict[str, TaskPair]]:
    """Return the pairs, and by their ids those that were made from labelled rows."""
    if not target.pairs:
        return [], {}
    pairs: list[PreferencePair] = []
    made: dict[str, TaskPair] = {}
    for entry in target.pairs:
        if entry.task is None:
            pairs += read_pairs(
                expand(entry.files),
                target=target.name,
                format=entry.format,
                subtask=entry.subtask,
                subtask_field=entry.subtask_field,
                subtask_blocks=entry.subtask_blocks,
                checked=checked,
            )
            continue
        for each in _task_pairs(entry, entry.task, target.name):
            pairs.append(each.pair)
            made[each.pair.pair_id] = each
    if checked:
        check_pairs(pairs, target=target.name)
    rows = {pair_id: each.shot for pair_id, each in made.items()}
    return take_shots(pairs, target.shots, target=target.name, row_of=rows), made


def _task_pairs(entry: PairInput, task: TaskInput, target: str) -> list[TaskPair]:
    return read_task_pairs(
        expand(entry.files),
        task_spec(task),
        target=target,
        subtask=entry.subtask,
        subtask_field=entry.subtask_field,
        samples=read_samples(expand(task.samples)) if task.samples else None,
    )


def target_questions(target: TargetConfig) -> dict[str, tuple[Message, ...]]:
    """Return the prompts of a target's rows of kind ``exact_answer`` by row id: what a model may be asked.

    Raises:
        ConfigError: It has none.
        DataError: A file cannot be read, or rows do not fit.
    """
    questions: dict[str, tuple[Message, ...]] = {}
    for entry in target.pairs:
        if entry.task is None or entry.task.kind != "exact_answer":
            continue
        found = read_questions(
            expand(entry.files),
            task_spec(entry.task),
            target=target.name,
            subtask=entry.subtask,
            subtask_field=entry.subtask_field,
        )
        if twice := sorted(set(found) & set(questions)):
            raise PairError(
                f"target {target.name}: the row id {twice[0]!r} stands in two of its inputs. Mend the files."
            )
        questions |= found
    if not questions:
        raise ConfigError(f"target {target.name}: no input with task kind exact_answer, so nothing to ask a model.")
    return questions


def task_spec(task: TaskInput) -> TaskSpec:
    """Return the settings of a task with the defaults of its kind filled in."""
    return TaskSpec(
        kind=task.kind,
        answer=task.answer_form,
        rejected=task.wrong_side,
        rejected_per_row=task.rejected_per_row,
        splits=None if task.split is None else (task.split,),
        instruction=task.instruction,
        document_field=task.document_field,
        summary_field=task.summary_field,
        seed=task.seed,
    )
