"""The model inside what was put around it."""

from __future__ import annotations

from typing import Any

from torch import nn


def core_model(module: Any) -> nn.Module:
    """Return the model that PEFT and DeepSpeed were put around."""
    while hasattr(module, "module"):  # DeepSpeed's engine around the model
        module = module.module
    base: nn.Module = module.get_base_model() if hasattr(module, "get_base_model") else module
    return base
