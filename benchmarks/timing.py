"""Variants of one pass, timed in turns against a baseline in the same run."""

from __future__ import annotations

import json
import os
import platform
import random
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

Pass = Callable[[], object]


@dataclass(frozen=True)
class Prepared:
    """A pass and what a process does once before it, which is not timed."""

    around: Callable[[], AbstractContextManager[Pass]]

    def __call__(self) -> object:
        """Run both."""
        with self.around() as once:
            return once()


ROUNDS = "seconds of each round"
"""Key of a row's raw numbers."""


@dataclass(frozen=True)
class Ratio:
    """How a variant compares with the baseline.

    Attributes:
        name: Of the variant.
        ratio: Median over rounds of baseline time over the variant's; above 1 is faster.
        low, high: 90 % bootstrap interval of that median.
        seconds: Median time of a pass, CPU seconds (of the device's clock on a GPU).
    """

    name: str
    ratio: float
    low: float
    high: float
    seconds: float


def compare(variants: Mapping[str, Pass], baseline: str, *, rounds: int, device: str = "cpu") -> list[Ratio]:
    """Divide the baseline's seconds by every variant's; arguments as in `time_in_turns`."""
    seconds = time_in_turns(variants, baseline, rounds=rounds, device=device)
    return [ratio(name, seconds[baseline], each) for name, each in seconds.items()]


def time_in_turns(
    variants: Mapping[str, Pass], baseline: str, *, rounds: int, device: str = "cpu"
) -> dict[str, list[float]]:
    """Return the seconds of every variant in every round, the order turned round each time: A B B A.

    Args:
        variants: A pass each, over the same batches.
        baseline: Which of them the others are divided by; it is timed twice a round, the second time as a control.
        rounds: How often; of an even number each order has one half.
        device: ``cpu`` counts the process's CPU seconds, ``cuda`` wall seconds up to the device's end.
    """
    passes = {**variants, f"{baseline}, again": variants[baseline]}
    for once in variants.values():
        once()
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    for number in range(rounds):
        for name in list(passes)[:: 1 if number % 2 == 0 else -1]:
            seconds[name].append(timed(passes[name], device))
    return seconds


def timed(once: Pass, device: str) -> float:
    """Return the seconds of a pass: the process's CPU seconds, or on ``cuda`` wall seconds up to the device's end."""
    if isinstance(once, Prepared):
        with once.around() as prepared:
            return timed(prepared, device)
    if device == "cpu":
        start = time.process_time()
        once()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    once()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def ratio(name: str, base: Sequence[float], seconds: Sequence[float]) -> Ratio:
    """Compare the rounds of a variant with those of a baseline, each with its own."""
    ratios = [b / t for b, t in zip(base, seconds, strict=True)]
    return Ratio(name, statistics.median(ratios), *interval(ratios), statistics.median(seconds))


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 90 % bootstrap interval of the median; of three values that is the smallest and the largest."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(1000))
    return medians[50], medians[949]


def machine() -> dict[str, Any]:
    """What the figures depend on besides the code."""
    text = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
    flags = set(re.findall(r"flags\s*:\s*(.*)", text)[0].split()) if text else set()
    return {
        "date": date.today().isoformat(),
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        ).stdout.strip(),
        "cpu": next(iter(re.findall(r"model name\s*:\s*(.*)", text)), platform.processor()),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "has": sorted(flags & {"avx2", "avx512f", "avx512_bf16", "amx_bf16"}),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0],
    }


def write_results(name: str, sections: Mapping[str, Sequence[Any]], facts: Mapping[str, Any], folder: Path) -> None:
    """Write ``DATE-NAME.json`` and ``.md``: a table of dataclasses (or mappings) a section, and print the latter.

    What a row has under `ROUNDS` is in the former alone.
    """
    rows = {
        title: [each if isinstance(each, dict) else asdict(each) for each in part] for title, part in sections.items()
    }
    about = {**machine(), **facts}
    lines = [f"# {name}", "", *(f"- {key}: {value}" for key, value in about.items())]
    for title, part in rows.items():
        if not part:
            continue
        columns = [column for column in part[0] if column != ROUNDS]
        lines += ["", f"## {title}", "", f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
        lines += [f"| {' | '.join(_cell(row.get(column)) for column in columns)} |" for row in part]
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"{about['date']}-{name}"
    stem.with_suffix(".json").write_text(json.dumps({"about": about, "sections": rows}, indent=1, default=str) + "\n")
    stem.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
