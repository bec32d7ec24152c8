"""An input file to shards: Parquet of unique, valid rows, and a table of what was rejected.

A file is read twice: first to learn which rows are equal and which ids clash (some 80 bytes a row are kept),
then to write. So ``num_copies`` is right in the first shard already, and no more than one shard is held in
memory. Shards depend on the file's bytes, its name's stem and the settings alone.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pyarrow as pa

from rose_ray.data.census import Census, Fates, PoolRow
from rose_ray.data.conversation import canonical_json, row_id, validate_conversation
from rose_ray.data.formats import POOL_FORMATS, SAMPLE_ROWS, detect_format, to_conversation
from rose_ray.data.records import RawRecord, RejectedRecord, file_digest, file_stem, iter_records
from rose_ray.data.strict_json import canonical_text
from rose_ray.errors import ConfigError, DataError, RowError
from rose_ray.filesystem import Location
from rose_ray.schemas import REJECTED, SHARD
from rose_ray.stages.pool import check_row_counts
from rose_ray.stores.manifest import Manifest, artefact_key, commit_artefact, find_manifest
from rose_ray.stores.workspace import FileRecord, Workspace

INGEST_VERSION = 1
"""Raised whenever the same file would give other shards."""

REJECTED_FILE = "rejected.parquet"


@dataclass(frozen=True)
class IngestSettings:
    """How files become shards.

    Attributes:
        shard_rows: Unique rows of a shard; the last one of a file may have fewer.
        sample_fraction: Share of the rows to take, chosen by their content; in (0, 1].
        sample_seed: Which rows such a share holds.

    Raises:
        ConfigError: A value is out of range.
    """

    shard_rows: int = 512
    sample_fraction: float = 1.0
    sample_seed: int = 0

    def __post_init__(self) -> None:
        if self.shard_rows < 1:
            raise ConfigError(f"shard_rows is {self.shard_rows}, expected at least 1.")
        if not 0 < self.sample_fraction <= 1:
            raise ConfigError(f"sample_fraction is {self.sample_fraction}, expected more than 0 and at most 1.")


@dataclass(frozen=True)
class PoolFile:
    """An input file and how to read it.

    Attributes:
        location: Where it is.
        format: One of ``POOL_FORMATS``, or ``auto``.
        source: Source of all its rows.
        source_field: Key of the record that names its source. With neither, the record's ``source`` or
            ``dataset`` counts where it is text, else the file's name without folder and endings.

    Raises:
        ConfigError: Unknown format, or both kinds of source.
    """

    location: Location
    format: str = "auto"
    source: str | None = None
    source_field: str | None = None

    def __post_init__(self) -> None:
        if self.format not in ("auto", *POOL_FORMATS):
            raise ConfigError(f"format is {self.format!r}, expected auto or one of {', '.join(POOL_FORMATS)}.")
        if self.source is not None and self.source_field is not None:
            raise ConfigError("source and source_field contradict each other: set one of them.")


def detect_file_format(location: Location) -> str:
    """Return the format that the first readable records of a file share.

    Raises:
        DataError: The file cannot be read, no record can, or the records do not agree.
    """
    good: list[dict[str, Any]] = []
    first_bad: RejectedRecord | None = None
    for record in iter_records(location):
        if isinstance(record, RawRecord):
            good.append(record.value)
        else:
            first_bad = first_bad or record
        if len(good) == SAMPLE_ROWS:
            break
    if first_bad is not None and not good:
        raise DataError(
            f"{location.name}: not one record can be read; row {first_bad.place}: {first_bad.reason}: "
            f"{first_bad.detail}. Check whether the file is what its name says."
        )
    return detect_format(good, file=location.name)


def ingest_made_from(pool_file: PoolFile, settings: IngestSettings) -> dict[str, Any]:
    """Return what an ingested file depends on: its bytes and how they are read. Two files may share it."""
    location = pool_file.location
    return {
        "file_sha256": file_digest(location),
        "format": pool_file.format,
        "source": pool_file.source,
        "source_field": pool_file.source_field,
        "source_default": None if pool_file.source or pool_file.source_field else file_stem(location),
        "shard_rows": settings.shard_rows,
        "sample_fraction": settings.sample_fraction,
        "sample_seed": settings.sample_seed if settings.sample_fraction < 1 else None,
        "ingest_version": INGEST_VERSION,
    }


def ingest_file(workspace: Workspace, pool_file: PoolFile, settings: IngestSettings) -> Manifest:
    """Write a file's shards and its rejected table, or return the manifest of a finished run.

    Counts: ``rows_read`` = ``unique`` + ``duplicates`` + ``rejected`` + ``unsampled``. Facts: ``file`` as it
    was named when it was read, ``format``, ``shards`` (``shard``, ``path``, ``num_rows``, first and last
    ``place``, file ``record``), ``sources`` (counts by source; rejected rows have none), ``reject_reasons``.

    Raises:
        DataError: The file cannot be read, its format is unclear, or it changed meanwhile.
    """
    location = pool_file.location
    made_from = ingest_made_from(pool_file, settings)
    folder = f"ingest/{artefact_key(made_from)}"
    known = find_manifest(workspace, folder)
    if known is not None:
        return known
    started = time.monotonic()
    format_name = detect_file_format(location) if pool_file.format == "auto" else pool_file.format
    census = Census(settings.sample_fraction, settings.sample_seed)
    for row in _rows(pool_file, format_name):
        census.add(row)
    fates = census.settle()
    shards = _write_shards(workspace, folder, pool_file, format_name, fates, settings.shard_rows)
    if file_digest(location) != made_from["file_sha256"]:
        raise DataError(f"{location.name}: the file changed while it was read. Run again once it is complete.")
    rejected = workspace.write_table(f"{folder}/{REJECTED_FILE}", _rejected_table(location, fates.rejected))
    counts = fates.counts()
    counts["unique"] = sum(int(entry["num_rows"]) for entry in shards)
    check_row_counts(counts, location.name)
    facts = {
        "file": location.name,
        "format": format_name,
        "shards": shards,
        "sources": fates.source_tally(),
        "reject_reasons": dict(sorted(Counter(record.reason for record in fates.rejected).items())),
    }
    files = [FileRecord(**entry["record"]) for entry in shards]
    return commit_artefact(workspace, "ingest", made_from, [*files, rejected], counts, facts, started=started)


def _rows(pool_file: PoolFile, format_name: str) -> Iterator[PoolRow | RejectedRecord]:
    for record in iter_records(pool_file.location):
        if isinstance(record, RejectedRecord):
            yield record
            continue
        try:
            yield _row(record, pool_file, format_name)
        except RowError as error:
            yield RejectedRecord(record.place, error.reason, error.detail)
        except RecursionError:
            yield RejectedRecord(record.place, "not_json", "nested too deeply to use")


def _row(record: RawRecord, pool_file: PoolFile, format_name: str) -> PoolRow:
    conversation = to_conversation(record.value, format_name)
    validate_conversation(conversation)
    own_id = record.value.get("id")
    return PoolRow(
        place=record.place,
        row_id=row_id(conversation),
        source=_source(record.value, pool_file),
        record_id=None if own_id is None else canonical_text(own_id),
        record=record.text,
        conversation=canonical_json(conversation),
    )


def _source(value: dict[str, Any], pool_file: PoolFile) -> str:
    if pool_file.source is not None:
        return pool_file.source
    if pool_file.source_field is not None:
        named = value.get(pool_file.source_field)
        if not isinstance(named, str) or not named.strip():
            raise RowError("no_source", f"expected text at {pool_file.source_field!r}, found {str(named)[:60]!a}")
        return named
    named = next((value[key] for key in ("source", "dataset") if isinstance(value.get(key), str) and value[key]), None)
    return named if named is not None else file_stem(pool_file.location)


def _write_shards(
    workspace: Workspace, folder: str, pool_file: PoolFile, format_name: str, fates: Fates, shard_rows: int
) -> list[dict[str, Any]]:
    valid = (row for row in _rows(pool_file, format_name) if isinstance(row, PoolRow))
    copies = iter(fates.num_copies_N.tolist())
    # zip asks `copies` second, so a row beyond those counted is seen and stops here, unwritten.
    unique = ((row, num) for row, num in zip(valid, copies, strict=False) if num)
    entries: list[dict[str, Any]] = []
    while rows := list(islice(unique, shard_rows)):
        name = f"{folder.rsplit('/', 1)[-1]}-{len(entries):05d}"
        path = f"{folder}/shard-{len(entries):05d}.parquet"
        record = workspace.write_table(path, _shard_table(pool_file.location, rows))
        entries.append(
            {
                "shard": name,
                "path": path,
                "num_rows": len(rows),
                "first_place": rows[0][0].place,
                "last_place": rows[-1][0].place,
                "record": vars(record),
            }
        )
    return entries


def _shard_table(location: Location, rows: list[tuple[PoolRow, int]]) -> pa.Table:
    return pa.Table.from_pylist(
        [{**vars(row), "file": location.name, "num_copies": num_copies} for row, num_copies in rows],
        schema=SHARD,
    )


def _rejected_table(location: Location, rejected: list[RejectedRecord]) -> pa.Table:
    return pa.Table.from_pylist([{**vars(record), "file": location.name} for record in rejected], schema=REJECTED)
