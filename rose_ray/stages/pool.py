"""The pool: ingested files in order, with rows that an earlier file holds, or whose id it has, passed over.

Shards stay as their file made them. Which rows are passed over stands in an index beside them, so a file that
comes or goes changes the index and no shard.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from rose_ray.errors import AccountingError, AlteredFileError, DataError
from rose_ray.stages.pool_index import ID_CONFLICT, index_pool
from rose_ray.stores.manifest import Manifest, artefact_key, commit_artefact, find_manifest
from rose_ray.stores.workspace import FileRecord, Workspace

POOL_VERSION = 2
"""Raised whenever the same files would give another index."""

DUPLICATES_FILE = "duplicates.parquet"
REJECTED_FILE = "rejected.parquet"
ROW_COUNTS = ("rows_read", "unique", "duplicates", "rejected", "unsampled")
"""Counts of an ingested file and of a pool; the first is the sum of the others."""

_NUM_EXAMPLES = 3

_log = logging.getLogger(__name__)


def say_files(workspace: Workspace, pool: Manifest, names: Sequence[str], manifests: Sequence[Manifest]) -> None:
    """Log what each file held, and warn of what a user may not have meant.

    Args:
        workspace: Where the pool is.
        pool: What `settle_pool` returned.
        names: Of the files as they are configured: files of the same bytes share a manifest.
        manifests: Of the files, in the same order.
    """
    by_bytes: dict[str, list[str]] = {}
    for name, manifest in zip(names, manifests, strict=True):
        counts = ", ".join(f"{manifest.counts[count]:,} {count.replace('_', ' ')}" for count in ROW_COUNTS)
        reasons = ", ".join(f"{reason} {number:,}" for reason, number in manifest.facts["reject_reasons"].items())
        _log.info("%s: format %s, %s%s", name, manifest.facts["format"], counts, f" ({reasons})" if reasons else "")
        by_bytes.setdefault(manifest.made_from["file_sha256"], []).append(name)
    for same in by_bytes.values():
        if len(same) > 1:
            _log.warning("these input files hold the same bytes, one of them counts: %s", ", ".join(same))
    if pool.facts["num_id_conflicts"]:
        record = pool.file(REJECTED_FILE)
        first = workspace.read_table(record.path, record).slice(0, _NUM_EXAMPLES).to_pylist()
        _log.warning(
            "%s rows are rejected, since an earlier file has their source and id with other content: %s; all in %s",
            f"{pool.facts['num_id_conflicts']:,}",
            "; ".join(f"{row['file']} row {row['place']}: {row['detail']}" for row in first),
            record.path,
        )


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
    """Join ingested files to a pool. Of equal rows in several files the first file's counts, and so of rows of one
    source that share an id and differ in content.

    Counts: `ROW_COUNTS` over all files, ``duplicates`` and ``rejected`` within and across files. Facts: ``shards`` in
    order, each with ``shard``, ``path``, ``num_rows``, ``num_skipped`` and the file ``record``; ``sources`` (unique
    rows of each); ``reject_reasons``; ``num_id_conflicts`` across files; ``files``. Memory: some 120 bytes a row.

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
    index = index_pool(workspace, entries)
    shards = [
        {**entry, "num_skipped": num_skipped} for entry, num_skipped in zip(entries, index.num_skipped, strict=True)
    ]
    counts = {name: sum(manifest.counts[name] for manifest in manifests) for name in ROW_COUNTS}
    moved, clashing = counts["unique"] - sum(index.sources.values()), index.rejected.num_rows
    counts["unique"] -= moved
    counts["rejected"] += clashing
    counts["duplicates"] += moved - clashing
    check_row_counts(counts, "pool")
    reasons: Counter[str] = Counter({ID_CONFLICT: clashing} if clashing else {})
    for manifest in manifests:
        reasons.update(manifest.facts["reject_reasons"])
    if counts["unique"] == 0:
        raise DataError(_why_empty(manifests, counts, reasons))
    folder = f"pool/{artefact_key(made_from)}"
    records = [
        workspace.write_table(f"{folder}/{DUPLICATES_FILE}", index.passed_over),
        workspace.write_table(f"{folder}/{REJECTED_FILE}", index.rejected),
    ]
    facts = {
        "shards": shards,
        "sources": dict(sorted(index.sources.items())),
        "reject_reasons": dict(sorted(reasons.items())),
        "num_id_conflicts": clashing,
        "files": [
            {"file": m.facts["file"], "ingest_key": m.key, "format": m.facts["format"], **m.counts} for m in manifests
        ],
    }
    return commit_artefact(workspace, "pool", made_from, records, counts, facts, started=started)


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
    return read_pool_entry(workspace, pool, entry, columns=columns, skipped=skipped)


def read_pool_entry(
    workspace: Workspace,
    pool: Manifest,
    entry: Mapping[str, Any],
    *,
    columns: list[str] | None = None,
    skipped: Mapping[str, list[str]] | None = None,
) -> pa.Table:
    """Return what `read_pool_shard` does, for one of the pool's ``shards``: many are not found by name.

    Raises:
        AlteredFileError: The shard or the index differs from its record.
    """
    shard = entry["shard"]
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
    entries: Iterable[Mapping[str, Any]] = pool.facts["shards"]
    tables = (read_pool_entry(workspace, pool, entry, columns=["row_id"], skipped=skipped) for entry in entries)
    return [row_id for table in tables for row_id in table["row_id"].to_pylist()]


def _why_empty(manifests: Sequence[Manifest], counts: Mapping[str, int], reasons: Mapping[str, int]) -> str:
    files = ", ".join(str(manifest.facts["file"]) for manifest in manifests) or "no file"
    rejected = ", ".join(f"{reason} {number}" for reason, number in sorted(reasons.items())) or "none"
    return (
        f"the pool has no row: {counts['rows_read']} read from {files}, {counts['unsampled']} outside the "
        f"sample, {counts['rejected']} rejected ({rejected}). Look at rejected.parquet, `format` and "
        "`sample_fraction`."
    )
