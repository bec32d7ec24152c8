"""Adam and norms of a module under torch.compile instead of torch's own operators, in the engine's whole pass.

    python benchmarks/compiled.py --rounds 6

What the engine would gain, were its work behind the gradients compiled: each variant beside the engine as it is, and
beside a pass that drops the gradients, which nothing behind them can beat.
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

from benchmarks.engine import DROPPED, Setting, Variant, engine, free_all
from benchmarks.timing import Pass, compare, write_results
from rose_ray.kernels.direction_sums import DirectionSums

SIZES = {"small": 96, "base": 48, "large": 24}
"""Samples of each size."""

EAGER = "engine, sketch, deflated, D 16384"


def directions(
    grads_BOI: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, beta1: float, beta2: float, eps: float, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Adam's directions, and the squares of moment term, of moment and gradient term [B], and of directions [B]."""
    momentum = beta1 * exp_avg
    total_BOI = momentum + (1 - beta1) * grads_BOI
    denominator_BOI = torch.sqrt(scale * beta2 * exp_avg_sq + scale * (1 - beta2) * grads_BOI * grads_BOI) + eps
    direction_BOI = total_BOI / denominator_BOI
    squares_B = (each.square().flatten(1).sum(1) for each in (total_BOI, direction_BOI))
    return direction_BOI, momentum.square().sum(), *squares_B  # type: ignore[return-value]


def adding(function: Callable[..., tuple[Tensor, ...]]) -> Callable[..., None]:
    """Return what takes the place of `DirectionSums.add`; mode ``torch`` alone."""

    def add(sums: DirectionSums, offset: int, grads_BOI: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> None:
        state = sums.state
        factor = 1 - state.adam_beta1 ** (state.num_updates + 1)
        scale = factor * factor / (1 - state.adam_beta2 ** (state.num_updates + 1))
        direction_BOI, momentum, total_B, square_B = function(
            grads_BOI, exp_avg, exp_avg_sq, state.adam_beta1, state.adam_beta2, factor * state.adam_eps, scale
        )
        sums.momentum_square += momentum.double()
        sums.total_square_B += total_B.double()
        sums.square_B += square_B.double()
        for projection, out_BD in zip(sums.projections, sums.projected, strict=True):
            projection.add(out_BD, offset, direction_BOI.flatten(1))

    return add


def passes(size: str, samples: int) -> dict[str, Pass]:
    """The engine as it is, with the same arithmetic compiled, and with the gradients dropped."""
    setting = Setting(size, 64, 2048, "cpu", None, samples)
    once = engine(setting, Variant(EAGER, torch.float32, "sketch, deflated", 16384))
    compiled = adding(torch.compile(directions, dynamic=True))

    def with_compiled() -> None:
        with patch.object(DirectionSums, "add", compiled):
            once()

    return {
        EAGER: once,
        "the same, compiled": with_compiled,
        DROPPED: engine(setting, Variant("", torch.float32, "dropped")),
    }


def main() -> None:
    """Time all sizes and write one result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sections: dict[str, list[dict[str, Any]]] = {}
    for size in options.sizes:
        rows = compare(passes(size, SIZES[size]), EAGER, rounds=options.rounds)
        sections[f"{size}, r 64"] = [asdict(row) for row in rows]
        free_all()
    write_results("compiled", sections, {"rounds": options.rounds, "samples": SIZES}, options.out)


if __name__ == "__main__":
    main()
