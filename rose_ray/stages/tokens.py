"""Pool rows to samples: what goes into the model."""

from __future__ import annotations

import pyarrow as pa

from rose_ray.data.conversation import parse_conversation
from rose_ray.data.tokenize import Sample, Tokeniser
from rose_ray.errors import RowError
from rose_ray.schemas import FEATURE_REJECTED, TOKENS


def tokenize_shard(shard: pa.Table, tokeniser: Tokeniser) -> tuple[pa.Table, pa.Table]:
    """Tokenise the rows of a shard.

    Args:
        shard: Columns ``row_id`` and ``conversation`` of schema ``SHARD``.
        tokeniser: Of the base model.

    Returns:
        Samples (schema ``TOKENS``) and rows that make none (schema ``FEATURE_REJECTED``), both in the shard's order.
    """
    samples: list[dict[str, object]] = []
    rejected: list[dict[str, str]] = []
    for row_id, text in zip(shard["row_id"].to_pylist(), shard["conversation"].to_pylist(), strict=True):
        try:
            sample = tokeniser.encode(parse_conversation(text))
        except RowError as error:
            rejected.append({"row_id": row_id, "reason": error.reason, "detail": error.detail})
        else:
            samples.append({"row_id": row_id, **sample.__dict__})
    return pa.Table.from_pylist(samples, schema=TOKENS), pa.Table.from_pylist(rejected, schema=FEATURE_REJECTED)


def read_samples(tokens: pa.Table) -> list[Sample]:
    """Return the samples of a ``TOKENS`` table."""
    columns = (tokens[name].to_pylist() for name in ("input_ids", "loss_mask", "num_tokens_cut"))
    return [Sample(ids, mask, cut) for ids, mask, cut in zip(*columns, strict=True)]
