"""Intervals against loops, and against what is known of them."""

from __future__ import annotations

import numpy as np
import pytest

from rose_ray.errors import ConfigError, NonFiniteError, ShapeError
from rose_ray.kernels import bootstrap
from rose_ray.kernels.bootstrap import Resampling, crossed_estimate, mean_estimate, unit_estimate

FLOAT64_ROUNDING = 1e-12  # sums of a few dozen numbers of order 1


def _slow_means(values: np.ndarray, resampling: Resampling, groups: list[list[int]] | None = None) -> list[float]:
    """Draw counts as the kernel does, and write every resampled table out."""
    random = np.random.default_rng(resampling.seed)
    seeds = len(values)
    members = groups or [[item] for item in range(values.shape[1])]
    count = resampling.num_resamples
    seed_counts = random.multinomial(seeds, np.full(seeds, 1 / seeds), count)
    group_counts = random.multinomial(len(members), np.full(len(members), 1 / len(members)), count)
    means = []
    for own_seeds, own_groups in zip(seed_counts, group_counts, strict=True):
        rows = [row for row, times in enumerate(own_seeds) for _ in range(times)]
        columns = [
            item for group, times in zip(members, own_groups, strict=True) for _ in range(times) for item in group
        ]
        means.append(float(np.mean([[values[row, column] for column in columns] for row in rows])))
    return means


def test_the_interval_is_that_of_resampled_tables() -> None:
    values = np.random.default_rng(1).normal(size=(3, 7))
    resampling = Resampling(40, 0.9, seed=5)
    estimate = mean_estimate(values, resampling)
    slow = _slow_means(values, resampling)
    assert estimate.value == pytest.approx(values.mean(), abs=FLOAT64_ROUNDING)
    assert estimate.low == pytest.approx(np.quantile(slow, 0.05), abs=FLOAT64_ROUNDING)
    assert estimate.high == pytest.approx(np.quantile(slow, 0.95), abs=FLOAT64_ROUNDING)


def test_groups_of_items_are_resampled_whole() -> None:
    values = np.random.default_rng(1).normal(size=(3, 7))
    labels = np.array([4, 9, 4, 1, 9, 4, 7])
    groups = [[3], [0, 2, 5], [6], [1, 4]]  # by label
    resampling = Resampling(40, 0.9, seed=5)
    estimate = mean_estimate(values, resampling, labels)
    slow = _slow_means(values, resampling, groups)
    assert estimate.value == pytest.approx(values.mean(), abs=FLOAT64_ROUNDING)
    assert estimate.low == pytest.approx(np.quantile(slow, 0.05), abs=FLOAT64_ROUNDING)
    assert estimate.high == pytest.approx(np.quantile(slow, 0.95), abs=FLOAT64_ROUNDING)

    seen: list[list[int]] = []

    def statistic(seeds: np.ndarray, items: np.ndarray) -> float:
        seen.append(items.tolist())
        return float(values[np.ix_(seeds, items)].mean())

    assert crossed_estimate(3, 7, statistic, resampling, labels).value == estimate.value
    assert seen[0] == list(range(7)) and len(seen) == 41
    for items in seen[1:]:
        assert all(len({items.count(item) for item in group}) == 1 for group in groups)
        assert sum(items.count(group[0]) for group in groups) == 4


def test_copies_of_items_narrow_no_interval() -> None:
    values = np.random.default_rng(0).normal(size=(1, 30))
    copied, labels = np.repeat(values, 3, axis=1), np.repeat(np.arange(30), 3)
    one, three = mean_estimate(values, Resampling()), mean_estimate(copied, Resampling(), labels)
    assert (three.low, three.high) == pytest.approx((one.low, one.high), abs=FLOAT64_ROUNDING)
    apart = mean_estimate(copied, Resampling())
    assert apart.high - apart.low < 0.7 * (one.high - one.low)  # type: ignore[operator]
    assert mean_estimate(values, Resampling(), np.zeros(30)).low is None
    assert crossed_estimate(1, 30, lambda s, i: 3.0, Resampling(), np.zeros(30)).low is None


