"""Causal attention of short rows by matrix products, for bfloat16 on a CPU that multiplies it.

Shapes: B batch, H heads, S tokens, K numbers of a head's query and key, V numbers of its value, N = B * H.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from rose_ray.errors import ShapeError

SHORT_ROW = 256
"""Up to this many tokens it is level with torch's fused operator or ahead of it, with heads of 32, 64 and 128 numbers;
beyond, it falls behind with narrow heads first, and what it keeps for the backward pass grows with the square
(benchmarks/attention.py)."""


def causal_attention(query_BHSK: Tensor, key_BHSK: Tensor, value_BHSV: Tensor, scale: float) -> Tensor:
    """Return ``softmax(scale * Q K^T, keys up to the query's own place) V``, with gradients for all three.

    Products of queries and keys, and the softmax, are made in float32 (float64 in float64) whatever the type: rounding
    a score of size s to bfloat16 would move its weight by up to s / 256 of it. The other products are in the type of
    the inputs, added up as torch does. The probabilities, N * S * S numbers, are kept for the backward pass.

    Args:
        query_BHSK: Queries.
        key_BHSK: Keys, a head for each of the queries.
        value_BHSV: Values.
        scale: Usually ``K ** -0.5``.

    Returns:
        [B, H, S, V], in the type of the inputs.

    Raises:
        ShapeError: The three do not fit together.
    """
    if query_BHSK.shape != key_BHSK.shape or query_BHSK.shape[:3] != value_BHSV.shape[:3] or query_BHSK.ndim != 4:
        shapes = [tuple(each.shape) for each in (query_BHSK, key_BHSK, value_BHSV)]
        raise ShapeError(f"query, key and value have shapes {shapes}; expected [B, H, S, K] twice and [B, H, S, V]")
    attended: Tensor = _CausalAttention.apply(query_BHSK, key_BHSK, value_BHSV, scale)
    return attended


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query_BHSK: Tensor, key_BHSK: Tensor, value_BHSV: Tensor, scale: float) -> Tensor:
        query_NSK, key_NSK, value_NSV = (_rows(each) for each in (query_BHSK, key_BHSK, value_BHSV))
        wide = torch.float64 if query_NSK.dtype == torch.float64 else torch.float32
        later_SS = _later(query_NSK.shape[1], wide)
        scores_NSS = torch.baddbmm(later_SS, query_NSK.to(wide), key_NSK.to(wide).mT, alpha=scale)
        probs_NSS = torch.softmax(scores_NSS, -1).to(value_NSV.dtype)
        ctx.save_for_backward(query_NSK, key_NSK, value_NSV, probs_NSS)
        ctx.scale = scale
        return torch.bmm(probs_NSS, value_NSV).view(value_BHSV.shape)

    @staticmethod
    def backward(ctx: Any, *grads_BHSV: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query_NSK, key_NSK, value_NSV, probs_NSS = ctx.saved_tensors
        heads = grads_BHSV[0].shape[:2]
        grad_NSV = _rows(grads_BHSV[0])
        value_grad_NSV = torch.bmm(probs_NSS.mT, grad_NSV)
        probs_grad_NSS = torch.bmm(grad_NSV, value_NSV.mT)
        scores_grad_NSS = torch._softmax_backward_data(probs_grad_NSS, probs_NSS, -1, probs_NSS.dtype)
        # beta = 0: the first argument is not looked at; alpha saves a pass
        query_grad_NSK = torch.baddbmm(query_NSK, scores_grad_NSS, key_NSK, beta=0, alpha=ctx.scale)
        key_grad_NSK = torch.baddbmm(key_NSK, scores_grad_NSS.mT, query_NSK, beta=0, alpha=ctx.scale)
        parts = (each.unflatten(0, heads) for each in (query_grad_NSK, key_grad_NSK, value_grad_NSV))
        return *parts, None


def _rows(tensor_BHSK: Tensor) -> Tensor:
    return tensor_BHSK.contiguous().flatten(0, 1)


@functools.lru_cache(maxsize=64)
def _later(length: int, dtype: torch.dtype) -> Tensor:
    """0 for keys up to the query's own place, minus infinity after it; every query has a key."""
    return torch.full((length, length), float("-inf"), dtype=dtype).triu_(1)
