"""One layer and its adapter, apart and merged, against plain autograd. Whole models: tests/equivalence."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rose_ray.kernels.per_sample import (
    PackedRows,
    added_lora,
    linear_weight_gradients,
    merged_lora,
    packed_weight_gradients,
)

FLOAT64 = 1e-12
"""Sums of a few dozen products in another order."""

ROWS, TOKENS, INPUTS, OUTPUTS, RANK = 3, 5, 7, 6, 2
SCALING = 1.5

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda base: base.clone(),
    "a view": lambda base: base.clone().view_as(base),
    "transposed": lambda base: base.transpose(0, 1).contiguous().transpose(0, 1),
    "dense, axes swapped": lambda base: torch.empty_strided(base.shape, (6, 18, 1), dtype=base.dtype).copy_(base),
    "a slice of a wider output": lambda base: torch.cat([base, base], dim=-1)[..., :OUTPUTS],
    "with gaps": lambda base: torch.empty_strided(base.shape, (90, 18, 3), dtype=base.dtype).copy_(base),
    "one row for all": lambda base: base[:1].expand_as(base),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_of_the_base_s_output_does_not_matter(layout: str) -> None:
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    base, hidden = drawn(ROWS, TOKENS, OUTPUTS), drawn(ROWS, TOKENS, INPUTS).requires_grad_()
    if layout == "one row for all":
        base = base[:1].repeat(ROWS, 1, 1)
    first, second, upstream = drawn(RANK, INPUTS), drawn(OUTPUTS, RANK), drawn(ROWS, TOKENS, OUTPUTS)
    received: dict[str, Tensor] = {}

    def receive(which: str, input_BSI: Tensor, output_grad_BSO: Tensor) -> None:
        received[which] = linear_weight_gradients(input_BSI, output_grad_BSO)

    found = added_lora(LAYOUTS[layout](base), hidden, first, second, SCALING, receive)
    (hidden_grad,) = torch.autograd.grad(found, hidden, upstream)

    # Weights of each sample's own, so that autograd keeps their gradients apart.
    firsts, seconds = (each.repeat(ROWS, 1, 1).requires_grad_() for each in (first, second))
    expected = base + SCALING * (hidden @ firsts.mT) @ seconds.mT
    wanted = torch.autograd.grad(expected, (hidden, firsts, seconds), upstream)
    torch.testing.assert_close(found, expected, rtol=0, atol=FLOAT64)
    for one, other in zip((hidden_grad, received["A"], received["B"]), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=FLOAT64)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("lowest", [True, False])
def test_a_merged_layer_gives_what_autograd_gives(has_bias: bool, lowest: bool) -> None:
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    hidden, weight, bias = drawn(ROWS, TOKENS, INPUTS).requires_grad_(), drawn(OUTPUTS, INPUTS), drawn(OUTPUTS)
    first, second, upstream = drawn(RANK, INPUTS), drawn(OUTPUTS, RANK), drawn(ROWS, TOKENS, OUTPUTS)
    received: dict[str, Tensor] = {}

    def receive(which: str, input_BSI: Tensor, output_grad_BSO: Tensor) -> None:
        received[which] = linear_weight_gradients(input_BSI, output_grad_BSO)

    given = hidden.detach() if lowest else hidden
    merged = weight + SCALING * second @ first
    found = merged_lora(given, merged, bias if has_bias else None, first, second, SCALING, receive)
    found.backward(upstream)

    firsts, seconds = (each.repeat(ROWS, 1, 1).requires_grad_() for each in (first, second))
    expected = hidden @ weight.T + SCALING * (hidden @ firsts.mT) @ seconds.mT + (bias if has_bias else 0)
    wanted = torch.autograd.grad(expected, (hidden, firsts, seconds), upstream)
    torch.testing.assert_close(found, expected, rtol=0, atol=FLOAT64)
    for which, other in zip("AB", wanted[1:], strict=True):
        torch.testing.assert_close(received[which], other, rtol=0, atol=FLOAT64)
    assert (hidden.grad is None) == lowest
    if hidden.grad is not None:
        torch.testing.assert_close(hidden.grad, wanted[0], rtol=0, atol=FLOAT64)


def test_a_merged_layer_that_nobody_listens_to_has_no_graph_of_its_own() -> None:
    hidden, merged, zeros = torch.ones(1, 2, 3), torch.ones(4, 3), torch.zeros(1)
    assert not merged_lora(hidden, merged, None, zeros, zeros, 1.0, None).requires_grad


def test_samples_end_to_end_have_the_gradients_of_their_own_tokens() -> None:
    lengths = (3, 1, 4)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(sum(lengths), INPUTS, generator=generator, dtype=torch.float64)
    grads = torch.randn(sum(lengths), OUTPUTS, generator=generator, dtype=torch.float64)
    rows = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2])
    slots = torch.tensor([0, 1, 2, 0, 0, 1, 2, 3])
    packed = PackedRows.of(rows, slots, len(lengths), max(lengths))
    side_by_side = packed.side_by_side(inputs)
    assert side_by_side.shape == (3, 4, INPUTS) and not side_by_side[0, 3:].any() and not side_by_side[1, 1:].any()
    expected = [
        sum(torch.outer(grads[token], inputs[token]) for token in range(len(rows)) if rows[token] == row)
        for row in range(len(lengths))
    ]
    found = packed_weight_gradients(inputs, grads, packed)
    torch.testing.assert_close(found, torch.stack(expected), rtol=FLOAT64, atol=FLOAT64)  # type: ignore[arg-type]
