"""Artefacts of single shards besides features: ``KIND/KEY/SHARD``, each with a receipt of its own."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from rose_ray.errors import AlteredFileError
from rose_ray.failpoints import die_at
from rose_ray.stores.manifest import Manifest, commit_artefact, find_manifest
from rose_ray.stores.read_ahead import looked_up
from rose_ray.stores.workspace import FileRecord, Workspace

LENGTHS, SURVEYS, SHARD_SCORES = "lengths", "surveys", "shard_scores"
"""Kinds: tokens of rows, parts of pool statistics, scores of a method."""


def find_receipt(workspace: Workspace, kind: str, key: str, shard: str, skipped: Sequence[str]) -> Manifest | None:
    """Return the receipt of a shard that is done.

    Args:
        workspace: Where to look.
        kind, key: Of the artefact.
        shard: Name of the shard.
        skipped: Row ids of the shard that are not wanted now. A receipt that covers more rows than are wanted is good,
            except where rows were summed up.
    """
    receipt = find_manifest(workspace, f"{kind}/{key}/{shard}")
    if receipt is None:
        return None
    before, now = set(receipt.facts["skipped"]), set(skipped)
    return receipt if (before == now if kind == SURVEYS else before <= now) else None


def shards_without(
    workspace: Workspace, kind: str, key: str, shards: Sequence[str], skipped: Mapping[str, Sequence[str]]
) -> list[str]:
    """Return those of the shards that have no such receipt; ``skipped`` by shard."""

    def lacks(shard: str) -> bool:
        return find_receipt(workspace, kind, key, shard, skipped.get(shard, [])) is None

    return [shard for shard, is_lacking in zip(shards, looked_up(lacks, shards), strict=True) if is_lacking]


def commit_shard(
    workspace: Workspace,
    kind: str,
    key: str,
    shard: str,
    files: list[FileRecord],
    counts: dict[str, int],
    skipped: Sequence[str],
    *,
    started: float,
    facts: Mapping[str, Any] | None = None,
) -> Manifest:
    """Write the receipt of a shard whose files are all there: among its facts, the process that made it."""
    die_at("before_receipt")
    made_from = {kind: key, "shard": shard}
    told = {"skipped": list(skipped), "host": socket.gethostname(), "pid": os.getpid(), **(facts or {})}
    folder = f"{kind}/{key}/{shard}"
    return commit_artefact(workspace, kind, made_from, files, counts, told, started=started, folder=folder)


def write_arrays(workspace: Workspace, path: str, arrays: Mapping[str, NDArray[Any]]) -> FileRecord:
    """Write arrays of numbers or booleans atomically. The same arrays give the same bytes."""
    whole = {name: np.ascontiguousarray(array).reshape(array.shape) for name, array in arrays.items()}
    return workspace.write(path, safetensors.numpy.save(whole), num_rows=len(whole))


def read_arrays(workspace: Workspace, record: FileRecord) -> dict[str, NDArray[Any]]:
    """Return what `write_arrays` wrote.

    Raises:
        AlteredFileError: The file differs from its record, or holds no arrays.
    """
    try:
        arrays: dict[str, NDArray[Any]] = safetensors.numpy.load(workspace.read(record.path, record))
    except safetensors.SafetensorError as error:
        raise AlteredFileError(f"{record.path}: not arrays ({error}). Delete its folder and run again.") from error
    return arrays
