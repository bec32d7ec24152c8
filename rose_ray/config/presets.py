"""Named sets of defaults that lie under what the user writes."""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    # The behaviour of the authors' released code, slips included: docs/rose_official.md lists each.
    "rose_official": {
        "model": {"template": "tulu", "loss_on_turn_tail": True, "max_tokens": 2048},
        "gradients": {
            "adam": "less_code",
            "projection": {"kind": "rademacher", "dim": 8192, "seed": 0, "deflate": False},
            "stored_dtype": "float16",
        },
        "targets": {
            "objective": "rose",
            "encoding": "rose_official",
            "normalize": "projected",
            "aggregation": "max",
            "selection": {"method": "top_k"},
        },
    },
}
