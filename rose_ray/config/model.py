"""The base model and the adapter: the YAML's `model` and `lora`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from rose_ray.config.strict import Strict


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
        "bfloat16",
        description="Type of the frozen base weights. The adapter is trained in float32 and scored in this type; "
        "gradients are float32.",
    )
    max_tokens: int = Field(2048, ge=8, description="Longest sample; the right side of longer ones is cut and counted.")
    template: str = Field(
        "tokenizer", description="Chat template: tokenizer (the model's own), tulu (as in LESS), or a Jinja file."
    )
    loss_on_turn_tail: bool = Field(
        False, description="Let what follows an answer's end token (a newline) carry loss too, as LESS's code does."
    )
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = Field(
        "auto",
        description="Attention kernel. auto is sdpa, but in bfloat16 on a CPU that multiplies it (AVX-512 BF16, "
        "AMX) rows of up to 256 tokens go through matrix products, which are faster there.",
    )
    merge_adapter: Literal["auto", "never"] = Field(
        "auto",
        description="auto adds the adapter to a copy of its layers' weights once a checkpoint, instead of at every "
        "token, where those are float32, whole and no wider than 128 times the rank. never saves the copy's memory.",
    )
    quantized: Literal["none", "nf4"] = Field(
        "none", description="nf4 holds the base's linear layers in 4 bits (bitsandbytes); adapters stay whole."
    )
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations: less memory, takes about half as long again."
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
