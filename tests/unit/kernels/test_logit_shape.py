"""Scales and caps of logits are read off from what a model makes of given numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rose_ray.kernels.logit_shape import PROBE_N, UNALTERED, LogitShape, shape_of

FLOAT32 = 1e-6
"""Relative: a scale and a cap read off after a few roundings in float32 (6e-8 each)."""


def gemma(logits: Tensor) -> Tensor:
    return torch.tanh(logits.float() / 30.0) * 30.0


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (lambda z: z * 1.0, UNALTERED),
        (lambda z: z.float() * 0.0625, LogitShape(0.0625)),
        (lambda z: z / 6, LogitShape(1 / 6)),
        (gemma, LogitShape(1.0, 30.0)),
        (lambda z: gemma(z / 8), LogitShape(1 / 8, 30.0)),
        (lambda z: 3 * gemma(z), LogitShape(3.0, 90.0)),
    ],
)
def test_scales_and_caps_are_read_off(model: Callable[[Tensor], Tensor], expected: LogitShape) -> None:
    found = shape_of(model(PROBE_N.clone()))
    assert found is not None and found.scale == pytest.approx(expected.scale, rel=FLOAT32)
    assert found.cap is None if expected.cap is None else found.cap == pytest.approx(expected.cap, rel=FLOAT32)


@pytest.mark.parametrize(
    "model",
    [
        lambda z: z + 1,
        lambda z: -z,
        lambda z: z.clamp(-50, 50),
        lambda z: z.clamp(min=0),
        lambda z: z - z.mean(),
        lambda z: z[:-1],
        lambda z: (z * 0.3).bfloat16(),  # too coarse to tell the scale
        lambda z: z * torch.nan,
    ],
)
def test_what_is_neither_is_told(model: Callable[[Tensor], Tensor]) -> None:
    assert shape_of(model(PROBE_N.clone())) is None


@pytest.mark.parametrize("shape", [LogitShape(0.3), LogitShape(1.0, 2.0), LogitShape(0.7, 4.0)])
def test_the_slope_is_the_caps(shape: LogitShape) -> None:
    logits = torch.randn(5, 7, dtype=torch.float64).mul(3).requires_grad_(True)
    by_hand = logits * shape.scale if shape.cap is None else shape.cap * torch.tanh(logits * shape.scale / shape.cap)
    (gradient,) = torch.autograd.grad(by_hand.sum(), logits)
    found, slope = shape.applied(logits.detach().clone())
    torch.testing.assert_close(found, by_hand.detach(), rtol=1e-12, atol=0)  # rounding in float64
    scaled = torch.full_like(found, shape.scale) if slope is None else slope * shape.scale
    torch.testing.assert_close(scaled, gradient, rtol=0, atol=1e-12)
