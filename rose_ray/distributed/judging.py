"""The judges of an evaluation. Endpoints are asked from this process, which has their keys; models run in tasks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray

from rose_ray.config.judge import JudgeConfig
from rose_ray.data.preferences import PreferencePair
from rose_ray.distributed.job import Job
from rose_ray.distributed.session import root_cause
from rose_ray.errors import JudgeError, ModelError
from rose_ray.evaluate.endpoint import EndpointJudge
from rose_ray.evaluate.index import Entry, Index
from rose_ray.evaluate.judges import judge_identity, load_judge
from rose_ray.evaluate.judging import judge_answers, judge_numbers, verdict_folder
from rose_ray.evaluate.measures import Item
from rose_ray.evaluate.work import Workbench, read_items
from rose_ray.stores.manifest import find_manifest
from rose_ray.stores.workspace import Workspace

logger = logging.getLogger(__name__)

CHOSEN = "chosen"


@dataclass(frozen=True)
class JudgingTask:
    """One trial's answers on one held-out set against its opponent's.

    Attributes:
        held_out: Name of the set.
        ours, theirs: Folders; ``chosen`` for the pairs' own answers.
        folder, made_from: Of the verdicts.
    """

    held_out: str
    ours: str
    theirs: str
    folder: str
    made_from: dict[str, Any]


def judge_all(job: Job, bench: Workbench, index: Index) -> tuple[Index, list[str]]:
    """Let every judge compare what it has not compared yet.

    Args:
        job: Ways to start work.
        bench: Benchmarks and settings.
        index: With the numbers of every trial.

    Returns:
        The index with the verdicts that are there, and a line for every judge that stopped.
    """
    stopped = []
    for judge in bench.evaluation.judges:
        tasks: dict[tuple[int, str], JudgingTask] = {}
        try:
            identity = ray.get(job.task(judge_identity, judge))
            tasks = judging_tasks(bench, index, judge, identity)
            waiting = [task for task in tasks.values() if find_manifest(bench.workspace, task.folder) is None]
            unique = list({task.folder: task for task in waiting}.values())
            logger.info(f"judge {judge.name}: {len(unique)} of {len(tasks)} comparisons of models to do")
            if unique:
                _judge(job, bench, judge, unique)
        except Exception as error:
            cause = root_cause(error)
            if not isinstance(cause, JudgeError | ModelError):
                raise
            stopped.append(str(cause))
        index = _with_verdicts(bench.workspace, index, judge, tasks)
    return index, stopped


def judging_tasks(
    bench: Workbench, index: Index, judge: JudgeConfig, identity: Mapping[str, Any]
) -> dict[tuple[int, str], JudgingTask]:
    """Return what a judge has to compare, by the place of the trial in the index and the held-out set.

    A trial without an opponent (random rows of its budget and seed were not trained, or it is the opponent itself), or
    without answers, is left out.
    """
    kind = "pairs" if judge.kind == "cross_entropy" else "answers"
    tasks = {}
    for place, entry in enumerate(index.entries):
        for held_out in bench.evaluation.held_out:
            key = f"{kind}/{held_out.name}"
            ours, theirs = entry.measures.get(key), _opponent(bench.evaluation.opponent, index, entry, key)
            if ours is not None and theirs is not None:
                folder, made_from = verdict_folder(identity, ours, theirs)
                tasks[place, held_out.name] = JudgingTask(held_out.name, ours, theirs, folder, made_from)
    return tasks


def _opponent(opponent: str, index: Index, entry: Entry, key: str) -> str | None:
    if opponent == CHOSEN:
        return CHOSEN
    if entry.arm == opponent:
        return None
    if opponent == "zero_shot":
        return index.untrained.get(key)
    same = [e for e in index.entries if (e.arm, e.budget, e.seed) == (opponent, entry.budget, entry.seed)]
    return same[0].measures.get(key) if same else None


def _judge(job: Job, bench: Workbench, judge: JudgeConfig, tasks: Sequence[JudgingTask]) -> None:
    prompts = {b.name: b.pairs for b in bench.benchmarks if b.kind == "answers"}
    if judge.kind == "endpoint":
        ask_endpoint(bench.workspace, judge, prompts, tasks)
    elif judge.kind in ("local_model", "reward_model"):
        ray.get(job.model_task(judge_here, bench.workspace, judge, prompts, tasks, bench.device))
    else:
        ray.get(job.task(judge_here, bench.workspace, judge, prompts, tasks))


def judge_here(
    workspace: Workspace,
    config: JudgeConfig,
    prompts: Mapping[str, Sequence[PreferencePair]],
    tasks: Sequence[JudgingTask],
    device: str = "cpu",
) -> None:
    """Judge in this process, with the model on ``device``.

    Raises:
        JudgeError: Too often no verdict.
        ModelError: The judge's model cannot be used.
    """
    if config.kind == "cross_entropy":
        for task in tasks:
            ours, theirs = read_items(workspace, task.ours), read_items(workspace, task.theirs)
            judge_numbers(workspace, config, ours, theirs, task.folder, task.made_from)
        return
    # One model, one thread: its passes must not mix.
    one_thread = config.model_copy(update={"parallel": 1})
    judge = load_judge(config, device)
    for task in tasks:
        _judge_task(workspace, one_thread, judge, prompts, task)


def ask_endpoint(
    workspace: Workspace,
    config: JudgeConfig,
    prompts: Mapping[str, Sequence[PreferencePair]],
    tasks: Sequence[JudgingTask],
    make: Callable[[JudgeConfig, int], EndpointJudge] = EndpointJudge,
) -> None:
    """Ask an endpoint, and keep count of what it costs in ``evaluation/judges/NAME.json``, whatever else changes.

    The count is written after every ``parallel`` comparisons: a process that is killed forgets no more than these.

    Raises:
        JudgeError: It stopped; what was judged, and what that cost, is kept.
    """
    ledger = f"evaluation/judges/{config.name}.json"
    spent = workspace.read_json(ledger)["tokens"] if workspace.exists(ledger) else 0
    judge = make(config, spent)

    def keep_count() -> None:
        workspace.write_json(ledger, {"judge": config.name, "tokens": judge.spent})

    try:
        for task in tasks:
            _judge_task(workspace, config, judge, prompts, task, keep_count)
    finally:
        keep_count()
        logger.info(f"judge {config.name}: {judge.spent - spent:,} tokens in this run, {judge.spent:,} in all")


def _judge_task(
    workspace: Workspace,
    config: JudgeConfig,
    judge: Any,
    prompts: Mapping[str, Sequence[PreferencePair]],
    task: JudgingTask,
    after_batch: Callable[[], None] | None = None,
) -> None:
    pairs = prompts[task.held_out]
    theirs: list[Item]
    if task.theirs == CHOSEN:
        theirs = [{"item_id": pair.pair_id, "answer": pair.chosen} for pair in pairs]
    else:
        theirs = read_items(workspace, task.theirs)
    ours = read_items(workspace, task.ours)
    judge_answers(workspace, config, judge, pairs, ours, theirs, task.folder, task.made_from, after_batch)


def _with_verdicts(
    workspace: Workspace, index: Index, judge: JudgeConfig, tasks: Mapping[tuple[int, str], JudgingTask]
) -> Index:
    entries = list(index.entries)
    finished: dict[str, bool] = {}
    for (place, held_out), task in tasks.items():
        if task.folder not in finished:
            finished[task.folder] = find_manifest(workspace, task.folder) is not None
        if finished[task.folder]:
            verdicts = {**entries[place].verdicts, f"{judge.name}/{held_out}": task.folder}
            entries[place] = replace(entries[place], verdicts=verdicts)
    return replace(index, entries=entries)
