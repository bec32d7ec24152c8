"""The bank stage on Ray: one actor holds the model for all targets whose bank is missing."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import ray

from rose_ray.config.models import TargetConfig
from rose_ray.data.preferences import PreferencePair, check_pairs, read_pairs, take_shots
from rose_ray.distributed.actors import BankActor
from rose_ray.distributed.job import Job
from rose_ray.filesystem import expand
from rose_ray.stages.bank import BANK_VERSION
from rose_ray.stores.features import checkpoint_file
from rose_ray.stores.manifest import Manifest, artefact_key, commit_artefact, find_manifest

logger = logging.getLogger(__name__)


def read_target_pairs(target: TargetConfig) -> list[PreferencePair]:
    """Read and check all pairs of a target.

    Raises:
        DataError: A file cannot be read.
        PairError: Pairs that cannot be used, or too few of them.
    """
    pairs = [
        pair
        for entry in target.pairs
        for pair in read_pairs(
            expand(entry.files),
            target=target.name,
            format=entry.format,
            subtask=entry.subtask,
            subtask_field=entry.subtask_field,
            subtask_blocks=entry.subtask_blocks,
        )
    ]
    check_pairs(pairs, target=target.name)
    return take_shots(pairs, target.shots, target=target.name)


def bank_made_from(job: Job, warmup: Manifest, target: TargetConfig, pairs: Sequence[PreferencePair]) -> dict[str, Any]:
    """What a bank depends on: not the objective, nor how scores are aggregated."""
    official = target.encoding == "rose_official"
    return {
        "stage": "bank",
        "version": BANK_VERSION,
        "space": job.space(warmup),
        **job.encoding(),
        "pairs": hashlib.sha256(repr([asdict(pair) for pair in pairs]).encode()).hexdigest(),
        "encoding": target.encoding,
        "official": [target.official_cut, target.dpo_beta] if official else None,
    }


def make_banks(job: Job, warmup: Manifest, pairs: Mapping[str, Sequence[PreferencePair]]) -> None:
    """Find or compute the bank of every target; the model is loaded once for all that are missing."""
    actor: Any = None
    try:
        for target in job.config.targets:
            started = time.monotonic()
            made_from = bank_made_from(job, warmup, target, pairs[target.name])
            bank = find_manifest(job.workspace, f"bank/{artefact_key(made_from)}")
            reused = bank is not None
            if bank is None:
                actor = actor or job.actor(BankActor, job.spec(warmup))
                num_pairs, num_checkpoints = len(pairs[target.name]), len(warmup.facts["checkpoints"])
                logger.info(f"bank {target.name}: {num_pairs} pairs x {num_checkpoints} checkpoints")
                tables: list[pa.Table] = ray.get(actor.bank.remote(target, pairs[target.name]))
                bank = _commit_bank(job, made_from, warmup, tables, started)
            job.result.banks[target.name] = bank
            job.note(f"bank {target.name}", bank, started, reused=reused)
    finally:
        if actor is not None:
            ray.kill(actor)


def _commit_bank(
    job: Job, made_from: dict[str, Any], warmup: Manifest, tables: list[pa.Table], started: float
) -> Manifest:
    folder = f"bank/{artefact_key(made_from)}"
    names = [checkpoint["name"] for checkpoint in warmup.facts["checkpoints"]]
    files = [
        job.workspace.write_table(f"{folder}/{checkpoint_file(name)}", table)
        for name, table in zip(names, tables, strict=True)
    ]
    subtasks = tables[0]["subtask"].to_pylist()
    facts = {
        "space": made_from["space"],
        "checkpoints": names,
        "subtasks": {name: subtasks.count(name) for name in dict.fromkeys(subtasks)},
        "num_tokens_cut": sum(sum(tables[0][f"num_tokens_cut_{side}"].to_pylist()) for side in "wl"),
    }
    counts = {"pairs": tables[0].num_rows, "checkpoints": len(tables)}
    return commit_artefact(job.workspace, "bank", made_from, files, counts, facts, started=started)
