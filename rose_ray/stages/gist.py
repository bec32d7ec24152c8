"""GIST (arXiv:2602.18584): the influence's cosine, taken inside the span of the target's gradients.

Features and bank are those of any gradient score; only the last step differs. Inner products with the target's
gradients are what features keep (exactly, where the target is exact), so everything inside their span is known.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from rose_ray.config.target import TargetConfig
from rose_ray.errors import ConfigError
from rose_ray.kernels.aggregation import aggregate_subtasks, subtask_order
from rose_ray.kernels.influence import checkpoint_weights
from rose_ray.kernels.span_cosine import gradient_subspace, span_cosines
from rose_ray.stages.score import ScorableRows, score_rows, target_directions


class SpanScorer:
    """One target's directions and the subspace in which rows are compared with them.

    Args:
        banks: The target's bank, a table per checkpoint.
        mean_learning_rates: Of the checkpoints; their shares are the weights.
        target: Objective, normalisation, aggregation; whether pairs have columns of their own.
        rank: Dimensions of the subspace; None for all that the directions span.

    Attributes:
        subtasks: Names, in the order of their columns.
        pairs: Ids of the pairs that have a column.
        vectors: What features are multiplied with, [K, D] for each checkpoint.

    Raises:
        ConfigError: The subspace would have one dimension, or more than the directions span.
    """

    def __init__(
        self,
        banks: Sequence[pa.Table],
        mean_learning_rates: Sequence[float],
        target: TargetConfig,
        rank: int | None = None,
    ) -> None:
        directions = target_directions(banks, target)
        self.aggregation = target.aggregation
        self._names, self._subtask_of_V = list(directions[0].names), directions[0].subtasks
        self.subtasks = list(subtask_order(self._subtask_of_V))
        self.pairs = self._names if target.scores_pairs else []
        self._weights = checkpoint_weights(mean_learning_rates)
        self._pairs = [each.vectors_UD for each in directions]
        self.vectors = [gradient_subspace(vectors_VD, rank) for vectors_VD in self._pairs]
        if any(len(basis_KD) == 1 for basis_KD in self.vectors):
            raise ConfigError(
                f"target {target.name}: gist compares rows inside the span of {len(self._names)} pairs, which has one "
                "dimension, where every score is +1 or -1. Give pairs whose gradients differ, a rank of at least 2, or "
                "use method: rose."
            )

    def score(self, rows: ScorableRows, products: Sequence[np.ndarray]) -> pa.Table:
        """See `RowScorer`."""
        scores_NV = np.zeros((rows.table.num_rows, len(self._names)))
        for weight, rows_NK, vectors_VD, basis_KD in zip(
            self._weights, products, self._pairs, self.vectors, strict=True
        ):
            scores_NV += weight * span_cosines(rows_NK, vectors_VD, basis_KD)
        subtask_NT = aggregate_subtasks(scores_NV, self._subtask_of_V)
        return score_rows(
            rows,
            dict(zip(self.subtasks, subtask_NT.T, strict=True)),
            dict(zip(self.pairs, scores_NV.T, strict=False)),  # all pairs, or none
            self.aggregation,
        )
