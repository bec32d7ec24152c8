"""What the stages of one run share: configuration, workspace, the model's identity, and ways to start work."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import ray

from rose_ray.config.job import JobConfig
from rose_ray.config.target import TargetConfig
from rose_ray.data.preferences import PreferencePair
from rose_ray.distributed.actors import ScoringSpec, device_of
from rose_ray.distributed.engine import check_offload
from rose_ray.distributed.metrics import say_stage
from rose_ray.distributed.spaces import SpaceSpec, projection_identity
from rose_ray.kernels.span import SPAN_VERSION
from rose_ray.methods.registry import needs_of
from rose_ray.model.describe import ModelIdentity, describe_model
from rose_ray.model.tokenizer import describe_text
from rose_ray.stages.basis_choice import BasisChoice, choose_basis
from rose_ray.stages.features import FEATURES_VERSION
from rose_ray.stores.manifest import Manifest, artefact_key
from rose_ray.stores.runs import StageRecord
from rose_ray.stores.workspace import FileRecord, Workspace

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FeatureSet:
    """One kind of features: what they depend on besides their row (not pool, workers or batches), and where they go."""

    made_from: dict[str, Any]
    spec: SpaceSpec

    @property
    def key(self) -> str:
        """Of the folder that holds them."""
        return self.spec.features_key


@dataclass
class RunResult:
    """What a run made or found.

    Attributes:
        stages: A record each, in order.
        pool, warmup: Their artefacts.
        bases, banks, scores: By target; bases of those that are scored exactly.
        selections: By target, and ``training_set`` where one is configured.
        events: What happened on the way, for people: what was found, made again, lost, halved, taken over.
    """

    stages: list[StageRecord] = field(default_factory=list)
    pool: Manifest | None = None
    warmup: Manifest | None = None
    bases: dict[str, Manifest] = field(default_factory=dict)
    banks: dict[str, Manifest] = field(default_factory=dict)
    scores: dict[str, Manifest] = field(default_factory=dict)
    selections: dict[str, Manifest] = field(default_factory=dict)
    events: list[str] = field(default_factory=list)


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

    @cached_property
    def text(self) -> str:
        """Digest of tokenizer and template, found on a worker, and without a look at the base model's weights."""
        if "identity" in vars(self):
            return self.identity.text
        found: str = ray.get(self.task(describe_text, self.config.model))
        return found

    def check_offload(self) -> None:
        """Make sure, on a worker, that parameters can be where ``model.deepspeed.offload_parameters`` puts them.

        Raises:
            ResourceError: They cannot; the message has DeepSpeed's reason.
        """
        if needs_of(self.config).base_model and self.config.model.deepspeed.offload_parameters == "nvme":
            ray.get(self.model_task(check_offload, self.config.model, device_of(self.config.ray)))

    def bare_space(self, warmup: Manifest) -> dict[str, Any]:
        """Where gradients live, before anything projects them."""
        return {
            "base": self.identity.base,
            "adapters": [checkpoint["adapter"] for checkpoint in warmup.facts["checkpoints"]],
            "layout": self.identity.layout.digest,
        }

    def basis_choice(self, target: TargetConfig, pairs: Sequence[PreferencePair]) -> BasisChoice:
        """What the basis of an exact target keeps; its warm-up need not be there yet."""
        return choose_basis(
            self.config.gradients,
            target,
            pairs,
            num_parameters=self.identity.layout.num_parameters,
            num_checkpoints=self.config.warmup.num_checkpoints,
        )

    def feature_sets(self, warmup: Manifest) -> dict[str, FeatureSet]:
        """The feature spaces of this run: under ``""`` that of the projection, and one per exact target by its name.

        Exact spaces need the bases of ``make_bases``.
        """
        exact = [target for target in self.config.targets if self.config.is_exact(target)]
        projected = {} if self.config.gradients.projection.kind == "exact" else {"": self._projected(warmup)}
        return {**projected, **{target.name: self.feature_set(warmup, target) for target in exact}}

    def feature_set(self, warmup: Manifest, target: TargetConfig) -> FeatureSet:
        """The features that a target is scored by."""
        if not self.config.is_exact(target):
            return self._projected(warmup)
        basis = self.result.bases[target.name]
        space = {**self.bare_space(warmup), "projection": f"exact/v{SPAN_VERSION}/basis={basis.key}"}
        return self._feature_set(warmup, space, "float32", tuple(basis.files))

    def _projected(self, warmup: Manifest) -> FeatureSet:
        gradients = self.config.gradients
        space = {**self.bare_space(warmup), "projection": projection_identity(gradients, self.identity.layout)}
        return self._feature_set(warmup, space, gradients.stored_type, None)

    def _feature_set(
        self, warmup: Manifest, space: dict[str, Any], stored_dtype: str, basis: tuple[FileRecord, ...] | None
    ) -> FeatureSet:
        made_from = {
            "stage": "features",
            "version": FEATURES_VERSION,
            "space": space,
            **self.encoding(),
            "adam": self.config.gradients.adam,
            "stored_dtype": stored_dtype,
        }
        return FeatureSet(made_from, SpaceSpec(artefact_key(made_from), basis))

    def encoding(self) -> dict[str, Any]:
        """What decides how text becomes numbers, besides the space."""
        model = self.config.model
        return {
            "text": self.identity.text,
            "max_tokens": model.max_tokens,
            "dtype": model.dtype,
            "quantized": model.quantized,
        }

    def spec(self, warmup: Manifest | None, max_batch_tokens: int, spaces: Sequence[SpaceSpec] = ()) -> ScoringSpec:
        """What scoring actors need to know; without a warm-up, no checkpoints."""
        config = self.config
        names = [f"{warmup.folder}/{each['name']}" for each in warmup.facts["checkpoints"]] if warmup else []
        return ScoringSpec(
            workspace=self.workspace,
            model=config.model,
            lora=config.lora,
            gradients=config.gradients,
            layout=self.identity.layout,
            checkpoints=tuple(names),
            checkpoint_files=tuple(file for file in (warmup.files if warmup else []) if "/checkpoint-" in file.path),
            device=device_of(config.ray),
            threads=config.ray.threads_per_actor,
            max_batch_tokens=max_batch_tokens,
            memory_share=self.memory_share,
            spaces=tuple(spaces),
            ranks=config.ray.ranks_per_actor,
            cpus=config.ray.cpus_per_actor,
            gpus=config.ray.gpus_per_actor,
            stall_seconds=config.ray.stall_seconds,
        )

    @property
    def memory_share(self) -> float:
        """Part of its device's memory that an actor may plan with.

        Actors share a GPU by fractions of it; on the CPU all of them, and all their ranks, may be on one node.
        """
        settings = self.config.ray
        return min(1.0, settings.gpus_per_actor) or 1 / (settings.actors * settings.ranks_per_actor)

    def budget_file(self, warmup: Manifest) -> str:
        """Where the measured batch bound of these settings is remembered."""
        config = self.config
        settings = {
            "model": config.model.model_dump(mode="json"),
            "lora": config.lora.model_dump(mode="json"),
            # Bases stand among the spaces, whatever bound they were chosen by.
            "gradients": config.gradients.model_dump(mode="json", exclude={"exact_basis_gib"}),
            "device": device_of(config.ray),
            "memory_share": self.memory_share,
            "ranks": config.ray.ranks_per_actor,
            "spaces": [each.made_from["space"]["projection"] for each in self.feature_sets(warmup).values()],
        }
        return f"budgets/{artefact_key(settings)}.json"

    def task(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Start a task with the resources of a reader and return its reference."""
        return ray.remote(num_cpus=self.config.ray.cpus_per_task)(function).remote(*arguments)

    def model_task(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Start a task with the resources of a scoring actor and return its reference."""
        settings = self.config.ray
        return ray.remote(num_cpus=settings.cpus_per_actor, num_gpus=settings.gpus_per_actor)(function).remote(
            *arguments
        )

    def actor(self, kind: type, *arguments: Any, restarts: int = 0) -> Any:
        """Start an actor with the resources of a scoring actor; a lost one is started again and its calls repeated."""
        settings = self.config.ray
        made: Any = ray.remote(
            num_cpus=settings.cpus_per_actor,
            num_gpus=settings.gpus_per_actor,
            max_restarts=restarts,
            max_task_retries=restarts,
        )(kind)
        return made.remote(*arguments)

    def note(self, stage: str, manifest: Manifest, started: float, *, reused: bool) -> None:
        """Record a stage that one artefact stands for."""
        seconds = round(time.monotonic() - started, 3)
        self.record(
            StageRecord(stage, manifest.key, manifest.folder, reused, seconds, manifest.counts, manifest.num_bytes)
        )

    def record(self, stage: StageRecord) -> None:
        """Keep and log what a stage did."""
        self.result.stages.append(stage)
        say_stage(stage.stage, stage.seconds)
        counts = ", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in stage.counts.items())
        verb = "found" if stage.reused else "made"
        size = f", {stage.num_bytes / 1e6:,.1f} MB" if stage.num_bytes >= 1e5 else ""
        logger.info(f"{stage.stage}: {verb} {stage.folder} in {stage.seconds:.1f} s: {counts}{size}")
