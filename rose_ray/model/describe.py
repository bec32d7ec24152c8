"""What identifies a model: digests of its weights and of how text becomes tokens, and the adapter's layout."""

from __future__ import annotations

from dataclasses import dataclass

from rose_ray.config.model import LoraConfig, ModelConfig
from rose_ray.model.base import attach_adapter, base_digest, load_base
from rose_ray.model.layout import ParameterLayout, layout_of
from rose_ray.model.tokenizer import load_tokeniser, resolve_base, text_digest


@dataclass(frozen=True)
class ModelIdentity:
    """Digests (16 hex digits) and layout.

    Attributes:
        base: Weights and configuration of the base model.
        text: Tokenizer, chat template and what carries loss.
        layout: Names and shapes of the adapter's parameters.
    """

    base: str
    text: str
    layout: ParameterLayout


def describe_model(model: ModelConfig, lora: LoraConfig) -> ModelIdentity:
    """Look at a base model without loading its weights into a model.

    Raises:
        ModelError: The base, its tokenizer or template cannot be used, or it lacks a LoRA target.
    """
    folder = resolve_base(model)
    text = text_digest(load_tokeniser(model))
    empty = attach_adapter(load_base(model, device="meta"), lora, dropout=0.0)
    return ModelIdentity(base=base_digest(folder), text=text, layout=layout_of(empty))
