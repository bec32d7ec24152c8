"""The shape of the YAML: strict models whose field descriptions are the reference for users."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from rose_ray.config.lease import LeaseConfig
from rose_ray.config.selection import SelectionConfig, TrainingSetConfig
from rose_ray.config.strict import Fraction, Name, Strict

AdamMode = Literal["torch", "less_code", "v_only", "sgd"]
Objective = Literal["rose", "rose_simpo", "rose_balanced", "dpo_weighted", "less"]
Normalization = Literal["exact", "projected", "none"]


class DeepSpeedConfig(Strict):
    """How DeepSpeed holds the frozen base model while gradients are computed."""

    zero_stage: Literal[0, 3] = Field(0, description="0: whole on the device. 3: parameters gathered layer by layer.")
    offload_parameters: Literal["none", "cpu", "nvme"] = Field(
        "none", description="cpu keeps the parameters in host memory, nvme on a local disk; needs zero_stage 3."
    )
    nvme_path: str | None = Field(None, description="Folder on that disk, on every node.")

    @model_validator(mode="after")
    def _offload_needs_stage_3(self) -> DeepSpeedConfig:
        if self.offload_parameters != "none" and self.zero_stage != 3:
            raise ValueError(f"offload_parameters: {self.offload_parameters} needs zero_stage: 3")
        if (self.offload_parameters == "nvme") != (self.nvme_path is not None):
            raise ValueError("offload_parameters: nvme and nvme_path go together: set both or neither")
        return self


class ModelConfig(Strict):
    """The base model and how text becomes tokens."""

    base: str = Field(description="Folder or Hugging Face name of the base model and its tokenizer.")
    dtype: Literal["float32", "bfloat16"] = Field(
        "bfloat16", description="Type of the frozen base weights. Adapters and gradients are float32 always."
    )
    max_tokens: int = Field(2048, ge=8, description="Longest sample; the right side of longer ones is cut and counted.")
    template: str = Field(
        "tokenizer", description="Chat template: tokenizer (the model's own), tulu (as in LESS), or a Jinja file."
    )
    loss_on_turn_tail: bool = Field(
        False, description="Let what follows an answer's end token (a newline) carry loss too, as LESS's code does."
    )
    attention: Literal["sdpa", "eager", "flash_attention_2"] = Field("sdpa", description="Attention kernel.")
    quantized: Literal["none", "nf4"] = Field(
        "none", description="nf4 holds the base's linear layers in 4 bits (bitsandbytes); adapters stay whole."
    )
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations: less memory, about half as fast again."
    )
    trust_remote_code: bool = Field(False, description="Run code that comes with the base model.")
    loader: Literal["deepspeed", "plain"] = Field("deepspeed", description="Who holds the model in the scoring actors.")
    deepspeed: DeepSpeedConfig = Field(
        default_factory=DeepSpeedConfig, description="DeepSpeed settings of those actors."
    )

    @model_validator(mode="after")
    def _settings_fit_loader(self) -> ModelConfig:
        if self.loader == "plain" and self.deepspeed != DeepSpeedConfig():
            raise ValueError("loader: plain leaves no use for what is set in deepspeed: take out one of them")
        return self

    @model_validator(mode="after")
    def _packed_weights_stay_whole(self) -> ModelConfig:
        if self.quantized != "none" and self.deepspeed.zero_stage == 3:
            raise ValueError(
                f"quantized: {self.quantized} with deepspeed.zero_stage: 3 is not supported, since packed weights "
                "would be partitioned: set zero_stage: 0 or quantized: none"
            )
        return self


class LoraConfig(Strict):
    """The adapter whose gradients are compared. Defaults are the paper's."""

    rank: int = Field(128, ge=1, description="Rank of every adapter matrix.")
    alpha: float = Field(512.0, gt=0, description="Scale: the adapter's output is multiplied by alpha / rank.")
    dropout: float = Field(0.1, ge=0, lt=1, description="Dropout before the adapter, in the warm-up only.")
    target_modules: list[str] = Field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"],
        min_length=1,
        description="Names of the linear layers that get an adapter.",
    )


