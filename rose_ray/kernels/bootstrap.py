"""Intervals by resampling: how far a number would move with other seeds and other items.

Shapes: S seeds, N items, G groups of items, R resamples, U units.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rose_ray.errors import ConfigError, NonFiniteError, ShapeError

_BLOCK_NUMBERS = 1 << 22
"""Counts of resampled items held at a time."""


@dataclass(frozen=True)
class Resampling:
    """How intervals are made; the same settings give the same interval.

    Attributes:
        num_resamples: R, at least 1.
        level: Share of the resampled numbers inside the interval, in (0, 1).
        seed: Of the resampling.
    """

    num_resamples: int = 1000
    level: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_resamples < 1 or not 0 < self.level < 1:
            raise ConfigError(
                f"{self.num_resamples} resamples at level {self.level}; expected at least 1 and a level in (0, 1)"
            )


@dataclass(frozen=True)
class Estimate:
    """A number with its interval.

    Attributes:
        value: On the data as they are.
        low, high: Ends of the percentile interval; None where nothing could be resampled.
    """

    value: float
    low: float | None
    high: float | None


def mean_estimate(values_SN: NDArray[Any], resampling: Resampling, groups_N: NDArray[Any] | None = None) -> Estimate:
    """Mean over seeds and items, with an interval over both.

    Every resample draws S seeds and, apart from them, G groups of items with replacement: all seeds meet the same
    items, so the design is crossed (Owen 2007, "The pigeonhole bootstrap", arXiv:0712.1111). A group is drawn whole,
    and each of its items counts as often as the group was drawn. With one seed the interval is over items alone, and
    says nothing of how another training would have come out; with one group it is over seeds alone.

    Args:
        values_SN: A number per seed and item, finite.
        resampling: R, level, seed.
        groups_N: A label for each item; items of one label are no independent ones. Every item is a group where None.

    Raises:
        ShapeError: Not two axes, or one is empty; another number of labels than of items.
        NonFiniteError: A value is NaN or infinite.
    """
    values_SN = np.asarray(values_SN, dtype=np.float64)
    if values_SN.ndim != 2 or 0 in values_SN.shape:
        raise ShapeError(f"values have shape {values_SN.shape}; expected seeds by items, at least one of each")
    if not np.isfinite(values_SN).all():
        raise NonFiniteError(f"{(~np.isfinite(values_SN)).sum()} of {values_SN.size} values are NaN or infinite")
    value = float(values_SN.mean())
    num_seeds, num_items = values_SN.shape
    places_N = _group_places(num_items, groups_N)
    sizes_G = np.bincount(places_N)
    sums_SG = np.stack([np.bincount(places_N, weights=values_N) for values_N in values_SN])
    num_groups = len(sizes_G)
    if num_seeds * num_groups == 1:
        return Estimate(value, None, None)
    random = np.random.default_rng(resampling.seed)
    means = []
    step = max(1, _BLOCK_NUMBERS // (num_seeds + num_groups))
    for start in range(0, resampling.num_resamples, step):
        size = min(step, resampling.num_resamples - start)
        seeds_RS = random.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), size) / num_seeds
        groups_RG = random.multinomial(num_groups, np.full(num_groups, 1 / num_groups), size)
        means.append(((seeds_RS @ sums_SG) * groups_RG).sum(axis=1) / (groups_RG @ sizes_G))
    return _interval(value, np.concatenate(means), resampling.level)


def unit_estimate(
    num_units: int, statistic: Callable[[NDArray[np.int64]], float | None], resampling: Resampling
) -> Estimate | None:
    """A statistic of independent units, with an interval over them.

    Args:
        num_units: U.
        statistic: Gets the numbers of the units taken, some of them several times; None where it is undefined, for
            instance the correlation with a constant. Undefined resamples are left out.
        resampling: R, level, seed.

    Returns:
        None where the statistic of the units as they are is undefined; no interval where fewer than half of the
        resamples are defined, or there is one unit.
    """
    value = statistic(np.arange(num_units))
    if value is None:
        return None
    if num_units == 1:
        return Estimate(value, None, None)
    random = np.random.default_rng(resampling.seed)
    drawn = (statistic(random.integers(0, num_units, num_units)) for _ in range(resampling.num_resamples))
    found = np.array([each for each in drawn if each is not None], dtype=np.float64)
    if 2 * len(found) < resampling.num_resamples:
        return Estimate(value, None, None)
    return _interval(value, found, resampling.level)


def crossed_estimate(
    num_seeds: int,
    num_items: int,
    statistic: Callable[[NDArray[np.int64], NDArray[np.int64]], float],
    resampling: Resampling,
    groups_N: NDArray[Any] | None = None,
) -> Estimate:
    """A statistic of a table of seeds by items, with an interval over both, drawn as in :func:`mean_estimate`.

    Args:
        num_seeds, num_items: S and N.
        statistic: Gets the seeds and the items taken, some of them several times.
        resampling: R, level, seed.
        groups_N: As in :func:`mean_estimate`.

    Raises:
        ShapeError: Another number of labels than of items.
    """
    value = statistic(np.arange(num_seeds), np.arange(num_items))
    places_N = _group_places(num_items, groups_N)
    members = np.split(np.argsort(places_N, kind="stable"), np.cumsum(np.bincount(places_N))[:-1])
    if num_seeds * len(members) == 1:
        return Estimate(value, None, None)
    random = np.random.default_rng(resampling.seed)
    drawn = []
    for _ in range(resampling.num_resamples):
        taken_S = random.integers(0, num_seeds, num_seeds)
        groups_G = random.integers(0, len(members), len(members))
        drawn.append(statistic(taken_S, np.concatenate([members[group] for group in groups_G])))
    return _interval(value, np.array(drawn), resampling.level)


def _group_places(num_items: int, groups_N: NDArray[Any] | None) -> NDArray[np.int64]:
    """The number of each item's group, from 0, [N]."""
    if groups_N is None:
        return np.arange(num_items)
    if np.shape(groups_N) != (num_items,):
        raise ShapeError(
            f"labels of groups have shape {np.shape(groups_N)}; expected one for each of {num_items} items"
        )
    return np.unique(groups_N, return_inverse=True)[1]


def _interval(value: float, resampled_R: NDArray[np.float64], level: float) -> Estimate:
    low, high = np.quantile(resampled_R, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(value, float(low), float(high))
