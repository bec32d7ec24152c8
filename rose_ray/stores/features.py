"""The feature store: one folder per feature space, one below it per shard, a file per checkpoint.

A shard counts as done when its receipt is there, its files have their sizes, and the rows it covers include the rows
wanted now. Rows that a file shares with an earlier file of the pool are passed over, and which ones they are can change
when files come and go: a receipt that covers more than is wanted stays good.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from rose_ray.stores.manifest import Manifest, find_manifest
from rose_ray.stores.workspace import Workspace

REJECTED_FILE = "rejected.parquet"


def shard_folder(features_key: str, shard: str) -> str:
    """Folder of one shard's features, relative to the workspace."""
    return f"features/{features_key}/{shard}"


def checkpoint_file(checkpoint: str) -> str:
    """Name of the file that holds one checkpoint's features."""
    return f"{checkpoint}.parquet"


def find_shard(workspace: Workspace, features_key: str, shard: str, skipped: Sequence[str]) -> Manifest | None:
    """Return the receipt of a shard that is done.

    Args:
        workspace: Where to look.
        features_key: The feature space.
        shard: Name of the shard.
        skipped: Row ids of the shard that are not wanted now.
    """
    receipt = find_manifest(workspace, shard_folder(features_key, shard))
    if receipt is None or not set(receipt.facts["skipped"]) <= set(skipped):
        return None
    return receipt


def mixed_settings(settings: Iterable[Mapping[str, Any]]) -> str:
    """Name what differs among shards, each value with its number of shards; empty where nothing does.

    Args:
        settings: Of each shard, as its receipt tells; those of a receipt that does not are empty.
    """
    counts: dict[str, Counter[Any]] = {}
    for each in settings:
        for name, value in each.items():
            counts.setdefault(name, Counter())[value] += 1
    return "; ".join(
        f"{name} {', '.join(f'{value} ({number:,} shards)' for value, number in found.most_common())}"
        for name, found in counts.items()
        if len(found) > 1
    )


@dataclass(frozen=True)
class StoredShard:
    """One shard's features, one table per checkpoint, and the rows that could not be scored."""

    tables: list[pa.Table]
    rejected: pa.Table


def read_shard_features(workspace: Workspace, receipt: Manifest, checkpoints: Sequence[str]) -> StoredShard:
    """Read a shard's features, checked against its receipt.

    Raises:
        AlteredFileError: A file differs from its receipt.
    """
    records = [receipt.file(checkpoint_file(name)) for name in checkpoints]
    rejected = receipt.file(REJECTED_FILE)
    return StoredShard(
        [workspace.read_table(record.path, record) for record in records],
        workspace.read_table(rejected.path, rejected),
    )