class PoolInput(Strict):
    """Files of the pool that share a format."""

    files: list[str] = Field(
        min_length=1, description="Paths, URIs or patterns: JSONL, JSON, Parquet; .gz and .zst too."
    )
    format: Literal["auto", "messages", "prompt_completion", "alpaca", "sharegpt"] = Field(
        "auto", description="Shape of a record; auto looks at the first rows and says what it found."
    )
    source: str | None = Field(None, description="Source that all rows count under.")
    source_field: str | None = Field(None, description="Key of the record that names its source.")

    @model_validator(mode="after")
    def _one_source(self) -> PoolInput:
        if self.source is not None and self.source_field is not None:
            raise ValueError("source and source_field contradict each other: set one of them")
        return self


class PoolConfig(Strict):
    """What is selected from."""

    inputs: list[PoolInput] = Field(
        min_length=1, description="Where the rows are. Of equal rows the first input's counts."
    )
    shard_rows: int = Field(512, ge=1, description="Rows of a unit of work; part of every shard's identity.")
    sample_fraction: Fraction = Field(
        1.0, description="Take this share of the rows, chosen by their content; for trials."
    )
    sample_seed: int = Field(0, description="Which rows such a share holds.")


class PairInput(Strict):
    """Preference pairs of a target."""

    files: list[str] = Field(min_length=1, description="Paths, URIs or patterns.")
    format: Literal["auto", "explicit", "implicit", "sharegpt", "rose_authors"] = Field(
        "auto",
        description="Shape of a record: with a prompt, with the prompt inside both answers, or the authors' files.",
    )
    subtask: Name | None = Field(None, description="Subtask of all pairs in these files.")
    subtask_field: str | None = Field(None, description="Key of the record that names its subtask.")
    subtask_blocks: int | None = Field(
        None, ge=1, description="The file holds this many subtasks, one equal block each."
    )

    @model_validator(mode="after")
    def _one_subtask(self) -> PairInput:
        given = [n for n in ("subtask", "subtask_field", "subtask_blocks") if getattr(self, n) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} contradict each other: set one of them")
        return self


class TargetConfig(Strict):
    """What the selected data should make the model better at."""

    name: Name = Field(description="Name of the target, used in paths.")
    pairs: list[PairInput] = Field(min_length=1, description="Its preference pairs.")
    shots: int | None = Field(None, ge=1, description="Use the first so many pairs of every subtask; all where unset.")
    objective: Objective = Field("rose", description="Which direction a pair stands for; docs/objectives.md.")
    dpo_beta: float = Field(0.1, gt=0, description="Beta of the DPO loss; matters in dpo_weighted and in reports.")
    normalize: Normalization = Field(
        "exact", description="Divide by the exact lengths, by the projected ones (as the released code), or not at all."
    )
    encoding: Literal["chat", "rose_official"] = Field(
        "chat", description="Pairs in the pool's chat template, or in the raw transcripts of the released code."
    )
    official_cut: Literal["keep_start", "keep_end"] = Field(
        "keep_start", description="Which end of a long prompt rose_official keeps; the authors use keep_end for hh."
    )
    aggregation: Literal["max", "mean"] = Field("max", description="From subtask scores to the score.")
    exact: bool = Field(
        False,
        description="Score by exact inner products, made in the same pass as the features, instead of by features.",
    )
    selection: SelectionConfig = Field(default_factory=SelectionConfig, description="How much is selected, and how.")

    @model_validator(mode="after")
    def _cut_fits_encoding(self) -> TargetConfig:
        if self.encoding != "rose_official" and self.official_cut != "keep_start":
            raise ValueError(
                f"official_cut: {self.official_cut} has no meaning with encoding: {self.encoding}, which cuts the "
                "right side: take it out, or set encoding: rose_official"
            )
        return self


