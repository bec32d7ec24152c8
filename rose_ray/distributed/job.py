"""What the stages of one run share: configuration, workspace, the model's identity, and ways to start work."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import ray

from rose_ray.config.models import JobConfig
from rose_ray.distributed.actors import ScoringSpec, device_of
from rose_ray.kernels.projection import make_projection
from rose_ray.model.describe import ModelIdentity, describe_model
from rose_ray.stages.features import FEATURES_VERSION
from rose_ray.stores.manifest import Manifest, artefact_key
from rose_ray.stores.runs import StageRecord
from rose_ray.stores.workspace import Workspace

logger = logging.getLogger(__name__)


@dataclass
class RunResult:
    """What a run made or found.

    Attributes:
        stages: A record each, in order.
        pool, warmup: Their artefacts.
        banks, scores: By target.
        selections: By target, and ``training_set`` where one is configured.
    """

    stages: list[StageRecord] = field(default_factory=list)
    pool: Manifest | None = None
    warmup: Manifest | None = None
    banks: dict[str, Manifest] = field(default_factory=dict)
    scores: dict[str, Manifest] = field(default_factory=dict)
    selections: dict[str, Manifest] = field(default_factory=dict)


@dataclass
class Job:
    """One run.

    Attributes:
        workspace: Where artefacts are found and made.
        config: The checked configuration, its local paths absolute.
        result: What has been found or made so far.
    """

    workspace: Workspace
    config: JobConfig
    result: RunResult = field(default_factory=RunResult)

    @cached_property
    def identity(self) -> ModelIdentity:
        """The base model's identity, found on a worker: the driver may be a machine without it."""
        found: ModelIdentity = ray.get(self.task(describe_model, self.config.model, self.config.lora))
        return found

    def space(self, warmup: Manifest) -> dict[str, Any]:
        """What features and bank must share to be multiplied."""
        identity, settings = self.identity, self.config.gradients.projection
        projection = make_projection(settings.kind, settings.dim, settings.seed, identity.layout.num_parameters)
        return {
            "base": identity.base,
            "adapters": [checkpoint["adapter"] for checkpoint in warmup.facts["checkpoints"]],
            "layout": identity.layout.digest,
            "projection": projection.identity(),
        }

    def encoding(self) -> dict[str, Any]:
        """What decides how text becomes numbers, besides the space."""
        model = self.config.model
        return {"text": self.identity.text, "max_tokens": model.max_tokens, "dtype": model.dtype}

    def spec(self, warmup: Manifest) -> ScoringSpec:
        """What scoring actors need to know."""
        config = self.config
        return ScoringSpec(
            workspace=self.workspace,
            model=config.model,
            lora=config.lora,
            gradients=config.gradients,
            layout=self.identity.layout,
            checkpoints=tuple(f"{warmup.folder}/{c['name']}" for c in warmup.facts["checkpoints"]),
            checkpoint_files=tuple(file for file in warmup.files if "/checkpoint-" in file.path),
            device=device_of(config.ray),
            threads=config.ray.threads_per_actor,
            features_key=artefact_key(self.features_made_from(warmup)),
        )

    def features_made_from(self, warmup: Manifest) -> dict[str, Any]:
        """What a feature depends on besides its row: not the pool, the workers or the batches."""
        return {
            "stage": "features",
            "version": FEATURES_VERSION,
            "space": self.space(warmup),
            **self.encoding(),
            "adam": self.config.gradients.adam,
            "stored_dtype": self.config.gradients.stored_dtype,
        }

    def task(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Start a task with the resources of a reader and return its reference."""
        return ray.remote(num_cpus=self.config.ray.cpus_per_task)(function).remote(*arguments)

    def actor(self, kind: type, *arguments: Any) -> Any:
        """Start an actor with the resources of a scoring actor."""
        settings = self.config.ray
        return ray.remote(num_cpus=settings.cpus_per_actor, num_gpus=settings.gpus_per_actor)(kind).remote(*arguments)

    def note(self, stage: str, manifest: Manifest, started: float, *, reused: bool) -> None:
        """Record a stage that one artefact stands for."""
        seconds = round(time.monotonic() - started, 3)
        self.record(
            StageRecord(stage, manifest.key, manifest.folder, reused, seconds, manifest.counts, manifest.num_bytes)
        )

    def record(self, stage: StageRecord) -> None:
        """Keep and log what a stage did."""
        self.result.stages.append(stage)
        counts = ", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in stage.counts.items())
        verb = "found" if stage.reused else "made"
        size = f", {stage.num_bytes / 1e6:,.1f} MB" if stage.num_bytes >= 1e5 else ""
        logger.info(f"{stage.stage}: {verb} {stage.folder} in {stage.seconds:.1f} s: {counts}{size}")
