"""The feature stage on Ray Data: shards are tokenised in tasks and scored by a pool of actors."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import ray

from rose_ray.distributed.actors import ScoringActor, ScoringSpec
from rose_ray.distributed.bank import budget_to_lower, remember_halved
from rose_ray.distributed.data import set_up_ray_data
from rose_ray.distributed.gang import GangActor, released_gangs
from rose_ray.distributed.job import Job
from rose_ray.distributed.progress import Progress
from rose_ray.distributed.roll import called_roll
from rose_ray.distributed.spaces import too_wide
from rose_ray.distributed.tokens import tokenize_row
from rose_ray.distributed.waiting import said_while_waiting
from rose_ray.errors import AccountingError
from rose_ray.stages.pool import skipped_rows
from rose_ray.stores.features import find_shard, mixed_settings
from rose_ray.stores.leftovers import sweep_folder
from rose_ray.stores.manifest import Manifest
from rose_ray.stores.read_ahead import looked_up
from rose_ray.stores.runs import StageRecord
from rose_ray.stores.shards import FEATURES, why_missing
from rose_ray.stores.versions import package_versions, utc_now
from rose_ray.stores.workspace import Workspace

logger = logging.getLogger(__name__)


def missing_features(job: Job, pool: Manifest, warmup: Manifest) -> dict[str, list[int]]:
    """Return the shards whose features are missing, each with the numbers of the feature sets that it lacks.

    A shard whose files were cut short or altered, as far as a look can tell, is missing; the log says so.
    """
    skipped = skipped_rows(job.workspace, pool)
    sets = list(job.feature_sets(warmup).values())
    shards = [entry["shard"] for entry in pool.facts["shards"]]

    def look(shard: str) -> list[str | None]:
        return [why_missing(job.workspace, FEATURES, each.key, shard, skipped.get(shard, [])) for each in sets]

    missing, progress = {}, Progress("features: looking at what is there", len(shards), "shards")
    for shard, reasons in zip(shards, looked_up(look, shards), strict=True):
        progress.advance(1)
        lacking = [number for number, reason in enumerate(reasons) if reason is not None]
        if lacking:
            missing[shard] = lacking
        for reason in filter(None, reasons):
            logger.warning(f"features: made again: {reason}")
            job.result.events.append(f"shard made again: {reason}")
    job.result.events.append(f"shards: {len(shards) - len(missing):,} found, {len(missing):,} to make")
    return missing


def make_features(
    job: Job, pool: Manifest, warmup: Manifest, missing: Mapping[str, Sequence[int]], max_batch_tokens: int
) -> None:
    """Compute what `missing_features` found, in one pass over each shard, and account for all of it."""
    started = time.monotonic()
    sets = job.feature_sets(warmup)
    skipped = skipped_rows(job.workspace, pool)
    for feature_set in sets.values():
        sweep_folder(job.workspace, f"features/{feature_set.key}")
        job.workspace.write_json(f"features/{feature_set.key}/space.json", feature_set.made_from)
    if missing and (note := too_wide(job.config.gradients, job.identity.layout)) is not None:
        logger.warning(note)
        job.result.events.append(note)
    if missing:
        spec = job.spec(warmup, max_batch_tokens, [each.spec for each in sets.values()])
        with called_roll(job.config.ray.actors, job.result.events) as roll, released_gangs(spec):
            num_halvings = _compute(replace(spec, roll=roll), pool, missing, skipped, job, budget_to_lower(job, warmup))
        if num_halvings:
            job.result.events.append(f"batches halved for memory: {num_halvings}")
    for number, (name, feature_set) in enumerate(sets.items()):
        made = {shard for shard, lacking in missing.items() if number in lacking}
        stage = f"features {name}".strip()
        _account_features(job, pool, stage, feature_set.key, skipped, started, made)


def _account_features(
    job: Job, pool: Manifest, stage: str, key: str, skipped: dict[str, list[str]], started: float, made: set[str]
) -> None:
    reused, passes = not made, 0
    totals = {"rows": 0, "scored": 0, "rejected": 0}
    facts = {"num_rows_cut": 0, "num_tokens": 0, "num_positions": 0, "num_halvings": 0}
    num_bytes, settings = 0, []

    def look(entry: Mapping[str, Any]) -> Manifest | None:
        return find_shard(job.workspace, key, entry["shard"], skipped.get(entry["shard"], []))

    entries = pool.facts["shards"]
    for entry, receipt in zip(entries, looked_up(look, entries), strict=True):
        if receipt is None or receipt.counts["rows"] < entry["num_rows"] - entry["num_skipped"]:
            raise AccountingError(f"{stage}: shard {entry['shard']} is not complete. Run again.")
        totals = {name: totals[name] + receipt.counts[name] for name in totals}
        facts = {name: facts[name] + receipt.facts[name] for name in facts}
        num_bytes += receipt.num_bytes
        settings.append(receipt.facts.get("computed_with", {}))
        if entry["shard"] in made:
            passes += receipt.counts["scored"] * (len(receipt.files) - 1)  # a file a checkpoint, and the rejected rows
    if totals["rows"] != totals["scored"] + totals["rejected"]:
        raise AccountingError(
            f"{stage}: {totals['rows']} rows, {totals['scored']} scored, {totals['rejected']} rejected."
        )
    if mixed := mixed_settings(settings):
        told = f"{stage}: shards were computed in different ways, so scores agree within rounding alone: {mixed}"
        logger.warning(told)
        job.result.events.append(told)
    seconds = round(time.monotonic() - started, 3)
    _write_summary(job.workspace, pool, key, {**totals, **facts, "num_bytes": num_bytes}, seconds, reused=reused)
    totals[f"cut at {job.config.model.max_tokens} tokens"] = facts["num_rows_cut"]
    totals["gradient passes"] = passes
    if facts["num_halvings"]:
        totals["batches halved for memory"] = facts["num_halvings"]
    job.record(StageRecord(stage, key, f"features/{key}", reused, seconds, totals, num_bytes))
    padding = 1 - facts["num_tokens"] / facts["num_positions"] if facts["num_positions"] else 0.0
    logger.info(f"{stage}: {facts['num_tokens']:,} tokens a checkpoint, padding {padding:.1%} of positions")


def _write_summary(
    workspace: Workspace, pool: Manifest, key: str, totals: Mapping[str, int], seconds: float, *, reused: bool
) -> None:
    """Leave the stage's totals beside its shards, for people: the shards' receipts are what counts."""
    path = f"features/{key}/pool-{pool.key}.json"
    if reused and workspace.exists(path):
        return  # what the run that computed them said, its seconds among it
    content = {"pool": pool.key, "num_shards": len(pool.facts["shards"]), **totals, "seconds": seconds}
    workspace.write_json(path, {**content, "versions": package_versions(), "created_at": utc_now()})


def _compute(
    spec: ScoringSpec,
    pool: Manifest,
    missing: Mapping[str, Sequence[int]],
    skipped: Mapping[str, list[str]],
    job: Job,
    budget_file: str | None,
) -> int:
    """Compute the features of the shards in ``missing``; return how many batches had to be halved.

    One Ray row is one shard: only names and tokens travel, gradients never leave their actor.

    Args:
        spec: What an actor needs to know.
        pool: The pool that the shards belong to.
        missing: Shards, each with the numbers of the spaces that it lacks.
        skipped: Row ids passed over, by shard.
        job: For its resources.
        budget_file: Where a bound that was halved is remembered, if anywhere.
    """
    settings = job.config.ray
    set_up_ray_data(settings)
    entries = [entry for entry in pool.facts["shards"] if entry["shard"] in missing]
    rows = [
        {"shard": shard, "skipped": skipped.get(shard, []), "spaces": list(lacking)}
        for shard, lacking in missing.items()
    ]
    num_rows = sum(entry["num_rows"] - entry["num_skipped"] for entry in entries)
    logger.info(f"features: {num_rows:,} rows in {len(entries):,} shards x {len(spec.checkpoints)} checkpoints")
    gang = settings.ranks_per_actor > 1
    tokenize = functools.partial(tokenize_row, workspace=spec.workspace, model=spec.model, pool_ref=[ray.put(pool)])
    lines = (
        ray.data.from_items(rows, override_num_blocks=len(rows))
        # A shard is read and tokenised in a part of the time that scoring it takes: one reader an actor keeps up, and
        # every further process costs the start of the actors seconds of a processor.
        .map(tokenize, num_cpus=settings.cpus_per_task, compute=ray.data.TaskPoolStrategy(size=settings.actors))
        .map_batches(
            GangActor if gang else ScoringActor,
            fn_constructor_kwargs={"spec": spec},
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=settings.actors),
            # A gang's ranks have their resources to themselves, out of Ray Data's sight.
            num_cpus=0 if gang else settings.cpus_per_actor,
            num_gpus=0 if gang else settings.gpus_per_actor,
        )
    )
    progress, num_halvings = Progress("features", num_rows, "rows"), 0
    with said_while_waiting(progress, settings):
        for line in lines.iter_rows():
            num_halvings += int(line["num_halvings"])
            if budget_file is not None and line["num_halvings"]:
                remember_halved(spec.workspace, budget_file, int(line["max_batch_tokens"]))
            progress.advance(int(line["rows"]), note=f"shard {line['shard']}")
    return num_halvings