class WarmupConfig(Strict):
    """The short LoRA training that yields the checkpoints. Defaults are the paper's."""

    fraction: Fraction = Field(0.05, description="Share of the pool to train on, chosen by seed.")
    seed: int = Field(0, description="Chooses the rows, their order, and the adapter's first values.")
    epochs: int = Field(4, ge=1, description="Passes; each ends with a checkpoint.")
    learning_rate: float = Field(2e-5, gt=0, description="Peak; rises linearly from 0, then falls linearly to 0.")
    warmup_ratio: float = Field(0.03, ge=0, lt=1, description="Share of the steps in which it rises.")
    batch_size: int = Field(128, ge=1, description="Samples of one optimizer step, over all workers.")
    max_batch_tokens: int = Field(
        8192, ge=8, description="Bound on rows times length of what goes through the model at once."
    )
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay.")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="Decay of the first moment.")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="Decay of the second moment.")
    adam_eps: float = Field(1e-8, gt=0, description="Added to the root of the second moment.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients of a step are clipped to this length.")
    workers: int = Field(1, ge=1, description="Data-parallel workers.")
    zero_stage: Literal[0, 1, 2, 3] = Field(
        0, description="What DeepSpeed shards among them: 1 the optimizer's state, 2 gradients too, 3 the model too."
    )
    save_steps: int = Field(
        100,
        ge=1,
        description="Steps between saved states, from which an interrupted training goes on; epochs' ends too.",
    )
    max_restarts: int = Field(2, ge=0, description="How often workers are started again after one of them was lost.")
    adapters: list[str] | None = Field(
        None,
        min_length=1,
        description="Your own PEFT adapter folders instead of a warm-up. Without moments.safetensors and "
        "optimizer_state.json in each, as warm-up and import-checkpoint write them, only gradients.adam: sgd is open.",
    )
    adapter_weights: list[Annotated[float, Field(ge=0)]] | None = Field(
        None, description="Weights of those adapters, for instance learning rates; equal where unset."
    )

    @model_validator(mode="after")
    def _adapters_are_not_trained(self) -> WarmupConfig:
        # At its default a setting says nothing: `init` writes them all.
        training = {name: field for name, field in type(self).model_fields.items() if not name.startswith("adapter")}
        idle = [name for name, field in training.items() if getattr(self, name) != field.default]
        if self.adapters is not None and idle:
            raise ValueError(f"adapters are used as they are, which leaves no use for {', '.join(idle)}: take them out")
        return self

    @model_validator(mode="after")
    def _weights_fit_adapters(self) -> WarmupConfig:
        if self.adapter_weights is not None and len(self.adapter_weights) != len(self.adapters or []):
            raise ValueError(
                f"adapter_weights has {len(self.adapter_weights)} entries for {len(self.adapters or [])} adapters"
            )
        if self.adapter_weights is not None and not any(self.adapter_weights):
            raise ValueError("adapter_weights are all 0: at least one adapter must count")
        return self


class ProjectionConfig(Strict):
    """What makes a feature of a direction."""

    kind: Literal["sketch", "rademacher", "factored", "none", "exact"] = Field(
        "sketch",
        description="sketch (fast), rademacher (dense, as the released code), factored (two-sided, per matrix), none "
        "(every parameter; small models), exact (inner products with the pairs themselves: a new target costs a pass).",
    )
    dim: int = Field(8192, ge=1, description="Width of a feature; ignored by none and exact.")
    seed: int = Field(0, ge=0, description="Seed of the projection.")
    deflate: bool = Field(
        True,
        description="Take the moment term that all directions share out before projecting and keep its inner product "
        "exactly: less noise for one number a row. Nothing to do for adam: sgd and v_only, nor for none and exact.",
    )


