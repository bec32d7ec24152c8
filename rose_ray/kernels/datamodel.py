"""The linear datamodeling score: do a method's scores add up to what training on subsets does?

Park et al., TRAK (arXiv:2303.14186), definition 2.4. Shapes: N rows, S subsets, Q queries (held-out pairs).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rose_ray.errors import NonFiniteError, NumericsError, ShapeError
from rose_ray.kernels.correlation import spearman


@dataclass(frozen=True, eq=False)
class DatamodelScore:
    """How well the sums of scores rank the subsets.

    Attributes:
        value: Mean over the queries of the rank correlations that are defined.
        low, high: Percentile interval of 95 % over subsets drawn with replacement; None where too few differ.
        correlations_Q: Of each query; NaN where its measurements, or the foretold sums, do not vary.
    """

    value: float
    low: float | None
    high: float | None
    correlations_Q: NDArray[np.float64]


def subset_sums(scores_N: NDArray[Any], subsets: Sequence[NDArray[np.integer[Any]]]) -> NDArray[np.float64]:
    """Return the summed scores of each subset, [S]: what a linear method foretells of training on it.

    Args:
        scores_N: Or [N, Q], for sums [S, Q].
        subsets: Positions of the rows of each, none twice.

    Raises:
        ShapeError: A position is out of range, or stands twice.
    """
    scores_N = np.asarray(scores_N, dtype=np.float64)
    sums = []
    for number, members in enumerate(subsets):
        if len(np.unique(members)) != len(members):
            raise ShapeError(f"subset {number} holds a row twice; expected each at most once")
        if len(members) and (min(members) < 0 or max(members) >= len(scores_N)):
            raise ShapeError(f"subset {number} has positions outside of 0 to {len(scores_N) - 1}")
        sums.append(scores_N[members].sum(axis=0))
    return np.array(sums)


def datamodel_score(
    foretold_SQ: NDArray[Any], measured_SQ: NDArray[Any], *, num_resamples: int = 1000, seed: int = 0
) -> DatamodelScore:
    """Return the mean over queries of Spearman's correlation between foretold and measured outputs of the subsets.

    Args:
        foretold_SQ: From `subset_sums`; [S] where one forecast serves all queries.
        measured_SQ: What training on each subset gave, larger where the method expects more; [S] for one query.
        num_resamples: Of the subsets, for the interval.
        seed: Of the resampling.

    Raises:
        ShapeError: The shapes disagree.
        NonFiniteError: A number is NaN or infinite.
        NumericsError: No query has a correlation: fewer than two subsets, or nothing varies.
    """
    measured_SQ = np.asarray(measured_SQ, dtype=np.float64)
    measured_SQ = measured_SQ[:, None] if measured_SQ.ndim == 1 else measured_SQ
    foretold_SQ = np.asarray(foretold_SQ, dtype=np.float64)
    if foretold_SQ.ndim == 1:
        foretold_SQ = np.broadcast_to(foretold_SQ[:, None], (len(foretold_SQ), measured_SQ.shape[1]))
    if foretold_SQ.shape != measured_SQ.shape:
        raise ShapeError(f"foretold {foretold_SQ.shape} and measured {measured_SQ.shape}; expected one shape")
    if not (np.isfinite(foretold_SQ).all() and np.isfinite(measured_SQ).all()):
        raise NonFiniteError("a foretold or measured number is NaN or infinite; leave its subset out")
    correlations_Q = _correlations(foretold_SQ, measured_SQ)
    if not np.isfinite(correlations_Q).any():
        raise NumericsError(f"no query has a rank correlation over {len(measured_SQ)} subsets: nothing varies")
    random, found = np.random.default_rng(seed), []
    for _ in range(num_resamples):
        drawn = random.integers(0, len(measured_SQ), len(measured_SQ))
        resampled_Q = _correlations(foretold_SQ[drawn], measured_SQ[drawn])
        if np.isfinite(resampled_Q).any():
            found.append(float(np.nanmean(resampled_Q)))
    low, high = np.quantile(found, [0.025, 0.975]) if 2 * len(found) >= num_resamples > 0 else (None, None)
    return DatamodelScore(
        float(np.nanmean(correlations_Q)),
        None if low is None else float(low),
        None if high is None else float(high),
        correlations_Q,
    )


def _correlations(foretold_SQ: NDArray[np.float64], measured_SQ: NDArray[np.float64]) -> NDArray[np.float64]:
    each = (spearman(*columns) for columns in zip(foretold_SQ.T, measured_SQ.T, strict=True))
    return np.array([np.nan if value is None else value for value in each])
