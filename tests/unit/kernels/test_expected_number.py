"""The number that a model expects to give, against a loop."""

from __future__ import annotations

import math

import pytest
import torch

from rose_ray.errors import ShapeError
from rose_ray.kernels.expected_number import expected_number


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_it_is_a_mean_by_probability(dtype: torch.dtype) -> None:
    logits = (4 * torch.randn(5, 6, generator=torch.Generator().manual_seed(0))).to(dtype)
    numbers = torch.tensor([1.0, 2, 3, 4, 5, 6], dtype=torch.float64)
    found = expected_number(logits, numbers)
    assert found.dtype == torch.float64
    for row, value in zip(logits.tolist(), found.tolist(), strict=True):
        weights = [math.exp(logit) for logit in row]
        by_hand = sum(weight * number for weight, number in zip(weights, range(1, 7), strict=True)) / sum(weights)
        assert value == pytest.approx(by_hand, rel=1e-12)  # float64 throughout, whatever the logits were


def test_by_hand_and_at_the_ends() -> None:
    logits = torch.tensor([[0.0, 0.0], [0.0, math.log(3)], [1e4, 0.0], [0.0, float("nan")]])
    found = expected_number(logits, torch.tensor([1.0, 5.0], dtype=torch.float64)).tolist()
    assert found[:3] == pytest.approx([3.0, 4.0, 1.0], rel=1e-7)  # log 3 is rounded to float32
    assert math.isnan(found[3])


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"logits have shape \(2, 3\), numbers \(2,\); expected \[B, L\] and \[L\]"):
        expected_number(torch.zeros(2, 3), torch.zeros(2, dtype=torch.float64))
