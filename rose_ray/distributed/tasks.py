"""Work that runs once, in one Ray task: reading a base model's identity, reducing, selecting."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from rose_ray.config.selection import JointSelectionConfig, SelectionConfig
from rose_ray.config.target import TargetConfig
from rose_ray.errors import AccountingError
from rose_ray.schemas import FEATURE_REJECTED, SELECTED
from rose_ray.stages.candidates import Scores, choose, joint_candidates, target_candidates
from rose_ray.stages.clean import ContaminationSources, ReadTexts, clean_gate
from rose_ray.stages.diversity import DiversityGate
from rose_ray.stages.gates import JoinedGate, TellingGate, passed_over
from rose_ray.stages.gist import SpanScorer
from rose_ray.stages.pool import read_pool_entry, skipped_rows
from rose_ray.stages.row_vectors import VectorSource, vector_reader
from rose_ray.stages.score import RowScorer, ShardRows, TargetScorer, check_same_space, score_shards
from rose_ray.stages.score_table import ScoreTable
from rose_ray.stages.select import (
    chosen_rows,
    selection_summary,
    shards_of,
    training_jsonl,
    with_conversations,
    with_records,
)
from rose_ray.stages.shard_rows import read_shard_rows
from rose_ray.stores.features import checkpoint_file
from rose_ray.stores.manifest import Manifest, commit_artefact
from rose_ray.stores.read_ahead import depth_for, read_ahead
from rose_ray.stores.spool import PlacedSpool
from rose_ray.stores.workspace import FileRecord, Workspace

SCORES_FILE = "scores.parquet"
REJECTED_FILE = "rejected.parquet"
SELECTED_FILE = "selected.parquet"
JSONL_FILE = "selected.jsonl"
SUMMARY_FILE = "summary.json"
PASSED_OVER_FILE = "passed_over.parquet"
CORRELATED_COLUMNS = ("num_labelled_tokens", "num_tokens", "gradient_norm", "momentum_share")
"""What would betray a score that follows a shortcut."""

OF_TOKENS = CORRELATED_COLUMNS[:2]
"""Those that every method's table has; the others are of gradients."""


@dataclass(frozen=True)
class ScorePlan:
    """One score table to make.

    Attributes:
        target: Objective, normalisation, aggregation.
        bank: Of the target.
        made_from, folder: Of the artefact.
    """

    target: TargetConfig
    bank: Manifest
    made_from: dict[str, Any]
    folder: str


def score_targets(
    workspace: Workspace, pool: Manifest, features: Mapping[str, Any], plans: Sequence[ScorePlan], board: Any = None
) -> list[Manifest]:
    """Reduce the scores of targets that share their features, in one pass over them, and commit the score tables.

    Args:
        workspace: Where everything is.
        pool: Rows wanted.
        features: ``key``, ``space``, ``checkpoints`` (names), ``mean_learning_rates``, provenance.
        plans: What to make.
        board: Where progress is reported to, from ``shown_progress``.
    """
    started = time.monotonic()
    names: list[str] = features["checkpoints"]
    scorers: list[RowScorer] = []
    for plan in plans:
        check_same_space(features["space"], plan.bank.facts["space"])
        records = [plan.bank.file(checkpoint_file(name)) for name in names]
        banks = [workspace.read_table(record.path, record) for record in records]
        scorers.append(_scorer(banks, features["mean_learning_rates"], plan.target))
    with ExitStack() as stack:
        tables = [stack.enter_context(ScoreTable(scorer.subtasks, scorer.pairs)) for scorer in scorers]
        score_shards(_reported(read_shard_rows(workspace, pool, features["key"], names), pool, board), scorers, tables)
        return [
            _commit_scores(workspace, pool, features, plan, scorer, table, started)
            for plan, scorer, table in zip(plans, scorers, tables, strict=True)
        ]


def _scorer(banks: Sequence[pa.Table], rates: Sequence[float], target: TargetConfig) -> RowScorer:
    if target.gist is not None:
        return SpanScorer(banks, rates, target, target.gist.rank)
    return TargetScorer(banks, rates, target)


def _commit_scores(
    workspace: Workspace,
    pool: Manifest,
    features: Mapping[str, Any],
    plan: ScorePlan,
    scorer: RowScorer,
    table: ScoreTable,
    started: float,
) -> Manifest:
    table.settle()
    files = [
        workspace.write_tables(f"{plan.folder}/{SCORES_FILE}", table.scored(), table.schema),
        workspace.write_tables(f"{plan.folder}/{REJECTED_FILE}", table.rejected(), FEATURE_REJECTED),
    ]
    counts = {"unique": pool.counts["unique"], "scored": table.num_scored, "rejected": table.num_rejected}
    if counts["unique"] != counts["scored"] + counts["rejected"]:
        raise AccountingError(f"target {plan.target.name}: {counts} do not add up. This is a bug; please report it.")
    facts = {
        "target": plan.target.name,
        "subtasks": scorer.subtasks,
        "pairs": scorer.pairs,
        "objective": plan.target.objective,
        "normalize": plan.target.normalize,
        "aggregation": plan.target.aggregation,
        "reject_reasons": dict(table.reasons),
        "features": dict(features),
        "pool": {"key": pool.key, "folder": pool.folder},
        "bank": {"key": plan.bank.key, "folder": plan.bank.folder},
    }
    return commit_artefact(
        workspace, "score", plan.made_from, files, counts, facts, started=started, folder=plan.folder
    )


def _reported(shards: Iterable[ShardRows], pool: Manifest, board: Any) -> Iterator[ShardRows]:
    if board is not None:
        board.set_total.remote(pool.counts["unique"])
    for shard in shards:
        yield shard
        if board is not None:
            board.advance.remote(len(shard.row_ids), f"shard {shard.shard}")


