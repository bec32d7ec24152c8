"""A plan is arithmetic: every number here is worked out by hand."""

from dataclasses import replace

import pytest

from rose_ray.config.warmup import WarmupConfig
from rose_ray.stages.plan import (
    PoolTokens,
    Rates,
    Work,
    artefact_bytes,
    features_seconds,
    held_bytes,
    makespan,
    no_work,
    num_positions,
    predict,
    stored_bytes,
    warmup_positions,
)
from rose_ray.stages.plan_lines import duration, plan_lines
from rose_ray.stages.warmup import plan_training

TOKENS = PoolTokens(num_rows=1000, lengths=[50, 100, 150, 100], num_rejected=1, num_cut=2)
"""Four in five of 1,000 rows are scored: 800 of 100 tokens."""

RATES = Rates(
    scoring=1e-3,
    training=2e-3,
    pairs={"a": 3e-3, "b": 4e-3},
    reducing=[1e-4, 2e-4],
    start_up=10.0,
    peak_bytes=3 * 10**9,
    available_bytes=8 * 10**9,
    max_batch_tokens=4096,
)

WORK = Work(
    actors=2,
    workers=2,
    gpus=1.0,
    num_checkpoints=4,
    num_parameters=1000,
    dims={"": 1024, "b": 16},
    stored_dtype="float16",
    shard_rows=[500, 250, 250],
    warmup_positions=6000,
    warmup_start=12.0,
    basis_tokens={"b": 500},
    pair_tokens={"a": 1000, "b": 500},
    spaces=["", "b"],
    num_pairs={"a": 10, "b": 5},
    passes=[["a"], ["b"]],
    num_subtasks={"a": 2, "b": 1},
    fraction=0.05,
)


def test_the_sample_speaks_for_the_pool() -> None:
    assert TOKENS.num_sampled == 5
    assert TOKENS.num_scored == 800
    assert TOKENS.num_tokens == 80_000


def test_the_histogram_covers_every_sample_and_leaves_out_empty_ends() -> None:
    tokens = PoolTokens(6, [1, 64, 65, 128, 600, 40_000], 0, 0)
    histogram = dict(tokens.histogram())
    assert list(histogram)[:2] == ["1-64", "65-128"]
    assert histogram["1-64"] == histogram["65-128"] == pytest.approx(2 / 6)
    assert histogram["129-256"] == 0
    assert histogram["513-1,024"] == histogram["> 32,768"] == pytest.approx(1 / 6)
    assert sum(histogram.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("durations", "workers", "end"),
    [([], 2, 0), ([3.0], 4, 3), ([1.0, 1.0, 1.0], 2, 2), ([5.0, 1.0, 1.0, 1.0], 2, 5), ([2.0] * 6, 3, 4)],
)
def test_makespan(durations: list[float], workers: int, end: float) -> None:
    assert makespan(durations, workers) == end


def test_seconds_by_stage() -> None:
    seconds = predict(WORK, TOKENS, RATES).seconds
    assert seconds["warmup"] == pytest.approx(12 + 6000 * 2e-3 / 2)
    assert list(seconds) == [
        "warmup", "basis b", "bank a", "bank b", "features", "features b", "score a", "score b",
    ]  # fmt: skip
    assert seconds["basis b"] == pytest.approx(10 + 500 * 4 * 4e-3)
    assert seconds["bank a"] == pytest.approx(1000 * 4 * 3e-3)  # the model is loaded once
    assert seconds["bank b"] == pytest.approx(500 * 4 * 4e-3)
    # A row of 100 tokens takes 0.4 s at four checkpoints, and four in five are scored: 160 s, then 80 s beside 80 s.
    assert seconds["features"] == pytest.approx(10 + 160)
    assert features_seconds(WORK, TOKENS, RATES) == seconds["features"] == seconds["features b"]
    assert seconds["score a"] == pytest.approx(800 * 4 * 1e-4)
    assert seconds["score b"] == pytest.approx(800 * 4 * 2e-4)


