"""The training that yields the checkpoints: the YAML's `warmup`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rose_ray.config.strict import Fraction, Strict


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

    @property
    def num_checkpoints(self) -> int:
        """How many there will be: one an epoch, or the adapters given."""
        return self.epochs if self.adapters is None else len(self.adapters)

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
