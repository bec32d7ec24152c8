"""An evaluation on Ray: selections of every budget, a task a model, then the judges; tables from what is there."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray

from rose_ray.config.evaluation import EvaluationConfig
from rose_ray.config.job import JobConfig
from rose_ray.config.model import LoraConfig, ModelConfig
from rose_ray.config.selection import SelectionConfig
from rose_ray.data.preferences import PreferencePair
from rose_ray.distributed.actors import device_of
from rose_ray.distributed.job import Job, RunResult
from rose_ray.distributed.judging import judge_all
from rose_ray.distributed.methods import vector_source
from rose_ray.distributed.resources import granted_resources
from rose_ray.distributed.run import run_job
from rose_ray.distributed.session import ray_session, root_cause, unwrapped_errors
from rose_ray.distributed.tasks import SCORES_FILE, SELECTED_FILE, select_target
from rose_ray.errors import ConfigError, RoseError
from rose_ray.evaluate.benchmarks import Benchmark
from rose_ray.evaluate.correlate import association_lines, association_records, associations
from rose_ray.evaluate.index import Index, make_index, read_index, write_index
from rose_ray.evaluate.inputs import check_budgets, check_inputs
from rose_ray.evaluate.report import REPORT_FOLDER, reader, write_report
from rose_ray.evaluate.trials import (
    RANDOM,
    Training,
    TrainingPlanner,
    Trial,
    budget_sizes,
    plan_trials,
    random_rows,
    row_set_digest,
    selection_of_size,
    with_parents,
)
from rose_ray.evaluate.work import Workbench, store_rows, training_lengths, work_on
from rose_ray.filesystem import locate
from rose_ray.model.describe import ModelIdentity, describe_model
from rose_ray.model.tokenizer import with_absolute_paths
from rose_ray.stages.clean import ContaminationSources, contamination_sources
from rose_ray.stages.row_vectors import VectorSource
from rose_ray.stages.select import SELECT_VERSION
from rose_ray.stages.target_pairs import read_target_pairs
from rose_ray.stores.lease import opened
from rose_ray.stores.manifest import Manifest, artefact_key, find_manifest
from rose_ray.stores.workspace import Workspace

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation works with, once the job has run.

    Attributes:
        job: Configuration and ways to start work; its workspace is held.
        config: The `evaluation` block.
        bench: What all models share.
        planner: Says what trainings depend on.
        scores: Of every arm.
        scored: Row ids of every arm's score table, sorted: a method may set rows aside.
        population: Row ids that were scored for some arm, sorted.
        sizes: Rows of every budget.
    """

    job: Job
    config: EvaluationConfig
    bench: Workbench
    planner: TrainingPlanner
    scores: Mapping[str, Manifest]
    scored: Mapping[str, list[str]]
    population: list[str]
    sizes: Mapping[float, int]


def evaluation_config(config: JobConfig) -> EvaluationConfig:
    """Return the `evaluation` block.

    Raises:
        ConfigError: There is none.
    """
    if config.evaluation is None:
        raise ConfigError("the configuration has no `evaluation` block. docs/evaluation.md shows one.")
    return config.evaluation


@contextmanager
def prepared(config: JobConfig) -> Iterator[Evaluation]:
    """Run the job as far as its scores, hold its workspace, and give what an evaluation works with.

    Raises:
        RoseError: Whatever is wrong with configuration, data, model, workspace or cluster.
    """
    settings = evaluation_config(config)
    benchmarks = check_inputs(config, settings)
    pairs = {target.name: read_target_pairs(target) for target in config.targets}
    with unwrapped_errors(), ray_session(config.ray):
        trained = _trained_model(config, settings)
        result = run_job(config, check_pool=lambda pool: check_budgets(config, settings, pool.facts["sources"]))
        with opened(config.workspace, config.lease.term) as workspace, granted_resources(config):
            yield _prepare(workspace, config, settings, benchmarks, pairs, result, trained)


@dataclass(frozen=True)
class _TrainedModel:
    """The model that is fine-tuned; it may be another one than scores the rows."""

    model: ModelConfig
    lora: LoraConfig
    identity: ModelIdentity


def _trained_model(config: JobConfig, settings: EvaluationConfig) -> _TrainedModel:
    """Look at the model on a worker before the job computes anything: all of that would be for nothing without it."""
    model, lora = with_absolute_paths(settings.model or config.model), settings.lora or config.lora
    with granted_resources(config):
        task = Job(Workspace(locate(config.workspace)), config).task(describe_model, model, lora)
        return _TrainedModel(model, lora, ray.get(task))


