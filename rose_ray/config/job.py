"""The shape of the whole YAML: strict models whose field descriptions are the reference for users."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field, model_validator

from rose_ray.config.cleaning import RowVectors
from rose_ray.config.cluster import RayConfig
from rose_ray.config.evaluation import EvaluationConfig
from rose_ray.config.gradients import GradientConfig
from rose_ray.config.lease import LeaseConfig
from rose_ray.config.model import LoraConfig, ModelConfig
from rose_ray.config.pool import PoolConfig
from rose_ray.config.selection import SelectionConfig, TrainingSetConfig
from rose_ray.config.strict import Strict
from rose_ray.config.target import TargetConfig
from rose_ray.config.warmup import WarmupConfig


class JobConfig(Strict):
    """The whole YAML."""

    workspace: str = Field(description="Folder or URI that holds everything the job makes.")
    preset: Literal["rose_official"] | None = Field(
        None, description="rose_official reproduces the released code's behaviour; what you set yourself wins."
    )
    model: ModelConfig = Field(description="The base model and how text becomes tokens.")
    lora: LoraConfig = Field(default_factory=LoraConfig, description="The adapter whose gradients are compared.")
    pool: PoolConfig = Field(description="What is selected from.")
    targets: list[TargetConfig] = Field(min_length=1, description="What the selected data should help.")
    training_set: TrainingSetConfig | None = Field(
        None, description="One training set from several targets, if wanted."
    )
    warmup: WarmupConfig = Field(default_factory=WarmupConfig, description="The training that yields the checkpoints.")
    gradients: GradientConfig = Field(default_factory=GradientConfig, description="From gradient to feature.")
    evaluation: EvaluationConfig | None = Field(
        None, description="What `rose-ray evaluate` trains and measures; docs/evaluation.md."
    )
    ray: RayConfig = Field(default_factory=RayConfig, description="Where the job runs.")
    lease: LeaseConfig = Field(default_factory=LeaseConfig, description="One run at a time on a workspace.")

    @model_validator(mode="after")
    def _parts_agree(self) -> JobConfig:
        names = [target.name for target in self.targets]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"targets: names must differ, found {repeated} more than once")
        if "training_set" in names:
            raise ValueError("targets: the name training_set is taken by `training_set`")
        if self.training_set is not None:
            unknown = sorted(set(self.training_set.targets or []) - set(names))
            if unknown:
                raise ValueError(f"training_set.targets: {unknown} are not among the targets {names}")
        unknown = sorted(set((self.evaluation and self.evaluation.arms) or []) - set(names))
        if unknown:
            raise ValueError(f"evaluation.arms: {unknown} are not among the targets {names}")
        if self.gradients.packing and self.model.attention != "flash_attention_2":
            raise ValueError(
                f"gradients.packing: only flash_attention_2 keeps packed rows apart without a mask of length squared; "
                f"model.attention is {self.model.attention}"
            )
        if self.gradients.kernel == "triton" and self.ray.gpus_per_actor == 0:
            raise ValueError(
                "gradients.kernel: triton runs on CUDA, and ray.gpus_per_actor: 0 computes on the CPU: set kernel: "
                "torch, or give each actor a GPU"
            )
        if self.model.quantized != "none" and self.warmup.zero_stage == 3:
            raise ValueError(
                f"warmup.zero_stage: 3 would partition the packed weights of model.quantized: {self.model.quantized}: "
                "set zero_stage: 2 or lower"
            )
        partitioned = self.model.loader == "deepspeed" and self.model.deepspeed.zero_stage == 3
        if self.ray.ranks_per_actor > 1 and not partitioned:
            raise ValueError(
                f"ray.ranks_per_actor: {self.ray.ranks_per_actor} ranks share a model only under model.loader: "
                "deepspeed with model.deepspeed.zero_stage: 3"
            )
        if self.ray.ranks_per_actor > 1 and self.gradients.packing:
            raise ValueError("gradients.packing is not open to ranks that share a model: set ray.ranks_per_actor: 1")
        for key, selection, target in self._selections():
            if selection.diversity is None or selection.diversity.vectors != "gradients":
                continue
            if not target.uses_gradients:
                raise ValueError(
                    f"{key}.diversity.vectors: target {target.name} is scored by {target.method}, which computes no "
                    "gradients: set rds or rds_plus"
                )
        for target in self.targets:
            if target.gist is not None and self.gradients.exact_basis == "subtasks":
                raise ValueError(
                    f"targets {target.name}: method: gist compares rows with single pairs, which "
                    "gradients.exact_basis: subtasks does not keep: set it to pairs"
                )
            if target.scores_pairs and self.is_exact(target) and self.gradients.exact_basis == "subtasks":
                raise ValueError(
                    f"targets {target.name}: selection.method: round_robin_pairs needs exact scores of pairs, which "
                    "gradients.exact_basis: subtasks does not keep: set it to pairs"
                )
            if target.normalize == "projected" and self.is_exact(target):
                raise ValueError(
                    f"targets {target.name}: normalize: projected has no meaning where nothing is projected"
                )
            if target.normalize == "own" and target.uses_gradients:
                self._check_own_part(target)
        return self

    def _check_own_part(self, target: TargetConfig) -> None:
        settings = self.gradients
        if settings.adam in ("sgd", "v_only"):
            raise ValueError(
                f"targets {target.name}: normalize: own leaves out the moment term that rows share, and with "
                f"gradients.adam: {settings.adam} they share none: set it to exact"
            )
        if self.is_exact(target) or settings.projection.kind == "none" or not settings.projection.deflate:
            raise ValueError(
                f"targets {target.name}: normalize: own needs the shared moment term kept beside the projection: a "
                "target that is not exact, gradients.projection.deflate: true and a kind that projects"
            )

    def _selections(self) -> Iterator[tuple[str, SelectionConfig, TargetConfig]]:
        """Every selection, the key that it stands under, and its first target."""
        for number, target in enumerate(self.targets):
            yield f"targets.{number}.selection", target.selection, target
        if self.training_set is not None:
            first = (self.training_set.targets or [self.targets[0].name])[0]
            named = next(target for target in self.targets if target.name == first)
            yield "training_set.selection", self.training_set.selection, named

    @property
    def row_states(self) -> list[RowVectors]:
        """The states of the base model that selections compare rows by."""
        wanted = {selection.diversity.vectors for _, selection, _ in self._selections() if selection.diversity}
        return sorted(wanted - {"gradients"})

    def is_exact(self, target: TargetConfig) -> bool:
        """Whether a target is scored by exact inner products."""
        wanted = target.exact or target.gist is not None or self.gradients.projection.kind == "exact"
        return target.uses_gradients and wanted

    @property
    def gradient_targets(self) -> list[TargetConfig]:
        """The targets that warm-up, bank and features are for."""
        return [target for target in self.targets if target.uses_gradients]

    @property
    def method_targets(self) -> list[TargetConfig]:
        """The targets that a method of `rose_ray.methods` scores."""
        return [target for target in self.targets if not target.uses_gradients]
