"""Ways to run what stands behind the gradients, in the engine's whole pass: Adam, norms, projection.

    python benchmarks/adam_passes.py --rounds 6
    python benchmarks/adam_passes.py --rounds 6 --tokens 16384

The engine takes all samples of a batch through one of torch's operators after the other. Beside it: Adam and norms
under torch.compile, and a pass that drops the gradients, which nothing can beat.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.engine import Setting, engine, free_all
from benchmarks.timing import Pass, compare, write_results
from benchmarks.variants import DROPPED, Variant
from rose_ray.kernels.direction_sums import DirectionSums

SIZES = {"small": 96, "base": 48, "large": 24}
"""Samples of each size."""

EAGER = "engine, sketch, deflated, D 16384"


def directions(
    grads_BOI: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, beta1: float, beta2: float, eps: float, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Adam's directions, and the lengths of the moment term, and of moment and gradient term [B]."""
    momentum = beta1 * exp_avg
    total_BOI = momentum + (1 - beta1) * grads_BOI
    denominator_BOI = torch.sqrt(scale * beta2 * exp_avg_sq + scale * (1 - beta2) * grads_BOI * grads_BOI) + eps
    direction_BOI = total_BOI / denominator_BOI
    return direction_BOI, momentum.square().sum().sqrt(), total_BOI.square().flatten(1).sum(1).sqrt()


def adding(function: Callable[..., tuple[Tensor, ...]]) -> Callable[..., None]:
    """Return what takes the place of `DirectionSums.add`; mode ``torch`` alone."""

    def add(sums: DirectionSums, offset: int, grads_BOI: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> None:
        state = sums.state
        factor = 1 - state.adam_beta1 ** (state.num_updates + 1)
        scale = factor * factor / (1 - state.adam_beta2 ** (state.num_updates + 1))
        direction_BOI, momentum_norm, total_norm_B = function(
            grads_BOI, exp_avg, exp_avg_sq, state.adam_beta1, state.adam_beta2, factor * state.adam_eps, scale
        )
        sums.add_direction(offset, direction_BOI.flatten(1), total_norm_B, momentum_norm)

    return add


def passes(size: str, samples: int, tokens: int) -> dict[str, Pass]:
    """The engine as it is, with the same arithmetic compiled, and with gradients dropped."""
    setting = Setting(size, 64, tokens, "cpu", None, samples)
    once = engine(setting, Variant(EAGER, torch.float32, "sketch, deflated", 16384))
    ways = {"compiled": adding(torch.compile(directions, dynamic=True))}

    def another(add: Callable[..., None]) -> Pass:
        def other() -> None:
            with patch.object(DirectionSums, "add", add):
                once()

        return other

    dropped = engine(setting, Variant(DROPPED, torch.float32, "dropped"))
    return {EAGER: once, **{name: another(add) for name, add in ways.items()}, DROPPED: dropped}


def main() -> None:
    """Time all sizes and write one result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=2048, help="bound on rows times length of a batch")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sections: dict[str, list[dict[str, Any]]] = {}
    for size in options.sizes:
        rows = compare(passes(size, SIZES[size], options.tokens), EAGER, rounds=options.rounds)
        sections[f"{size}, r 64"] = [asdict(row) for row in rows]
        free_all()
    facts = {"rounds": options.rounds, "samples": SIZES, "batch tokens": options.tokens}
    write_results(f"adam-passes-{options.tokens}", sections, facts, options.out)


if __name__ == "__main__":
    main()
