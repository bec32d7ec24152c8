"""What a run counts for Prometheus, through Ray's own exporter on every node.

Ray prefixes names with ``ray_``, ends counters in ``_total``, and adds the worker, node and job as labels: a scoring
actor is a ``WorkerId``. Our own labels have a handful of values each.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from ray.util.metrics import Counter, Gauge

PREFIX = "rose_ray"

COUNTERS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "rows": ("Rows of finished shards, by outcome: scored or rejected.", ("outcome",)),
    "tokens": ("Tokens of scored rows, once whatever the number of checkpoints.", ()),
    "gradient_passes": ("Rows times checkpoints that went forward and backward.", ()),
    "batch_halvings": ("Batches halved because they did not fit into memory.", ()),
    "phase_seconds": (
        "Seconds by phase: tokenise, load, compute, write, or idle (between shards).",
        ("phase",),
    ),
}
"""Name, meaning, labels."""

GAUGES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "stage_seconds": ("Wall time of the last stage of a kind, found ones included.", ("stage",)),
}


def exported_names() -> list[str]:
    """Return the names as Prometheus sees them."""
    return [*(f"ray_{PREFIX}_{name}_total" for name in COUNTERS), *(f"ray_{PREFIX}_{name}" for name in GAUGES)]


def count(name: str, value: float, **labels: str) -> None:
    """Add to a counter; nothing is exported for zero."""
    if value > 0:
        _counter(name).inc(value, tags=labels)


def count_shard(
    counts: Mapping[str, int], facts: Mapping[str, Any], num_checkpoints: int, write_seconds: float
) -> None:
    """Count a shard whose receipt is written: its counts and facts."""
    for outcome in ("scored", "rejected"):
        count("rows", counts[outcome], outcome=outcome)
    count("tokens", facts["num_tokens"])
    count("gradient_passes", counts["scored"] * num_checkpoints)
    count("batch_halvings", facts["num_halvings"])
    for phase in ("load", "compute"):
        count("phase_seconds", facts[f"{phase}_seconds"], phase=phase)
    count("phase_seconds", write_seconds, phase="write")


def say_stage(stage: str, seconds: float) -> None:
    """Export how long a stage took; targets of one kind of stage share a label."""
    _gauge("stage_seconds").set(seconds, tags={"stage": stage.split()[0]})


@cache
def _counter(name: str) -> Counter:
    meaning, labels = COUNTERS[name]
    return Counter(f"{PREFIX}_{name}", meaning, labels)


@cache
def _gauge(name: str) -> Gauge:
    meaning, labels = GAUGES[name]
    return Gauge(f"{PREFIX}_{name}", meaning, labels)
