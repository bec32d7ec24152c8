"""A model's own answers to a target's labelled rows, on Ray, kept as an artefact."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import ray

from rose_ray.config.job import JobConfig
from rose_ray.config.model import ModelConfig
from rose_ray.data.conversation import Message
from rose_ray.distributed.actors import device_of
from rose_ray.distributed.job import Job
from rose_ray.distributed.resources import granted_resources
from rose_ray.distributed.session import ray_session, root_cause
from rose_ray.errors import ConfigError, RoseError
from rose_ray.model.base import load_base
from rose_ray.model.tokenizer import load_tokeniser, with_absolute_paths
from rose_ray.stages.sample_answers import SAMPLE_VERSION, SamplingSettings, sample_answers, what_is_asked
from rose_ray.stages.target_pairs import target_questions
from rose_ray.stores.lease import opened
from rose_ray.stores.manifest import Manifest, artefact_key, commit_artefact, find_manifest
from rose_ray.stores.workspace import Workspace

logger = logging.getLogger(__name__)

SAMPLES_FILE = "samples.jsonl"


def sample_target(config: JobConfig, name: str, settings: SamplingSettings) -> tuple[Manifest, str]:
    """Ask the base model for answers to a target's rows of kind ``exact_answer``, or find those of an earlier call.

    Args:
        config: The checked configuration.
        name: Of the target.
        settings: How the model is asked.

    Returns:
        The artefact, and where its file lies.

    Raises:
        ConfigError: There is no such target, or it has no such rows.
        RoseError: Whatever is wrong with data, model, workspace or cluster.
    """
    target = next((target for target in config.targets if target.name == name), None)
    if target is None:
        raise ConfigError(f"no target {name!r}; the configuration has {[target.name for target in config.targets]}.")
    questions = target_questions(target)
    with opened(config.workspace, config.lease.term, create=True) as workspace:
        job = Job(workspace, config.model_copy(update={"model": with_absolute_paths(config.model)}))
        try:
            with ray_session(config.ray), granted_resources(config):
                made = _find_or_sample(job, questions, settings, target.shots)
        except BaseException as error:
            cause = root_cause(error)
            raise (cause if isinstance(cause, RoseError | OSError) else error) from None
        return made, workspace.location(f"{made.folder}/{SAMPLES_FILE}").name


def _find_or_sample(
    job: Job, questions: Mapping[str, Sequence[Message]], settings: SamplingSettings, shots: int | None
) -> Manifest:
    text = repr([(row_id, [(turn.role, turn.content) for turn in turns]) for row_id, turns in questions.items()])
    made_from = {
        "stage": "samples",
        "version": SAMPLE_VERSION,
        "base": job.identity.base,
        **job.encoding(),
        "questions": hashlib.sha256(text.encode()).hexdigest(),
        "settings": asdict(settings),
    }
    known = find_manifest(job.workspace, f"samples/{artefact_key(made_from)}")
    if known is not None:
        return known
    logger.info(what_is_asked(len(questions), settings.num_samples, shots))
    device = device_of(job.config.ray)
    arguments = (job.workspace, job.config.model, dict(questions), settings, made_from, device)
    made: Manifest = ray.get(job.model_task(_sample, *arguments))
    return made


def _sample(
    workspace: Workspace,
    config: ModelConfig,
    questions: Mapping[str, Sequence[Message]],
    settings: SamplingSettings,
    made_from: dict[str, Any],
    device: str,
) -> Manifest:
    started = time.monotonic()
    model, tokeniser = load_base(config, device=device).eval(), load_tokeniser(config)
    folder = f"samples/{artefact_key(made_from)}"
    num_answers = 0
    with workspace.writer(f"{folder}/{SAMPLES_FILE}") as lines:
        for row_id, answers in sample_answers(model, tokeniser, questions, settings):
            lines.write((json.dumps({"id": row_id, "samples": answers}, ensure_ascii=False) + "\n").encode())
            num_answers += len(answers)
    counts = {"questions": len(questions), "answers": num_answers}
    files = [lines.record(len(questions))]
    return commit_artefact(workspace, "samples", made_from, files, counts, {}, started=started, folder=folder)
