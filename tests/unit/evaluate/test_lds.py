"""Subsets, their sums, and what the correlation says of scores that are right, or the opposite."""

from __future__ import annotations

import numpy as np
import pytest

from rose_ray.config.evaluation import LdsConfig
from rose_ray.data.conversation import Message
from rose_ray.data.preferences import PreferencePair
from rose_ray.errors import NumericsError
from rose_ray.evaluate.lds import RowScores, lds_lines, lds_result, random_subsets
from rose_ray.kernels.bootstrap import Resampling

ROWS = [f"{number:03d}" for number in range(60)]


def test_subsets_are_random_and_of_one_size() -> None:
    settings = LdsConfig(subsets=50, seed=1)
    subsets = random_subsets(ROWS, 12, settings)
    assert random_subsets(ROWS[::-1], 12, settings) == subsets
    assert all(len(set(subset)) == 12 for subset in subsets) and len({tuple(sorted(s)) for s in subsets}) == 50
    times = np.array([sum(row in subset for subset in subsets) for row in ROWS])
    # 10 of 50 expected of each; binomial standard deviation 2.8, and 4.5 of them are never reached by 60 rows
    assert times.min() > 0 and times.max() < 23


def test_sums_by_hand() -> None:
    table = RowScores(["a", "b", "c"], ["x", "y"], np.array([[2.0, 1.5, 2.0], [-1.0, -1.0, -3.0], [4.0, 4.0, 0.0]]))
    assert table.sums([["a", "b"], ["c"]]).tolist() == [[1.0, 0.5, -1.0], [4.0, 4.0, 0.0]]
    assert table.columns([pair("y"), pair("elsewhere"), pair("x")]) == [2, 0, 1]


def pair(subtask: str) -> PreferencePair:
    return PreferencePair(subtask, subtask, (Message("user", "Why?"),), "good", "bad", "Why?", "good", "bad")


def test_scores_that_add_up() -> None:
    random = np.random.default_rng(0)
    table = RowScores(ROWS, [], random.normal(size=(60, 1)))
    foretold = table.sums(random_subsets(ROWS, 12, LdsConfig()))
    margins = np.concatenate([foretold * 2 + 1, foretold**3], axis=1)
    right = lds_result("h", foretold, [0, 0], margins, Resampling(100))
    assert right.overall is not None and right.overall.value == 1.0 and right.by_pair.value == 1.0
    wrong = lds_result("h", -foretold, [0, 0], margins, Resampling(100))
    assert wrong.overall is not None and wrong.overall.value == -1.0
    unrelated = lds_result("h", foretold, [0, 0, 0], random.normal(size=(20, 3)), Resampling(200))
    assert unrelated.overall is not None and unrelated.overall.low is not None and unrelated.overall.high is not None
    assert unrelated.overall.low < 0 < unrelated.overall.high
    lines = list(lds_lines("alpha", [right], 12))
    assert "20 random subsets of 12 rows" in lines[0]
    assert "mean margin +1.00 [+1.00, +1.00]  mean over 2 pairs +1.00 [+1.00, +1.00]" in lines[1]


def test_each_pair_is_foretold_by_its_own_subtask() -> None:
    scores_NT = np.random.default_rng(3).normal(size=(60, 2))
    table = RowScores(ROWS, ["x", "y"], np.column_stack([scores_NT.max(axis=1), scores_NT]))
    foretold = table.sums(random_subsets(ROWS, 12, LdsConfig()))
    margins = foretold[:, [1, 2, 2]]  # subtasks whose scores add up exactly, though the best of both does not
    own = lds_result("h", foretold, table.columns([pair("x"), pair("y"), pair("y")]), margins, Resampling(20))
    assert own.by_pair.value == 1.0 and own.by_pair.correlations_Q.tolist() == [1.0, 1.0, 1.0]
    assert own.foretold_S.tolist() == foretold[:, 0].tolist()
    assert lds_result("h", foretold, [0, 0, 0], margins, Resampling(20)).by_pair.value < 0.9


def test_nothing_varies() -> None:
    with pytest.raises(NumericsError, match="nothing varies"):
        lds_result("h", np.arange(5.0)[:, None], [0, 0], np.ones((5, 2)), Resampling(10))
