"""Lines for people: what a run made, what a workspace holds, why a row scored as it did."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from textwrap import shorten
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rose_ray.config.job import JobConfig
from rose_ray.config.target import TargetConfig
from rose_ray.data.conversation import parse_conversation
from rose_ray.errors import DataError, StoreError
from rose_ray.kernels.aggregation import aggregate_subtasks, subtask_order
from rose_ray.kernels.influence import checkpoint_weights
from rose_ray.stages.basis_choice import has_pair_vectors
from rose_ray.stages.pool import read_pool_shard
from rose_ray.stages.score import shard_influences, target_directions
from rose_ray.stores.features import checkpoint_file, read_shard_features, shard_folder
from rose_ray.stores.history import latest_version, selected_names
from rose_ray.stores.lease import find_holder
from rose_ray.stores.manifest import Manifest, read_manifest
from rose_ray.stores.plans import find_plan
from rose_ray.stores.runs import RUNNING, StageRecord, last_ended_run, last_run, last_stage
from rose_ray.stores.workspace import Workspace

_PASSED_OVER = {
    "near_duplicates": "near-duplicates",
    "contaminated": "contaminated",
    "too_similar": "too similar",
    "without_vector": "without a vector",
}
"""Counts of rows that a selection passed over, as people read them."""


def result_lines(
    stages: Sequence[StageRecord], selections: Mapping[str, Manifest], events: Sequence[str] = ()
) -> Iterator[str]:
    """Say how long each stage took, what happened on the way, what was selected from what, and where it lies."""
    yield from stage_lines([vars(stage) for stage in stages])
    yield from events
    for name, selection in selections.items():
        yield ""
        yield from selection_lines(name, selection)


def stage_lines(stages: Sequence[Mapping[str, Any]], planned: Mapping[str, float] | None = None) -> Iterator[str]:
    """A table of stages: seconds, those that a plan foretold beside them, made or found, counts, folder."""
    width = max((len(stage["stage"]) for stage in stages), default=5)
    yield f"{'stage':<{width}}  seconds{'  planned' if planned else ''}"
    for stage in stages:
        counts = ", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in stage["counts"].items())
        verb = "found" if stage["reused"] else "made"
        foretold = None if planned is None or stage["reused"] else planned.get(stage["stage"])
        column = f"  {'' if foretold is None else f'{foretold:.1f}':>7}" if planned else ""
        yield f"{stage['stage']:<{width}}  {stage['seconds']:>7.1f}{column}  {verb:<5}  {stage['folder']}  {counts}"


def selection_lines(name: str, selection: Manifest) -> Iterator[str]:
    """A selection by source, with the correlations that would betray a shortcut."""
    summary = selection.facts["summary"]
    rows = f"{summary['num_selected']:,} of {summary['num_scored']:,} scored rows"
    yield f"{name}: {rows}, {summary['num_tokens']:,} tokens"
    width = max(len(source) for source in summary["sources"])
    yield f"  {'source':<{width}}   in pool          in selection"
    by_selected = sorted(summary["sources"].items(), key=lambda item: -item[1]["selected"])
    for source, share in by_selected:
        yield (
            f"  {source:<{width}}  {share['pool']:>7,} {share['pool_share']:>6.1%}  "
            f"{share['selected']:>7,} {share['selected_share']:>6.1%}"
        )
    correlations = {k: v for k, v in summary["spearman_of_score"].items() if v is not None}
    yield "  rank correlation of score with " + ", ".join(
        f"{key.removeprefix('num_').replace('_', ' ')} {value:+.2f}" for key, value in correlations.items()
    )
    cleaning = summary.get("cleaning")
    if cleaning is not None:
        counts = [f"{cleaning[name]:,} {called}" for name, called in _PASSED_OVER.items() if name in cleaning]
        yield f"  passed over: {', '.join(counts)}; {cleaning['looked_at']:,} rows were looked at"
    for warning in summary["warnings"]:
        yield f"  warning: {warning}"
    further = ", passed_over.parquet" if cleaning is not None else ""
    yield f"  {selection.folder}/selected.jsonl, selected.parquet, summary.json{further}"


def status_lines(workspace: Workspace) -> Iterator[str]:
    """Say whether a run is at work, what the last one that ended did, and what the workspace holds beside it."""
    yield f"workspace {workspace.root.name}"
    newest = last_run(workspace)
    if newest is None:
        yield "no run yet"
        return
    if newest["outcome"] == RUNNING:
        yield _begun_line(workspace, newest)
    run = last_ended_run(workspace)
    if run is not None:
        yield f"last run: {run['outcome']}, {run['finished_at']}"
        plan = find_plan(workspace, run["config"])
        yield from stage_lines(run["stages"], plan["seconds"] if plan else None)
    for stage in ("pool", "warmup", "bank", "features"):
        folders = [path for path in workspace.list_folder(stage) if not path.endswith(("pins", ".json"))]
        yield f"{stage}: {len(folders)} kept"
    if run is not None:
        yield from _warmup_lines(workspace, run)
    for name in selected_names(workspace):
        latest = latest_version(workspace, name)
        if latest is None:
            yield f"selection {name}: unfinished"
            continue
        yield f"selection {name}: version {latest.number}, {latest.num_rows:,} rows, {latest.since}, {latest.folder}"


def _begun_line(workspace: Workspace, run: Mapping[str, Any]) -> str:
    number = run["fencing_number"]
    holder, is_gone = (None, False) if number is None else find_holder(workspace, number)
    if holder is None:
        return (
            f"a run began {run['started_at']} and has not ended: at work, or killed; without a lease this is not known"
        )
    if is_gone:
        return f"a run began {run['started_at']} and was killed or cut off before its end: {holder}"
    return f"a run is at work: {holder}, last seen {holder.renewed_at}"


def _warmup_lines(workspace: Workspace, run: Mapping[str, Any]) -> Iterator[str]:
    """Say how old the warm-up of a run is, and how much of the run's pool was there when its rows were drawn."""
    folders = {stage["stage"]: stage["folder"] for stage in run["stages"]}
    if "warmup" not in folders:
        return
    warmup, pool = (read_manifest(workspace, folders[stage]) for stage in ("warmup", "ingest"))
    age = datetime.now(UTC) - datetime.fromisoformat(warmup.created_at)
    seen = _seen_share(workspace, warmup, pool)
    yield f"warm-up {warmup.folder}: {warmup.created_at}, {age.days} days old" + (f"; {seen}" if seen else "")


