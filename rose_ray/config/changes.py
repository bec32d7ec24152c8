"""What a change of the configuration costs: which stages have to compute again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

STAGES = ("ingest", "warmup", "bank", "features", "score", "select")

_AFTER_WARMUP = ("bank", "features", "score", "select")
# The longest prefix that fits a key counts.
_RECOMPUTED: dict[str, tuple[str, ...]] = {
    "workspace": STAGES,
    "preset": (),
    "model": ("warmup", *_AFTER_WARMUP),
    "model.loader": (),
    "model.deepspeed": (),
    "model.gradient_checkpointing": (),
    "lora": ("warmup", *_AFTER_WARMUP),
    "pool": ("ingest", "score", "select"),
    "pool.inputs": ("ingest", "features", "score", "select"),
    "pool.shard_rows": ("ingest", "features", "score", "select"),
    "pool.sample_fraction": ("ingest", "features", "score", "select"),
    "targets": ("bank", "score", "select"),
    "training_set": ("select",),
    "warmup": ("warmup", *_AFTER_WARMUP),
    "warmup.max_batch_tokens": (),
    "warmup.workers": (),
    "warmup.zero_stage": (),
    "gradients": _AFTER_WARMUP,
    "gradients.stored_dtype": ("features", "score", "select"),
    "gradients.max_batch_tokens": (),
    "ray": (),
}


def changed_keys(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Return the leaves in which two dumped configurations differ: dotted key to (old, new)."""
    changes: dict[str, tuple[Any, Any]] = {}
    for key in [*old, *(k for k in new if k not in old)]:
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            changes |= changed_keys(before, after, f"{prefix}{key}.")
        elif before != after:
            changes[f"{prefix}{key}"] = (before, after)
    return changes


def recomputed_stages(key: str) -> tuple[str, ...]:
    """Return the stages that a change of ``key`` makes compute anew, beside what exists."""
    parts = key.split(".")
    for length in range(len(parts), 0, -1):
        stages = _RECOMPUTED.get(".".join(parts[:length]))
        if stages is not None:
            return stages
    return STAGES
