"""How the price of features grows with rows, length, checkpoints and rank, each beside a straight line.

    python benchmarks/growth.py              a quarter of an hour on one core
    python benchmarks/growth.py --device cuda --rows 512 --size 1b
    python benchmarks/growth.py --quick      whether it runs

One engine process computes a shard's features as an actor does. Variants of one section take turns; a point is the
median of its rounds with the 90 % bootstrap interval of that median, and that median over what a straight line from the
section's first point would give. The plot needs `pip install matplotlib`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from benchmarks.models import SIZES, make_checkpoint, make_model, make_samples, shared_direction
from benchmarks.timing import Pass, interval, machine, timed, write_results
from rose_ray.kernels.adam import AdamState
from rose_ray.kernels.deflated import DeflatedProjection
from rose_ray.kernels.projection import make_projection
from rose_ray.model.checkpoint import Checkpoint
from rose_ray.model.layout import ParameterLayout, layout_of
from rose_ray.model.scoring import ScoringModel
from rose_ray.schemas import TOKENS
from rose_ray.stages.directions import DirectionSettings
from rose_ray.stages.features import shard_features

DIM = 16384
BATCH_TOKENS = 2048
UNITS = {"cpu": "CPU s", "cuda": "s"}
"""Columns of seconds by device."""


@dataclass(frozen=True)
class Scorer:
    """What all points share: a size of model and a device."""

    size: str
    device: str

    def __call__(self, rows: int, *, length: int | None = None, checkpoints: int = 1, rank: int = 64) -> Pass:
        """Return what computes a shard's features."""
        size = SIZES[self.size]
        module = make_model(size, rank, torch.float32, adapter=torch.float32, device=self.device)
        layout = layout_of(module)
        steps = [make_checkpoint(module, seed) for seed in range(checkpoints)]
        model = ScoringModel(module, self.device, merge_adapter=True)
        sketch = make_projection("sketch", DIM, 0, layout.num_parameters).to(self.device)
        maps = [DeflatedProjection(sketch, _shared(layout, step).to(self.device)) for step in steps]
        samples = make_samples(rows, size.vocabulary, length=length)
        tokens = pa.Table.from_pylist(
            [{"row_id": str(number), **sample.__dict__} for number, sample in enumerate(samples)], schema=TOKENS
        )
        settings = DirectionSettings("torch", "bit1", BATCH_TOKENS)

        def once() -> None:
            made = shard_features(model, tokens, steps, layout, [maps], settings)
            assert made.tables[0][0].num_rows == rows

        return once


def _shared(layout: ParameterLayout, step: Checkpoint) -> torch.Tensor:
    state, averages = step.state, (step.exp_avg, step.exp_avg_sq)
    assert state is not None and averages[0] is not None and averages[1] is not None
    adam = AdamState(state.num_updates, state.adam_beta1, state.adam_beta2, state.adam_eps)
    return shared_direction(layout, averages[0], averages[1], adam)


def section(
    points: Mapping[float, Pass], work: Mapping[float, float], rounds: int, device: str
) -> list[dict[str, Any]]:
    """Time the points in turns.

    Args:
        points: What to run, by the number on the axis.
        work: What a straight line says that each costs, in any unit.
        rounds: How often.
        device: Whose seconds.
    """
    seconds: dict[float, list[float]] = {point: [] for point in points}
    for once in points.values():
        once()
    for number in range(rounds):
        for point in list(points)[:: 1 if number % 2 == 0 else -1]:
            seconds[point].append(timed(points[point], device))
    first = next(iter(points))
    base = statistics.median(seconds[first]) / work[first]
    rows = []
    for point, times in seconds.items():
        median, (low, high) = statistics.median(times), interval(times)
        line = median / (base * work[point])
        rows.append({"at": point, UNITS[device]: median, "low": low, "high": high, "over a straight line": line})
    return rows


def measured(scoring: Scorer, unit: int, rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Return the four sections; ``unit`` rows are the smallest shard."""
    rows = {float(unit * factor): scoring(unit * factor) for factor in (1, 4, 16)}
    made = {"rows": section(rows, {n: n for n in rows}, rounds, scoring.device)}
    lengths = {float(s): scoring(max(1, 2 * unit * 128 // s), length=s) for s in (128, 256, 512, 1024, 2048)}
    tokens = {s: max(1, int(2 * unit * 128 // s)) * s for s in lengths}
    made["length, equal numbers of tokens"] = section(lengths, tokens, rounds, scoring.device)
    checkpoints = {float(c): scoring(unit, checkpoints=c) for c in (1, 2, 3, 4)}
    made["checkpoints"] = section(checkpoints, {c: c for c in checkpoints}, rounds, scoring.device)
    ranks = {float(r): scoring(unit, rank=r) for r in (8, 16, 32, 64, 128)}
    made["LoRA rank"] = section(ranks, dict.fromkeys(ranks, 1.0), rounds, scoring.device)
    return made


def plot(sections: Mapping[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw the sections side by side: seconds at each point, and the straight line from the first."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(sections), figsize=(13, 3.2), constrained_layout=True)
    unit = next(each for each in UNITS.values() if each in next(iter(sections.values()))[0])
    for axis, (title, points) in zip(axes, sections.items(), strict=True):
        at = [point["at"] for point in points]
        seconds = [point[unit] for point in points]
        line = [point[unit] / point["over a straight line"] for point in points]
        spread = [
            [s - p["low"] for s, p in zip(seconds, points, strict=True)],
            [p["high"] - s for s, p in zip(seconds, points, strict=True)],
        ]
        axis.plot(at, line, "--", color="0.6", label="straight line" if title != "LoRA rank" else "constant")
        axis.errorbar(at, seconds, yerr=spread, fmt="o-", color="tab:blue", capsize=2, label="measured")
        axis.set_xscale("log", base=2)
        axis.set_xticks(at, [f"{x:g}" for x in at])
        axis.minorticks_off()
        axis.set_xlabel(title)
        if max(seconds) > 4 * min(seconds):
            axis.set_yscale("log", base=2)
            axis.yaxis.set_major_formatter("{x:g}")
        else:
            axis.set_ylim(0, 1.25 * max(*seconds, *line))
        axis.legend(frameon=False, fontsize=8)
    axes[0].set_ylabel({"CPU s": "CPU seconds", "s": "seconds"}[unit])
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Measure, write the table, draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32, help="rows of the smallest shard")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--size", choices=list(SIZES), default="base")
    parser.add_argument("--device", choices=list(UNITS), default="cpu")
    parser.add_argument("--quick", action="store_true", help="four rows, one round")
    parser.add_argument("--plot", type=Path, help="draw the plot of a results file instead of measuring")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    if options.plot:
        plot(json.loads(options.plot.read_text())["sections"], options.plot.with_suffix(".svg"))
        return
    torch.set_num_threads(1)
    unit, rounds = (4, 1) if options.quick else (options.rows, options.rounds)
    sections = measured(Scorer(options.size, options.device), unit, rounds)
    facts = {
        "model": options.size,
        "device": options.device,
        "rounds": rounds,
        "D": DIM,
        "projection": "sketch, deflated",
        "batch tokens": BATCH_TOKENS,
    }
    name = f"growth-{options.size}-{options.device}"
    write_results(name, sections, facts, options.out)
    if importlib.util.find_spec("matplotlib") is None:
        print("no plot: pip install matplotlib, then --plot with the results file")
        return
    plot(sections, options.out / f"{machine()['date']}-{name}.svg")


if __name__ == "__main__":
    main()