def _seen_share(workspace: Workspace, warmup: Manifest, pool: Manifest) -> str:
    if warmup.made_from["row_ids"] is None:
        return ""  # your own adapters: nothing was drawn
    pins = [workspace.read_json(path) for path in workspace.list_folder("warmup/pins")]
    pin = next((pin for pin in pins if pin["folder"] == warmup.folder), None)
    if pin is None:
        return "runs keep another one: the run that made it ended before its scores"
    if "ingested" not in pin:
        return "how much of today's pool it has seen is not known: an earlier version made it"
    drawn_from = set(pin["ingested"])
    entries = pool.facts["shards"]
    rows = [entry["num_rows"] - entry["num_skipped"] for entry in entries]
    seen = sum(
        count for count, each in zip(rows, entries, strict=True) if posixpath.dirname(each["path"]) in drawn_from
    )
    return f"{seen / sum(rows):.1%} of today's pool was there when its rows were drawn"


def explain_lines(workspace: Workspace, config: JobConfig, row_id: str) -> Iterator[str]:
    """Show a row's conversation, shortened, and its influence per target, pair and checkpoint, or why it has none.

    Args:
        workspace: Of a finished run.
        config: Names the targets.
        row_id: As in the score table, or its first characters.

    Raises:
        StoreError: No run made a score table of a target, or the newest is one of another objective.
        DataError: No scored or rejected row, or several, begin like this.
    """
    for target in config.targets:
        stage = last_stage(workspace, f"score {target.name}")
        if stage is None:
            raise StoreError(f"no run made scores for {target.name}. Run `rose-ray run` first.")
        scores = read_manifest(workspace, stage["folder"])
        _check_same_scores(target, scores)
        row = _find_row(workspace, scores, row_id)
        if "reason" in row:
            yield f"target {target.name}: row {row['row_id']} was rejected: {row['reason']}: {row['detail']}"
            continue
        yield f"target {target.name}: row {row['row_id']} of source {row['source']}, {row['num_tokens']} tokens"
        yield from _conversation_lines(workspace, scores, row)
        yield f"  score {row['score']:+.5f}, rank {row['rank']:,} of {scores.counts['scored']:,}"
        for subtask in scores.facts["subtasks"]:
            yield f"  subtask {subtask}: {row[f'subtask_{subtask}']:+.5f}"
        if "method" in scores.facts:
            pairs = {name: value for name, value in row.items() if name.startswith("pair_")}
            yield f"  scored by {target.method}" + ("" if pairs else ", which keeps no influence of single pairs")
            yield from (f"  pair {name.removeprefix('pair_')}: {value:+.5f}" for name, value in pairs.items())
        else:
            if target.gist is not None:
                yield "  gist compares inside the span of the pairs; influences, as rose takes them:"
            yield from _influence_lines(workspace, config, scores, row)


