"""From one sample's gradient to the step Adam would take for it alone.

Shapes: B batch, and the parameter's own axes behind it. The functions work on one parameter tensor at a time,
so that a caller can stream over parameters and add up the squares.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from rose_ray.errors import ConfigError, NumericsError, ShapeError

AdamMode = Literal["torch", "less_code", "v_only", "sgd"]

LESS_CODE_BETA1 = 0.9
LESS_CODE_BETA2 = 0.999
LESS_CODE_EPS = 1e-8
"""Constants written into the released code of LESS, whatever the optimizer really used."""


@dataclass(frozen=True)
class AdamState:
    """What the warm-up's optimizer knew besides the moments.

    Args:
        num_updates: Updates already taken at the checkpoint, at least 0.
        adam_beta1: Decay of the first moment, in [0, 1).
        adam_beta2: Decay of the second moment, in [0, 1).
        adam_eps: Added to the root of the second moment, above 0, in units of a gradient.

    Raises:
        ConfigError: A value is out of its range.
    """

    num_updates: int
    adam_beta1: float
    adam_beta2: float
    adam_eps: float

    def __post_init__(self) -> None:
        if self.num_updates < 0:
            raise ConfigError(f"num_updates is {self.num_updates}; expected 0 or more")
        for name, beta in (("adam_beta1", self.adam_beta1), ("adam_beta2", self.adam_beta2)):
            if not 0.0 <= beta < 1.0:
                raise ConfigError(f"{name} is {beta!r}; expected a number in [0, 1)")
        if not (math.isfinite(self.adam_eps) and self.adam_eps > 0):
            raise ConfigError(f"adam_eps is {self.adam_eps!r}; expected a finite number above 0")


class AdamDirection(NamedTuple):
    """Directions of one parameter tensor, and the lengths from which the momentum share is made.

    ``direction_B``: [B, *shape]. ``momentum_norm``: ``||b1 m||``, scalar. ``total_norm_B``: ``||b1 m + (1 - b1) g||``,
    [B]. All have the dtype of the gradients. Lengths squared and summed over all parameters, the root of their quotient
    is the share of the common moment term. Both are 0 where the mode has no momentum.
    """

    direction_B: Tensor
    momentum_norm: Tensor
    total_norm_B: Tensor


def adam_direction(
    grads_B: Tensor,
    exp_avg: Tensor | None,
    exp_avg_sq: Tensor | None,
    state: AdamState,
    mode: AdamMode = "torch",
) -> AdamDirection:
    """Return the step that each sample alone would cause, learning rate left out.

    Gamma(z; theta) of LESS, section 3.1 (Xia et al. 2024, arXiv:2402.04333), with t = num_updates + 1::

        m' = b1 m + (1 - b1) g        v' = b2 v + (1 - b2) g**2

        torch      (m' / (1 - b1**t)) / (sqrt(v' / (1 - b2**t)) + eps)
        less_code  m' / sqrt(v' + 1e-8), b1 = 0.9 and b2 = 0.999 whatever the state says
        v_only     g / (sqrt(v' / (1 - b2**t)) + eps)
        sgd        g

    ``torch`` is what ``torch.optim.Adam`` would do. ``less_code`` is the released code of LESS: no bias
    correction, eps under the root. The parameters then move by minus the learning rate times the direction.

    Args:
        grads_B: Loss gradients [B, *shape], float32 or float64, one row per sample. Not modified.
        exp_avg: First moment m stored with the checkpoint, [*shape]; may be None in ``v_only`` and ``sgd``.
        exp_avg_sq: Second moment v, [*shape], at least 0; may be None in ``sgd``.
        state: Number of updates, betas and eps of the optimizer that ran.
        mode: One of the four above.

    Returns:
        Directions and lengths, on the device of the gradients. Moments are used in the dtype of the
        gradients. ``sgd`` returns the gradients themselves, not a copy. NaN and infinity pass through.

    Raises:
        ConfigError: The mode is unknown, or needs a moment that is missing.
        ShapeError: A moment's shape is not that of one sample's gradient.
        NumericsError: The gradients are neither float32 nor float64.
    """
    _check_mode(mode)
    if grads_B.dtype not in (torch.float32, torch.float64):
        raise NumericsError(f"gradients are {grads_B.dtype}; expected float32 or float64")
    if mode == "sgd":
        return _without_momentum(grads_B)
    sq = _moment("exp_avg_sq", exp_avg_sq, grads_B, mode)
    if mode == "v_only":
        return _without_momentum(grads_B / _denominator(grads_B, sq, state))
    avg = _moment("exp_avg", exp_avg, grads_B, mode)
    beta1 = LESS_CODE_BETA1 if mode == "less_code" else state.adam_beta1
    momentum = beta1 * avg
    total_B = torch.add(momentum, grads_B, alpha=1.0 - beta1)
    if mode == "less_code":
        denom_B = _second_moment(grads_B, sq, LESS_CODE_BETA2, 1.0).add_(LESS_CODE_EPS).sqrt_()
    else:
        denom_B = _denominator(grads_B, sq, state, 1.0 - state.adam_beta1 ** (state.num_updates + 1))
    # Summed in the type of the directions, where the error is some 1e-6 of the sum: float64 would double the time.
    lengths = torch.linalg.vector_norm(momentum), torch.linalg.vector_norm(total_B.flatten(1), dim=1)
    return AdamDirection(total_B.div_(denom_B), *lengths)


def common_direction(
    exp_avg: Tensor | None, exp_avg_sq: Tensor | None, state: AdamState, mode: AdamMode = "torch"
) -> Tensor | None:
    """Return the direction of a zero gradient: the moment term alone, which all samples have in common.

    Args:
        exp_avg: As in :func:`adam_direction`; used in float32 unless it is float64.
        exp_avg_sq: Likewise.
        state: Likewise.
        mode: Likewise.

    Returns:
        [*shape], float32 or float64, or None in ``v_only`` and ``sgd``, where it would be zero.

    Raises:
        ConfigError: The mode is unknown, or needs a moment that is missing.
        ShapeError: The moments' shapes disagree.
    """
    _check_mode(mode)
    if mode in ("v_only", "sgd"):
        return None
    if exp_avg is None:
        raise _missing("exp_avg", mode)
    dtype = torch.float64 if exp_avg.dtype == torch.float64 else torch.float32
    zeros_B = torch.zeros_like(exp_avg, dtype=dtype).unsqueeze(0)
    return adam_direction(zeros_B, exp_avg, exp_avg_sq, state, mode).direction_B[0]


def _check_mode(mode: str) -> None:
    if mode not in get_args(AdamMode):
        raise ConfigError(f"Adam mode is {mode!r}; expected one of {', '.join(get_args(AdamMode))}")


def _missing(name: str, mode: AdamMode) -> ConfigError:
    return ConfigError(
        f"Adam mode {mode!r} needs {name}, and the checkpoint has none; "
        "use a checkpoint with its optimizer state, or mode 'sgd'"
    )


def _moment(name: str, moment: Tensor | None, grads_B: Tensor, mode: AdamMode) -> Tensor:
    if moment is None:
        raise _missing(name, mode)
    if moment.shape != grads_B.shape[1:]:
        raise ShapeError(
            f"{name} has shape {tuple(moment.shape)} and the gradients {tuple(grads_B.shape)}; "
            "expected the gradients' shape without its first axis"
        )
    return moment.to(dtype=grads_B.dtype, device=grads_B.device)


def _second_moment(grads_B: Tensor, exp_avg_sq: Tensor, beta2: float, scale: float) -> Tensor:
    """``scale * v'`` in one pass over the gradients."""
    return torch.addcmul(exp_avg_sq * (scale * beta2), grads_B, grads_B, value=scale * (1.0 - beta2))


def _denominator(grads_B: Tensor, exp_avg_sq: Tensor, state: AdamState, factor: float = 1.0) -> Tensor:
    """``factor * (sqrt(v' / (1 - b2**t)) + eps)``; the factor saves a pass over the directions."""
    scale = factor * factor / (1.0 - state.adam_beta2 ** (state.num_updates + 1))
    return _second_moment(grads_B, exp_avg_sq, state.adam_beta2, scale).sqrt_().add_(factor * state.adam_eps)


def _without_momentum(direction_B: Tensor) -> AdamDirection:
    zeros_B = direction_B.new_zeros(direction_B.shape[0])
    return AdamDirection(direction_B, zeros_B.new_zeros(()), zeros_B)