def select_target(
    workspace: Workspace,
    pool: Manifest,
    scores: Sequence[Manifest],
    name: str,
    selection: SelectionConfig,
    made_from: dict[str, Any],
    folder: str,
    sources: ContaminationSources | None = None,
    vectors: VectorSource | None = None,
) -> Manifest:
    """Select from one target's score table, or from several, and commit the training set.

    Args:
        workspace: Where everything is.
        pool: Holds the records.
        scores: Score artefacts; more than one makes a joint set.
        name: Of the target, or ``training_set``.
        selection: Budget, method, source rules.
        made_from, folder: Of the artefact.
        sources: Test text for ``selection.decontaminate``.
        vectors: Where those of ``selection.diversity`` lie.
    """
    started = time.monotonic()
    opened = {m.facts["target"]: Scores(workspace.open_table(r.path, r)) for m in scores for r in [m.file(SCORES_FILE)]}
    first, facts = next(iter(opened.values())), scores[0].facts
    candidates = (
        joint_candidates(opened, pool.counts["unique"], selection.aggregation)
        if isinstance(selection, JointSelectionConfig)
        else target_candidates(first, facts["subtasks"], pool.counts["unique"], facts.get("pairs", ()))
    )
    gate = _gate(workspace, pool, first, selection, sources, vectors)
    positions = choose(candidates, selection, gate)
    columns = [column for column in CORRELATED_COLUMNS if "method" not in scores[0].facts or column in OF_TOKENS]
    further = {column: functools.partial(first.numbers, column) for column in columns}
    by_gradients = all("method" not in each.facts for each in scores)
    objectives = {each.facts["objective"] for each in scores} if by_gradients else set()
    summary = {"target": name, **selection_summary(candidates, further, positions, objectives=objectives)}
    with PlacedSpool(SELECTED, "place", len(positions)) as selected:
        for rows in _selected_rows(workspace, pool, chosen_rows(candidates, positions)):
            selected.append(rows)
        files = _write_selection(workspace, folder, selected)
    counts = {"scored": summary["num_scored"], "selected": summary["num_selected"], "tokens": summary["num_tokens"]}
    if gate is not None:
        refused, summary["cleaning"] = passed_over(candidates, gate, positions)
        counts |= {name: summary["cleaning"][name] for name in ("selectable", *gate.counted.values())}
        files.append(workspace.write_table(f"{folder}/{PASSED_OVER_FILE}", refused))
    files.append(workspace.write_json(f"{folder}/{SUMMARY_FILE}", summary))
    made = {"summary": summary, "scores": [m.folder for m in scores], "selection": selection.model_dump()}
    if vectors is not None:
        made["made_of"] = list(vectors.made_of)
    return commit_artefact(workspace, "select", made_from, files, counts, made, started=started, folder=folder)


def _gate(
    workspace: Workspace,
    pool: Manifest,
    scores: Scores,
    selection: SelectionConfig,
    sources: ContaminationSources | None,
    vectors: VectorSource | None,
) -> JoinedGate | None:
    gates: list[TellingGate] = []
    clean = clean_gate(selection, sources, _texts(workspace, pool, scores))
    if clean is not None:
        gates.append(clean)
    if selection.diversity is not None:
        assert vectors is not None
        reader = vector_reader(workspace, pool, scores, vectors)
        gates.append(DiversityGate(reader, selection.diversity.max_cosine))
    return JoinedGate(gates) if gates else None


def _texts(workspace: Workspace, pool: Manifest, scores: Scores) -> ReadTexts:
    """Read conversations of scored rows by their positions, a shard at a time."""
    entries = {entry["shard"]: entry for entry in pool.facts["shards"]}
    depth = depth_for(max(entry["record"]["num_bytes"] for entry in entries.values()))
    columns = ["row_id", "conversation"]

    def read_all(positions: np.ndarray) -> Iterator[tuple[int, str]]:
        skipped = skipped_rows(workspace, pool)
        rows = scores.rows(positions, ["row_id", "shard"]).append_column("position", pa.array(positions))

        def read(shard: str, part: pa.Table) -> pa.Table:
            return with_conversations(
                part, read_pool_entry(workspace, pool, entries[shard], columns=columns, skipped=skipped)
            )

        for part in read_ahead((functools.partial(read, *each) for each in shards_of(rows)), depth):
            yield from zip(part["position"].to_pylist(), part["conversation"].to_pylist(), strict=True)

    return read_all


def _selected_rows(workspace: Workspace, pool: Manifest, chosen: pa.Table) -> Iterator[pa.Table]:
    """Fetch the records of the selected rows, a shard at a time."""
    skipped = skipped_rows(workspace, pool)
    entries = {entry["shard"]: entry for entry in pool.facts["shards"]}
    columns = ["row_id", "conversation", "record"]

    def read(shard: str, rows: pa.Table) -> pa.Table:
        return with_records(rows, read_pool_entry(workspace, pool, entries[shard], columns=columns, skipped=skipped))

    depth = depth_for(max(entry["record"]["num_bytes"] for entry in entries.values()))
    return read_ahead((functools.partial(read, *each) for each in shards_of(chosen)), depth)


def _write_selection(workspace: Workspace, folder: str, selected: PlacedSpool) -> list[FileRecord]:
    """Write the selection in both forms, in one reading."""
    with workspace.writer(f"{folder}/{JSONL_FILE}") as lines:

        def written() -> Iterator[pa.Table]:
            for table in selected.read():
                lines.write(training_jsonl(table))
                yield table

        record = workspace.write_tables(f"{folder}/{SELECTED_FILE}", written(), SELECTED)
    return [record, lines.record(record.num_rows)]
