"""Features times bank: the influence of every row on every pair, and one score a row.

    influence(z, pair) = sum over checkpoints i of w_i < unit(feature_i(z)), unit(direction_i(pair)) >

Section 3 of ROSE (arXiv:2412.00631): mean over the pairs of a subtask, then max over the subtasks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from rose_ray.config.models import Normalization, TargetConfig
from rose_ray.errors import AccountingError, AlteredFileError, DataError, SpaceMismatchError
from rose_ray.kernels.aggregation import aggregate_scores, aggregate_subtasks, subtask_order
from rose_ray.kernels.influence import checkpoint_weights, influence
from rose_ray.kernels.objectives import Directions, PairGradients, bank_directions
from rose_ray.kernels.quantization import dequantize
from rose_ray.kernels.selection import ranks
from rose_ray.schemas import FEATURE_REJECTED, scores_schema
from rose_ray.stores.features import StoredShard

SCORE_VERSION = 1
"""Raised whenever the same input would give other numbers."""


@dataclass(frozen=True)
class ShardRows:
    """The rows of one shard that take part.

    Attributes:
        shard: Its name.
        row_ids, sources: Of the rows wanted, in the shard's order.
        load: Reads the features when their turn comes, so that one shard at a time is in memory.
    """

    shard: str
    row_ids: list[str]
    sources: list[str]
    load: Callable[[], StoredShard]


@dataclass(frozen=True)
class ScoreTable:
    """A target's scores.

    Attributes:
        table: Schema ``scores_schema``; a row per scored row, in the pool's order.
        rejected: Rows that could not be scored, schema ``FEATURE_REJECTED``.
        subtasks: Names, in the order of their columns.
    """

    table: pa.Table
    rejected: pa.Table
    subtasks: list[str]


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
            _pair_gradients(bank),
            dpo_beta=target.dpo_beta,
            subtasks=bank["subtask"].to_pylist(),
            normalize=target.normalize,
        )
        for bank in banks
    ]


def normalized_features(table: pa.Table, normalize: Normalization) -> np.ndarray:
    """Return features [N, D] in the scale that ``normalize`` asks for.

    Stored features are projections divided by the exact length of what was projected, so ``exact`` is what is stored.
    Exact numbers stand behind the projected ones, as in the bank.
    """
    features_ND = stored_features(table)
    if normalize == "none":
        features_ND = features_ND * table["norm"].to_numpy()[:, None]
    elif normalize == "projected":
        features_ND = features_ND / np.linalg.norm(features_ND.astype(np.float64), axis=1, keepdims=True)
    return features_ND


def stored_features(table: pa.Table) -> np.ndarray:
    """Return features [N, D] as stored, float32: projected numbers, then exact ones."""
    dim = int(table.schema.metadata[b"dim"])
    parts = []
    if dim:
        codes = _list_column(table, "feature")
        scales_N = table["scale"].to_numpy() if "scale" in table.column_names else None
        parts.append(dequantize(codes, scales_N, dim))
    if "exact" in table.column_names:
        parts.append(_list_column(table, "exact").astype(np.float32))
    features_ND: np.ndarray = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
    return features_ND


def _list_column(table: pa.Table, name: str) -> np.ndarray:
    width = table.schema.field(name).type.list_size
    stored = table[name].combine_chunks()
    values = (stored.chunk(0) if isinstance(stored, pa.ChunkedArray) else stored).flatten()
    column: np.ndarray = values.to_numpy(zero_copy_only=False).reshape(-1, width)
    return column


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


def score_rows(
    shards: Iterable[ShardRows],
    banks: Sequence[pa.Table],
    mean_learning_rates: Sequence[float],
    target: TargetConfig,
) -> ScoreTable:
    """Score the pool for one target, a shard at a time.

    Memory: one shard's features, and about 400 bytes a row of the pool while ranks are made.

    Args:
        shards: Rows wanted and their features.
        banks: The target's bank, a table per checkpoint.
        mean_learning_rates: Of the checkpoints; their shares are the weights.
        target: Objective, normalisation, aggregation.

    Raises:
        AccountingError: A wanted row is neither scored nor rejected.
        AlteredFileError: Files of one shard disagree about their rows.
        DataError: No row could be scored.
    """
    directions = target_directions(banks, target)
    weights_C = checkpoint_weights(mean_learning_rates)
    labels = directions[0].subtasks
    subtasks = list(subtask_order(labels))
    parts, rejected, num_wanted = [], [], 0
    for shard in shards:
        stored = shard.load()
        num_wanted += len(shard.row_ids)
        part = _score_shard(shard, stored, directions, weights_C, target, subtasks)
        parts.append(part)
        rejected.append(_rejected_rows(shard, stored, part.num_rows))
    table, rejected_table = pa.concat_tables(parts), pa.concat_tables(rejected)
    if table.num_rows + rejected_table.num_rows != num_wanted:
        raise AccountingError(f"{num_wanted} rows wanted, {table.num_rows} scored, {rejected_table.num_rows} rejected.")
    if table.num_rows == 0:
        raise DataError(
            f"none of {num_wanted} rows could be scored; first reason: {rejected_table.slice(0, 1).to_pylist()}"
        )
    table = _with_ranks(table, subtasks)
    return ScoreTable(table, rejected_table, subtasks)


def _score_shard(
    shard: ShardRows,
    stored: StoredShard,
    directions: Sequence[Directions],
    weights_C: np.ndarray,
    target: TargetConfig,
    subtasks: list[str],
) -> pa.Table:
    stored_ids = stored.tables[0]["row_id"].to_pylist()
    for table in stored.tables[1:]:
        if table["row_id"].to_pylist() != stored_ids:
            raise AlteredFileError(
                f"shard {shard.shard}: its checkpoints hold different rows. Delete its folder and run again."
            )
    sources = dict(zip(shard.row_ids, shard.sources, strict=True))
    kept = pa.array([i for i, row_id in enumerate(stored_ids) if row_id in sources], pa.int64())
    tables = [table.take(kept) for table in stored.tables]
    influences_CNU = shard_influences(tables, directions, target.normalize)
    influences_NU = np.einsum("c,cnu->nu", weights_C, influences_CNU)
    subtask_scores_NT = aggregate_subtasks(influences_NU, directions[0].subtasks)
    scores_N = aggregate_scores(subtask_scores_NT, target.aggregation)
    row_ids = tables[0]["row_id"].to_pylist()

    def mean_of(column: str) -> pa.Array:
        return pa.array(np.mean([table[column].to_numpy() for table in tables], axis=0).astype(np.float32))

    columns = [
        pa.array(row_ids, pa.string()),
        pa.array([sources[row_id] for row_id in row_ids], pa.string()),
        tables[0]["num_tokens"].combine_chunks(),
        tables[0]["num_labelled_tokens"].combine_chunks(),
        mean_of("norm"),
        mean_of("momentum_share"),
        *(pa.array(subtask_scores_NT[:, t].astype(np.float32)) for t in range(len(subtasks))),
        pa.array(scores_N.astype(np.float32)),
        pa.array(np.zeros(len(row_ids), np.int64)),
        pa.array([shard.shard] * len(row_ids), pa.string()),
    ]
    return pa.Table.from_arrays(columns, schema=scores_schema(subtasks))


def _rejected_rows(shard: ShardRows, stored: StoredShard, num_scored: int) -> pa.Table:
    wanted = set(shard.row_ids)
    rows = [row for row in stored.rejected.to_pylist() if row["row_id"] in wanted]
    if num_scored + len(rows) != len(shard.row_ids):
        raise AccountingError(
            f"shard {shard.shard}: {len(shard.row_ids)} rows wanted, {num_scored} scored, {len(rows)} rejected. "
            "Delete its folder under features/ and run again."
        )
    return pa.Table.from_pylist(rows, schema=FEATURE_REJECTED)


def _with_ranks(table: pa.Table, subtasks: list[str]) -> pa.Table:
    place = table.schema.get_field_index("rank")
    row_ids = np.array(table["row_id"].to_pylist())
    ranks_N = ranks(table["score"].to_numpy().astype(np.float64), row_ids)
    return table.set_column(place, scores_schema(subtasks).field("rank"), pa.array(ranks_N.astype(np.int64)))


def _pair_gradients(bank: pa.Table) -> PairGradients:
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
