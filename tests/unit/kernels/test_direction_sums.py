"""What modules add up to against each sample alone in float64."""

from __future__ import annotations

import pytest
import torch

from rose_ray.kernels.adam import AdamMode, AdamState
from rose_ray.kernels.direction_sums import DirectionSums
from rose_ray.kernels.projection import NoProjection, make_projection
from tests.unit.kernels.projection_oracles import slow_matrix

STATE = AdamState(7, 0.9, 0.999, 1e-8)
SHAPES = ((4, 6), (3, 5))
FLOAT32 = 1e-5
"""Some float32 roundings of sums of some tens of numbers."""


def _step(grad: torch.Tensor, avg: torch.Tensor, sq: torch.Tensor, mode: str) -> tuple[torch.Tensor, float, float]:
    """One sample's direction, and the squares of moment term and of all of the first moment, in float64."""
    if mode == "sgd":
        return grad, 0.0, 0.0
    momentum, total = 0.9 * avg, 0.9 * avg + 0.1 * grad
    step = (total / (1 - 0.9**8)) / ((0.999 * sq + 0.001 * grad**2).div(1 - 0.999**8).sqrt() + 1e-8)
    return step, float(momentum.square().sum()), float(total.square().sum())


@pytest.mark.parametrize("mode", ["torch", "sgd"])
def test_sums_are_those_of_each_sample(mode: AdamMode) -> None:
    torch.manual_seed(0)
    size = sum(rows * columns for rows, columns in SHAPES)
    sketch = make_projection("sketch", 8, 0, size)
    sums = DirectionSums(5, [NoProjection(size), sketch], mode, STATE)
    vectors = torch.zeros(5, size, dtype=torch.float64)
    expected = torch.zeros(2, 5, dtype=torch.float64)
    momentum_square, offset = 0.0, 0
    for shape in SHAPES:
        grads, avg, sq = torch.randn(5, *shape), torch.randn(shape), torch.rand(shape)
        sums.add(offset, grads.clone(), avg, sq)
        for row in range(5):
            step, moment, total = _step(grads[row].double(), avg.double(), sq.double(), mode)
            vectors[row, offset : offset + step.numel()] = step.flatten()
            expected[:, row] += torch.tensor([step.square().sum().item(), total])
        momentum_square += moment
        offset += shape[0] * shape[1]
    ended = sums.ended()
    found = torch.stack([ended.square_B, ended.total_square_B])
    torch.testing.assert_close(found, expected, rtol=FLOAT32, atol=0)
    torch.testing.assert_close(ended.projected[0].double(), vectors, rtol=FLOAT32, atol=FLOAT32)
    torch.testing.assert_close(
        ended.projected[1].double(), vectors @ slow_matrix("sketch", 8, 0, size).T, rtol=FLOAT32, atol=FLOAT32
    )
    assert float(ended.momentum_square) == pytest.approx(momentum_square, rel=FLOAT32)


def test_a_batch_of_no_samples() -> None:
    sums = DirectionSums(0, [NoProjection(6)], "torch", STATE)
    sums.add(0, torch.zeros(0, 2, 3), torch.ones(2, 3), torch.ones(2, 3))
    ended = sums.ended()
    assert ended.projected[0].shape == (0, 6) and ended.momentum_shares().shape == (0,)
