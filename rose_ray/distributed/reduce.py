"""Score tables and selections on Ray: a task each, found where their key is known."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import ray

from rose_ray.config.selection import SelectionConfig
from rose_ray.data.preferences import PreferencePair
from rose_ray.distributed.job import Job
from rose_ray.distributed.methods import vector_source
from rose_ray.distributed.progress import shown_progress
from rose_ray.distributed.tasks import ScorePlan, score_targets, select_target
from rose_ray.stages.clean import contamination_sources
from rose_ray.stages.drift import overlap
from rose_ray.stages.drift_lines import short_drift
from rose_ray.stages.score import SCORE_VERSION
from rose_ray.stages.select import SELECT_VERSION
from rose_ray.stores.history import Version, latest_version, make_latest, read_version
from rose_ray.stores.leftovers import sweep_folder
from rose_ray.stores.manifest import Manifest, artefact_key, find_manifest
from rose_ray.stores.workspace import Workspace

logger = logging.getLogger(__name__)

_SHOWN_FROM = 50_000
"""Rows of a pool whose scoring takes longer than a few seconds, so that progress is worth an actor."""


def make_scores(job: Job, pool: Manifest, warmup: Manifest) -> None:
    """Reduce the score table of every target."""
    checkpoints = warmup.facts["checkpoints"]
    provenance = {
        "checkpoints": [c["name"] for c in checkpoints],
        "mean_learning_rates": [c["mean_learning_rate"] for c in checkpoints],
        "adam": job.config.gradients.adam,
        "template": job.config.model.template,
        "text": job.identity.text,
        "warmup": warmup.folder,
        # Where v is far below eps squared, Adam's preconditioner is all but off.
        "median_exp_avg_sq": [c.get("median_exp_avg_sq") for c in checkpoints],
        "adam_eps": warmup.facts["adam_eps"],
    }
    started = time.monotonic()
    missing: dict[str, tuple[dict[str, Any], list[ScorePlan]]] = {}
    found: dict[str, Manifest | None] = {}
    for target in job.config.gradient_targets:
        bank = job.result.banks[target.name]
        feature_set = job.feature_set(warmup, target)
        features = {
            "key": feature_set.key,
            "space": feature_set.made_from["space"],
            "stored_dtype": feature_set.made_from["stored_dtype"],
            **provenance,
        }
        made_from = {
            "stage": "score",
            "version": SCORE_VERSION,
            "features": feature_set.key,
            "weights": provenance["mean_learning_rates"],
            "pool": pool.key,
            "bank": bank.key,
            "objective": target.objective,
            "dpo_beta": target.dpo_beta if target.objective == "dpo_weighted" else None,
            "normalize": target.normalize,
            "aggregation": target.aggregation,
            **({"pairs": True} if target.scores_pairs else {}),
            **({"gist": target.gist.model_dump()} if target.gist is not None else {}),
        }
        folder = f"scores/{target.name}/{artefact_key(made_from)}"
        found[target.name] = find_manifest(job.workspace, folder)
        if found[target.name] is None:
            _, plans = missing.setdefault(feature_set.key, (features, []))
            plans.append(ScorePlan(target, bank, made_from, folder))
    made = {m.facts["target"]: m for features, plans in missing.values() for m in _score(job, pool, features, plans)}
    for name, scores in found.items():
        job.result.scores[name] = scores or made[name]
        since = started if scores is None else time.monotonic()  # a pass that targets share counts for each of them
        job.note(f"score {name}", job.result.scores[name], since, reused=scores is not None)


def _score(job: Job, pool: Manifest, features: Mapping[str, Any], plans: Sequence[ScorePlan]) -> list[Manifest]:
    """Score targets that share their features in one task, so that features are read once."""
    arguments = (job.workspace, pool, features, plans)
    if pool.counts["unique"] < _SHOWN_FROM:
        return list(ray.get(job.task(score_targets, *arguments)))
    with shown_progress("score", "rows") as board:
        return list(ray.get(job.task(score_targets, *arguments, board)))


def make_selections(job: Job, pool: Manifest, pairs: Mapping[str, Sequence[PreferencePair]]) -> None:
    """Select for every target, and for the joint training set where one is configured."""
    for target in job.config.targets:
        _select(job, pool, target.name, [target.name], target.selection, pairs)
    joint = job.config.training_set
    if joint is not None:
        names = joint.targets or [target.name for target in job.config.targets]
        _select(job, pool, "training_set", names, joint.selection, pairs)


def _select(
    job: Job,
    pool: Manifest,
    name: str,
    targets: list[str],
    selection: SelectionConfig,
    pairs: Mapping[str, Sequence[PreferencePair]],
) -> None:
    started = time.monotonic()
    scores = [job.result.scores[target] for target in targets]
    made_from = {
        "stage": "select",
        "version": SELECT_VERSION,
        "scores": [m.key for m in scores],
        "targets": targets,
        "selection": selection.identity(),
    }
    sources = contamination_sources(selection, [pair for target in targets for pair in pairs[target]])
    if sources is not None:
        made_from["test_text"] = sources.identity()
    vectors = vector_source(job, pool, selection, scores[0])
    if vectors is not None:
        made_from["vectors"] = vectors.identity()
    folder = f"selections/{name}/{artefact_key(made_from)}"
    chosen = find_manifest(job.workspace, folder)
    reused = chosen is not None
    if chosen is None:
        arguments = (job.workspace, pool, scores, name, selection, made_from, folder, sources, vectors)
        chosen = ray.get(job.task(select_target, *arguments))
    assert chosen is not None
    before = latest_version(job.workspace, name)
    for folder in (f"selections/{name}", f"selections/{name}/history"):
        sweep_folder(job.workspace, folder)
    now = make_latest(job.workspace, name, chosen, pool.key)
    job.result.selections[name] = chosen
    job.note(f"select {name}", chosen, started, reused=reused)
    if before is not None and before != now:
        text = ray.get(job.task(_drift_text, job.workspace, name, before, now))
        logger.info(f"{name}: version {before.number} -> {now.number}: {text}")
    for warning in chosen.facts["summary"]["warnings"]:
        logger.warning(f"{name}: {warning}")


def _drift_text(workspace: Workspace, name: str, before: Version, now: Version) -> str:
    if find_manifest(workspace, before.folder) is None:
        return f"the files of version {before.number} are gone"
    return short_drift(overlap(workspace, *(read_version(workspace, name, each) for each in (before, now))))
