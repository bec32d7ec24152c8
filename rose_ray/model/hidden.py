"""What a model's head reads: the hidden states after its last layer and norm."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rose_ray.errors import ModelError
from rose_ray.kernels.pooling import Pooling, pool_hidden
from rose_ray.model.batch import Batch
from rose_ray.model.core import core_model
from rose_ray.model.scoring import ScoringModel


def pooled_states(model: ScoringModel, batch: Batch, pooling: Pooling) -> Tensor:
    """Return one vector a sample from the states before the head: [B, H], float32 or float64, not normalised.

    No logits are made: the head is passed over. Gradients are the caller's to switch off.

    Args:
        model: As it stands: with the adapter in its slot, unless within ``without_adapter``.
        batch: Padded on the right, not packed.
        pooling: See ``pool_hidden``.

    Raises:
        ModelError: The model has no output layer, or does not call it.
    """
    assert batch.lengths is None, "a packed row holds several samples"
    core: Any = core_model(model.module)
    head = core.get_output_embeddings() if hasattr(core, "get_output_embeddings") else None
    if head is None:
        raise ModelError(f"{type(core).__name__} has no output layer whose input could be read; choose another method")
    lengths_B = batch.attention_mask.sum(1)
    pooled: list[Tensor] = []

    def forward(hidden_BSH: Tensor) -> Tensor:
        pooled.append(pool_hidden(hidden_BSH, lengths_B, pooling))
        return hidden_BSH[..., :1]

    head.forward = forward
    try:
        model.module(**batch.model_inputs)
    finally:
        del head.forward
    if not pooled:
        raise ModelError(f"{type(core).__name__} does not call its output layer; choose another method")
    return pooled[0]
