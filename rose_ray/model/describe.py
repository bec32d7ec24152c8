"""What identifies a model: digests of its weights and of how text becomes tokens, and the adapter's layout."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rose_ray.config.model import LoraConfig, ModelConfig
from rose_ray.model.base import attach_adapter, base_digest, load_base
from rose_ray.model.layout import ParameterLayout, layout_of
from rose_ray.model.recompute import recomputing_layers
from rose_ray.model.tokenizer import load_tokeniser, resolve_base, text_digest


@dataclass(frozen=True)
class ModelIdentity:
    """Digests (16 hex digits) and layout.

    Attributes:
        base: Weights and configuration of the base model.
        text: Tokenizer, chat template and what carries loss.
        layout: Names and shapes of the adapter's parameters.
        base_bytes, largest_bytes: Of the base's parameters, and of the largest one, all in the configured type.
    """

    base: str
    text: str
    layout: ParameterLayout
    base_bytes: int
    largest_bytes: int


def describe_model(model: ModelConfig, lora: LoraConfig) -> ModelIdentity:
    """Look at a base model without loading its weights into a model.

    Raises:
        ModelError: The base, its tokenizer or template cannot be used, it lacks a LoRA target, or it is to recompute
            activations and cannot.
    """
    folder = resolve_base(model)
    text = text_digest(load_tokeniser(model))
    base = load_base(model, device="meta")
    if model.gradient_checkpointing:
        recomputing_layers(base)
    size = getattr(torch, model.dtype).itemsize  # on the meta device it has another type
    sizes = [size * parameter.numel() for parameter in base.parameters()]
    layout = layout_of(attach_adapter(base, lora, dropout=0.0))
    return ModelIdentity(base_digest(folder), text, layout, base_bytes=sum(sizes), largest_bytes=max(sizes))