def _check_same_scores(target: TargetConfig, scores: Manifest) -> None:
    ours = None if target.uses_gradients else [target.method, target.method_options]
    theirs = [scores.facts["method"], scores.facts["method_options"]] if "method" in scores.facts else None
    if ours != theirs:
        then, now = (" ".join(map(str, each)) if each else "gradients" for each in (theirs, ours))
        raise StoreError(
            f"target {target.name}: the last run scored with method {then}, the configuration says {now}. "
            "Run `rose-ray run` first."
        )
    if ours is not None:
        _check_same(target, scores, ("aggregation",))
        return
    gist = None if target.gist is None else target.gist.model_dump()
    if scores.made_from.get("gist") != gist:
        raise StoreError(
            f"target {target.name}: the last run scored with gist options {scores.made_from.get('gist')}, the "
            f"configuration says {gist}. Run `rose-ray run` first."
        )
    matters = ("dpo_beta",) if target.objective == "dpo_weighted" else ()
    _check_same(target, scores, ("objective", "normalize", "aggregation", *matters))


def _check_same(target: TargetConfig, scores: Manifest, names: Sequence[str]) -> None:
    for name in names:
        then, now = scores.made_from[name], getattr(target, name)
        if then != now:
            raise StoreError(
                f"target {target.name}: the last run scored with {name} {then}, the configuration says {now}. "
                "Run `rose-ray run` first."
            )


def _find_row(workspace: Workspace, scores: Manifest, row_id: str) -> dict[str, Any]:
    """The row's columns: of the score table, or, where it was rejected, of the table of rejected rows."""
    records = [scores.file(name) for name in ("scores.parquet", "rejected.parquet")]
    scored, rejected = (_rows_that_begin(workspace.open_table(each.path, each), row_id) for each in records)
    if scored.num_rows + rejected.num_rows != 1:
        what = f"{scored.num_rows:,} scored and {rejected.num_rows:,} rejected rows begin"
        if not scored.num_rows + rejected.num_rows:
            what = "no scored or rejected row begins"
        raise DataError(f"{what} with {row_id!r}. Row ids stand in {records[0].path} and rejected.parquet beside it.")
    rows: list[dict[str, Any]] = [*scored.to_pylist(), *rejected.to_pylist()]
    return rows[0]


def _rows_that_begin(scores: pq.ParquetFile, row_id: str) -> pa.Table:
    found = [scores.schema_arrow.empty_table()]
    for number in range(scores.num_row_groups):
        mask = pc.starts_with(scores.read_row_group(number, columns=["row_id"])["row_id"], pattern=row_id)
        if pc.any(mask).as_py():
            found.append(scores.read_row_group(number).filter(mask))
    return pa.concat_tables(found)


def _conversation_lines(workspace: Workspace, scores: Manifest, row: dict[str, Any]) -> Iterator[str]:
    pool = read_manifest(workspace, scores.facts["pool"]["folder"])
    shard = read_pool_shard(workspace, pool, row["shard"], columns=["row_id", "conversation"])
    text = shard["conversation"].to_pylist()[shard["row_id"].to_pylist().index(row["row_id"])]
    for message in parse_conversation(text).messages:
        yield f"  {message.role}: {shorten(message.content, 100, placeholder=' ...')}"


def _influence_lines(workspace: Workspace, config: JobConfig, scores: Manifest, row: dict[str, Any]) -> Iterator[str]:
    features = scores.facts["features"]
    names: list[str] = features["checkpoints"]
    target = next(target for target in config.targets if target.name == scores.facts["target"])
    bank = read_manifest(workspace, scores.facts["bank"]["folder"])
    tables = [workspace.read_table(r.path, r) for r in (bank.file(checkpoint_file(name)) for name in names)]
    directions = target_directions(tables, target)
    receipt = read_manifest(workspace, shard_folder(features["key"], row["shard"]))
    stored = read_shard_features(workspace, receipt, names).tables
    place = stored[0]["row_id"].to_pylist().index(row["row_id"])
    influences_CU = shard_influences([table.slice(place, 1) for table in stored], directions, target.normalize)[:, 0]
    what, labels = "pair", directions[0].names
    if not has_pair_vectors(workspace, bank):  # its vectors add up to those of the subtasks, and mean nothing alone
        influences_CU = aggregate_subtasks(influences_CU, directions[0].subtasks)
        what, labels = "subtask", subtask_order(directions[0].subtasks)
        yield "  the basis holds one direction a subtask, so single pairs have no influence"
    weights_C = checkpoint_weights(features["mean_learning_rates"])
    heads = [f"{name.removeprefix('checkpoint-'):>9}" for name in names]
    width = max(len(name) for name in (*labels, what, "weight"))
    yield f"  {what:<{width}}  {'influence':>9}  at checkpoint {'  '.join(heads)}"
    yield f"  {'weight':<{width}}  {'':>9}                {'  '.join(f'{w:>9.3f}' for w in weights_C)}"
    for number, name in enumerate(labels):
        values = influences_CU[:, number]
        total = float(np.dot(weights_C, values))
        yield f"  {name:<{width}}  {total:>+9.5f}                {'  '.join(f'{v:>+9.5f}' for v in values)}"
