"""Trainings on random subsets, as Ray tasks, against what the scores foretell of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import ray

from rose_ray.config.job import JobConfig
from rose_ray.distributed.evaluate import Evaluation, evaluation_config, prepared, train_all
from rose_ray.distributed.tasks import SCORES_FILE
from rose_ray.errors import ConfigError, RoseError
from rose_ray.evaluate.benchmarks import Benchmark
from rose_ray.evaluate.lds import LdsResult, RowScores, lds_lines, lds_result, random_subsets
from rose_ray.evaluate.measures import pair_values
from rose_ray.evaluate.report import REPORT_FOLDER
from rose_ray.evaluate.results import resampling_of
from rose_ray.evaluate.trials import Training
from rose_ray.evaluate.work import read_items, store_rows
from rose_ray.kernels.budget import part_of
from rose_ray.stores.manifest import Manifest
from rose_ray.stores.workspace import Workspace


def run_lds(config: JobConfig, target: str) -> list[str]:
    """Train on random subsets and compare; write ``evaluation/report/lds-TARGET.json`` and return lines of text.

    Margins are measured on the target's own pairs, which its scores are about, and on every held-out set.

    Args:
        config: The checked configuration.
        target: Whose scores are summed.

    Raises:
        ConfigError: There is no such target, or its subsets would be the whole pool.
        RoseError: Whatever is wrong with the job; a training that diverged.
    """
    settings = evaluation_config(config)
    names = [each.name for each in config.targets]
    if target not in names:
        raise ConfigError(f"lds: there is no target {target!r}; the configuration has {names}.")
    # Its subsets have a size of their own: nothing is selected, judged, or measured on tasks.
    alone = settings.model_copy(update={"arms": [target], "tasks": [], "judges": [], "budgets": [1.0], "counts": []})
    with prepared(config.model_copy(update={"evaluation": alone})) as evaluation:
        return _run(evaluation, target)


def _run(evaluation: Evaluation, target: str) -> list[str]:
    settings, bench = evaluation.config.lds, evaluation.bench
    size = max(1, part_of(settings.fraction, bench.pool.counts["unique"]))
    if size >= len(evaluation.population):
        raise ConfigError(
            f"evaluation.lds.fraction: {size} rows are the whole pool of {len(evaluation.population)} scored rows, so "
            "all subsets would be one. Lower it."
        )
    own = Benchmark(f"own pairs of {target}", "pairs", pairs=tuple(bench.pairs[target]))
    held_out = [benchmark for benchmark in bench.benchmarks if benchmark.kind == "pairs"]
    bench = replace(bench, benchmarks=[own, *held_out] if own.pairs else held_out)
    evaluation = replace(evaluation, bench=bench)
    subsets = random_subsets(evaluation.population, size, settings)
    trainings = [evaluation.planner.on_rows(subset, settings.seed) for subset in subsets]
    for subset in subsets:
        store_rows(bench.workspace, subset)
    untrained = evaluation.planner.untrained()
    unique = {training.key: training for training in [untrained, *trainings]}
    measured, failures = train_all(evaluation, [list(unique.values())])
    if failures:
        raise RoseError(f"lds: {len(failures)} of {len(unique)} models failed: {next(iter(failures.values()))}")
    scores = ray.get(evaluation.job.task(row_scores, bench.workspace, evaluation.scores[target]))
    foretold_SC = scores.sums(subsets)
    betas = {held_out.name: held_out.dpo_beta for held_out in evaluation.config.held_out}
    results = []
    for benchmark in bench.benchmarks:
        beta = betas.get(benchmark.name, evaluation.config.held_out[0].dpo_beta)
        margins_SQ = _margins(evaluation, benchmark, trainings, measured, untrained, beta)
        columns = scores.columns(benchmark.pairs)
        resampling = resampling_of(evaluation.config)
        results.append(lds_result(benchmark.name, foretold_SC, columns, margins_SQ, resampling))
    _write(bench.workspace, target, size, results)
    return list(lds_lines(target, results, size))


def _margins(
    evaluation: Evaluation,
    benchmark: Benchmark,
    trainings: Sequence[Training],
    measured: Mapping[str, Mapping[str, str]],
    untrained: Training,
    beta: float,
) -> np.ndarray:
    workspace, key = evaluation.bench.workspace, f"pairs/{benchmark.name}"
    reference = read_items(workspace, measured[untrained.key][key])
    settings: dict[str, Any] = {
        "dpo_beta": beta,
        "length_normalised_beta": evaluation.config.length_normalised_beta,
    }
    items = (read_items(workspace, measured[training.key][key]) for training in trainings)
    return np.stack([pair_values(each, reference, **settings)["margin"] for each in items])


def row_scores(workspace: Workspace, scores: Manifest) -> RowScores:
    """Return the scores of every row of a score table."""
    subtasks: list[str] = scores.facts["subtasks"]
    columns = ["score", *(f"subtask_{name}" for name in subtasks)]
    record = scores.file(SCORES_FILE)
    table = workspace.read_table(record.path, record, columns=["row_id", *columns])
    scores_NC = np.stack([table[column].to_numpy().astype(np.float64) for column in columns], axis=1)
    return RowScores(table["row_id"].to_pylist(), subtasks, scores_NC)


def _write(workspace: Workspace, target: str, size: int, results: Sequence[LdsResult]) -> None:
    content = {
        "target": target,
        "rows": size,
        "results": [
            {
                "benchmark": result.benchmark,
                "spearman": vars(result.overall) if result.overall else None,
                "mean_over_pairs": result.by_pair.value,
                "mean_over_pairs_low": result.by_pair.low,
                "mean_over_pairs_high": result.by_pair.high,
                "foretold": result.foretold_S.tolist(),
                "measured": result.measured_S.tolist(),
            }
            for result in results
        ],
    }
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    workspace.write(f"{REPORT_FOLDER}/lds-{target}.json", text.encode())
