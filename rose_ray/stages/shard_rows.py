"""The pool's rows with their stored features, a shard at a time."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rose_ray.errors import StoreError
from rose_ray.stages.pool import read_pool_entry, skipped_rows
from rose_ray.stages.score import ShardRows
from rose_ray.stores.features import find_shard, read_shard_features
from rose_ray.stores.manifest import Manifest
from rose_ray.stores.read_ahead import depth_for, read_ahead
from rose_ray.stores.workspace import Workspace


def read_shard_rows(
    workspace: Workspace, pool: Manifest, features_key: str, checkpoints: Sequence[str]
) -> Iterator[ShardRows]:
    """Yield the rows of one shard of the pool after another, read ahead in threads.

    Raises:
        StoreError: A shard has no features.
        AlteredFileError: A file differs from its record.
    """
    skipped = skipped_rows(workspace, pool)
    entries = pool.facts["shards"]

    def receipt_of(entry: Mapping[str, Any]) -> Manifest:
        receipt = find_shard(workspace, features_key, entry["shard"], skipped.get(entry["shard"], []))
        if receipt is None:
            raise StoreError(f"shard {entry['shard']} has no features. Run `rose-ray features` first.")
        return receipt

    def read(entry: Mapping[str, Any]) -> ShardRows:
        receipt = receipt_of(entry)
        table = read_pool_entry(workspace, pool, entry, columns=["row_id", "source"], skipped=skipped)
        stored = read_shard_features(workspace, receipt, checkpoints)
        return ShardRows(entry["shard"], table["row_id"], table["source"], stored)

    fullest = max(entries, key=lambda entry: int(entry["num_rows"]))
    depth = depth_for(receipt_of(fullest).num_bytes)
    return read_ahead((functools.partial(read, entry) for entry in entries), depth)
