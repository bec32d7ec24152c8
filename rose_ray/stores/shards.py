"""Artefacts of single shards: ``KIND/KEY/SHARD``, each with a receipt of its own."""

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
from rose_ray.stores.inspect import visible_fault
from rose_ray.stores.manifest import MANIFEST_FILE, Manifest, commit_artefact, find_manifest, read_manifest
from rose_ray.stores.read_ahead import looked_up
from rose_ray.stores.workspace import FileRecord, Workspace

LENGTHS, SURVEYS, SHARD_SCORES, FEATURES = "lengths", "surveys", "shard_scores", "features"
"""Kinds: tokens of rows, parts of pool statistics, scores of a method, features."""


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
    return receipt if receipt is not None and _covers(kind, receipt, skipped) else None


def _covers(kind: str, receipt: Manifest, skipped: Sequence[str]) -> bool:
    before, now = set(receipt.facts["skipped"]), set(skipped)
    return before == now if kind == SURVEYS else before <= now


def why_missing(workspace: Workspace, kind: str, key: str, shard: str, skipped: Sequence[str]) -> str | None:
    """Return why a shard has to be computed, or None where it is done; looks into every file, without reading it whole.

    The reason is empty where the shard was never finished. Arguments as in `find_receipt`.
    """
    folder = f"{kind}/{key}/{shard}"
    if not workspace.exists(f"{folder}/{MANIFEST_FILE}"):
        return ""
    try:
        receipt = read_manifest(workspace, folder)
    except AlteredFileError as error:
        return str(error)
    for record in receipt.files:
        if (fault := visible_fault(workspace, record)) is not None:
            return f"{record.path}: {fault}"
    return None if _covers(kind, receipt, skipped) else f"{folder}: made when other rows were wanted"


def missing_shards(
    workspace: Workspace, kind: str, key: str, shards: Sequence[str], skipped: Mapping[str, Sequence[str]]
) -> dict[str, str]:
    """Return those of the shards that have to be computed, each with the reason as in `why_missing`.

    Args:
        workspace, kind, key: As in `find_receipt`.
        shards: Names.
        skipped: Row ids that are not wanted, by shard.
    """

    def look(shard: str) -> str | None:
        return why_missing(workspace, kind, key, shard, skipped.get(shard, []))

    reasons = zip(shards, looked_up(look, shards), strict=True)
    return {shard: reason for shard, reason in reasons if reason is not None}


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