def _prepare(
    workspace: Workspace,
    config: JobConfig,
    settings: EvaluationConfig,
    benchmarks: Sequence[Benchmark],
    pairs: Mapping[str, Sequence[PreferencePair]],
    result: RunResult,
    trained: _TrainedModel,
) -> Evaluation:
    assert result.pool is not None
    job = Job(workspace, config)
    arms = settings.arms or [target.name for target in config.targets]
    scores = {arm: result.scores[arm] for arm in arms}
    scored, population = ray.get(job.task(scored_rows, workspace, scores))
    bench = Workbench(
        workspace,
        result.pool,
        settings,
        trained.model,
        trained.lora,
        pairs,
        benchmarks,
        device=device_of(config.ray),
        threads=config.ray.threads_per_actor,
    )
    sizes = budget_sizes(settings, result.pool.counts["unique"], len(population))
    planner = TrainingPlanner(settings, trained.model, trained.lora, trained.identity)
    return Evaluation(job, settings, bench, planner, scores, scored, population, sizes)


def scored_rows(workspace: Workspace, scores: Mapping[str, Manifest]) -> tuple[dict[str, list[str]], list[str]]:
    """Return the row ids of each arm's score table, and of all of them together, sorted.

    What one method sets aside, as IFD does with rows that its instruction does not help, is no matter of the others:
    random rows and the whole pool are drawn from what any arm scored.
    """
    by_arm = {}
    for arm, manifest in scores.items():
        record = manifest.file(SCORES_FILE)
        by_arm[arm] = set(workspace.read_table(record.path, record, columns=["row_id"])["row_id"].to_pylist())
    population = sorted(set().union(*by_arm.values()))
    # One list for all arms that scored everything: there may be millions of rows.
    scored = {arm: population if len(own) == len(population) else sorted(own) for arm, own in by_arm.items()}
    return scored, population


def run_evaluation(config: JobConfig) -> tuple[Index, list[str]]:
    """Train, measure and judge what is not there yet, and write the index.

    Args:
        config: The checked configuration.

    Returns:
        The index and what failed, a line each: trainings that diverged, judges that stopped. Everything else was done.

    Raises:
        RoseError: Whatever is wrong with configuration, data, model, workspace or cluster.
    """
    with prepared(config) as evaluation:
        selections = _selections(evaluation)
        trials = plan_trials(
            evaluation.planner, selections, evaluation.population, evaluation.bench.pairs, evaluation.sizes
        )
        _store_row_sets(evaluation, selections, trials)
        measured, failures = train_all(evaluation, with_parents(trials, evaluation.planner))
        index = make_index(
            trials,
            measured,
            failures,
            untrained=evaluation.planner.untrained().key,
            seeds=evaluation.config.seeds,
            pool_rows=evaluation.bench.pool.counts["unique"],
        )
        write_index(evaluation.bench.workspace, index)
        lines = [_failed(trial, failures) for trial in trials if trial.training.key in failures]
        index, stopped = judge_all(evaluation.job, evaluation.bench, index)
        write_index(evaluation.bench.workspace, index)
        return index, lines + stopped


def report_lines(config: JobConfig) -> list[str]:
    """Write table and curves of what was evaluated, and return them as lines of text.

    Raises:
        StoreError: Nothing was evaluated, or its numbers are missing or altered.
    """
    settings = evaluation_config(config)
    with opened(config.workspace, config.lease.term) as workspace:
        lines = write_report(workspace, read_index(workspace), settings, config.targets)
        where = workspace.location(REPORT_FOLDER).name
    return [*lines, f"{where}: table.txt, table.csv, table.json, curves as SVG"]


def correlate_lines(config: JobConfig) -> list[str]:
    """Correlate losses with outcomes across the models of an evaluation; write ``correlations.json`` beside the table.

    Raises:
        StoreError: Too few models were evaluated, or their numbers are missing or altered.
    """
    settings = evaluation_config(config)
    with opened(config.workspace, config.lease.term) as workspace:
        index = read_index(workspace)
        lengths = training_lengths(workspace, {entry.model for entry in index.entries})
        found = associations(index, settings, reader(workspace), lengths)
        text = json.dumps(association_records(found), indent=1) + "\n"
        workspace.write(f"{REPORT_FOLDER}/correlations.json", text.encode())
    return list(association_lines(found, settings.intervals.level))


def _failed(trial: Trial, failures: Mapping[str, str]) -> str:
    rows = f"{trial.num_rows:,} rows, seed {trial.seed}"
    return f"{trial.arm} ({rows}) has no numbers: {failures[trial.training.key]}"


