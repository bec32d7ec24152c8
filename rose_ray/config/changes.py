"""What a change of the configuration costs: which stages have to compute again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

STAGES = ("ingest", "warmup", "bank", "features", "score", "select")

_AFTER_WARMUP = ("bank", "features", "score", "select")
_REDUCED = ("score", "select")
# The longest prefix that fits a key counts; items of lists go by their list's name. What computes nothing is in no key:
# it moves results by rounding; the warm-up's batches and workers also draw other dropout masks in a fresh warm-up.
_RECOMPUTED: dict[str, tuple[str, ...]] = {
    "workspace": STAGES,
    "preset": (),
    "model": ("warmup", *_AFTER_WARMUP),
    "model.attention": (),
    "model.merge_adapter": (),
    "model.trust_remote_code": (),
    "model.loader": (),
    "model.deepspeed": (),
    "model.gradient_checkpointing": (),
    "lora": ("warmup", *_AFTER_WARMUP),
    "pool": ("ingest", "features", *_REDUCED),
    "targets": ("bank", *_REDUCED),
    "targets.method": ("warmup", *_AFTER_WARMUP),
    "targets.method_options": _REDUCED,
    "targets.objective": _REDUCED,
    "targets.normalize": _REDUCED,
    "targets.aggregation": _REDUCED,
    "targets.exact": ("bank", "features", *_REDUCED),
    "targets.selection": ("select",),
    "targets.selection.method": _REDUCED,  # round_robin_pairs wants columns that other score tables lack
    "training_set": ("select",),
    "warmup": ("warmup", *_AFTER_WARMUP),
    "warmup.adapter_weights": ("warmup", *_REDUCED),
    "warmup.max_batch_tokens": (),
    "warmup.workers": (),
    "warmup.zero_stage": (),
    "warmup.save_steps": (),
    "warmup.max_restarts": (),
    "gradients": _AFTER_WARMUP,
    "gradients.adam": _AFTER_WARMUP,
    "gradients.stored_dtype": ("features", *_REDUCED),
    "gradients.max_batch_tokens": (),
    "gradients.packing": (),
    "gradients.kernel": (),
    "evaluation": (),
    "ray": (),
    "lease": (),
}


def changed_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the leaves in which two dumped configurations differ: dotted key to (old, new).

    Items of lists of mappings are numbered, as behind ``--set``: ``targets.0.objective``.
    """
    changes: dict[str, tuple[Any, Any]] = {}
    for key in [*old, *(k for k in new if k not in old)]:
        before, after = _numbered(old.get(key)), _numbered(new.get(key))
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            changes |= {f"{key}.{below}": change for below, change in changed_keys(before, after).items()}
        elif before != after:
            changes[key] = (old.get(key), new.get(key))
    return changes


def _numbered(value: Any) -> Any:
    if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        return {str(number): item for number, item in enumerate(value)}
    return value


def recomputed_stages(key: str) -> tuple[str, ...]:
    """Return the stages that a change of ``key`` can make compute anew, beside what exists."""
    parts = [part for part in key.split(".") if not part.isdigit()]
    for length in range(len(parts), 0, -1):
        stages = _RECOMPUTED.get(".".join(parts[:length]))
        if stages is not None:
            return stages
    return STAGES
