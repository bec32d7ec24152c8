"""The feature stage on Ray Data: shards are tokenised in tasks and scored by a pool of actors."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import ray

from rose_ray.config.models import RayConfig
from rose_ray.distributed.actors import ScoringActor, ScoringSpec, tokenize_task
from rose_ray.distributed.progress import Progress
from rose_ray.distributed.session import is_verbose
from rose_ray.stores.manifest import Manifest

logger = logging.getLogger(__name__)


def compute_features(
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
    if not is_verbose():
        logging.getLogger("ray.data").setLevel(logging.ERROR)  # Ray Data sets its own level once it is imported
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
    return tokenize_task(row, spec, ray.get(pool_ref[0]))
