"""Aggregation against loops."""

from __future__ import annotations

import numpy as np
import pytest

from rose_ray.errors import ConfigError, ShapeError
from rose_ray.kernels.aggregation import aggregate_scores, aggregate_subtasks, subtask_order

FLOAT64_ROUNDING = 1e-14  # means of a handful of numbers of order 1


def _influences() -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    return np.random.default_rng(0).standard_normal((9, 6)).astype(np.float32)


LABELS = ["x", "y", "x", "z", "y", "x"]


def test_subtasks_are_means_over_their_pairs() -> None:
    influences = _influences()
    ours = aggregate_subtasks(influences, LABELS)
    assert subtask_order(LABELS) == ("x", "y", "z") and ours.shape == (9, 3) and ours.dtype == np.float64
    for row in range(9):
        for column, name in enumerate(("x", "y", "z")):
            shots = [float(influences[row, v]) for v in range(6) if LABELS[v] == name]
            assert ours[row, column] == pytest.approx(sum(shots) / len(shots), abs=FLOAT64_ROUNDING)


def test_scores_are_the_best_or_the_mean_subtask() -> None:
    subtasks = aggregate_subtasks(_influences(), LABELS)
    best, mean = aggregate_scores(subtasks), aggregate_scores(subtasks, "mean")
    for row in range(9):
        values = subtasks[row].tolist()
        assert best[row] == max(values)
        assert mean[row] == pytest.approx(sum(values) / 3, abs=FLOAT64_ROUNDING)


def test_a_row_does_not_depend_on_its_company() -> None:
    influences = _influences()
    for mode in ("max", "mean"):
        whole = aggregate_scores(aggregate_subtasks(influences, LABELS), mode)
        for row in range(9):
            alone = aggregate_scores(aggregate_subtasks(influences[row : row + 1], LABELS), mode)
            assert alone[0] == whole[row]


def test_input_is_checked() -> None:
    influences = _influences()
    with pytest.raises(ConfigError, match="'median'"):
        aggregate_subtasks(influences, LABELS, "median")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="'min'"):
        aggregate_scores(influences, "min")  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="5 subtask labels"):
        aggregate_subtasks(influences, LABELS[:5])
    with pytest.raises(ShapeError, match="0 subtask labels"):
        aggregate_subtasks(influences[:, :0], [])
    with pytest.raises(ShapeError, match="T at least 1"):
        aggregate_scores(influences[:, :0])
