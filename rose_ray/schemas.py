"""Arrow schemas of every table rose_ray writes. A column's meaning and unit stand in its field metadata."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa


def _column(name: str, kind: pa.DataType, meaning: str, *, nullable: bool = False) -> pa.Field:
    return pa.field(name, kind, nullable=nullable, metadata={"meaning": meaning})


SHARD = pa.schema(
    [
        _column("row_id", pa.string(), "hex digest of the normalised conversation: roles, contents, tools"),
        _column("source", pa.string(), "source the row is counted under"),
        _column("file", pa.string(), "input file as named in the configuration, or matched by its pattern"),
        _column("place", pa.int64(), "line number in JSONL, row number in JSON and Parquet; from 1"),
        _column("record_id", pa.string(), "the record's own id as JSON text", nullable=True),
        _column("record", pa.string(), "the record's exact text"),
        _column("conversation", pa.string(), "normalised conversation as canonical JSON: messages, tools"),
        _column("num_copies", pa.int32(), "rows of this file with this row_id, this one included"),
    ],
    metadata={"table": "shard", "version": "1"},
)

REJECTED = pa.schema(
    [
        _column("file", pa.string(), "input file"),
        _column("place", pa.int64(), "line or row number, from 1; 0 where the whole file is meant"),
        _column("reason", pa.string(), "short stable identifier"),
        _column("detail", pa.string(), "what was found and what was expected"),
    ],
    metadata={"table": "rejected", "version": "1"},
)

DUPLICATES = pa.schema(
    [
        _column("row_id", pa.string(), "row that is passed over for one of an earlier file of the pool"),
        _column("shard", pa.string(), "shard in which it is passed over"),
        _column("owner", pa.string(), "shard that holds the earlier one"),
        _column("reason", pa.string(), "duplicate: equal; id_conflict: of the same source and id, with other content"),
    ],
    metadata={"table": "duplicates", "version": "2"},
)

TOKENS = pa.schema(
    [
        _column("row_id", pa.string(), "row"),
        _column("input_ids", pa.list_(pa.int32()), "token ids after cutting"),
        _column("loss_mask", pa.list_(pa.bool_()), "True where the token carries loss"),
        _column("num_tokens_cut", pa.int32(), "tokens cut off at the limit"),
    ],
    metadata={"table": "tokens", "version": "1"},
)

FEATURE_REJECTED = pa.schema(
    [
        _column("row_id", pa.string(), "row that could not be scored"),
        _column("reason", pa.string(), "short stable identifier"),
        _column("detail", pa.string(), "what was found and what was expected"),
    ],
    metadata={"table": "feature_rejected", "version": "1"},
)


LENGTHS = pa.schema(
    [
        _column("row_id", pa.string(), "row"),
        _column("num_tokens", pa.int32(), "tokens after cutting"),
        _column("num_labelled_tokens", pa.int32(), "tokens that carry loss"),
        _column("num_tokens_cut", pa.int32(), "tokens cut off at the limit"),
    ],
    metadata={"table": "lengths", "version": "1"},
)


def shard_scores_schema(width: int, number: pa.DataType | None = None) -> pa.Schema:
    """Schema of a method's scores of one shard. ``width``: columns of the method; ``number``: float64 unless given."""
    return pa.schema(
        [
            _column("row_id", pa.string(), "row"),
            _column(
                "values", pa.list_(number or pa.float64(), width), "a number a subtask, a pair, or one; or a vector"
            ),
        ],
        metadata={"table": "shard_scores", "version": "1"},
    )


STORED_TYPES = {"float32": pa.float32(), "float16": pa.float16(), "int8": pa.int8(), "bit1": pa.uint8()}
"""Arrow type of a stored number of a feature; ``bit1`` has eight in one."""


