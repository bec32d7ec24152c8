"""Base model and adapter, loaded once and told apart by digest.

PEFT and the models of transformers are imported where one is loaded: five seconds of a processor, which the driver and
all tasks that load none would pay too.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rose_ray.config.model import LoraConfig, ModelConfig
from rose_ray.errors import ModelError
from rose_ray.model.attention import SHORT_ROWS, attend_short_rows, attention_that_runs
from rose_ray.model.tokenizer import resolve_base

if TYPE_CHECKING:
    from peft import PeftModel

_WEIGHT_FILES = (".safetensors",)
_NF4_BLOCK = 64  # weights that share an absolute maximum; what BitsAndBytesConfig uses


def base_digest(folder: str) -> str:
    """Return 16 hex digits that stand for the base model's weights and configuration.

    Raises:
        ModelError: The folder holds no safetensors weights.
    """
    names = sorted(os.listdir(folder))
    weights = [name for name in names if name.endswith(_WEIGHT_FILES)]
    if not weights:
        raise ModelError(f"{folder}: no *.safetensors file. Save the model with safe serialisation.")
    digest = hashlib.sha256()
    for name in [*weights, *(name for name in names if name == "config.json" or name.endswith(".py"))]:
        with open(os.path.join(folder, name), "rb") as file:
            digest.update(f"{name}:{hashlib.file_digest(file, 'sha256').hexdigest()};".encode())
    return digest.hexdigest()[:16]


def load_base(model: ModelConfig, *, device: str | None = "cpu", dtype: torch.dtype | None = None) -> nn.Module:
    """Return the base model: frozen, without a cache, on ``device``.

    Args:
        model: What to load.
        device: ``cpu``, ``cuda`` or ``meta`` (names and shapes only, no weights read, nothing quantised); None leaves
            weights where loading puts them, which DeepSpeed may decide.
        dtype: Overrides the configured type; float64 in tests.

    Raises:
        ModelError: It cannot be loaded, or not be quantised: bitsandbytes is not installed or cannot hold its layers.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = resolve_base(model)
    dtype = dtype or getattr(torch, model.dtype)
    attention = "sdpa" if model.attention == "auto" else model.attention
    try:
        if device == "meta":
            config = AutoConfig.from_pretrained(folder, trust_remote_code=model.trust_remote_code)
            runnable = None if attention == "flash_attention_2" else attention  # whose package the GPUs' nodes have
            with torch.device("meta"):
                base: nn.Module = AutoModelForCausalLM.from_config(
                    config, attn_implementation=runnable, trust_remote_code=model.trust_remote_code
                )
        else:
            nf4 = _nf4_settings(device, dtype) if model.quantized == "nf4" and device is not None else {}
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                attn_implementation=attention,
                trust_remote_code=model.trust_remote_code,
                use_safetensors=True,  # pickles run code
                output_loading_info=True,
                **nf4,
            )
            pretrained, report = loaded
            _check_loaded(model, report)
            if attention_that_runs(model.attention, device, dtype) == SHORT_ROWS:
                attend_short_rows(pretrained)
            if device is None:
                base = pretrained
            else:
                base = _trustworthy(pretrained, model, device) if nf4 else pretrained.to(device)
    except ModelError:  # a ValueError too, and says all there is to say
        raise
    except (OSError, ValueError, ImportError) as error:
        if attention == "sdpa" and "scaled_dot_product_attention" in str(error):
            raise ModelError(
                f"{model.base}: models of its kind do not run with torch's fused attention. Set model.attention: eager."
            ) from error
        raise ModelError(f"{model.base}: cannot load it as a causal language model: {error}") from error
    base.config.use_cache = False  # type: ignore[union-attr]
    base.requires_grad_(False)
    return base


def _nf4_settings(device: str, dtype: torch.dtype) -> dict[str, Any]:
    # Layers are packed where they are to stay. Absolute maxima stay float32: packing them too saves 0.4 bits a weight.
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError("model.quantized: nf4 needs bitsandbytes: pip install 'rose-ray[quantized]'")
    from transformers import BitsAndBytesConfig

    packing = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=False,
    )
    return {
        "quantization_config": packing,
        "device_map": {"": torch.cuda.current_device() if device == "cuda" else device},
    }


def _trustworthy(base: nn.Module, model: ModelConfig, device: str) -> nn.Module:
    # Two faults of bitsandbytes 0.50 on CPUs with AVX-512, both silent. Rows that end within a block are unpacked with
    # another block's maximum; and a pass without gradients repacks the weights for good, for a kernel that has no
    # backward.
    linear = {name: module for name, module in base.named_modules() if isinstance(module, nn.Linear)}
    packed = {name: module for name, module in linear.items() if module.weight.dtype == torch.uint8}
    uneven = [name for name, module in packed.items() if module.in_features % _NF4_BLOCK]
    if device == "cpu" and uneven:
        raise ModelError(
            f"model.quantized: nf4 on the CPU needs layers whose number of inputs is a multiple of {_NF4_BLOCK}; "
            f"{model.base} has {len(uneven)} others, such as {uneven[0]}. Set it to none, or use GPUs."
        )
    for module in packed.values():
        setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 - nn.Module does not declare it
    return base


def _check_loaded(model: ModelConfig, report: Mapping[str, Any]) -> None:
    # Weights that the files lack are made at random, in each process others: scores would be finite and meaningless.
    lacking = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
    if lacking:
        raise ModelError(
            f"{model.base}: {len(lacking)} weights are missing from its files or have another shape: "
            f"{lacking[:3]}. Use a complete causal language model."
        )


def attach_adapter(base: nn.Module, lora: LoraConfig, *, dropout: float) -> PeftModel:
    """Put a fresh LoRA adapter of float32 parameters on ``base`` (float64 where the base is).

    Raises:
        ModelError: The model lacks one of the target modules.
    """
    from peft import LoraConfig as PeftLoraConfig
    from peft import PeftModel, get_peft_model

    present = {name.rsplit(".", 1)[-1] for name, module in base.named_modules() if isinstance(module, nn.Linear)}
    lacking = sorted(set(lora.target_modules) - present)
    if lacking:
        raise ModelError(f"lora.target_modules: the model has no linear layer {lacking}; it has {sorted(present)}.")
    config = PeftLoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # it is a scale, PEFT multiplies by it
        lora_dropout=dropout,
        target_modules=list(lora.target_modules),
        bias="none",
        task_type="CAUSAL_LM",
    )
    peft_model = get_peft_model(base, config, autocast_adapter_dtype=True)
    assert isinstance(peft_model, PeftModel)
    return peft_model
