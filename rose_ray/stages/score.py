"""Features times bank: the influence of every row on every pair, and one score a row.

    influence(z, pair) = sum over checkpoints i of w_i < unit(feature_i(z)), unit(direction_i(pair)) >

Section 3 of ROSE (arXiv:2412.00631): mean over the pairs of a subtask, then max over the subtasks. Mean and sum being
linear, the pairs' directions are weighted and averaged once, and a row meets one vector a subtask and checkpoint.

Shapes: C checkpoints, N rows, U directions, T subtasks, D numbers of a feature.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rose_ray.config.target import Normalization, TargetConfig
from rose_ray.errors import AccountingError, AlteredFileError, NonFiniteError, SpaceMismatchError
from rose_ray.kernels.aggregation import ScoreMode, aggregate_scores, aggregate_subtasks, subtask_order
from rose_ray.kernels.feature_matrix import FeatureMatrix
from rose_ray.kernels.influence import checkpoint_weights, influence, influences
from rose_ray.kernels.objectives import Directions, PairGradients, bank_directions
from rose_ray.schemas import FEATURE_REJECTED, scores_schema
from rose_ray.stages.score_table import ScoreTable
from rose_ray.stages.stored_features import normalized_features, row_scales, stored_features
from rose_ray.stores.features import StoredShard

SCORE_VERSION = 2
"""Raised whenever the same input would give other numbers."""

_NUM_NAMED = 10


@dataclass(frozen=True)
class ShardRows:
    """The rows of one shard that take part.

    Attributes:
        shard: Its name.
        row_ids, sources: Of the rows wanted, strings, in the shard's order.
        stored: The shard's features, those of other rows among them.
    """

    shard: str
    row_ids: pa.Array | pa.ChunkedArray
    sources: pa.Array | pa.ChunkedArray
    stored: StoredShard


def check_same_space(features: Mapping[str, Any], bank: Mapping[str, Any]) -> None:
    """Refuse to multiply vectors that live in different spaces.

    Args:
        features, bank: Their ``space``: digests of base, adapters and layout, and the projection's identity.

    Raises:
        SpaceMismatchError: They differ; the message names in what.
    """
    differing = [
        f"{key}: features {features.get(key)!r}, bank {bank.get(key)!r}"
        for key in sorted({*features, *bank})
        if features.get(key) != bank.get(key)
    ]
    if differing:
        raise SpaceMismatchError(
            "features and bank were made in different spaces:\n  "
            + "\n  ".join(differing)
            + "\nRun the stage that is older again."
        )


def target_directions(banks: Sequence[pa.Table], target: TargetConfig) -> list[Directions]:
    """Return a target's directions at every checkpoint. ``banks``: a table of ``bank_schema`` each."""
    return [
        bank_directions(
            target.objective,
            stored_pair_gradients(bank),
            dpo_beta=target.dpo_beta,
            subtasks=bank["subtask"].to_pylist(),
            normalize=target.normalize,
        )
        for bank in banks
    ]


def shard_influences(
    tables: Sequence[pa.Table], directions: Sequence[Directions], normalize: Normalization
) -> np.ndarray:
    """Return the influence of each row on each direction at each checkpoint, [C, N, U], not yet weighted."""
    return np.stack(
        [
            influence(normalized_features(table, normalize), direction.vectors_UD)
            for table, direction in zip(tables, directions, strict=True)
        ]
    )


