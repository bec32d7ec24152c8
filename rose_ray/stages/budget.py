"""How many tokens go through the model at once: found by measuring, not by guessing."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from rose_ray.model.memory import MemoryMeter

logger = logging.getLogger(__name__)

MOST_TOKENS = {"cpu": 4096, "cuda": 65536}
"""Larger batches are no faster: a core is busy with one row, a GPU with this many tokens."""

USED_FRACTION = 0.8
"""Share of the memory that a batch may fill; the rest is for fragments and for what the estimate misses."""


@dataclass(frozen=True)
class MemoryNeed:
    """What scoring takes of its device, linear in rows.

    Attributes:
        row_tokens: Length of the longest row.
        one_row: Bytes held at the peak of a pass over one such row, model and tables included.
        per_row: Bytes that each further row adds.
        available: Bytes that this process may hold.
    """

    row_tokens: int
    one_row: int
    per_row: int
    available: int

    def peak_bytes(self, max_batch_tokens: int) -> int:
        """Return what a batch of so many tokens takes."""
        return self.one_row + (max(1, max_batch_tokens // self.row_tokens) - 1) * self.per_row

    def budget(self, most_tokens: int) -> int:
        """Return the largest batch that leaves some memory free, in tokens.

        Never more than ``most_tokens``; at least ``row_tokens``, since a row cannot be split.
        """
        assert self.per_row, "a row alone was measured, and that tells nothing of two"
        room = USED_FRACTION * self.available - self.one_row
        rows = 1 + max(0, int(room // self.per_row))
        return max(self.row_tokens, min(most_tokens, rows * self.row_tokens))


def memory_need(
    run: Callable[[int], object], row_tokens: int, meter: MemoryMeter, share: float = 1.0, *, one_row_only: bool = False
) -> MemoryNeed:
    """Measure one and two rows of the longest length.

    Args:
        run: Puts so many rows of ``row_tokens`` tokens, all labelled, through the model.
        row_tokens: Length of the longest row.
        meter: Of the device.
        share: Part of the device's memory that is this process's.
        one_row_only: No batch will have two such rows, so there need be no room for them; ``per_row`` is 0.
    """
    run(1)  # what is kept from the first pass on, such as tables, is no cost of a batch
    if one_row_only:
        return MemoryNeed(row_tokens, meter.peak_bytes(lambda: run(1)), 0, int(share * meter.available_bytes()))
    one, two = (meter.peak_bytes(lambda rows=rows: run(rows)) for rows in (1, 2))  # type: ignore[misc]
    return MemoryNeed(row_tokens, one, max(1, two - one), int(share * meter.available_bytes()))


def measured_budget(
    run: Callable[[int], object], row_tokens: int, most_tokens: int, meter: MemoryMeter, share: float = 1.0
) -> int:
    """Return the largest batch that fits, in tokens; arguments as in `memory_need` and `MemoryNeed.budget`."""
    need = memory_need(run, row_tokens, meter, share)
    budget = need.budget(most_tokens)
    room = max(0, USED_FRACTION * need.available - need.one_row)
    logger.info(
        f"batches of up to {budget:,} tokens: {need.per_row / 2**20:,.0f} MiB a row of {row_tokens:,} tokens, "
        f"{room / 2**20:,.0f} MiB free for them"
    )
    return budget
