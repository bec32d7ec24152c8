"""Score tables and selections on Ray: a task each, found where their key is known."""

from __future__ import annotations

import logging
import time

import ray

from rose_ray.config.selection import SelectionConfig
from rose_ray.distributed.job import Job
from rose_ray.distributed.tasks import score_target, select_target
from rose_ray.stages.score import SCORE_VERSION
from rose_ray.stages.select import SELECT_VERSION
from rose_ray.stores.leftovers import sweep_folder
from rose_ray.stores.manifest import Manifest, artefact_key, find_manifest

logger = logging.getLogger(__name__)


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
    for target in job.config.targets:
        started = time.monotonic()
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
        }
        folder = f"scores/{target.name}/{artefact_key(made_from)}"
        scores = find_manifest(job.workspace, folder)
        reused = scores is not None
        if scores is None:
            scores = ray.get(job.task(score_target, job.workspace, pool, features, bank, target, made_from, folder))
        assert scores is not None
        job.result.scores[target.name] = scores
        job.note(f"score {target.name}", scores, started, reused=reused)


def make_selections(job: Job, pool: Manifest) -> None:
    """Select for every target, and for the joint training set where one is configured."""
    for target in job.config.targets:
        _select(job, pool, target.name, [target.name], target.selection)
    joint = job.config.training_set
    if joint is not None:
        names = joint.targets or [target.name for target in job.config.targets]
        _select(job, pool, "training_set", names, joint.selection)


def _select(job: Job, pool: Manifest, name: str, targets: list[str], selection: SelectionConfig) -> None:
    started = time.monotonic()
    scores = [job.result.scores[target] for target in targets]
    made_from = {
        "stage": "select",
        "version": SELECT_VERSION,
        "scores": [m.key for m in scores],
        "targets": targets,
        "selection": selection.model_dump(mode="json"),
    }
    folder = f"selections/{name}/{artefact_key(made_from)}"
    chosen = find_manifest(job.workspace, folder)
    reused = chosen is not None
    if chosen is None:
        chosen = ray.get(job.task(select_target, job.workspace, pool, scores, name, selection, made_from, folder))
    assert chosen is not None
    sweep_folder(job.workspace, f"selections/{name}")
    job.workspace.write_json(f"selections/{name}/latest.json", {"folder": folder})
    job.result.selections[name] = chosen
    job.note(f"select {name}", chosen, started, reused=reused)
    for warning in chosen.facts["summary"]["warnings"]:
        logger.warning(f"{name}: {warning}")
