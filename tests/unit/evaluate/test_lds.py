"""Subsets, their sums, and what the correlation says of scores that are right, or the opposite."""

from __future__ import annotations

import numpy as np
import pytest

from rose_ray.config.evaluation import LdsConfig
from rose_ray.errors import NumericsError
from rose_ray.evaluate.lds import foretold_sums, lds_lines, lds_result, random_subsets
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
    assert foretold_sums({"a": 1.5, "b": -1.0, "c": 4.0}, [["a", "b"], ["c"]]).tolist() == [0.5, 4.0]


def test_scores_that_add_up() -> None:
    random = np.random.default_rng(0)
    scores = dict(zip(ROWS, random.normal(size=60), strict=True))
    foretold = foretold_sums(scores, random_subsets(ROWS, 12, LdsConfig()))
    margins = np.stack([foretold * 2 + 1, foretold**3], axis=1)
    right = lds_result("h", foretold, margins, Resampling(100))
    assert right.overall is not None and right.overall.value == 1.0 and right.by_pair.value == 1.0
    wrong = lds_result("h", -foretold, margins, Resampling(100))
    assert wrong.overall is not None and wrong.overall.value == -1.0
    unrelated = lds_result("h", foretold, random.normal(size=(20, 3)), Resampling(200))
    assert unrelated.overall is not None and unrelated.overall.low is not None and unrelated.overall.high is not None
    assert unrelated.overall.low < 0 < unrelated.overall.high
    lines = list(lds_lines("alpha", [right], 12))
    assert "20 random subsets of 12 rows" in lines[0]
    assert "mean margin +1.00 [+1.00, +1.00]  mean over 2 pairs +1.00 [+1.00, +1.00]" in lines[1]


def test_nothing_varies() -> None:
    with pytest.raises(NumericsError, match="nothing varies"):
        lds_result("h", np.arange(5.0), np.ones((5, 2)), Resampling(10))