class GradientConfig(Strict):
    """From a sample's gradient to its feature."""

    adam: AdamMode = Field("torch", description="torch, less_code (the released formula), v_only, or sgd.")
    projection: ProjectionConfig = Field(default_factory=ProjectionConfig, description="Direction to feature.")
    exact_basis: Literal["pairs", "subtasks"] = Field(
        "pairs",
        description="What exact targets keep of their pairs on the device: both sides of each, or one direction a "
        "subtask: less memory, but then only this objective's scores are exact, no single pair's influence.",
    )
    stored_dtype: Literal["float32", "float16", "int8", "bit1"] = Field(
        "int8", description="Type of a stored feature; docs/projections.md says what each costs in rank."
    )
    max_batch_tokens: int | Literal["auto"] = Field(
        "auto",
        description="Bound on rows times length of a batch; auto measures what fits into memory. Changes scores by "
        "rounding only.",
    )
    packing: bool = Field(
        False, description="Lay rows end to end instead of padding them; for attention: flash_attention_2."
    )
    kernel: Literal["torch", "triton"] = Field(
        "torch", description="What makes features of gradients: torch's operators, or one fused Triton kernel (CUDA)."
    )

    @field_validator("max_batch_tokens")
    @classmethod
    def _room_for_a_row(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 8:
            raise ValueError("expected auto, or at least 8")
        return value

    @model_validator(mode="after")
    def _kernel_fits_projection(self) -> GradientConfig:
        if self.kernel == "triton" and self.projection.kind not in ("sketch", "exact"):
            raise ValueError(f"kernel: triton has no projection.kind {self.projection.kind}; set kernel: torch")
        return self


class RayConfig(Strict):
    """Where the job runs."""

    address: str = Field(
        "auto", description="local (start one here), auto (join the cluster that this machine is in), or host:port."
    )
    actors: int = Field(1, ge=1, description="Scoring actors.")
    cpus_per_actor: float = Field(
        1.0, gt=0, description="CPUs reserved for each; fractions leave room for the readers."
    )
    gpus_per_actor: float = Field(0.0, ge=0, description="GPUs reserved for each; 0 computes on the CPU.")
    ranks_per_actor: int = Field(
        1,
        ge=1,
        description="Ranks that share the model of one actor, partitioned over their devices: for a model larger than "
        "one. Each gets what is reserved for an actor; needs model.deepspeed.zero_stage: 3.",
    )
    threads_per_actor: int = Field(1, ge=1, description="Torch threads in each; fixed, since it decides the last bits.")
    cpus_per_task: float = Field(0.25, gt=0, description="CPUs reserved for a task that reads or tokenises.")
    autoscale_seconds: float = Field(
        0.0,
        ge=0,
        description="On a cluster that grows: ask its autoscaler for what the job needs and wait so long for it. 0 "
        "takes the cluster as it is and refuses at once what does not fit.",
    )
    stall_seconds: int = Field(3600, ge=60, description="Give up when no shard ends for so long.")

    @field_validator("gpus_per_actor")
    @classmethod
    def _whole_gpus(cls, value: float) -> float:
        if value > 1 and not value.is_integer():
            raise ValueError(f"{value} GPUs: Ray shares one GPU among actors, or gives an actor whole ones")
        return value


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
        if self.gradients.packing and self.model.attention != "flash_attention_2":
            raise ValueError(
                f"gradients.packing: only flash_attention_2 keeps packed rows apart without a mask of length squared; "
                f"model.attention is {self.model.attention}"
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
        for target in self.targets:
            if target.normalize == "projected" and self.is_exact(target):
                raise ValueError(
                    f"targets {target.name}: normalize: projected has no meaning where nothing is projected"
                )
        return self

    def is_exact(self, target: TargetConfig) -> bool:
        """Whether a target is scored by exact inner products."""
        return target.exact or self.gradients.projection.kind == "exact"