class TargetScorer:
    """One target's directions, ready to meet features.

    Args:
        banks: The target's bank, a table per checkpoint.
        mean_learning_rates: Of the checkpoints; their shares are the weights.
        target: Objective, normalisation, aggregation; whether pairs have columns of their own.

    Attributes:
        subtasks: Names, in the order of their columns.
        pairs: Ids of the pairs that have a column.
        vectors: What features are multiplied with, [U, D] for each checkpoint: subtasks, then pairs.
    """

    def __init__(self, banks: Sequence[pa.Table], mean_learning_rates: Sequence[float], target: TargetConfig) -> None:
        directions = target_directions(banks, target)
        self.normalize, self.aggregation = target.normalize, target.aggregation
        self.subtasks = list(subtask_order(directions[0].subtasks))
        self.pairs = list(directions[0].names) if target.scores_pairs else []
        weights = checkpoint_weights(mean_learning_rates)
        # A row meets subtasks and pairs in one product.
        self.vectors = [
            weight
            * np.vstack([aggregate_subtasks(each.vectors_UD.T, each.subtasks).T, each.vectors_UD[: len(self.pairs)]])
            for weight, each in zip(weights, directions, strict=True)
        ]

    def score(self, rows: ScorableRows, products: Sequence[np.ndarray]) -> pa.Table:
        """See `RowScorer`."""
        scores_NU = np.zeros((rows.table.num_rows, len(self.subtasks) + len(self.pairs)))
        for table, features, products_NU in zip(rows.tables, rows.features, products, strict=True):
            scales_N = row_scales(table, features, self.normalize)
            with np.errstate(invalid="ignore"):  # `_check_finite` names the rows
                scores_NU += products_NU if scales_N is None else products_NU * scales_N[:, None]
        num_subtasks = len(self.subtasks)
        return score_rows(
            rows,
            dict(zip(self.subtasks, scores_NU.T[:num_subtasks], strict=True)),
            dict(zip(self.pairs, scores_NU.T[num_subtasks:], strict=True)),
            self.aggregation,
        )


def score_rows(
    rows: ScorableRows,
    subtasks: Mapping[str, np.ndarray],
    pairs: Mapping[str, np.ndarray],
    aggregation: ScoreMode,
) -> pa.Table:
    """Return rows' part of a score table, schema ``scores_schema``, ranks left 0.

    Args:
        rows: What no target changes.
        subtasks: Scores [N] by subtask.
        pairs: Scores [N] by pair, of pairs that have columns.
        aggregation: From subtasks to the score.

    Raises:
        NonFiniteError: A score is NaN or infinite; the rows are named.
    """
    scores_N = aggregate_scores(np.stack(list(subtasks.values()), axis=1), aggregation)
    _check_finite(rows, scores_N)
    columns = [
        *rows.table.select(["row_id", "source", "num_tokens", "num_labelled_tokens"]).columns,
        *rows.table.select(["gradient_norm", "momentum_share"]).columns,
        *(pa.array(column_N.astype(np.float32)) for column_N in (*subtasks.values(), *pairs.values())),
        pa.array(scores_N.astype(np.float32)),
        pa.array(np.zeros(len(scores_N), np.int64)),
        pa.repeat(rows.shard, len(scores_N)),
    ]
    return pa.Table.from_arrays(columns, schema=scores_schema(list(subtasks), list(pairs)))


class RowScorer(Protocol):
    """What turns features into a part of a score table.

    Attributes:
        subtasks: Names, in the order of their columns.
        pairs: Ids of the pairs that have a column.
        vectors: What features are multiplied with, [U, D] for each checkpoint.
    """

    subtasks: list[str]
    pairs: list[str]
    vectors: list[np.ndarray]

    def score(self, rows: ScorableRows, products: Sequence[np.ndarray]) -> pa.Table:
        """Return the rows' part of the score table, schema ``scores_schema``, ranks left 0.

        Args:
            rows: Rows that can be scored.
            products: Of their features, as stored, with ``vectors``, [N, U] for each checkpoint.
        """
        ...


@dataclass(frozen=True)
class ScorableRows:
    """What all targets need to know of a shard's rows that have features and are wanted.

    Attributes:
        shard: Its name.
        table: The columns of a score table that no target changes.
        tables: Feature tables of these rows, one a checkpoint.
        features: Their features, as stored.
        rejected: Rows wanted that have no features, schema ``FEATURE_REJECTED``.
    """

    shard: str
    table: pa.Table
    tables: list[pa.Table]
    features: list[FeatureMatrix]
    rejected: pa.Table


