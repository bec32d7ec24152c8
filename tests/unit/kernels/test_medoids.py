"""Rows near the centres of clusters."""

from __future__ import annotations

import numpy as np
import pytest

from rose_ray.errors import ConfigError, NonFiniteError, ShapeError
from rose_ray.kernels.medoids import cluster_medoids


def test_each_far_away_group_gives_the_row_nearest_to_its_middle() -> None:
    offsets = np.array([[0.3, 0.0], [0.0, 0.01], [-0.3, 0.0], [0.0, -0.3], [0.0, 0.3]])
    groups = [centre + offsets for centre in ([0.0, 0.0], [50.0, 0.0], [0.0, 50.0])]
    for seed in range(5):
        assert cluster_medoids(np.vstack(groups), 3, seed).tolist() == [1, 6, 11]


def test_the_choice_follows_from_rows_and_seed() -> None:
    rows = np.random.default_rng(0).normal(size=(60, 3))
    chosen = cluster_medoids(rows, 7, seed=4)
    assert chosen.tolist() == cluster_medoids(rows.astype(np.float64), 7, seed=4).tolist()
    assert len(set(chosen.tolist())) == 7 and sorted(chosen) == chosen.tolist()
    assert {tuple(cluster_medoids(rows, 7, seed).tolist()) for seed in range(6)} != {tuple(chosen.tolist())}


def test_copies_never_fill_two_places_with_one_row() -> None:
    assert cluster_medoids(np.ones((4, 2)), 4, 0).tolist() == [0, 1, 2, 3]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ShapeError):
        cluster_medoids(np.zeros(3), 1, 0)
    with pytest.raises(ConfigError, match="4 clusters of 3 rows"):
        cluster_medoids(np.zeros((3, 2)), 4, 0)
    with pytest.raises(NonFiniteError):
        cluster_medoids(np.array([[np.nan]]), 1, 0)
