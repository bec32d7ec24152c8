"""What models do to each logit behind their head: a scale, a soft cap, or both, read off from how they treat numbers.

Gemma caps (``cap * tanh(z / cap)``), Cohere multiplies, Granite divides. Shapes: R rows, V vocabulary, N probes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_TINY, _HUGE = 2.0**-20, 1e30
"""So small that no cap bends it (by less than 1e-12), and so large that every cap holds it; both fit float32."""

PROBE_N = torch.cat([torch.tensor([_TINY, _HUGE], dtype=torch.float64), torch.linspace(-200, 200, 801).double()])
"""What a model is given in place of logits, float64."""

_ROUNDING = 1e-5
"""Relative: a few roundings in float32, in which models work on logits, leave 1e-6."""


@dataclass(frozen=True)
class LogitShape:
    """``cap * tanh(scale * z / cap)``, or ``scale * z`` without a cap."""

    scale: float = 1.0
    cap: float | None = None

    def applied(self, logits_RV: Tensor) -> tuple[Tensor, Tensor | None]:
        """Shape logits in place.

        Args:
            logits_RV: Float32 or float64.

        Returns:
            The same tensor, and the cap's slope [R, V] at each, None without a cap; the scale is not in it.
        """
        if self.scale != 1.0:
            logits_RV.mul_(self.scale)
        if self.cap is None:
            return logits_RV, None
        logits_RV.div_(self.cap).tanh_()
        slope_RV = 1 - logits_RV * logits_RV
        return logits_RV.mul_(self.cap), slope_RV


UNALTERED = LogitShape()


def shape_of(found_N: Tensor) -> LogitShape | None:
    """Return the shape that makes these numbers of `PROBE_N`, None where it is none of ours.

    Args:
        found_N: What the model made of the probe, in its order, float32 or float64. Less precise numbers would not tell
            a scale well enough.
    """
    if found_N.shape != PROBE_N.shape or found_N.dtype not in (torch.float32, torch.float64):
        return None
    found_N = found_N.double().cpu()
    scale, limit = float(found_N[0]) / _TINY, float(found_N[1])
    if not scale > 0:
        return None
    shape = LogitShape(scale, None if limit > _HUGE / 2 * scale else limit)
    expected_N, _ = shape.applied(PROBE_N.clone())
    return shape if torch.allclose(found_N, expected_N, rtol=_ROUNDING, atol=0) else None