def score_shards(shards: Iterable[ShardRows], scorers: Sequence[RowScorer], tables: Sequence[ScoreTable]) -> None:
    """Score the pool for several targets in one pass, a shard at a time, and add to the targets' tables.

    Args:
        shards: Rows wanted and their features, of one feature space.
        scorers: Of the targets.
        tables: Empty ones, of the same targets; `ScoreTable.settle` comes next.

    Raises:
        AccountingError: A wanted row is neither scored nor rejected.
        AlteredFileError: Files of one shard disagree about their rows.
    """
    for shard in shards:
        rows = scorable_rows(shard)
        products = [
            influences(features, [scorer.vectors[place] for scorer in scorers])
            for place, features in enumerate(rows.features)
        ]
        for scorer, table, own in zip(scorers, tables, zip(*products, strict=True), strict=True):
            table.add(scorer.score(rows, own), rows.rejected, len(shard.row_ids))


def scorable_rows(shard: ShardRows) -> ScorableRows:
    """Return a shard's rows that can be scored; raises as `score_shards`."""
    stored_ids = shard.stored.tables[0]["row_id"]
    if any(not table["row_id"].equals(stored_ids) for table in shard.stored.tables[1:]):
        raise AlteredFileError(
            f"shard {shard.shard}: its checkpoints hold different rows. Delete its folder and run again."
        )
    place_of = pc.index_in(stored_ids, value_set=shard.row_ids)
    tables = shard.stored.tables
    if place_of.null_count:
        tables = [table.filter(place_of.is_valid()) for table in tables]
    rejected = shard.stored.rejected.filter(pc.is_in(shard.stored.rejected["row_id"], value_set=shard.row_ids))
    if tables[0].num_rows + rejected.num_rows != len(shard.row_ids):
        raise AccountingError(
            f"shard {shard.shard}: {len(shard.row_ids)} rows wanted, {tables[0].num_rows} scored, "
            f"{rejected.num_rows} rejected. Delete its folder under features/ and run again."
        )

    def mean_of(column: str) -> np.ndarray:
        mean_N: np.ndarray = np.mean([table[column].to_numpy() for table in tables], axis=0).astype(np.float32)
        return mean_N

    columns = {
        "row_id": tables[0]["row_id"],
        "source": shard.sources.take(place_of.drop_null()),
        "num_tokens": tables[0]["num_tokens"],
        "num_labelled_tokens": tables[0]["num_labelled_tokens"],
        "gradient_norm": mean_of("norm"),
        "momentum_share": mean_of("momentum_share"),
    }
    features = [stored_features(table) for table in tables]
    return ScorableRows(shard.shard, pa.table(columns), tables, features, rejected.cast(FEATURE_REJECTED))


def _check_finite(rows: ScorableRows, scores_N: np.ndarray) -> None:
    bad = np.flatnonzero(~np.isfinite(scores_N.astype(np.float32)))
    if bad.size:
        named = ", ".join(rows.table["row_id"].take(bad[:_NUM_NAMED]).to_pylist())
        raise NonFiniteError(
            f"shard {rows.shard}: {bad.size} rows have scores that are not finite, first: {named}; expected features "
            "and pairs of moderate length. Use `normalize: exact`, or delete the shard's folder under features/."
        )


def stored_pair_gradients(bank: pa.Table) -> PairGradients:
    """Return what a table of ``bank_schema`` knows of its pairs, for the objectives."""

    def vectors(name: str) -> np.ndarray:
        dim = bank.schema.field(name).type.list_size
        flat = pa.concat_arrays(bank[name].chunks).flatten().to_numpy(zero_copy_only=False)
        return np.asarray(flat.reshape(-1, dim), dtype=np.float64)

    def numbers(name: str) -> np.ndarray:
        return np.asarray(bank[name].to_numpy(), dtype=np.float64)

    return PairGradients(
        pair_ids=bank["pair_id"].to_pylist(),
        g_w_VD=vectors("gradient_w"),
        g_l_VD=vectors("gradient_l"),
        norms_w_V=numbers("norm_w"),
        norms_l_V=numbers("norm_l"),
        dots_wl_V=numbers("dot_wl"),
        tokens_w_V=numbers("num_tokens_w"),
        tokens_l_V=numbers("num_tokens_l"),
        logps_w_V=numbers("logps_w"),
        logps_l_V=numbers("logps_l"),
        ref_logps_w_V=numbers("reference_logps_w"),
        ref_logps_l_V=numbers("reference_logps_l"),
    )
