"""Base models loaded in parts: under ZeRO stage 3 no rank ever holds the whole of it.

Every parameter is cut up among the ranks as it is made, and filled by the first rank, which maps the files and hands
out one layer after another. Such a load has been known to leave weights at random without a word, so some are gathered
and compared with the files.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from rose_ray.config.model import ModelConfig
from rose_ray.errors import ModelError
from rose_ray.model.base import load_base
from rose_ray.model.tokenizer import resolve_base

NUM_COMPARED = 16
"""Parameters compared with the files: the first, the last, and others evenly spaced between them."""


def load_partitioned(model: ModelConfig, config: Mapping[str, Any], deepspeed: Any) -> nn.Module:
    """Return the base model: frozen, every parameter in parts on the ranks of the process group.

    Args:
        model: What to load, in its configured type.
        config: DeepSpeed's, of ZeRO stage 3.
        deepspeed: The package, imported for this device, the process group joined.

    Raises:
        ModelError: It cannot be loaded, or its weights are not those of its files.
    """
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    own = {**config, "bf16": {"enabled": model.dtype == "bfloat16"}}
    # DeepSpeed would replace torch's linear function, in this process and for good.
    own["zero_optimization"] = {**config["zero_optimization"], "memory_efficient_linear": False}
    switch: Any = HfDeepSpeedConfig(own)  # transformers partitions what it loads for as long as this object lives
    try:
        base = load_base(model, device=None)
    finally:
        del switch
    check_weights(base, model, deepspeed)
    return base


def check_weights(base: nn.Module, model: ModelConfig, deepspeed: Any) -> None:
    """Compare some parameters with the files, bit by bit. Collective: all ranks take part.

    Raises:
        ModelError: One differs, or the files name none of the model's parameters, so that nothing can be compared.
    """
    files = _files_by_name(Path(resolve_base(model)))
    prefix = f"{getattr(base, 'base_model_prefix', '')}."
    found = [
        (name, parameter, stored)
        for name, parameter in base.named_parameters()
        for stored in sorted({name, name.removeprefix(prefix), f"{prefix}{name}"} & files.keys())
    ]
    if not found:
        raise ModelError(
            f"{model.base}: none of its {len(files):,} stored weights has the name of a parameter, so weights loaded "
            "in parts cannot be checked. Save the model with this version of transformers, or set zero_stage: 0."
        )
    steps = max(1, min(NUM_COMPARED, len(found)) - 1)
    for place in sorted({round(step * (len(found) - 1) / steps) for step in range(steps + 1)}):
        name, parameter, stored = found[place]
        with safe_open(files[stored], framework="pt") as file, deepspeed.zero.GatheredParameters([parameter]):
            expected = file.get_tensor(stored).to(parameter.dtype)
            same = torch.equal(parameter.data.cpu(), expected)
        if not same:
            raise ModelError(
                f"{model.base}: {name}, loaded in parts, differs from {stored} in {files[stored].name}: transformers "
                "and DeepSpeed of these versions cannot load this architecture under ZeRO stage 3. Set zero_stage: 0."
            )


def _files_by_name(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= dict.fromkeys(file.keys(), path)
    return found
