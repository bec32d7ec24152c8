"""A method's scores of all shards to the score table of a target: the same table that gradients end in."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rose_ray.config.target import TargetConfig
from rose_ray.errors import AccountingError, StoreError
from rose_ray.kernels.aggregation import aggregate_scores, aggregate_subtasks
from rose_ray.methods.shards import LENGTHS_FILE, REJECTED_FILE, SCORES_FILE, MethodRun
from rose_ray.schemas import FEATURE_REJECTED, scores_schema
from rose_ray.stages.pool import read_pool_entry, skipped_rows
from rose_ray.stages.score_table import ScoreTable
from rose_ray.stores.manifest import Manifest, artefact_key, commit_artefact
from rose_ray.stores.read_ahead import depth_for, read_ahead
from rose_ray.stores.shards import LENGTHS, SHARD_SCORES, SURVEYS, find_receipt
from rose_ray.stores.workspace import Workspace

TABLE_VERSION = 1
"""Raised whenever the same scores of shards would give another table."""


def table_content(run: MethodRun, target: TargetConfig) -> dict[str, Any]:
    """Return what a score table is made from."""
    return {
        "stage": "score",
        "version": TABLE_VERSION,
        "method": run.key,
        "pool": run.pool_key,
        "subtasks": run.subtasks,
        "aggregation": target.aggregation,
        **({"pairs": True} if target.scores_pairs else {}),
    }


def table_folder(run: MethodRun, target: TargetConfig) -> str:
    """Return where a score table lies."""
    return f"scores/{target.name}/{artefact_key(table_content(run, target))}"


def make_table(
    workspace: Workspace, pool: Manifest, run: MethodRun, target: TargetConfig, model: Mapping[str, Any]
) -> Manifest:
    """Join the scores of all shards and commit the score table.

    Args:
        workspace: Holds them.
        pool: Rows wanted.
        run: Method and keys.
        target: Aggregation, and what the table is called.
        model: Where the model came from, for people; ``warmup``, its folder, where there is one.

    Raises:
        AccountingError: A row is neither scored nor rejected.
        StoreError: A shard is missing.
    """
    started = time.monotonic()
    folder = table_folder(run, target)
    pairs = _pair_ids(run, target)
    with ScoreTable(run.subtasks, pairs) as table:
        for scored, rejected, num_wanted in _parts(workspace, pool, run, target):
            table.add(scored, rejected, num_wanted)
        table.settle()
        files = [
            workspace.write_tables(f"{folder}/{SCORES_FILE}", table.scored(), table.schema),
            workspace.write_tables(f"{folder}/{REJECTED_FILE}", table.rejected(), FEATURE_REJECTED),
        ]
    counts = {"unique": pool.counts["unique"], "scored": table.num_scored, "rejected": table.num_rejected}
    if counts["unique"] != counts["scored"] + counts["rejected"]:
        raise AccountingError(f"target {target.name}: {counts} do not add up. This is a bug; please report it.")
    facts = {
        "target": target.name,
        "subtasks": run.subtasks,
        "pairs": pairs,
        "method": target.method,
        "method_options": target.method_options,
        "method_content": dict(run.content),
        "aggregation": target.aggregation,
        "reject_reasons": dict(table.reasons),
        "pool": {"key": pool.key, "folder": pool.folder},
        "model": dict(model),
        "made_of": [
            f"{LENGTHS}/{run.lengths_key}",
            *([f"{SURVEYS}/{run.survey_key}"] if run.method.needs.pool_statistics else []),
            run.state_folder,
            f"{SHARD_SCORES}/{run.key}",
            *([model["warmup"]] if "warmup" in model else []),
        ],
    }
    content = table_content(run, target)
    return commit_artefact(workspace, "score", content, files, counts, facts, started=started, folder=folder)


def _pair_ids(run: MethodRun, target: TargetConfig) -> list[str]:
    """Pairs that have columns of their own: all or none."""
    return [pair.pair_id for pair in run.target.pairs] if target.scores_pairs else []


def _parts(
    workspace: Workspace, pool: Manifest, run: MethodRun, target: TargetConfig
) -> Iterator[tuple[pa.Table, pa.Table, int]]:
    skipped = skipped_rows(workspace, pool)
    read = functools.partial(_part, workspace, pool, skipped, run, target)
    entries = pool.facts["shards"]
    depth = depth_for(max(entry["record"]["num_bytes"] for entry in entries))
    return read_ahead((functools.partial(read, entry) for entry in entries), depth)


def _part(
    workspace: Workspace,
    pool: Manifest,
    skipped: Mapping[str, list[str]],
    run: MethodRun,
    target: TargetConfig,
    entry: Mapping[str, Any],
) -> tuple[pa.Table, pa.Table, int]:
    """Return a shard's part of the score table, its rejected rows, and how many rows it should have."""
    shard = entry["shard"]
    wanted = read_pool_entry(workspace, pool, entry, columns=["row_id", "source"], skipped=skipped)
    receipts = [
        find_receipt(workspace, kind, key, shard, skipped.get(shard, []))
        for kind, key in ((LENGTHS, run.lengths_key), (SHARD_SCORES, run.key))
    ]
    lengths, scores = (
        _read(workspace, receipt, file, shard)
        for receipt, file in zip(receipts, (LENGTHS_FILE, SCORES_FILE), strict=True)
    )
    rejected = pa.concat_tables([_read(workspace, receipt, REJECTED_FILE, shard) for receipt in receipts])
    scores = scores.filter(pc.is_in(scores["row_id"], value_set=wanted["row_id"]))
    rejected = rejected.filter(pc.is_in(rejected["row_id"], value_set=wanted["row_id"]))
    lengths = lengths.take(pc.index_in(scores["row_id"], value_set=lengths["row_id"]))
    num_rows = scores.num_rows
    values_NC = pc.list_flatten(scores["values"]).to_numpy().reshape(num_rows, run.num_columns)
    subtasks_NT = values_NC
    if run.method.columns == "pairs":
        subtasks_NT = aggregate_subtasks(values_NC, [pair.subtask for pair in run.target.pairs])
    pairs = _pair_ids(run, target)
    schema = scores_schema(run.subtasks, pairs)
    columns = [
        scores["row_id"],
        wanted["source"].take(pc.index_in(scores["row_id"], value_set=wanted["row_id"])),
        lengths["num_tokens"],
        lengths["num_labelled_tokens"],
        *(pa.nulls(num_rows, pa.float32()) for _ in ("gradient_norm", "momentum_share")),
        *(pa.array(column_N.astype(np.float32)) for column_N in subtasks_NT.T),
        *(pa.array(column_N.astype(np.float32)) for column_N in values_NC.T[: len(pairs)]),
        pa.array(aggregate_scores(subtasks_NT, target.aggregation).astype(np.float32)),
        pa.array(np.zeros(num_rows, np.int64)),
        pa.repeat(shard, num_rows),
    ]
    return pa.Table.from_arrays(columns, schema=schema), rejected, wanted.num_rows


def _read(workspace: Workspace, receipt: Manifest | None, file: str, shard: str) -> pa.Table:
    if receipt is None:
        raise StoreError(f"shard {shard} has no scores of this method. Run `rose-ray run` again.")
    record = receipt.file(file)
    return workspace.read_table(record.path, record)
