"""A causal language model that was trained to answer a prompt with a number, read as the number it expects to give.

Shapes: B batch, L numbers it may answer with.
"""

from __future__ import annotations

import hashlib
import inspect
from typing import Any

import torch
from torch import Tensor

from rose_ray.config.method import ScorerConfig
from rose_ray.config.model import ModelConfig
from rose_ray.data.tokenize import Sample
from rose_ray.errors import ModelError
from rose_ray.kernels.expected_number import expected_number
from rose_ray.model.base import base_digest, load_base
from rose_ray.model.batch import Batch
from rose_ray.model.tokenizer import load_tokenizer, model_folder


class NumberScorer:
    """One such model.

    Args:
        config: What to load, and the numbers.
        device: Where to.

    Attributes:
        max_tokens: What the model was made for; None where its configuration does not say.

    Raises:
        ModelError: It cannot be loaded, or a number is not one token of it.
    """

    def __init__(self, config: ScorerConfig, device: torch.device | str) -> None:
        model = _model_config(config)
        self.tokenizer = load_tokenizer(model)
        self.label_ids = _label_ids(config, self.tokenizer)
        self.numbers_L = torch.tensor([float(label) for label in config.labels], dtype=torch.float64)
        self.module = load_base(model, device=str(device)).eval()
        limit = getattr(self.module.config, "max_position_embeddings", None)
        self.max_tokens = limit if isinstance(limit, int) else None

    def encode(self, prompt: str) -> Sample:
        """Return a prompt's tokens, with those that the tokenizer adds; none carries loss."""
        ids: list[int] = self.tokenizer(prompt)["input_ids"]
        return Sample(ids, [False] * len(ids))

    def numbers(self, batch: Batch) -> Tensor:
        """Return the expected number behind each prompt: float64 [B]. Gradients are the caller's to switch off."""
        last_B = batch.attention_mask.sum(1) - 1
        keep, column_B = last_B.unique(return_inverse=True)
        if "logits_to_keep" in inspect.signature(self.module.forward).parameters:
            logits_BKV = self.module(**batch.model_inputs, logits_to_keep=keep).logits
        else:
            logits_BKV = self.module(**batch.model_inputs).logits[:, keep]
        logits_BV = logits_BKV[torch.arange(len(column_B), device=column_B.device), column_B]
        return expected_number(logits_BV[:, self.label_ids], self.numbers_L.to(logits_BV.device))


def scorer_digest(config: ScorerConfig) -> dict[str, Any]:
    """Return what tells a scorer's weights and tokenizer apart from others'.

    Raises:
        ModelError: There is no such model, or a number is not one token of it.
    """
    model = _model_config(config)
    tokenizer = load_tokenizer(model)
    _label_ids(config, tokenizer)
    text: str = tokenizer.backend_tokenizer.to_str()
    return {"weights": base_digest(model.base), "tokenizer": hashlib.sha256(text.encode()).hexdigest()[:16]}


def _model_config(config: ScorerConfig) -> ModelConfig:
    return ModelConfig(base=model_folder(config.model), dtype=config.dtype)


def _label_ids(config: ScorerConfig, tokenizer: Any) -> list[int]:
    vocabulary = tokenizer.get_vocab()
    lacking = [label for label in config.labels if label not in vocabulary]
    if lacking:
        raise ModelError(
            f"{config.model}: {lacking} are no tokens of its own, so it cannot have been trained to answer with them. "
            "Set `labels` to the numbers it answers with."
        )
    return [vocabulary[label] for label in config.labels]
