"""The pairs on Ray: one actor holds the model for all bases and banks that are missing."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pyarrow as pa
import ray

from rose_ray.config.target import TargetConfig
from rose_ray.data.preferences import PreferencePair
from rose_ray.distributed.actors import BANK_WORKERS, BankActor, device_of
from rose_ray.distributed.gang import GangBank, released_gangs
from rose_ray.distributed.job import FeatureSet, Job
from rose_ray.distributed.progress import Progress
from rose_ray.distributed.roll import ENDLESS, called_roll
from rose_ray.distributed.waiting import said_while_waiting
from rose_ray.stages.bank import BANK_VERSION, pairs_digest
from rose_ray.stages.basis import BASIS_VERSION
from rose_ray.stores.features import checkpoint_file
from rose_ray.stores.manifest import Manifest, artefact_key, commit_artefact, find_manifest
from rose_ray.stores.workspace import Workspace

logger = logging.getLogger(__name__)


BANK_BATCH_TOKENS = 4096
"""Bound on a batch of pairs where ``gradients.max_batch_tokens`` is measured: they are few, and measured beside."""


class ModelActor:
    """The one actor that works on pairs; it starts when first needed, and again when it is lost."""

    def __init__(self, job: Job, warmup: Manifest) -> None:
        self.job = job
        self._handle: Any = None
        self._open = ExitStack()
        configured = job.config.gradients.max_batch_tokens
        self._spec = job.spec(warmup, BANK_BATCH_TOKENS if configured == "auto" else configured)

    def call(self, stage: str, method: str, *arguments: Any) -> Any:
        """Call a method of `BankActor` and return what it gives, saying what is free while it takes long."""
        reference = getattr(self._running, method).remote(*arguments)
        with said_while_waiting(Progress(stage, 1, "results"), self.job.config.ray):
            return ray.get(reference)

    @property
    def _running(self) -> Any:
        """Handle of a `BankActor`."""
        if self._handle is None:
            roll = self._open.enter_context(called_roll(1, self.job.result.events, BANK_WORKERS))
            self._open.enter_context(released_gangs(self._spec))
            spec = replace(self._spec, roll=roll)
            if spec.ranks > 1:  # a gang's coordinator needs nothing itself
                gang: Any = ray.remote(num_cpus=0, max_restarts=ENDLESS, max_task_retries=ENDLESS)(GangBank)
                self._handle = gang.remote(spec)
            else:
                self._handle = self.job.actor(BankActor, spec, restarts=ENDLESS)
            self._open.callback(ray.kill, self._handle)
        return self._handle

    def stop(self) -> None:
        """Give its resources back, and tell the run's events whether it was lost meanwhile."""
        self._open.close()
        self._handle = None


def bank_made_from(
    job: Job, feature_set: FeatureSet, target: TargetConfig, pairs: Sequence[PreferencePair]
) -> dict[str, Any]:
    """What a bank depends on: not the objective, nor how scores are aggregated."""
    return {
        "stage": "bank",
        "version": BANK_VERSION,
        "space": feature_set.made_from["space"],
        **_pairs_made_from(job, target, pairs),
    }


def _basis_made_from(
    job: Job, warmup: Manifest, target: TargetConfig, pairs: Sequence[PreferencePair]
) -> dict[str, Any]:
    per_subtask = job.basis_choice(target, pairs).per_subtask
    return {
        "stage": "basis",
        "version": BASIS_VERSION,
        "space": job.bare_space(warmup),
        **_pairs_made_from(job, target, pairs),
        # Both sides of every pair serve any objective; one direction a subtask serves its own.
        "objective": [target.objective, target.normalize, target.dpo_beta] if per_subtask else None,
    }


def missing_bases(job: Job, warmup: Manifest, pairs: Mapping[str, Sequence[PreferencePair]]) -> list[str]:
    """Return the exact targets whose basis is missing; those that are found go into the job's result."""
    missing = []
    for target in job.config.gradient_targets:
        if not job.config.is_exact(target):
            continue
        made_from = _basis_made_from(job, warmup, target, pairs[target.name])
        found = find_manifest(job.workspace, f"basis/{artefact_key(made_from)}")
        if found is None:
            missing.append(target.name)
        else:
            job.result.bases[target.name] = found
    return missing