def test_a_pass_over_the_features_that_targets_share_counts_once() -> None:
    apart = predict(WORK, TOKENS, RATES)
    assert apart.wall_seconds == pytest.approx(sum(apart.seconds.values()) - apart.seconds["features b"])
    shared = predict(replace(WORK, passes=[["a", "b"]]), TOKENS, replace(RATES, reducing=[3e-4]))
    assert shared.seconds["score a"] == shared.seconds["score b"] == pytest.approx(800 * 4 * 3e-4)
    twice = shared.seconds["features b"] + shared.seconds["score b"]
    assert shared.wall_seconds == pytest.approx(sum(shared.seconds.values()) - twice)


def test_device_hours_count_every_device_for_as_long_as_its_stage_takes() -> None:
    plan = predict(WORK, TOKENS, RATES)
    assert plan.device_hours["features"] == pytest.approx(2 * plan.seconds["features"] / 3600)
    assert plan.device_hours["bank a"] == pytest.approx(plan.seconds["bank a"] / 3600)
    assert plan.device_hours["basis b"] == pytest.approx(plan.seconds["basis b"] / 3600)
    assert not {"score a", "features b"} & set(plan.device_hours)


def test_break_even_is_where_the_saved_training_equals_the_cost() -> None:
    plan = predict(WORK, TOKENS, RATES)
    whole = 80_000 * 2e-3 / 3600
    assert plan.training_hours == pytest.approx((whole, 0.05 * whole))
    assert plan.break_even_epochs is not None
    saved = plan.break_even_epochs * 0.95 * whole
    assert saved == pytest.approx(sum(plan.device_hours.values()))


def test_what_is_there_costs_nothing() -> None:
    done = Work(
        **{**vars(WORK), "shard_rows": [], "warmup_positions": 0, "pair_tokens": {}, "passes": [], "basis_tokens": {}}
    )
    plan = predict(done, TOKENS, replace(RATES, reducing=[]))
    assert plan.seconds == {} and plan.wall_seconds == 0 and plan.break_even_epochs == 0


def test_without_a_probe_there_are_sizes_and_no_times() -> None:
    plan = predict(WORK, TOKENS, None)
    assert plan.seconds == {} and plan.break_even_epochs is None
    assert plan.num_bytes == artefact_bytes(WORK, TOKENS)
    assert plan.num_bytes["warmup"] == 3 * 4 * 1000 * 4
    assert plan.num_bytes["bank"] == 15 * 2 * 4 * 1024 * 4
    assert plan.num_bytes["features"] == 800 * 4 * (2048 + 64 + 104 * 2)
    assert any("no probe" in line for line in plan_lines(TOKENS, WORK, None, plan, 3))


@pytest.mark.parametrize(("dtype", "size"), [("float32", 64), ("float16", 32), ("int8", 20), ("bit1", 6)])
def test_stored_bytes(dtype: str, size: int) -> None:
    assert stored_bytes(16, dtype) == size  # type: ignore[arg-type]


def test_positions_of_a_warm_up_are_those_of_its_plan() -> None:
    settings = WarmupConfig(fraction=0.5, epochs=3, batch_size=4, max_batch_tokens=300)
    lengths = [100] * 40
    steps = plan_training(
        [str(row) for row in range(20)],
        lengths[:20],
        epochs=1,
        batch_size=4,
        max_batch_tokens=300,
        num_workers=2,
        learning_rate=1e-3,
        warmup_ratio=0.0,
        seed=0,
    )
    assert num_positions(steps, lengths) == 20 * 100
    assert warmup_positions(settings, lengths, 40) == 3 * 20 * 100


def test_the_report_says_what_does_not_fit() -> None:
    tight = Rates(**{**vars(RATES), "available_bytes": 10**9})
    text = "\n".join(plan_lines(TOKENS, WORK, tight, predict(WORK, TOKENS, tight), 3))
    assert "DOES NOT FIT" in text and "gradients.max_batch_tokens" in text
    assert "1,000 unique rows in 3 shards" in text and "GPU-hours" in text


def test_what_is_left_out_of_the_sum_is_said() -> None:
    plan = predict(WORK, TOKENS, RATES)
    for others, text in (({}, "without select"), ({"c": "gist"}, "without select and without what scores c")):
        (line,) = (line for line in plan_lines(TOKENS, WORK, RATES, plan, 3, others) if line.startswith("in all"))
        assert line.endswith(f"  {text}")


