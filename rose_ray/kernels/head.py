"""Log-probabilities of given tokens straight from hidden states: the head's logits exist a block at a time.

Shapes: T labelled positions of a batch, H hidden size, V vocabulary, R rows of a block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from rose_ray.errors import ShapeError
from rose_ray.kernels.logit_shape import UNALTERED, LogitShape

LOGIT_BLOCK_BYTES = {"cpu": 8 << 20, "cuda": 256 << 20}
"""Bytes of float32 logits held at once. Small on the CPU, where a block should stay in the cache."""


class _HeadLogps(torch.autograd.Function):
    """Forward and backward of the head in one go.

    The gradient of a log-probability in its hidden state needs the logits once more, so it is taken while they are
    there: T x H numbers are kept instead of T x V, and nothing is computed twice. The head is frozen.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        targets_T: Tensor,
        shape: LogitShape,
        block_bytes: int,
    ) -> Tensor:
        dtype = torch.promote_types(hidden_TH.dtype, torch.float32)
        logps_T = torch.empty(len(hidden_TH), dtype=dtype, device=hidden_TH.device)
        grad_TH = torch.empty_like(hidden_TH) if ctx.needs_input_grad[0] else None
        # A cap's slope is a second block.
        num_rows = max(1, block_bytes // (4 * weight_VH.shape[0] * (1 if shape.cap is None else 2)))
        for start in range(0, len(hidden_TH), num_rows):
            rows = slice(start, start + num_rows)
            targets_R1 = targets_T[rows, None]
            logits_RV, slope_RV = shape.applied(linear(hidden_TH[rows], weight_VH, bias_V).to(dtype))
            top_R1 = logits_RV.amax(1, keepdim=True)
            chosen_R1 = logits_RV.gather(1, targets_R1) - top_R1
            exps_RV = logits_RV.sub_(top_R1).exp_()
            sums_R1 = exps_RV.sum(1, keepdim=True)
            logps_T[rows] = (chosen_R1 - sums_R1.log())[:, 0]
            if grad_TH is not None:
                # d logp / d hidden = W[target] - softmax W, the softmax's division put off until H numbers are left
                own_RH = weight_VH[targets_T[rows]].to(dtype)
                if slope_RV is not None:
                    own_RH = own_RH * slope_RV.gather(1, targets_R1)
                    exps_RV = exps_RV.mul_(slope_RV)
                mean_RH = (exps_RV.to(weight_VH.dtype) @ weight_VH).to(dtype) / sums_R1
                grad_TH[rows] = ((own_RH - mean_RH) * shape.scale).to(grad_TH.dtype)
        if grad_TH is not None:
            ctx.save_for_backward(grad_TH)
        return logps_T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (grad_TH,) = ctx.saved_tensors
        return (grad_TH * grads[0][:, None].to(grad_TH.dtype)), None, None, None, None, None


def head_logps(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    targets_T: Tensor,
    shape: LogitShape = UNALTERED,
) -> Tensor:
    """Log-probability of each target under ``softmax(shape(hidden W^T + bias))``.

    Differentiable in ``hidden_TH`` alone: weight and bias are taken as constants. Rows are independent, so a NaN in one
    changes no other.

    Args:
        hidden_TH: What goes into the head at the positions that predict the targets. Floating point.
        weight_VH: Weight of the head, type of ``hidden_TH``.
        bias_V: Its bias, or None.
        targets_T: Target ids in [0, V), int64.
        shape: What the model does to its logits.

    Returns:
        Tensor [T], nats, float32, or float64 where the inputs are. Logits are rounded to the type of the inputs, as the
        model itself would, and worked on in float32 or float64.

    Raises:
        ShapeError: The shapes disagree.
    """
    if hidden_TH.ndim != 2 or targets_T.shape != hidden_TH.shape[:1] or weight_VH.shape[1:] != hidden_TH.shape[1:]:
        raise ShapeError(
            f"hidden states have shape {tuple(hidden_TH.shape)}, the head {tuple(weight_VH.shape)} and targets "
            f"{tuple(targets_T.shape)}; expected [T, H], [V, H] and [T]"
        )
    block_bytes = LOGIT_BLOCK_BYTES["cuda" if hidden_TH.is_cuda else "cpu"]
    logps_T: Tensor = _HeadLogps.apply(hidden_TH, weight_VH, bias_V, targets_T, shape, block_bytes)
    return logps_T