def missing_banks(job: Job, warmup: Manifest, pairs: Mapping[str, Sequence[PreferencePair]]) -> list[str]:
    """Return the targets whose bank is missing; one without its basis has none. Call `missing_bases` first."""
    missing = []
    for target in job.config.gradient_targets:
        if not job.config.is_exact(target) or target.name in job.result.bases:
            made_from = bank_made_from(job, job.feature_set(warmup, target), target, pairs[target.name])
            if find_manifest(job.workspace, f"bank/{artefact_key(made_from)}") is not None:
                continue
        missing.append(target.name)
    return missing


def make_bases(job: Job, warmup: Manifest, pairs: Mapping[str, Sequence[PreferencePair]], actor: ModelActor) -> None:
    """Find or compute the exact basis of every target that is scored exactly."""
    for target in job.config.gradient_targets:
        if not job.config.is_exact(target):
            continue
        started = time.monotonic()
        choice = job.basis_choice(target, pairs[target.name])
        logger.info(choice.line())
        job.result.events.append(choice.line())
        made_from = _basis_made_from(job, warmup, target, pairs[target.name])
        folder = f"basis/{artefact_key(made_from)}"
        basis = find_manifest(job.workspace, folder)
        reused = basis is not None
        if basis is None:
            files = actor.call(f"basis {target.name}", "basis", target, pairs[target.name], folder, choice.per_subtask)
            counts = {"pairs": len(pairs[target.name]), "directions": max(record.num_rows for record in files)}
            basis = commit_artefact(job.workspace, "basis", made_from, files, counts, choice.facts(), started=started)
        job.result.bases[target.name] = basis
        job.note(f"basis {target.name}", basis, started, reused=reused)


def make_banks(job: Job, warmup: Manifest, pairs: Mapping[str, Sequence[PreferencePair]], actor: ModelActor) -> None:
    """Find or compute the bank of every target; the model is loaded once for all that are missing."""
    for target in job.config.gradient_targets:
        started = time.monotonic()
        feature_set = job.feature_set(warmup, target)
        made_from = bank_made_from(job, feature_set, target, pairs[target.name])
        bank = find_manifest(job.workspace, f"bank/{artefact_key(made_from)}")
        reused = bank is not None
        if bank is None:
            num_pairs, num_checkpoints = len(pairs[target.name]), len(warmup.facts["checkpoints"])
            logger.info(f"bank {target.name}: {num_pairs} pairs x {num_checkpoints} checkpoints")
            stage, spec = f"bank {target.name}", feature_set.spec
            tables: list[pa.Table] = actor.call(stage, "bank", target, pairs[target.name], spec)
            bank = _commit_bank(job, made_from, warmup, tables, started)
        job.result.banks[target.name] = bank
        job.note(f"bank {target.name}", bank, started, reused=reused)


def batch_budget(job: Job, warmup: Manifest, actor: ModelActor) -> int:
    """Return the bound of a batch: the configured one, the remembered one, or what memory allows, measured now."""
    configured = job.config.gradients.max_batch_tokens
    if configured != "auto":
        return configured
    file = job.budget_file(warmup)
    if job.workspace.exists(file):
        return int(job.workspace.read_json(file)["max_batch_tokens"])
    spaces = [feature_set.spec for feature_set in job.feature_sets(warmup).values()]
    measured: int = actor.call("batch budget", "budget", spaces)
    job.workspace.write_json(file, {"max_batch_tokens": measured})
    logger.info(f"features: batches of up to {measured:,} tokens, as measured; remembered in {file}")
    return measured


def budget_to_lower(job: Job, warmup: Manifest) -> str | None:
    """Return the file of the measured bound where a halved one is to be remembered: measured, and on a GPU.

    On the CPU the bound stays: bytes must not depend on what did not fit once.
    """
    measured = job.config.gradients.max_batch_tokens == "auto" and device_of(job.config.ray) == "cuda"
    return job.budget_file(warmup) if measured else None


def remember_halved(workspace: Workspace, file: str, max_batch_tokens: int) -> None:
    """Lower the remembered bound of a batch to one that was halved for memory: later runs begin with it."""
    before = int(workspace.read_json(file)["max_batch_tokens"])
    if max_batch_tokens < before:
        workspace.write_json(file, {"max_batch_tokens": max_batch_tokens})
        logger.info(f"features: {before:,} tokens did not fit; {max_batch_tokens:,} are remembered in {file}")


def _pairs_made_from(job: Job, target: TargetConfig, pairs: Sequence[PreferencePair]) -> dict[str, Any]:
    official = target.encoding == "rose_official"
    return {
        **job.encoding(),
        "pairs": pairs_digest(pairs),
        "encoding": target.encoding,
        "official": [target.official_cut, target.dpo_beta] if official else None,
    }


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
