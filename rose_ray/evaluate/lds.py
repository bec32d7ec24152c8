"""Do scores add up to what training does? Trainings on random subsets against the sums of their scores.

Shapes: N scored rows, S subsets, Q pairs, C columns of scores: the score, then one a subtask.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rose_ray.config.evaluation import LdsConfig
from rose_ray.data.preferences import PreferencePair
from rose_ray.kernels.bootstrap import Estimate, Resampling, unit_estimate
from rose_ray.kernels.correlation import spearman
from rose_ray.kernels.datamodel import DatamodelScore, datamodel_score, subset_sums
from rose_ray.stages.warmup import seeded_order


@dataclass(frozen=True, eq=False)
class LdsResult:
    """How the sums of scores rank the subsets by what was measured on one benchmark.

    Attributes:
        benchmark: Its name.
        overall: Spearman of the sums with the mean margin, interval over subsets; None where either does not vary.
        by_pair: Mean over the pairs of each one's own correlation with the sums for its subtask.
        foretold_S, measured_S: Sums of scores, mean margins.
    """

    benchmark: str
    overall: Estimate | None
    by_pair: DatamodelScore
    foretold_S: NDArray[np.float64]
    measured_S: NDArray[np.float64]


def random_subsets(row_ids: Sequence[str], size: int, settings: LdsConfig) -> list[list[str]]:
    """Return random subsets of ``size`` rows each, drawn apart from one another by ``settings.seed``."""
    return [seeded_order(row_ids, f"lds-{settings.seed}-{number}")[:size] for number in range(settings.subsets)]


@dataclass(frozen=True, eq=False)
class RowScores:
    """A target's score table.

    Attributes:
        row_ids: N of them.
        subtasks: C - 1 names.
        scores_NC: The score, then that of each subtask.
    """

    row_ids: Sequence[str]
    subtasks: Sequence[str]
    scores_NC: NDArray[np.float64]

    def sums(self, subsets: Sequence[Sequence[str]]) -> NDArray[np.float64]:
        """Return the summed scores of each subset of row ids, [S, C]."""
        places = {row_id: place for place, row_id in enumerate(self.row_ids)}
        return subset_sums(self.scores_NC, [np.array([places[row_id] for row_id in subset]) for subset in subsets])

    def columns(self, pairs: Sequence[PreferencePair]) -> list[int]:
        """Return each pair's column, Q of them: its subtask's, or the score's where the target has no such subtask."""
        known = {name: place for place, name in enumerate(self.subtasks, start=1)}
        return [known.get(pair.subtask, 0) for pair in pairs]


def lds_result(
    benchmark: str,
    foretold_SC: NDArray[np.float64],
    columns: Sequence[int],
    margins_SQ: NDArray[np.float64],
    resampling: Resampling,
) -> LdsResult:
    """Compare sums of scores with margins.

    Args:
        benchmark: Name of what was measured on.
        foretold_SC: From `RowScores.sums`; the first column is compared with the mean margin.
        columns: From `RowScores.columns`: what each pair's margin is compared with.
        margins_SQ: Margin of every pair after training on each subset; the untrained model's are 0.
        resampling: Of the subsets.

    Raises:
        NumericsError: Nothing varies.
    """
    foretold_S = foretold_SC[:, 0]
    measured_S = margins_SQ.mean(axis=1)
    overall = unit_estimate(
        len(foretold_S), lambda taken_S: spearman(foretold_S[taken_S], measured_S[taken_S]), resampling
    )
    foretold_SQ = foretold_SC[:, list(columns)]
    by_pair = datamodel_score(foretold_SQ, margins_SQ, num_resamples=resampling.num_resamples, seed=resampling.seed)
    return LdsResult(benchmark, overall, by_pair, foretold_S, measured_S)


def lds_lines(target: str, results: Sequence[LdsResult], size: int) -> Iterator[str]:
    """Yield results as lines of text."""
    number = len(results[0].foretold_S)
    yield f"{target}: sums of scores against margins after training on {number} random subsets of {size:,} rows"
    for result in results:
        overall = "undefined" if result.overall is None else _text(result.overall)
        pairs = _text(Estimate(result.by_pair.value, result.by_pair.low, result.by_pair.high))
        defined = int(np.isfinite(result.by_pair.correlations_Q).sum())
        yield f"  {result.benchmark:<24} mean margin {overall}  mean over {defined} pairs {pairs}"


def _text(estimate: Estimate) -> str:
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:+.2f} without an interval"
    return f"{estimate.value:+.2f} [{estimate.low:+.2f}, {estimate.high:+.2f}]"
