"""Which rows of a pool are passed over: those an earlier file holds, and those whose id an earlier file has.

A few bytes of every row are kept while this is found out. Shape suffixes: N rows of all shards in order, M of them with
an id of their own, S passed over.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from rose_ray.data.digests import DIGEST_BYTES, Places, Words, digest_words, first_places, row_id_words
from rose_ray.schemas import DUPLICATES, REJECTED
from rose_ray.stores.workspace import FileRecord, Workspace

DUPLICATE = "duplicate"
ID_CONFLICT = "id_conflict"


@dataclass(frozen=True)
class PoolIndex:
    """Which rows are passed over, and what is left.

    Attributes:
        passed_over: Schema ``DUPLICATES``.
        rejected: Those of ``passed_over`` that clash, schema ``REJECTED``.
        num_skipped: Rows passed over, by shard.
        sources: Rows left, by source.
    """

    passed_over: pa.Table
    rejected: pa.Table
    num_skipped: list[int]
    sources: Counter[str]


def index_pool(workspace: Workspace, entries: Sequence[Mapping[str, Any]]) -> PoolIndex:
    """Settle rows among the shards of all files, in order.

    Of equal rows the first counts. A row whose source and id an earlier row of other content has is rejected, and so
    owns nothing.

    Args:
        workspace: Where the shards are.
        entries: As in the facts of an ingested file.

    Raises:
        AlteredFileError: A shard differs from its manifest.
    """
    words, ids, rows, sources, num_rows = [], [], [], [], 0
    for entry in entries:
        table = _read(workspace, entry, ["row_id", "source", "record_id"])
        words.append(row_id_words(table["row_id"]))
        named = [(row, *pair) for row, pair in enumerate(_own_ids(table), start=num_rows) if pair[1] is not None]
        ids.append(digest_words(_id_digest(source, own_id) for _, source, own_id in named))
        rows.append(np.array([row for row, _, _ in named], dtype=np.int64))
        sources.append(table["source"])
        num_rows += table.num_rows
    words_N2 = _joined(words)
    clashing_N, owner_N = _owners(words_N2, _joined(ids), np.concatenate(rows) if rows else np.arange(0))
    kept_N = owner_N == np.arange(num_rows)
    passed_S = np.flatnonzero(~kept_N)
    ends = np.cumsum([len(part) for part in words])
    shard_S = np.searchsorted(ends, passed_S, side="right")
    owning_S = np.searchsorted(ends, owner_N[passed_S], side="right")
    names = [entry["shard"] for entry in entries]
    passed_over = pa.Table.from_arrays(
        [
            pa.array([words_N2[row].astype(">u8").tobytes().hex() for row in passed_S], pa.string()),
            pa.array([names[shard] for shard in shard_S], pa.string()),
            pa.array([names[shard] for shard in owning_S], pa.string()),
            pa.array([ID_CONFLICT if clashing_N[row] else DUPLICATE for row in passed_S], pa.string()),
        ],
        schema=DUPLICATES,
    )
    tally: Counter[str] = Counter()
    for column, end in zip(sources, ends, strict=True):
        kept = column.filter(pa.array(kept_N[end - len(column) : end]))
        tally.update({each["values"]: each["counts"] for each in kept.value_counts().to_pylist()})
    rejected = _rejected(workspace, entries, ends, np.flatnonzero(clashing_N), owner_N)
    return PoolIndex(passed_over, rejected, np.bincount(shard_S, minlength=len(entries)).tolist(), tally)


def _owners(words_N2: Words, ids_M2: Words, rows_M: Places) -> tuple[np.ndarray, Places]:
    """Return which rows clash, and for every row its own place, or that of the row it is passed over for."""
    first_of_id_N = np.arange(len(words_N2))
    first_of_id_N[rows_M] = rows_M[first_places(ids_M2)]
    clashing_N = (words_N2 != words_N2[first_of_id_N]).any(axis=1)
    fine = np.flatnonzero(~clashing_N)
    owner_N = first_of_id_N.copy()
    owner_N[fine] = fine[first_places(words_N2[fine])]
    return clashing_N, owner_N


def _rejected(
    workspace: Workspace, entries: Sequence[Mapping[str, Any]], ends: np.ndarray, clashing: Places, owner_N: Places
) -> pa.Table:
    where = _places(workspace, entries, ends, sorted({*clashing.tolist(), *owner_N[clashing].tolist()}))
    rows = []
    for row in clashing.tolist():
        file, place = where[row]
        first_file, first_place = where[int(owner_N[row])]
        detail = f"row {first_place} of {first_file} has the same source and id and other content"
        rows.append({"file": file, "place": place, "reason": ID_CONFLICT, "detail": detail})
    return pa.Table.from_pylist(rows, schema=REJECTED)


def _places(
    workspace: Workspace, entries: Sequence[Mapping[str, Any]], ends: np.ndarray, rows: Sequence[int]
) -> dict[int, tuple[str, int]]:
    by_shard: dict[int, list[int]] = {}
    for row in rows:
        by_shard.setdefault(int(np.searchsorted(ends, row, side="right")), []).append(row)
    places = {}
    for shard, members in by_shard.items():
        table = _read(workspace, entries[shard], ["file", "place"])
        start = int(ends[shard]) - table.num_rows
        for row in members:
            places[row] = (table["file"][row - start].as_py(), table["place"][row - start].as_py())
    return places


def _read(workspace: Workspace, entry: Mapping[str, Any], columns: list[str]) -> pa.Table:
    return workspace.read_table(entry["path"], FileRecord(**entry["record"]), columns=columns)


def _own_ids(table: pa.Table) -> Iterable[tuple[str, str | None]]:
    return zip(table["source"].to_pylist(), table["record_id"].to_pylist(), strict=True)


def _id_digest(source: str, own_id: str | None) -> bytes:
    return hashlib.sha256(f"{source}\0{own_id}".encode()).digest()[:DIGEST_BYTES]


def _joined(words: Sequence[Words]) -> Words:
    return np.concatenate(words) if words else digest_words([])
