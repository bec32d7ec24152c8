"""Attention by matrix products, against one query at a time in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rose_ray.errors import ShapeError
from rose_ray.kernels.causal_attention import causal_attention

SCALE = 0.3


def _inputs(length: int, dtype: torch.dtype, size: float = 1.0) -> list[Tensor]:
    """Query, key, value and a gradient for the output, not contiguous, as transformers hands them on."""
    generator = torch.Generator().manual_seed(length)
    drawn = [torch.randn(2, length, 3, width, generator=generator) for width in (8, 8, 6, 6)]
    scaled = [drawn[0] * size, drawn[1] * size, *drawn[2:]]
    return [each.to(dtype).transpose(1, 2) for each in scaled]


def _oracle(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    rows = []
    for place in range(query.shape[2]):
        scores = scale * (query[:, :, place : place + 1] * key[:, :, : place + 1]).sum(-1)
        rows.append((scores.softmax(-1).unsqueeze(-1) * value[:, :, : place + 1]).sum(2))
    return torch.stack(rows, dim=2)


def _fused(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)


def _all_of(attend: object, inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Output, and gradients of query, key and value, float64."""
    leaves = [each.to(dtype).requires_grad_() for each in inputs[:3]]
    output = attend(*leaves, SCALE)  # type: ignore[operator]
    output.backward(inputs[3].to(dtype))
    return [output.detach().double(), *(leaf.grad.double() for leaf in leaves if leaf.grad is not None)]


@pytest.mark.parametrize("length", [1, 2, 37])
def test_it_is_the_oracle_in_float64(length: int) -> None:
    inputs = _inputs(length, torch.float64)
    for made, expected in zip(
        _all_of(causal_attention, inputs, torch.float64), _all_of(_oracle, inputs, torch.float64), strict=True
    ):
        # a few dozen additions of numbers near 1
        torch.testing.assert_close(made, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("size", [1.0, 4.0])
def test_in_bfloat16_it_errs_no_more_than_the_fused_operator(size: float) -> None:
    inputs = _inputs(60, torch.bfloat16, size)
    exact = _all_of(_oracle, inputs, torch.float64)
    for made, fused, expected in zip(
        _all_of(causal_attention, inputs, torch.bfloat16), _all_of(_fused, inputs, torch.bfloat16), exact, strict=True
    ):
        error, other = ((each - expected).norm() / expected.norm() for each in (made, fused))
        # both round probabilities and results to 8 bits, 0.4 % at most each, in different places: half again as much
        assert error < 1.5 * other + 2**-9
        assert error < 3 * 2**-8


def test_later_keys_do_not_matter_to_the_bit() -> None:
    query, key, value, _ = _inputs(20, torch.bfloat16)
    other_key, other_value = key.clone(), value.clone()
    other_key[:, :, 12:], other_value[:, :, 12:] = 5.0, -7.0
    made, other = (causal_attention(query, *each, SCALE) for each in ((key, value), (other_key, other_value)))
    assert torch.equal(made[:, :, :12], other[:, :, :12])
    assert not torch.equal(made[:, :, 12:], other[:, :, 12:])


def test_a_row_with_nan_leaves_the_others_bytes() -> None:
    inputs = _inputs(20, torch.bfloat16)
    damaged = [each.clone() for each in inputs]
    damaged[1][1, :, 3] = float("nan")
    clean, hurt = (_all_of(causal_attention, each, torch.bfloat16) for each in (inputs, damaged))
    for one, other in zip(clean, hurt, strict=True):
        assert torch.equal(one[0], other[0])
        assert not bool(other[1].isfinite().all())


def test_shapes_that_do_not_fit_are_refused() -> None:
    query, key, value, _ = _inputs(5, torch.float32)
    for wrong in ((query, key[:, :2], value), (query, key, value[:, :, :4]), (query[0], key[0], value[0])):
        with pytest.raises(ShapeError, match="expected"):
            causal_attention(*wrong, SCALE)
