"""Work that runs once, in one Ray task: reading a base model's identity, reducing, selecting."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rose_ray.config.models import TargetConfig
from rose_ray.config.selection import SelectionConfig
from rose_ray.errors import StoreError
from rose_ray.stages.pool import read_pool_shard, skipped_rows
from rose_ray.stages.score import ShardRows, check_same_space, score_rows
from rose_ray.stages.select import (
    choose,
    joint_candidates,
    selected_rows,
    selection_summary,
    target_candidates,
    training_jsonl,
)
from rose_ray.stores.features import checkpoint_file, find_shard, read_shard_features
from rose_ray.stores.manifest import Manifest, commit_artefact
from rose_ray.stores.workspace import Workspace

SCORES_FILE = "scores.parquet"
REJECTED_FILE = "rejected.parquet"
SELECTED_FILE = "selected.parquet"
JSONL_FILE = "selected.jsonl"
SUMMARY_FILE = "summary.json"


def score_target(
    workspace: Workspace,
    pool: Manifest,
    features: Mapping[str, Any],
    bank: Manifest,
    target: TargetConfig,
    made_from: dict[str, Any],
    folder: str,
) -> Manifest:
    """Reduce a target's scores and commit its score table.

    Args:
        workspace: Where everything is.
        pool: Rows wanted.
        features: ``key``, ``space``, ``checkpoints`` (names), ``mean_learning_rates``, provenance.
        bank: The target's bank.
        target: Objective, normalisation, aggregation.
        made_from, folder: Of the artefact.
    """
    started = time.monotonic()
    check_same_space(features["space"], bank.facts["space"])
    names: list[str] = features["checkpoints"]
    banks = [workspace.read_table(record.path, record) for record in (bank.file(checkpoint_file(n)) for n in names)]
    shards = _shard_rows(workspace, pool, features["key"], names)
    result = score_rows(shards, banks, features["mean_learning_rates"], target)
    files = [
        workspace.write_table(f"{folder}/{SCORES_FILE}", result.table),
        workspace.write_table(f"{folder}/{REJECTED_FILE}", result.rejected),
    ]
    reasons = {row["values"]: row["counts"] for row in pc.value_counts(result.rejected["reason"]).to_pylist()}
    counts = {"unique": pool.counts["unique"], "scored": result.table.num_rows, "rejected": result.rejected.num_rows}
    facts = {
        "target": target.name,
        "subtasks": result.subtasks,
        "objective": target.objective,
        "normalize": target.normalize,
        "aggregation": target.aggregation,
        "reject_reasons": reasons,
        "features": dict(features),
        "pool": {"key": pool.key, "folder": pool.folder},
        "bank": {"key": bank.key, "folder": bank.folder},
    }
    return commit_artefact(workspace, "score", made_from, files, counts, facts, started=started, folder=folder)


def _shard_rows(workspace: Workspace, pool: Manifest, features_key: str, names: Sequence[str]) -> list[ShardRows]:
    skipped = skipped_rows(workspace, pool)
    shards = []
    for entry in pool.facts["shards"]:
        shard = entry["shard"]
        receipt = find_shard(workspace, features_key, shard, skipped.get(shard, []))
        if receipt is None:
            raise StoreError(f"shard {shard} has no features. Run `rose-ray features` first.")
        table = read_pool_shard(workspace, pool, shard, columns=["row_id", "source"], skipped=skipped)
        load = functools.partial(read_shard_features, workspace, receipt, names)
        shards.append(ShardRows(shard, table["row_id"].to_pylist(), table["source"].to_pylist(), load))
    return shards


def select_target(
    workspace: Workspace,
    pool: Manifest,
    scores: Sequence[Manifest],
    name: str,
    selection: SelectionConfig,
    made_from: dict[str, Any],
    folder: str,
) -> Manifest:
    """Select from one target's score table, or from several, and commit the training set.

    Args:
        workspace: Where everything is.
        pool: Holds the records.
        scores: Score artefacts; more than one makes a joint set.
        name: Of the target, or ``training_set``.
        selection: Budget, method, source rules.
        made_from, folder: Of the artefact.
    """
    started = time.monotonic()
    tables = {m.facts["target"]: workspace.read_table(r.path, r) for m in scores for r in [m.file(SCORES_FILE)]}
    first = next(iter(tables.values()))
    candidates = (
        joint_candidates(tables, pool.counts["unique"])
        if name == "training_set"
        else target_candidates(first, scores[0].facts["subtasks"], pool.counts["unique"])
    )
    positions = choose(candidates, selection)
    records = _records(workspace, pool, first, positions)
    selected = selected_rows(candidates, positions, records)
    further = {
        column: first[column].to_numpy().astype(np.float64)
        for column in ("num_labelled_tokens", "num_tokens", "gradient_norm", "momentum_share")
    }
    summary = {"target": name, **selection_summary(candidates, further, positions)}
    files = [
        workspace.write_table(f"{folder}/{SELECTED_FILE}", selected),
        workspace.write(f"{folder}/{JSONL_FILE}", training_jsonl(selected), num_rows=selected.num_rows),
        workspace.write_json(f"{folder}/{SUMMARY_FILE}", summary),
    ]
    counts = {"scored": summary["num_scored"], "selected": summary["num_selected"], "tokens": summary["num_tokens"]}
    facts = {"summary": summary, "scores": [m.folder for m in scores], "selection": selection.model_dump()}
    return commit_artefact(workspace, "select", made_from, files, counts, facts, started=started, folder=folder)


def _records(
    workspace: Workspace, pool: Manifest, scores: pa.Table, positions: np.ndarray
) -> dict[str, tuple[str, str]]:
    chosen = scores.take(pa.array(positions))
    wanted: dict[str, set[str]] = {}
    for row_id, shard in zip(chosen["row_id"].to_pylist(), chosen["shard"].to_pylist(), strict=True):
        wanted.setdefault(shard, set()).add(row_id)
    skipped = skipped_rows(workspace, pool)
    records = {}
    for shard, row_ids in wanted.items():
        table = read_pool_shard(workspace, pool, shard, columns=["row_id", "conversation", "record"], skipped=skipped)
        for row in table.to_pylist():
            if row["row_id"] in row_ids:
                records[row["row_id"]] = (row["conversation"], row["record"])
    return records