def test_blocks_bound_memory_and_keep_the_number_of_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "_BLOCK_NUMBERS", 30)
    values = np.arange(20.0)[None]
    estimate = mean_estimate(values, Resampling(500, 0.95, 0))
    # The mean of 20 numbers of standard deviation 5.77 has standard error 1.29: the ends lie near 9.5 -+ 2.5. With 500
    # resamples an end wanders by some 0.2.
    assert estimate.low == pytest.approx(7.0, abs=0.6) and estimate.high == pytest.approx(12.0, abs=0.6)


def test_seeds_that_differ_widen_the_interval() -> None:
    items = np.random.default_rng(0).normal(size=200)
    alike = mean_estimate(np.stack([items, items, items]), Resampling())
    apart = mean_estimate(np.stack([items - 1, items, items + 1]), Resampling())
    assert apart.high - apart.low > 2 * (alike.high - alike.low)  # type: ignore[operator]


def test_one_number_has_no_interval() -> None:
    assert mean_estimate(np.array([[2.0]]), Resampling()).low is None


def test_a_seed_repeats_an_interval() -> None:
    values = np.random.default_rng(0).normal(size=(2, 9))
    assert mean_estimate(values, Resampling(seed=3)) == mean_estimate(values, Resampling(seed=3))
    assert mean_estimate(values, Resampling(seed=3)) != mean_estimate(values, Resampling(seed=4))


def test_units_are_resampled_whole() -> None:
    values = np.array([1.0, 5.0, 9.0])
    seen: list[tuple[int, ...]] = []

    def mean(taken: np.ndarray) -> float:
        seen.append(tuple(taken))
        return float(values[taken].mean())

    estimate = unit_estimate(3, mean, Resampling(200, 0.95, 1))
    assert estimate is not None and estimate.value == 5.0
    assert seen[0] == (0, 1, 2) and len(seen) == 201
    expected = np.quantile([values[list(taken)].mean() for taken in seen[1:]], [0.025, 0.975])
    assert (estimate.low, estimate.high) == tuple(expected)


def test_a_statistic_of_a_table_has_the_interval_of_its_mean() -> None:
    values = np.random.default_rng(2).normal(size=(3, 50))
    mean = mean_estimate(values, Resampling(2000, 0.9, 0))
    other = crossed_estimate(3, 50, lambda s, i: float(values[np.ix_(s, i)].mean()), Resampling(2000, 0.9, 1))
    assert other.value == pytest.approx(mean.value, abs=FLOAT64_ROUNDING)
    # Other draws of the same distribution; with 2,000 of them an end wanders by some 0.01.
    assert (other.low, other.high) == (pytest.approx(mean.low, abs=0.04), pytest.approx(mean.high, abs=0.04))
    assert crossed_estimate(1, 1, lambda s, i: 3.0, Resampling()).low is None


def test_undefined_statistics() -> None:
    one = unit_estimate(1, lambda taken: 2.0, Resampling())
    assert one is not None and (one.value, one.low) == (2.0, None)
    assert unit_estimate(3, lambda taken: None, Resampling()) is None
    only_whole = unit_estimate(3, lambda taken: 1.0 if tuple(taken) == (0, 1, 2) else None, Resampling())
    assert only_whole is not None and only_whole.low is None


def test_refusals() -> None:
    with pytest.raises(ShapeError, match="seeds by items"):
        mean_estimate(np.zeros((0, 3)), Resampling())
    with pytest.raises(ShapeError, match=r"shape \(2,\); expected one for each of 3 items"):
        mean_estimate(np.zeros((1, 3)), Resampling(), np.zeros(2))
    with pytest.raises(NonFiniteError, match="1 of 2"):
        mean_estimate(np.array([[1.0, np.nan]]), Resampling())
    with pytest.raises(ConfigError, match="level 1"):
        Resampling(level=1.0)
