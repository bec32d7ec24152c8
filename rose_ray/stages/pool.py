"""The pool: ingested files in order, with rows that an earlier file holds passed over.

Shards stay as their file made them. Which rows are passed over stands in an index beside them, so a file that
comes or goes changes the index and no shard.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rose_ray.data.digests import Places, digest_words, first_places
from rose_ray.errors import AccountingError, AlteredFileError, DataError
from rose_ray.schemas import DUPLICATES
from rose_ray.stores.manifest import Manifest, artefact_key, commit_artefact, find_manifest
from rose_ray.stores.workspace import FileRecord, Workspace

POOL_VERSION = 1
"""Raised whenever the same files would give another index."""

DUPLICATES_FILE = "duplicates.parquet"
ROW_COUNTS = ("rows_read", "unique", "duplicates", "rejected", "unsampled")
"""Counts of an ingested file and of a pool; the first is the sum of the others."""

_log = logging.getLogger(__name__)


def check_row_counts(counts: Mapping[str, int], what: str) -> None:
    """Check that no row was lost or made up.

    Raises:
        AccountingError: Rows read are not unique + duplicates + rejected + unsampled.
    """
    read, *parts = (counts[name] for name in ROW_COUNTS)
    if read != sum(parts):
        terms = " + ".join(f"{counts[name]} {name}" for name in ROW_COUNTS[1:])
        raise AccountingError(f"{what}: {read} rows read, but {terms} = {sum(parts)}. This is a bug; please report it.")


def settle_pool(workspace: Workspace, manifests: Sequence[Manifest]) -> Manifest:
    """Join ingested files to a pool. Of equal rows in several files the first file's counts.

    Counts: `ROW_COUNTS` over all files, ``duplicates`` within and across files. Facts: ``shards`` in order,
    each with ``shard``, ``path``, ``num_rows``, ``num_skipped`` and the file ``record``; ``sources`` (unique
    rows of each); ``reject_reasons``; ``files``. Memory: some 75 bytes a row.

    Args:
        workspace: Where the files were ingested.
        manifests: What `ingest_file` returned, in the order of the configuration.

    Raises:
        DataError: No row is left.
        AlteredFileError: A shard differs from its manifest.
    """
    made_from = {"ingest_keys": [manifest.key for manifest in manifests], "pool_version": POOL_VERSION}
    known = find_manifest(workspace, f"pool/{artefact_key(made_from)}")
    if known is not None:
        return known
    started = time.monotonic()
    distinct = list({manifest.key: manifest for manifest in manifests}.values())
    entries = [entry for manifest in distinct for entry in manifest.facts["shards"]]
    index = _settle(workspace, entries)
    shards = [
        {**entry, "num_skipped": num_skipped} for entry, num_skipped in zip(entries, index.num_skipped, strict=True)
    ]
    counts = {name: sum(manifest.counts[name] for manifest in manifests) for name in ROW_COUNTS}
    moved = counts["unique"] - sum(index.sources.values())
    counts["unique"] -= moved
    counts["duplicates"] += moved
    check_row_counts(counts, "pool")
    reasons: Counter[str] = Counter()
    for manifest in manifests:
        reasons.update(manifest.facts["reject_reasons"])
    if counts["unique"] == 0:
        raise DataError(_why_empty(manifests, counts, reasons))
    _warn_of_repeats(manifests)
    record = workspace.write_table(f"pool/{artefact_key(made_from)}/{DUPLICATES_FILE}", index.duplicates)
    facts = {
        "shards": shards,
        "sources": dict(sorted(index.sources.items())),
        "reject_reasons": dict(sorted(reasons.items())),
        "files": [
            {"file": m.facts["file"], "ingest_key": m.key, "format": m.facts["format"], **m.counts} for m in manifests
        ],
    }
    return commit_artefact(workspace, "pool", made_from, [record], counts, facts, started=started)


class _Index:
    """Which rows are passed over, and what is left."""

    def __init__(self, duplicates: pa.Table, num_skipped: list[int], sources: Counter[str]) -> None:
        self.duplicates = duplicates
        self.num_skipped = num_skipped
        self.sources = sources


def _settle(workspace: Workspace, entries: Sequence[Mapping[str, Any]]) -> _Index:
    words, columns = [], []
    for entry in entries:
        table = workspace.read_table(entry["path"], FileRecord(**entry["record"]), columns=["row_id", "source"])
        words.append(digest_words(bytes.fromhex(row_id) for row_id in table["row_id"].to_pylist()))
        columns.append(table["source"])
    words_N2 = np.concatenate(words) if words else digest_words([])
    first_N = first_places(words_N2)
    skipped_N: Places = np.flatnonzero(first_N != np.arange(len(first_N)))
    ends = np.cumsum([len(part) for part in words])
    shard_of_N = np.searchsorted(ends, skipped_N, side="right")
    owner_of_N = np.searchsorted(ends, first_N[skipped_N], side="right")
    names = [entry["shard"] for entry in entries]
    duplicates = pa.Table.from_arrays(
        [
            pa.array([words_N2[place].astype(">u8").tobytes().hex() for place in skipped_N], pa.string()),
            pa.array([names[shard] for shard in shard_of_N], pa.string()),
            pa.array([names[shard] for shard in owner_of_N], pa.string()),
        ],
        schema=DUPLICATES,
    )
    kept_N = np.ones(len(first_N), dtype=bool)
    kept_N[skipped_N] = False
    sources: Counter[str] = Counter()
    for column, end in zip(columns, ends, strict=True):
        kept = column.filter(pa.array(kept_N[end - len(column) : end]))
        sources.update({tally["values"]: tally["counts"] for tally in kept.value_counts().to_pylist()})
    return _Index(duplicates, np.bincount(shard_of_N, minlength=len(entries)).tolist(), sources)


def skipped_rows(workspace: Workspace, pool: Manifest) -> dict[str, list[str]]:
    """Return the row ids passed over in each shard; shards without any are left out.

    Raises:
        AlteredFileError: The index differs from the manifest.
    """
    record = pool.file(DUPLICATES_FILE)
    table = workspace.read_table(record.path, record)
    skipped: dict[str, list[str]] = {}
    for row_id, shard in zip(table["row_id"].to_pylist(), table["shard"].to_pylist(), strict=True):
        skipped.setdefault(shard, []).append(row_id)
    return skipped


def read_pool_shard(
    workspace: Workspace,
    pool: Manifest,
    shard: str,
    *,
    columns: list[str] | None = None,
    skipped: Mapping[str, list[str]] | None = None,
) -> pa.Table:
    """Return a shard's rows in file order, those of an earlier file left out.

    Args:
        workspace: Where the pool is.
        pool: What `settle_pool` returned.
        shard: Name of a shard.
        columns: Columns of schema ``SHARD`` to return, ``row_id`` among them; all where None.
        skipped: What `skipped_rows` returned, for a caller that reads many shards.

    Raises:
        DataError: The pool has no such shard.
        AlteredFileError: The shard or the index differs from its record.
    """
    entry = next((entry for entry in pool.facts["shards"] if entry["shard"] == shard), None)
    if entry is None:
        raise DataError(f"pool {pool.key} has no shard {shard!r}; it has {len(pool.facts['shards'])} others.")
    table = workspace.read_table(entry["path"], FileRecord(**entry["record"]), columns=columns)
    if entry["num_skipped"]:
        rows = (skipped_rows(workspace, pool) if skipped is None else skipped).get(shard, [])
        table = table.filter(pc.invert(pc.is_in(table["row_id"], value_set=pa.array(rows, pa.string()))))
    if table.num_rows != entry["num_rows"] - entry["num_skipped"]:
        raise AlteredFileError(
            f"shard {shard}: {table.num_rows} rows left, expected {entry['num_rows']} less "
            f"{entry['num_skipped']}. Delete the folder pool/{pool.key} and run again."
        )
    return table


def pool_row_ids(workspace: Workspace, pool: Manifest) -> list[str]:
    """Return the ids of all rows of the pool, in order.

    Raises:
        AlteredFileError: A shard or the index differs from its record.
    """
    skipped = skipped_rows(workspace, pool)
    names: Iterable[str] = (entry["shard"] for entry in pool.facts["shards"])
    tables = (read_pool_shard(workspace, pool, name, columns=["row_id"], skipped=skipped) for name in names)
    return [row_id for table in tables for row_id in table["row_id"].to_pylist()]


def _why_empty(manifests: Sequence[Manifest], counts: Mapping[str, int], reasons: Mapping[str, int]) -> str:
    files = ", ".join(str(manifest.facts["file"]) for manifest in manifests) or "no file"
    rejected = ", ".join(f"{reason} {number}" for reason, number in sorted(reasons.items())) or "none"
    return (
        f"the pool has no row: {counts['rows_read']} read from {files}, {counts['unsampled']} outside the "
        f"sample, {counts['rejected']} rejected ({rejected}). Look at rejected.parquet, `format` and "
        "`sample_fraction`."
    )


def _warn_of_repeats(manifests: Sequence[Manifest]) -> None:
    files: dict[str, list[str]] = {}
    for manifest in manifests:
        files.setdefault(manifest.key, []).append(manifest.facts["file"])
    for names in files.values():
        if len(names) > 1:
            _log.warning("these input files hold the same bytes, one of them counts: %s", ", ".join(names))
