"""The simulated job against cases that have a formula."""

from __future__ import annotations

import math
from dataclasses import asdict

import numpy as np
import pytest

from benchmarks.simulate import Cluster, Job, Shards, simulate, started_over
from benchmarks.svg_plot import Axis, line_chart

ROUNDING = 1e-9  # sums of some thousand seconds in float64
STANDARD_ERRORS = 5.0  # a right mean leaves this band once in two million draws

JOB = Job(rows=10_000, num_pairs=10)


@pytest.mark.parametrize(("gpus", "shard_rows"), [(1, 100), (3, 100), (8, 512), (200, 64)])
def test_without_failures_shards_run_in_rounds(gpus: int, shard_rows: int) -> None:
    cluster, shards = Cluster(gpus), Shards(shard_rows, fixed_seconds=0.5, row_seconds=0.001, spread=0)
    outcome = simulate(JOB, cluster, shards)
    whole = shard_rows * JOB.checkpoints * JOB.sample_seconds + 0.5 + shard_rows * 0.001
    rounds = math.ceil(10_000 / shard_rows / gpus)
    last = 10_000 % shard_rows
    longest = cluster.load_seconds + rounds * whole
    assert outcome.features <= longest + ROUNDING
    if not last or math.ceil(10_000 / shard_rows) % gpus != 1:
        assert outcome.features == pytest.approx(longest, rel=ROUNDING)
    assert outcome.useful == pytest.approx(10_000 * JOB.checkpoints * JOB.sample_seconds, rel=ROUNDING)
    warmup = JOB.rows * 0.05 * 4 * JOB.sample_seconds / min(8, gpus) + cluster.load_seconds
    assert outcome.warmup == pytest.approx(warmup, rel=ROUNDING) and outcome.failures == outcome.lost == 0


@pytest.mark.parametrize("seed", range(5))
def test_every_gpu_second_is_accounted_for(seed: int) -> None:
    cluster = Cluster(20, failures=20.0, replacement_seconds=60, load_seconds=20)
    outcome = simulate(Job(rows=100_000), cluster, Shards(), seed)
    parts = [outcome.useful, outcome.overhead, outcome.lost, outcome.loading, outcome.down, outcome.idle]
    assert sum(parts) == pytest.approx(20 * outcome.features, rel=ROUNDING)
    assert all(part >= 0 for part in parts) and outcome.failures > 0 and outcome.lost > 0


def test_work_that_starts_over_takes_what_the_formula_says() -> None:
    # Time to survive T at rate r with repair R: (exp(r T) - 1) (1 / r + R).
    cluster = Cluster(failures=2.0, load_seconds=100.0, replacement_seconds=300.0)
    random, rate, whole = np.random.default_rng(0), 2.0 / 3600, 1800.0
    times = [started_over(1700.0, 8, cluster, random) for _ in range(4000)]
    expected = (math.exp(rate * whole) - 1) * (1 / rate + 300.0)
    assert abs(np.mean(times) - expected) < STANDARD_ERRORS * np.std(times) / math.sqrt(len(times))


def test_failures_come_as_often_as_they_are_said_to() -> None:
    cluster = Cluster(80, failures=0.5, replacement_seconds=0.0)
    outcomes = [simulate(Job(rows=100_000), cluster, Shards(), seed) for seed in range(20)]
    expected = sum(10 * 0.5 * each.features / 3600 for each in outcomes)
    assert abs(sum(each.failures for each in outcomes) - expected) < STANDARD_ERRORS * math.sqrt(expected)


def test_a_seed_gives_the_same_again() -> None:
    cluster = Cluster(16, failures=3.0)
    one, two, other = (asdict(simulate(Job(rows=30_000), cluster, Shards(), seed)) for seed in (1, 1, 2))
    assert one == two != other


def test_a_chart_places_points_by_their_scales() -> None:
    chart = line_chart("a < b", {"s": [(1, 10), (100, 1000)]}, Axis("x", log=True), Axis("y", log=True))
    assert '<polyline points="70.0,310.0 510.0,40.0"' in chart and "a &lt; b" in chart
    with pytest.raises(ValueError, match="log scale"):
        line_chart("t", {"s": [(0, 1)]}, Axis("x", log=True), Axis("y"))
