"""Tasks that read shards and make samples of them. They start many processes, so nothing here imports torch or PEFT."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray

from rose_ray.config.model import ModelConfig
from rose_ray.data.tokenize import Tokeniser
from rose_ray.distributed.metrics import count
from rose_ray.distributed.session import carried_errors
from rose_ray.errors import DataError
from rose_ray.methods.shards import count_tokens
from rose_ray.model.tokenizer import load_tokeniser
from rose_ray.stages.pool import read_pool_shard, skipped_rows
from rose_ray.stages.tokens import tokenize_shard
from rose_ray.stores.manifest import Manifest
from rose_ray.stores.workspace import FileRecord, Workspace


def tokenize_row(row: dict[str, Any], workspace: Workspace, model: ModelConfig, pool_ref: list[Any]) -> dict[str, Any]:
    """Turn the name of a shard into its samples: one Ray row is one shard, so no block ever cuts a shard.

    Args:
        row: ``shard``, its name; ``skipped``, row ids passed over; ``spaces``, handed on.
        workspace: Holds the shard.
        model: Names tokenizer, template and the longest sample.
        pool_ref: Reference to the pool's manifest, in a list so that Ray Data does not fetch it for every row.
    """
    with carried_errors():
        return tokenize_task(row, workspace, model, ray.get(pool_ref[0]))


def tokenize_task(row: dict[str, Any], workspace: Workspace, model: ModelConfig, pool: Manifest) -> dict[str, Any]:
    """See ``tokenize_row``; the tables travel as Arrow streams."""
    shard = str(row["shard"])
    table = read_pool_shard(workspace, pool, shard)
    tokeniser, start = cached_tokeniser(model), time.monotonic()
    tokens, rejected = tokenize_shard(table, tokeniser)
    count("phase_seconds", time.monotonic() - start, phase="tokenise")
    skipped = pa.table({"row_id": pa.array(list(row["skipped"]), pa.string())})
    tables = {"tokens": _bytes(tokens), "rejected": _bytes(rejected), "skipped": _bytes(skipped)}
    return {"shard": shard, **tables, "spaces": row["spaces"]}


@functools.lru_cache(maxsize=1)
def cached_tokeniser(model: ModelConfig) -> Tokeniser:
    """Load a worker process's tokenizer once."""
    return load_tokeniser(model)


def count_shard_tokens(
    workspace: Workspace, pool: Manifest, shard: str, skipped: Sequence[str], key: str, model: ModelConfig
) -> Manifest:
    """See `count_tokens`."""
    return count_tokens(workspace, pool, shard, skipped, key, cached_tokeniser(model))


def _bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def shard_row_ids(workspace: Workspace, pool: Manifest, shard: str, skipped: list[str]) -> list[str]:
    """Return a shard's row ids without those passed over."""
    table = read_pool_shard(workspace, pool, shard, columns=["row_id"], skipped={shard: skipped})
    row_ids: list[str] = table["row_id"].to_pylist()
    return row_ids


def warmup_samples(
    workspace: Workspace, pool: Manifest, row_ids: list[str], model: ModelConfig, path: str
) -> tuple[FileRecord, int]:
    """Write the samples of the warm-up's rows to ``path``; return their file and how many rows make none.

    Raises:
        DataError: None of them makes a sample.
    """
    wanted = pa.array(row_ids, pa.string())
    skipped = skipped_rows(workspace, pool)
    parts = []
    for entry in pool.facts["shards"]:
        table = read_pool_shard(workspace, pool, entry["shard"], columns=["row_id", "conversation"], skipped=skipped)
        parts.append(table.filter(pc.is_in(table["row_id"], value_set=wanted)))
    tokens, rejected = tokenize_shard(pa.concat_tables(parts), cached_tokeniser(model))
    if tokens.num_rows == 0:
        raise DataError(
            f"warm-up: none of its {len(row_ids)} rows makes a sample; the first: {rejected.slice(0, 1).to_pylist()}. "
            "Raise `model.max_tokens` or `warmup.fraction`, or look at the pool."
        )
    return workspace.write_table(path, tokens), rejected.num_rows