def features_schema(dim: int, stored_dtype: str, num_exact: int = 0) -> pa.Schema:
    """Schema of one shard's features at one checkpoint.

    Args:
        dim: Numbers of a feature that are projections; 0 where all are exact.
        stored_dtype: Key of ``STORED_TYPES``.
        num_exact: Numbers that are exact inner products, kept in float32 behind the projected ones.
    """
    width = -(-dim // 8) if stored_dtype == "bit1" else dim
    stored = pa.list_(STORED_TYPES[stored_dtype], width)
    feature = _column("feature", stored, "projection of the Adam direction, over its exact length")
    scale = _column("scale", pa.float32(), "what the stored integers are multiplied by; signs: bits, lowest first")
    exact = _column("exact", pa.list_(pa.float32(), num_exact), "exact inner products, over the direction's length")
    return pa.schema(
        [
            _column("row_id", pa.string(), "row"),
            *([feature] if dim else []),
            *([scale] if dim and stored_dtype in ("int8", "bit1") else []),
            *([exact] if num_exact else []),
            _column("norm", pa.float64(), "exact length of the unprojected direction"),
            _column("momentum_share", pa.float32(), "length of the common moment term over that of the first moment"),
            _column("loss", pa.float32(), "token-mean cross-entropy, nats"),
            _column("num_labelled_tokens", pa.int32(), "tokens that carry loss"),
            _column("num_tokens", pa.int32(), "tokens after cutting"),
            _column("num_tokens_cut", pa.int32(), "tokens cut off at the limit"),
        ],
        metadata={"table": "features", "version": "2", "dim": str(dim), "stored_dtype": stored_dtype},
    )


def bank_schema(dim: int) -> pa.Schema:
    """Schema of a target's pairs at one checkpoint. ``dim``: width of a feature, exact numbers included."""
    side = "gradient of the summed log-probability of the {} answer, as features are made"
    return pa.schema(
        [
            _column("pair_id", pa.string(), "pair"),
            _column("subtask", pa.string(), "subtask the pair belongs to"),
            _column("gradient_w", pa.list_(pa.float32(), dim), side.format("chosen")),
            _column("gradient_l", pa.list_(pa.float32(), dim), side.format("rejected")),
            _column("norm_w", pa.float64(), "exact length of the unprojected chosen gradient"),
            _column("norm_l", pa.float64(), "exact length of the unprojected rejected gradient"),
            _column("dot_wl", pa.float64(), "exact inner product of the two"),
            _column("num_tokens_w", pa.int32(), "answer tokens of the chosen side"),
            _column("num_tokens_l", pa.int32(), "answer tokens of the rejected side"),
            _column("num_tokens_cut_w", pa.int32(), "tokens cut off the chosen side"),
            _column("num_tokens_cut_l", pa.int32(), "tokens cut off the rejected side"),
            _column("logps_w", pa.float64(), "summed log-probability under the checkpoint, nats"),
            _column("logps_l", pa.float64(), "summed log-probability under the checkpoint, nats"),
            _column("reference_logps_w", pa.float64(), "summed log-probability under the base model, nats"),
            _column("reference_logps_l", pa.float64(), "summed log-probability under the base model, nats"),
        ],
        metadata={"table": "bank", "version": "1"},
    )


def scores_schema(subtasks: Sequence[str], pairs: Sequence[str] = ()) -> pa.Schema:
    """Schema of a target's score table.

    Args:
        subtasks: Names, one column each.
        pairs: Ids, one column each where pairs take turns at selection.
    """
    return pa.schema(
        [
            _column("row_id", pa.string(), "row"),
            _column("source", pa.string(), "source of the row"),
            _column("num_tokens", pa.int32(), "tokens after cutting"),
            _column("num_labelled_tokens", pa.int32(), "tokens that carry loss"),
            _column("gradient_norm", pa.float32(), "length of the direction, mean over checkpoints", nullable=True),
            _column("momentum_share", pa.float32(), "mean over checkpoints", nullable=True),
            *(_column(f"subtask_{name}", pa.float32(), f"influence on subtask {name}") for name in subtasks),
            *(_column(f"pair_{pair}", pa.float32(), f"influence on pair {pair}") for pair in pairs),
            _column("score", pa.float32(), "aggregated over subtasks; higher helps more"),
            _column("rank", pa.int64(), "1 is best; ties by row_id"),
            _column("shard", pa.string(), "shard that holds the row"),
        ],
        metadata={"table": "scores", "version": "2"},
    )


PASSED_OVER = pa.schema(
    [
        _column("row_id", pa.string(), "row that was next by its score, and was not selected"),
        _column("source", pa.string(), "source of the row"),
        _column("score", pa.float32(), "as in the selection"),
        _column("reason", pa.string(), "near_duplicate, contaminated, too_similar or no_vector"),
        _column(
            "match",
            pa.string(),
            "row_id of the selected row it resembles, the test item whose text it holds, or nothing",
        ),
    ],
    metadata={"table": "passed_over", "version": "1"},
)

SELECTED = pa.schema(
    [
        _column("place", pa.int64(), "order of choice, from 1"),
        _column("row_id", pa.string(), "row"),
        _column("source", pa.string(), "source of the row"),
        _column("score", pa.float32(), "score in the target's table; the best one for a set of several targets"),
        _column("best_for", pa.string(), "subtask, or target of a set of several, on which the row scores highest"),
        _column("num_tokens", pa.int32(), "tokens after cutting"),
        _column("conversation", pa.string(), "normalised conversation as canonical JSON: messages, tools"),
        _column("record", pa.string(), "the record's exact text"),
    ],
    metadata={"table": "selected", "version": "1"},
)
