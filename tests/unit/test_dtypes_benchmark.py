"""Emulated bfloat16 products are what the processor's own are, up to the last bit."""

from __future__ import annotations

import torch

from benchmarks.dtypes import RoundedProducts

LAST_BIT = 2.0**-8
"""Of bfloat16, relative: sums in another order may round to the other side."""


def test_products_are_the_processor_s_up_to_the_last_bit() -> None:
    torch.manual_seed(0)
    a, b, c = (torch.randn(*shape).bfloat16() for shape in ((5, 33), (33, 7), (5, 7)))
    stack, other = torch.randn(2, 5, 33).bfloat16(), torch.randn(2, 33, 7).bfloat16()
    own = [a @ b, torch.addmm(c, a, b), c.clone().addmm_(a, b), stack @ other]
    own.append(torch.baddbmm(c.expand(2, 5, 7), stack, other))
    with RoundedProducts():
        found = [a @ b, torch.addmm(c, a, b), c.clone().addmm_(a, b), stack @ other]
        found.append(torch.baddbmm(c.expand(2, 5, 7), stack, other))
    for ours, theirs in zip(found, own, strict=True):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours, theirs, rtol=LAST_BIT, atol=LAST_BIT)


def test_gradients_go_through() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(16, 8, dtype=torch.bfloat16)
    x = torch.randn(4, 16).bfloat16().requires_grad_()
    layer(x).sum().backward()
    own = x.grad
    x.grad = None
    with RoundedProducts():
        layer(x).sum().backward()
    assert own is not None and x.grad is not None
    torch.testing.assert_close(x.grad, own, rtol=LAST_BIT, atol=LAST_BIT)
