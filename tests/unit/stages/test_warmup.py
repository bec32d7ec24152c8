"""What the warm-up trains on, in which order, with which learning rate."""

from __future__ import annotations

import math
from random import Random

import pytest

from rose_ray.stages.warmup import (
    TrainingStep,
    learning_rate_factor,
    plan_training,
    seeded_order,
    warmup_rows,
)

ROW_IDS = [f"{number:032x}" for number in range(23)]
LENGTHS = [5 + 7 * number % 40 for number in range(23)]


def _plan(row_ids: list[str] = ROW_IDS, lengths: list[int] = LENGTHS, **settings: int) -> list[TrainingStep]:
    defaults = {"epochs": 2, "batch_size": 5, "max_batch_tokens": 90, "num_workers": 1, "seed": 0}
    return plan_training(row_ids, lengths, **{**defaults, **settings}, learning_rate=0.5, warmup_ratio=0.2)  # type: ignore[arg-type]


def _rows(step: TrainingStep) -> list[int]:
    return [row for part in step.micro_batches for batch in part if batch.counts for row in batch.rows]


def test_the_order_depends_on_content_and_salt_alone() -> None:
    shuffled = Random(1).sample(ROW_IDS, len(ROW_IDS))
    order = seeded_order(ROW_IDS, "a")
    assert seeded_order(shuffled, "a") == order != seeded_order(ROW_IDS, "b")
    assert sorted(order) == ROW_IDS
    assert [i for i in order if i in ROW_IDS[:9]] == seeded_order(ROW_IDS[:9], "a")


def test_warm_up_rows_are_a_share_of_the_pool() -> None:
    assert len(warmup_rows(ROW_IDS, 0.3, 0)) == 7
    assert len(warmup_rows(ROW_IDS, 1e-9, 0)) == 1
    assert sorted(warmup_rows(ROW_IDS, 1.0, 0)) == ROW_IDS
    assert warmup_rows(ROW_IDS[::-1], 0.3, 0) == warmup_rows(ROW_IDS, 0.3, 0) != warmup_rows(ROW_IDS, 0.3, 1)
    assert set(warmup_rows(ROW_IDS, 0.3, 0)) < set(warmup_rows(ROW_IDS, 0.6, 0))


@pytest.mark.parametrize(("num_steps", "ratio"), [(10, 0.3), (10, 0.0), (1, 0.03), (7, 0.99), (100, 0.03)])
def test_the_learning_rate_rises_and_falls_linearly(num_steps: int, ratio: float) -> None:
    factors = [learning_rate_factor(step, num_steps, ratio) for step in range(num_steps)]
    rising = math.ceil(ratio * num_steps)
    assert all(0 < factor <= 1 for factor in factors) and max(factors) == 1
    assert factors[:rising] == pytest.approx([(step + 1) / rising for step in range(rising)])
    falling = num_steps - rising
    assert factors[rising:] == pytest.approx([1 - step / falling for step in range(falling)])


def test_every_epoch_sees_every_row_once_in_an_order_of_its_own() -> None:
    steps = _plan()
    epochs = [[row for step in steps if step.epoch == epoch for row in _rows(step)] for epoch in (1, 2)]
    assert all(sorted(rows) == list(range(23)) for rows in epochs)
    batches = [[sorted(_rows(step)) for step in steps if step.epoch == epoch] for epoch in (1, 2)]
    assert batches[0] != batches[1]
    assert [step.num_samples for step in steps] == [5, 5, 5, 5, 3] * 2
    assert [step.learning_rate for step in steps] == [0.5 * learning_rate_factor(i, 10, 0.2) for i in range(10)]


def test_micro_batches_respect_the_bound() -> None:
    for step in _plan(max_batch_tokens=60):
        for batch in step.micro_batches[0]:
            longest = max(LENGTHS[row] for row in batch.rows)
            assert len(batch.rows) == 1 or len(batch.rows) * longest <= 60


@pytest.mark.parametrize("num_workers", [2, 3, 7])
def test_workers_share_each_step_and_stay_in_step(num_workers: int) -> None:
    for alone, shared in zip(_plan(), _plan(num_workers=num_workers), strict=True):
        assert sorted(_rows(shared)) == sorted(_rows(alone))
        assert (shared.epoch, shared.learning_rate, shared.num_samples) == (
            alone.epoch,
            alone.learning_rate,
            alone.num_samples,
        )
        assert len(shared.micro_batches) == num_workers
        assert len({len(part) for part in shared.micro_batches}) == 1
        shares = [sum(len(batch.rows) for batch in part if batch.counts) for part in shared.micro_batches]
        assert max(shares) - min(shares) <= 1


def test_what_only_keeps_workers_in_step_does_not_count_and_is_short() -> None:
    fillers = [
        batch for step in _plan(num_workers=7) for part in step.micro_batches for batch in part if not batch.counts
    ]
    assert fillers and all(len(batch.rows) == 1 for batch in fillers)


def test_the_plan_depends_on_the_rows_not_on_their_places() -> None:
    places = Random(2).sample(range(23), 23)
    moved = _plan([ROW_IDS[place] for place in places], [LENGTHS[place] for place in places])
    for step, other in zip(_plan(), moved, strict=True):
        assert sorted(ROW_IDS[row] for row in _rows(step)) == sorted(ROW_IDS[places[row]] for row in _rows(other))


def test_the_seed_changes_the_order() -> None:
    assert [sorted(_rows(s)) for s in _plan(seed=1)] != [sorted(_rows(s)) for s in _plan(seed=0)]
