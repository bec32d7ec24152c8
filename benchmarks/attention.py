"""Causal attention in bfloat16 on a CPU: torch's fused operator, and matrix products with scores in float32.

    python benchmarks/attention.py --rounds 6

Forward and backward pass over some 2,000 tokens in rows of one length: where the fused operator falls behind, and up to
which length, is what `rose_ray.kernels.causal_attention.SHORT_ROW` was set by. Errors are relative to float64.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import Pass, compare, write_results
from rose_ray.kernels.causal_attention import causal_attention

FUSED = "fused, bfloat16"
TOKENS = 2048
LENGTHS = (64, 128, 154, 256, 384, 512, 1024)
HEADS = ((4, 64), (8, 32), (8, 128))
"""Numbers of heads, and numbers of each."""

Attention = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def fused(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """What `sdpa` runs for causal rows."""
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)


def drawn(length: int, heads: int, width: int) -> list[Tensor]:
    """Query, key, value and the output's gradient [B, H, S, K], laid out as a model's projections leave them."""
    torch.manual_seed(0)
    rows = max(1, TOKENS // length)
    return [torch.randn(rows, length, heads, width).transpose(1, 2) for _ in range(4)]


def results(attend: Attention, tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Output, and gradients of query, key and value."""
    leaves = query, key, value = [each.to(dtype).requires_grad_() for each in tensors[:3]]
    output = attend(query, key, value, tensors[0].shape[-1] ** -0.5)
    return [output.detach(), *torch.autograd.grad(output, leaves, tensors[3].to(dtype))]


def timed(attend: Attention, tensors: list[Tensor], dtype: torch.dtype) -> Pass:
    """A pass over tensors made beforehand."""
    leaves = query, key, value = [each.to(dtype).requires_grad_() for each in tensors[:3]]
    grad = tensors[3].to(dtype)

    def once() -> None:
        torch.autograd.grad(attend(query, key, value, query.shape[-1] ** -0.5), leaves, grad)

    return once


def errors(length: int) -> list[dict[str, Any]]:
    """Distance from float64 as a share of its length, both ways."""
    tensors = [each.to(torch.bfloat16) for each in drawn(length, 4, 64)]
    exact = results(fused, tensors, torch.float64)
    return [
        {"attention": name}
        | {
            part: float((made.double() - true).norm() / true.norm())
            for part, made, true in zip(
                ("output", "query grad", "key grad", "value grad"),
                results(attend, tensors, torch.bfloat16),
                exact,
                strict=True,
            )
        }
        for name, attend in ((FUSED, fused), ("products, bfloat16", causal_attention))
    ]


def main() -> None:
    """Time every shape and write one result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sections: dict[str, list[dict[str, Any]]] = {}
    for heads, width in HEADS:
        for length in LENGTHS:
            tensors = drawn(length, heads, width)
            passes = {
                FUSED: timed(fused, tensors, torch.bfloat16),
                "products, bfloat16": timed(causal_attention, tensors, torch.bfloat16),
                "fused, float32": timed(fused, tensors, torch.float32),
                "products, float32": timed(causal_attention, tensors, torch.float32),
            }
            rows = compare(passes, FUSED, rounds=options.rounds)
            sections[f"{heads} heads of {width}, rows of {length}"] = [asdict(row) for row in rows]
    sections |= {f"error, 4 heads of 64, rows of {length}": errors(length) for length in (154, 512)}
    write_results("attention", sections, {"rounds": options.rounds, "tokens": TOKENS}, options.out)


if __name__ == "__main__":
    main()
