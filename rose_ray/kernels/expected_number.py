"""What number a model expects to answer with.

Shapes: B batch, L numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rose_ray.errors import ShapeError


def expected_number(logits_BL: Tensor, numbers_L: Tensor) -> Tensor:
    """Return the mean of the numbers, weighted by their probabilities among themselves (DEITA, arXiv:2312.15685).

    Args:
        logits_BL: Of the numbers' tokens, any floating type.
        numbers_L: The numbers, float64.

    Returns:
        Tensor [B], float64, between the least and the greatest number; NaN where a logit is NaN or plus infinity.

    Raises:
        ShapeError: The shapes do not fit.
    """
    if logits_BL.ndim != 2 or logits_BL.shape[1:] != numbers_L.shape:
        raise ShapeError(
            f"logits have shape {tuple(logits_BL.shape)}, numbers {tuple(numbers_L.shape)}; expected [B, L] and [L]"
        )
    return torch.softmax(logits_BL.double(), dim=1) @ numbers_L
