"""Recomputed activations: layers that make theirs again in the backward pass, in evaluation mode like all else."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from rose_ray.errors import ModelError


def recomputing_layers(module: nn.Module) -> list[Any]:
    """Return the layers that recompute on their own once they are told to.

    Raises:
        ModelError: There are none.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [part for part in module.modules() if isinstance(part, GradientCheckpointingLayer)]
    if not layers:
        raise ModelError(
            "model.gradient_checkpointing: no layer of this model recomputes on its own. Set it to false, and lower "
            "gradients.max_batch_tokens where memory is short."
        )
    return layers


def recompute_in_evaluation(module: nn.Module) -> dict[Any, Callable[..., Any]]:
    """Let layers recompute while all of the model is in evaluation mode; return what each recomputed with.

    Hugging Face's layers look whether they are in training mode, and then run in it: with dropout and the like,
    wherever they read its share from. So they are in it while they look, and not while they run.

    Args:
        module: In evaluation mode, told to recompute (``gradient_checkpointing_enable``).

    Raises:
        ModelError: No layer recomputes, or none was told to.
    """
    found = {e: e._gradient_checkpointing_func for e in recomputing_layers(module) if e.gradient_checkpointing}
    if not found:
        raise ModelError("activations are to be recomputed, but gradient_checkpointing_enable was not called")
    for layer, recompute in found.items():
        layer.training = True
        layer._gradient_checkpointing_func = functools.partial(_in_evaluation, layer, recompute)
    return found


def _in_evaluation(layer: nn.Module, recompute: Callable[..., Any], run: Callable[..., Any], *hidden: Any) -> Any:
    def once(*hidden: Any) -> Any:
        layer.training = False
        try:
            return run(*hidden)
        finally:
            layer.training = True

    return recompute(once, *hidden)
