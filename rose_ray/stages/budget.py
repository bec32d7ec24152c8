"""How many tokens go through the model at once: found by measuring, not by guessing."""

from __future__ import annotations

import logging
from collections.abc import Callable

from rose_ray.model.memory import MemoryMeter

logger = logging.getLogger(__name__)

MOST_TOKENS = {"cpu": 4096, "cuda": 65536}
"""Larger batches are no faster: a core is busy with one row, a GPU with this many tokens."""

USED_FRACTION = 0.8
"""Share of the memory that a batch may fill; the rest is for fragments and for what the estimate misses."""


def measured_budget(
    run: Callable[[int], object], row_tokens: int, most_tokens: int, meter: MemoryMeter, share: float = 1.0
) -> int:
    """Return the largest batch that fits, in tokens.

    Runs one and two rows of the longest length and takes memory to be linear in rows.

    Args:
        run: Puts so many rows of ``row_tokens`` tokens, all labelled, through the model.
        row_tokens: Length of the longest row.
        most_tokens: Never more than this; at least ``row_tokens`` is returned, since a row cannot be split.
        meter: Of the device.
        share: Part of the device's memory that is this process's.
    """
    run(1)  # what is kept from the first pass on, such as tables, is no cost of a batch
    one, two = (meter.peak_bytes(lambda rows=rows: run(rows)) for rows in (1, 2))  # type: ignore[misc]
    per_row = max(1, two - one)
    room = USED_FRACTION * share * meter.available_bytes() - one
    rows = 1 + max(0, int(room // per_row))
    budget = max(row_tokens, min(most_tokens, rows * row_tokens))
    logger.info(
        f"batches of up to {budget:,} tokens: {per_row / 2**20:,.0f} MiB a row of {row_tokens:,} tokens, "
        f"{max(0, room) / 2**20:,.0f} MiB free for them"
    )
    return budget
