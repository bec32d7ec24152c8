"""The warm-up as an artefact: found by its settings, trained where there is none, or taken from the user's adapters.

A warm-up is pinned: once its settings have one, a pool that grows keeps it.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import time
from collections.abc import Callable
from typing import Any

import ray

from rose_ray.distributed.actors import device_of
from rose_ray.distributed.job import Job
from rose_ray.distributed.own_adapters import (
    adapter_files,
    check_moments,
    check_own_adapters,
    describe_moments,
    own_digest,
)
from rose_ray.distributed.resume import forget_state
from rose_ray.distributed.tokens import shard_row_ids, warmup_samples
from rose_ray.distributed.training import WarmupJob
from rose_ray.distributed.warmup import run_warmup
from rose_ray.errors import AlteredFileError, ModelError
from rose_ray.filesystem import child, locate, read_bytes
from rose_ray.model.checkpoint import adapter_digest
from rose_ray.stages.pool import skipped_rows
from rose_ray.stages.warmup import WARMUP_VERSION, warmup_rows
from rose_ray.stores.manifest import Manifest, artefact_key, commit_artefact, find_manifest
from rose_ray.stores.workspace import FileRecord

logger = logging.getLogger(__name__)


def warm_up(job: Job, pool: Manifest, new_warmup: bool) -> Manifest:
    """Return the pinned warm-up of these settings; train it where there is none yet.

    A new one is pinned at once only where none is: another stays until `pin_warmup`.
    """
    started = time.monotonic()
    settings = _warmup_settings(job)
    found = None if new_warmup else _pinned(job, settings)
    if found is not None:
        forget_state(job.workspace, found.folder)  # a run that was killed when it had just finished could not
        return _warmup_done(job, found, started, reused=True)
    if job.config.warmup.adapters is not None:
        made_from = {**settings, "row_ids": None}
        train: Callable[[dict[str, Any], str], Manifest] = functools.partial(_import_adapters, job)
    else:
        row_ids = _warmup_row_ids(job, pool)
        made_from = {**settings, "row_ids": hashlib.sha256("".join(row_ids).encode()).hexdigest()}
        train = functools.partial(_train, job, pool, row_ids)
    folder = f"warmup/{artefact_key(made_from)}"
    warmup = find_manifest(job.workspace, folder)
    reused = warmup is not None
    if warmup is None:
        warmup = train(made_from, folder)
    forget_state(job.workspace, folder)
    if not job.workspace.exists(_pin(settings)):
        _write_pin(job, settings, pool, warmup)
    return _warmup_done(job, warmup, started, reused=reused)


def pin_warmup(job: Job, pool: Manifest, warmup: Manifest) -> None:
    """Let later runs of these settings keep a warm-up whose rows were drawn from ``pool``."""
    settings = _warmup_settings(job)
    if job.workspace.read_json(_pin(settings))["folder"] != warmup.folder:
        _write_pin(job, settings, pool, warmup)


def _write_pin(job: Job, settings: dict[str, Any], pool: Manifest, warmup: Manifest) -> None:
    # The files that the rows were drawn from, since the pool itself goes once no selection needs it.
    ingested = sorted({f"ingest/{file['ingest_key']}" for file in pool.facts["files"]})
    job.workspace.write_json(_pin(settings), {"folder": warmup.folder, "ingested": ingested})


def pinned_warmup(job: Job) -> Manifest | None:
    """Return the warm-up that a run of these settings would keep, if there is one."""
    return _pinned(job, _warmup_settings(job))


def _pin(settings: dict[str, Any]) -> str:
    return f"warmup/pins/{artefact_key(settings)}.json"


def _pinned(job: Job, settings: dict[str, Any]) -> Manifest | None:
    pin = _pin(settings)
    if not job.workspace.exists(pin):
        return None
    folder = job.workspace.read_json(pin)["folder"]
    found = find_manifest(job.workspace, folder)
    if found is None:
        raise AlteredFileError(
            f"{folder}: the manifest or files of the pinned warm-up are missing or cut short. Put them back, or make "
            "another warm-up, and with it all features, with --new-warmup."
        )
    return found


def _warmup_settings(job: Job) -> dict[str, Any]:
    config, identity = job.config, job.identity
    common = {
        "stage": "warmup",
        "version": WARMUP_VERSION,
        "base": identity.base,
        "layout": identity.layout.digest,
        "lora": config.lora.model_dump(mode="json"),
    }
    if config.warmup.adapters is not None:
        digests = [own_digest(locate(name)) for name in config.warmup.adapters]
        check_moments(config)
        return {**common, "adapters": digests, "weights": config.warmup.adapter_weights}
    not_numeric = {"max_batch_tokens", "workers", "zero_stage", "save_steps", "max_restarts"}
    not_numeric |= {"adapters", "adapter_weights"}
    return {
        **common,
        "text": identity.text,
        "max_tokens": config.model.max_tokens,
        "dtype": config.model.dtype,
        "quantized": config.model.quantized,
        "warmup": config.warmup.model_dump(mode="json", exclude=not_numeric),
    }


def _warmup_row_ids(job: Job, pool: Manifest) -> list[str]:
    skipped = skipped_rows(job.workspace, pool)
    read = [
        job.task(shard_row_ids, job.workspace, pool, entry["shard"], skipped.get(entry["shard"], []))
        for entry in pool.facts["shards"]
    ]
    row_ids = [row_id for part in ray.get(read) for row_id in part]
    return warmup_rows(row_ids, job.config.warmup.fraction, job.config.warmup.seed)


def _train(job: Job, pool: Manifest, row_ids: list[str], made_from: dict[str, Any], folder: str) -> Manifest:
    started = time.monotonic()
    config = job.config
    samples, num_rejected = ray.get(
        job.task(warmup_samples, job.workspace, pool, row_ids, config.model, f"{folder}/samples.parquet")
    )
    training = WarmupJob(
        job.workspace,
        folder,
        samples,
        config.model,
        config.lora,
        config.warmup,
        device_of(config.ray),
        config.ray.threads_per_actor,
    )
    checkpoints = run_warmup(
        training,
        cpus_per_worker=config.ray.cpus_per_actor,
        gpus_per_worker=config.ray.gpus_per_actor,
        events=job.result.events,
    )
    files = [samples, *(FileRecord(**record) for c in checkpoints for record in c.pop("files"))]
    return _commit_warmup(job, made_from, folder, checkpoints, files, len(row_ids), num_rejected, started)


def _import_adapters(job: Job, made_from: dict[str, Any], folder: str) -> Manifest:
    started = time.monotonic()
    config = job.config
    assert config.warmup.adapters is not None
    states = check_own_adapters(config, job.identity.layout)
    weights = config.warmup.adapter_weights or [1.0] * len(config.warmup.adapters)
    checkpoints, files = [], []
    for number, (name, weight, state) in enumerate(zip(config.warmup.adapters, weights, states, strict=True), start=1):
        for file in adapter_files(state):
            data = read_bytes(child(locate(name), file))
            files.append(job.workspace.write(f"{folder}/checkpoint-{number}/{file}", data))
        entry = {"name": f"checkpoint-{number}", "mean_learning_rate": weight, "from": name}
        checkpoints.append({**entry, "adam_eps": state.adam_eps} if state else entry)
        logger.info(f"warm-up: using your adapter {name}, {describe_moments(state)}")
    return _commit_warmup(job, made_from, folder, checkpoints, files, 0, 0, started)


def _commit_warmup(
    job: Job,
    made_from: dict[str, Any],
    folder: str,
    checkpoints: list[dict[str, Any]],
    files: list[FileRecord],
    num_rows: int,
    num_rejected: int,
    started: float,
) -> Manifest:
    for checkpoint in checkpoints:
        location = job.workspace.location(f"{folder}/{checkpoint['name']}")
        if job.config.warmup.adapters is None:
            checkpoint["adapter"] = adapter_digest(location)
        else:  # trained elsewhere, they may agree in their weights and differ in their scale
            identity = {"adapter": own_digest(location), "alpha": job.config.lora.alpha}
            checkpoint["adapter"] = artefact_key(identity)
    adam_eps = next((c["adam_eps"] for c in checkpoints if "adam_eps" in c), job.config.warmup.adam_eps)
    facts = {"checkpoints": checkpoints, "adam_eps": adam_eps}
    counts = {"rows": num_rows, "trained": num_rows - num_rejected, "rejected": num_rejected}
    return commit_artefact(job.workspace, "warmup", made_from, files, counts, facts, started=started, folder=folder)


def _warmup_done(job: Job, warmup: Manifest, started: float, *, reused: bool) -> Manifest:
    job.result.warmup = warmup
    job.note("warmup", warmup, started, reused=reused)
    # Refuse a checkpoint of another model here, where the message is near its cause.
    if warmup.made_from["layout"] != job.identity.layout.digest:
        raise ModelError(f"{warmup.folder}: its adapters have another layout than this model. Delete it and run again.")
    return warmup
