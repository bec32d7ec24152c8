"""The fused head against logits made whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import rose_ray.kernels.head as head_module
from rose_ray.errors import ShapeError
from rose_ray.kernels.head import head_logps
from rose_ray.kernels.logit_shape import UNALTERED, LogitShape

FLOAT64_ROUNDING = 1e-12  # sums over a vocabulary of 50 in another order
BFLOAT16_ROUNDING = 0.02  # logits of order 3 have 8 bits in either path, and gradients are rounded to 8 bits
NUM_ROWS, HIDDEN, VOCABULARY = 23, 16, 50


def _inputs(dtype: torch.dtype, *, bias: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(NUM_ROWS, HIDDEN, dtype=dtype)
    weight = torch.randn(VOCABULARY, HIDDEN, dtype=dtype)
    targets = torch.randint(VOCABULARY, (NUM_ROWS,))
    return hidden, weight, torch.randn(VOCABULARY, dtype=dtype) if bias else None, targets


def _whole(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, shape: LogitShape = UNALTERED
) -> Tensor:
    logits = torch.nn.functional.linear(hidden, weight, bias).to(torch.promote_types(hidden.dtype, torch.float32))
    logits = logits * shape.scale
    if shape.cap is not None:
        logits = shape.cap * torch.tanh(logits / shape.cap)
    return torch.log_softmax(logits, 1)[torch.arange(len(targets)), targets]


@pytest.mark.parametrize("shape", [UNALTERED, LogitShape(0.25), LogitShape(1.0, 5.0), LogitShape(3.0, 7.0)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows_a_block", [1, 4, 1000])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_values_and_gradients_are_those_of_whole_logits(
    shape: LogitShape, bias: bool, rows_a_block: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(head_module.LOGIT_BLOCK_BYTES, "cpu", 4 * VOCABULARY * rows_a_block)
    hidden, weight, offset, targets = _inputs(dtype, bias=bias)
    upstream = torch.randn(NUM_ROWS, dtype=torch.promote_types(dtype, torch.float32))
    values, gradients = [], []
    for function in (head_logps, _whole):
        leaf = hidden.clone().requires_grad_(True)
        found = function(leaf, weight, offset, targets, shape)
        found.backward(upstream)
        assert leaf.grad is not None and found.dtype == upstream.dtype
        values.append(found.detach())
        gradients.append(leaf.grad)
    tolerance = FLOAT64_ROUNDING if dtype is torch.float64 else BFLOAT16_ROUNDING
    torch.testing.assert_close(values[0], values[1], rtol=tolerance, atol=tolerance)
    scale = float(gradients[1].abs().max())
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=tolerance * scale)


def test_large_logits_do_not_overflow() -> None:
    hidden, weight, _, targets = _inputs(torch.float32, bias=False)
    values = head_logps(1e4 * hidden, weight, None, targets)
    assert torch.isfinite(values).all() and (values <= 0).all()


def test_rows_are_independent() -> None:
    hidden, weight, _, targets = _inputs(torch.float32, bias=False)
    spoiled = hidden.clone()
    spoiled[3] = torch.nan
    found, expected = (head_logps(rows, weight, None, targets) for rows in (spoiled, hidden))
    assert torch.isnan(found[3])
    others = [row for row in range(NUM_ROWS) if row != 3]
    assert torch.equal(found[others], expected[others])


def test_nothing_is_kept_where_no_gradient_is_wanted() -> None:
    hidden, weight, _, targets = _inputs(torch.float32, bias=False)
    assert not head_logps(hidden, weight, None, targets).requires_grad


def test_shapes_are_checked() -> None:
    hidden, weight, _, targets = _inputs(torch.float32, bias=False)
    with pytest.raises(ShapeError, match="expected"):
        head_logps(hidden, weight, None, targets[:-1])
