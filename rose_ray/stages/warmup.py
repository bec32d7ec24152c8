"""What the warm-up trains on, in which order, with which learning rate. The training itself runs on Ray Train.

Section 4.1 of LESS (arXiv:2402.04333): LoRA on a random share of the pool, a checkpoint an epoch. A step's loss is the
mean over its samples of each one's token-mean cross-entropy, so that a step's gradient is the mean of the gradients
that features are made of.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

from rose_ray.data.batches import length_batches

WARMUP_VERSION = 2
"""Raised whenever the same input would give other numbers."""


def seeded_order(row_ids: Sequence[str], salt: str) -> list[str]:
    """Return row ids in an order that depends on their content and ``salt`` alone, not on the order given."""
    return sorted(row_ids, key=lambda row_id: hashlib.sha256(f"{salt}:{row_id}".encode()).digest())


def warmup_rows(row_ids: Sequence[str], fraction: float, seed: int) -> list[str]:
    """Return the rows to train on: ``fraction`` of the pool, rounded, at least one."""
    return seeded_order(row_ids, f"warmup-{seed}")[: max(1, round(fraction * len(row_ids)))]


def learning_rate_factor(step: int, num_steps: int, warmup_ratio: float) -> float:
    """Return the share of the peak learning rate at ``step`` (from 0): up linearly, then down linearly towards 0."""
    rising = math.ceil(warmup_ratio * num_steps)
    return (step + 1) / rising if step < rising else (num_steps - step) / (num_steps - rising)


@dataclass(frozen=True)
class MicroBatch:
    """Samples that go through one worker's model together.

    Attributes:
        rows: Places of the samples.
        counts: False where the batch only keeps the workers in step; its loss is multiplied by zero.
    """

    rows: list[int]
    counts: bool = True


@dataclass(frozen=True)
class TrainingStep:
    """One optimizer step.

    Attributes:
        epoch: From 1.
        learning_rate: Of this step.
        num_samples: Over all workers.
        micro_batches: A list per worker, all of one length: ZeRO's collectives need equally many backward passes.
    """

    epoch: int
    learning_rate: float
    num_samples: int
    micro_batches: list[list[MicroBatch]]


def plan_training(
    row_ids: Sequence[str],
    lengths: Sequence[int],
    *,
    epochs: int,
    batch_size: int,
    max_batch_tokens: int,
    num_workers: int,
    learning_rate: float,
    warmup_ratio: float,
    seed: int,
) -> list[TrainingStep]:
    """Lay out the whole training: every worker computes the same plan and takes its own part.

    Args:
        row_ids, lengths: Of the samples, lengths in tokens.
        epochs, batch_size, learning_rate, warmup_ratio, seed: As configured; the last step of an epoch may be short.
        max_batch_tokens: Bound on rows times longest row of a micro-batch.
        num_workers: The steps' samples do not depend on it.
    """
    place = {row_id: i for i, row_id in enumerate(row_ids)}
    batches = [
        (epoch, [place[row_id] for row_id in order[start : start + batch_size]])
        for epoch in range(1, epochs + 1)
        for order in [seeded_order(row_ids, f"epoch-{seed}-{epoch}")]
        for start in range(0, len(order), batch_size)
    ]
    return [
        TrainingStep(
            epoch,
            learning_rate * learning_rate_factor(step, len(batches), warmup_ratio),
            len(rows),
            _split(rows, lengths, max_batch_tokens, num_workers),
        )
        for step, (epoch, rows) in enumerate(batches)
    ]


def _split(rows: list[int], lengths: Sequence[int], max_batch_tokens: int, num_workers: int) -> list[list[MicroBatch]]:
    parts = []
    for worker in range(num_workers):
        own = rows[worker::num_workers]
        batches = length_batches([lengths[row] for row in own], max_batch_tokens)
        parts.append([MicroBatch([own[i] for i in batch]) for batch in batches])
    longest = max(len(part) for part in parts)
    shortest = min(rows, key=lambda row: lengths[row])
    return [part + [MicroBatch([shortest], counts=False)] * (longest - len(part)) for part in parts]