@pytest.mark.parametrize("work", [WORK, no_work(1, 0.0)])
def test_states_that_rows_are_compared_by_are_said_to_be_left_out(work: Work) -> None:
    for states in ([], ["rds", "rds_plus"]):
        asking = replace(work, row_states=states)
        lines = plan_lines(TOKENS, asking, None, predict(asking, TOKENS, None), 3, {"c": "deita"})
        said = [line for line in lines if line.startswith("selection.diversity: states rds and rds_plus of the base")]
        assert len(said) == bool(states)


def test_bases_that_are_missing_are_work_to_do() -> None:
    plan = predict(WORK, TOKENS, RATES)
    assert any("exact bases of 1; banks of 2 of 2 targets" in line for line in plan_lines(TOKENS, WORK, None, plan, 3))


def test_what_exact_bases_keep_is_said_with_and_without_a_probe() -> None:
    work = replace(WORK, basis_lines=["basis b: one direction a subtask"])
    for rates in (None, RATES):
        assert "basis b: one direction a subtask" in list(
            plan_lines(TOKENS, work, rates, predict(WORK, TOKENS, rates), 3)
        )


def test_an_actor_holds_weights_and_moments_of_every_checkpoint_and_what_projects_them() -> None:
    assert held_bytes(1000, 4, 0, deflates=False) == 12 * 1000 * 4
    assert held_bytes(1000, 4, 0, deflates=True) == (12 + 4) * 1000 * 4
    assert held_bytes(1000, 4, 16, deflates=False) == (12 + 4 * 16) * 1000 * 4


def test_the_hosts_memory_is_foretold_beside_a_gpus() -> None:
    plan, low = predict(WORK, TOKENS, RATES), {"host_bytes": 6 * 10**9, "host_available_bytes": 5 * 10**9}
    assert "host memory" not in "\n".join(plan_lines(TOKENS, WORK, RATES, plan, 3))
    text = "\n".join(plan_lines(TOKENS, WORK, replace(RATES, **low), plan, 3))
    assert "memory of an actor: 3 GB at batches of 4,096 tokens, 8 GB available: fits" in text
    assert "host memory of an actor: 6 GB, its checkpoints among it, 5 GB available: DOES NOT FIT" in text


def test_devices_of_all_ranks_count_and_the_warm_up_has_none() -> None:
    alone, shared = predict(WORK, TOKENS, RATES), predict(replace(WORK, ranks=4), TOKENS, RATES)
    assert shared.seconds == alone.seconds
    assert shared.device_hours.pop("warmup") == pytest.approx(alone.device_hours.pop("warmup"))
    assert shared.device_hours == pytest.approx({stage: 4 * hours for stage, hours in alone.device_hours.items()})


def test_ranks_that_were_probed_are_reported_as_ranks() -> None:
    shared = replace(WORK, ranks=4, gpus=0.0, base_bytes=16 * 10**9, largest_bytes=10**9)
    tight = replace(RATES, available_bytes=10**9)
    text = "\n".join(plan_lines(TOKENS, shared, tight, predict(shared, TOKENS, tight), 3))
    assert "memory of a rank: 3 GB at batches of 4,096 tokens, 1 GB available: DOES NOT FIT" in text
    assert "ray.ranks_per_actor" in text and "rank-hours" in text and "at least" not in text and "actor:" not in text


def test_the_least_memory_of_a_rank_is_foretold_without_a_probe() -> None:
    shared = replace(WORK, ranks=4, base_bytes=16 * 10**9, largest_bytes=10**9, held_bytes=48_000)
    lines = list(plan_lines(TOKENS, shared, None, predict(shared, TOKENS, None), 3))
    assert lines[-1] == "no probe: no times"
    assert lines[-2] == (
        "memory of a rank: at least 5 GB for weights (4 GB its part of the base's 16 GB, 1 GB the largest parameter, "
        "gathered), and 48 kB of host memory for checkpoints; what batches take comes on top"
    )


@pytest.mark.parametrize(("seconds", "text"), [(3.0, "3.0 s"), (600, "10.0 min"), (36000, "10.0 h")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
