"""The feature stage on Ray Data: shards are tokenised in tasks and scored by a pool of actors."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import ray

from rose_ray.config.models import RayConfig
from rose_ray.distributed.actors import ScoringActor, ScoringSpec, tokenize_task
from rose_ray.distributed.job import Job
from rose_ray.distributed.progress import Progress
from rose_ray.distributed.session import carried_errors, is_verbose
from rose_ray.errors import AccountingError
from rose_ray.stages.pool import skipped_rows
from rose_ray.stores.features import find_shard
from rose_ray.stores.manifest import Manifest
from rose_ray.stores.runs import StageRecord

logger = logging.getLogger(__name__)


def make_features(job: Job, pool: Manifest, warmup: Manifest) -> None:
    """Compute the features of every shard that has none yet."""
    started = time.monotonic()
    spec = job.spec(warmup)
    skipped = skipped_rows(job.workspace, pool)
    missing = [
        entry
        for entry in pool.facts["shards"]
        if find_shard(job.workspace, spec.features_key, entry["shard"], skipped.get(entry["shard"], [])) is None
    ]
    folder = f"features/{spec.features_key}"
    job.workspace.write_json(f"{folder}/space.json", job.features_made_from(warmup))
    if missing:
        _compute(spec, pool, missing, skipped, job.config.ray)
    _account_features(job, pool, spec.features_key, folder, skipped, started, reused=not missing)


def _account_features(
    job: Job, pool: Manifest, key: str, folder: str, skipped: dict[str, list[str]], started: float, *, reused: bool
) -> None:
    totals = {"rows": 0, "scored": 0, "rejected": 0}
    rows_cut = num_bytes = 0
    for entry in pool.facts["shards"]:
        receipt = find_shard(job.workspace, key, entry["shard"], skipped.get(entry["shard"], []))
        if receipt is None or receipt.counts["rows"] < entry["num_rows"] - entry["num_skipped"]:
            raise AccountingError(f"features: shard {entry['shard']} is not complete. Run again.")
        totals = {name: totals[name] + receipt.counts[name] for name in totals}
        rows_cut += receipt.facts["num_rows_cut"]
        num_bytes += receipt.num_bytes
    if totals["rows"] != totals["scored"] + totals["rejected"]:
        raise AccountingError(
            f"features: {totals['rows']} rows, {totals['scored']} scored, {totals['rejected']} rejected."
        )
    seconds = round(time.monotonic() - started, 3)
    totals[f"cut at {job.config.model.max_tokens} tokens"] = rows_cut
    job.record(StageRecord("features", key, folder, reused, seconds, totals, num_bytes))


def _compute(
    spec: ScoringSpec,
    pool: Manifest,
    entries: Sequence[Mapping[str, Any]],
    skipped: Mapping[str, list[str]],
    settings: RayConfig,
) -> None:
    """Compute the features of the shards in ``entries``.

    One Ray row is one shard: only names and tokens travel, gradients never leave their actor.

    Args:
        spec: What an actor needs to know.
        pool: The pool that the shards belong to.
        entries: From the pool's ``shards``.
        skipped: Row ids passed over, by shard.
        settings: Actors and resources.
    """
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_no_progress_timeout_s = settings.stall_seconds
    context.verbose_progress = False
    context.raise_original_map_exception = True  # its own wrapper loses the cause
    if not is_verbose():
        # Ray Data sets its own level once it is imported. Its errors come back as exceptions; its log calls ours a bug.
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    rows = [{"shard": entry["shard"], "skipped": skipped.get(entry["shard"], [])} for entry in entries]
    num_rows = sum(entry["num_rows"] - entry["num_skipped"] for entry in entries)
    logger.info(f"features: {num_rows:,} rows in {len(entries):,} shards x {len(spec.checkpoints)} checkpoints")
    tokenize = functools.partial(_tokenize, spec=spec, pool_ref=[ray.put(pool)])
    lines = (
        ray.data.from_items(rows, override_num_blocks=len(rows))
        .map(tokenize, num_cpus=settings.cpus_per_task)
        .map_batches(
            ScoringActor,
            fn_constructor_kwargs={"spec": spec},
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=settings.actors),
            num_cpus=settings.cpus_per_actor,
            num_gpus=settings.gpus_per_actor,
        )
    )
    progress = Progress("features", num_rows, "rows")
    for line in lines.iter_rows():
        progress.advance(int(line["rows"]), note=f"shard {line['shard']}")


def _tokenize(row: dict[str, Any], spec: ScoringSpec, pool_ref: list[Any]) -> dict[str, Any]:
    with carried_errors():
        return tokenize_task(row, spec, ray.get(pool_ref[0]))