def _selections(evaluation: Evaluation) -> dict[str, dict[float, list[str]]]:
    """Select for every arm at every budget; all that an arm scored needs no selection."""
    asked = {
        (arm, budget): _selected(evaluation, arm, size)
        for arm, scored in evaluation.scored.items()
        for budget, size in evaluation.sizes.items()
        if size < len(scored)
    }
    return {
        arm: {budget: ray.get(asked[arm, budget]) if (arm, budget) in asked else scored for budget in evaluation.sizes}
        for arm, scored in evaluation.scored.items()
    }


def _selected(evaluation: Evaluation, arm: str, size: int) -> Any:
    target = next(target for target in evaluation.job.config.targets if target.name == arm)
    selection = selection_of_size(target.selection, size)
    bench = evaluation.bench
    sources = contamination_sources(selection, bench.pairs[arm])
    scores = evaluation.scores[arm]
    vectors = vector_source(evaluation.job, bench.pool, selection, scores)
    arguments = (bench.workspace, bench.pool, scores, arm, selection, sources, vectors)
    return evaluation.job.task(selected_row_ids, *arguments)


def selected_row_ids(
    workspace: Workspace,
    pool: Manifest,
    scores: Manifest,
    arm: str,
    selection: SelectionConfig,
    sources: ContaminationSources | None,
    vectors: VectorSource | None,
) -> list[str]:
    """Select as `run` does, under ``evaluation/selections``, and return the row ids in order of choice."""
    made_from: dict[str, Any] = {
        "stage": "select",
        "version": SELECT_VERSION,
        "scores": [scores.key],
        "targets": [arm],
        "selection": selection.identity(),
    }
    if sources is not None:
        made_from["test_text"] = sources.identity()
    if vectors is not None:
        made_from["vectors"] = vectors.identity()
    folder = f"evaluation/selections/{arm}/{artefact_key(made_from)}"
    found = find_manifest(workspace, folder)
    chosen = found or select_target(workspace, pool, [scores], arm, selection, made_from, folder, sources, vectors)
    record = chosen.file(SELECTED_FILE)
    row_ids: list[str] = workspace.read_table(record.path, record, columns=["row_id"])["row_id"].to_pylist()
    return row_ids


def _store_row_sets(
    evaluation: Evaluation, selections: Mapping[str, Mapping[float, Sequence[str]]], trials: Sequence[Trial]
) -> None:
    sets: dict[str, Sequence[str]] = {row_set_digest(evaluation.population): evaluation.population}
    sets |= {row_set_digest(rows): rows for chosen in selections.values() for rows in chosen.values()}
    for trial in trials:
        if trial.arm == RANDOM and trial.seed is not None:
            drawn = random_rows(evaluation.population, trial.seed, trial.num_rows)
            sets[row_set_digest(drawn)] = drawn
    wanted = {trial.training.rows for trial in trials}
    for digest, rows in sets.items():
        if digest in wanted:
            store_rows(evaluation.bench.workspace, rows)


def train_all(
    evaluation: Evaluation, waves: Sequence[Sequence[Training]]
) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Train and measure models, a Ray task each, wave after wave.

    Args:
        evaluation: What all share.
        waves: From `with_parents`.

    Returns:
        Folders of the numbers, and what went wrong, by key of the model. A model whose parent failed is not trained.
    """
    measured: dict[str, dict[str, str]] = {}
    failures: dict[str, str] = {}
    total = sum(len(wave) for wave in waves)
    parents = {training.parent for wave in waves for training in wave}
    bench = ray.put(evaluation.bench)
    for wave in waves:
        waiting: dict[Any, Training] = {}
        for training in wave:
            if training.parent in failures:
                failures[training.key] = f"the model it starts from failed: {failures[training.parent]}"
                continue
            task = evaluation.job.model_task(work_on, bench, training, training.key in parents)
            waiting[task] = training
        while waiting:
            (done,), _ = ray.wait(list(waiting), num_returns=1)
            training = waiting.pop(done)
            try:
                measured[training.key] = ray.get(done)
            except Exception as error:
                cause = root_cause(error)
                if not isinstance(cause, RoseError):
                    raise
                failures[training.key] = str(cause)
            logger.info(f"evaluate: {len(measured) + len(failures)} of {total} models done")
    untrained = evaluation.planner.untrained().key
    if untrained in failures:
        raise RoseError(f"the untrained model cannot be measured, so nothing can: {failures[untrained]}")
    return measured, failures
