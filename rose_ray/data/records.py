"""Reading records from JSONL, JSON and Parquet, plain or compressed, with their exact text.

The name decides how a file is read: ``.jsonl`` or ``.ndjson`` (an object a line), ``.json`` (an array of
objects), ``.parquet``; the first three also with ``.gz`` or ``.zst`` behind. JSONL and Parquet are streamed;
a ``.json`` file is held in memory whole.

A record that cannot be read is handed on as a `RejectedRecord` and reading goes on. A file that cannot be
read, or holds no record, is a `DataError`.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import io
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rose_ray.data.strict_json import as_object, iter_array, parse_object
from rose_ray.errors import DataError, EmptyFileError, RowError
from rose_ray.filesystem import Location

_KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".parquet": "parquet"}
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_CHUNK_BYTES = 1 << 20
_PARQUET_BATCH_ROWS = 1024


@dataclass(frozen=True)
class RawRecord:
    """One object of an input file.

    Attributes:
        place: Line number in JSONL (blank lines counted), row number in JSON and Parquet; from 1.
        text: Its exact text; for Parquet the row as JSON (see `iter_records`).
        value: The parsed object.
    """

    place: int
    text: str
    value: dict[str, Any]


@dataclass(frozen=True)
class RejectedRecord:
    """One record that cannot be used, and why.

    Attributes:
        place: As in `RawRecord`.
        reason: Short stable identifier such as ``not_json``.
        detail: What was found and what was expected.
    """

    place: int
    reason: str
    detail: str


def iter_records(location: Location) -> Iterator[RawRecord | RejectedRecord]:
    """Yield the records of a file in order.

    Reasons to reject a record: ``not_json`` (``NaN`` and ``Infinity`` included), ``not_object``,
    ``invalid_utf8``, ``invalid_unicode`` (half a surrogate pair), ``duplicate_key``. Blank lines of JSONL are
    no records. A byte order mark at the start is passed over.

    A Parquet row becomes JSON with its columns in file order: dates and times in ISO 8601, binary in base64,
    decimals and the numbers JSON lacks ("NaN", "Infinity", "-Infinity") as strings, maps as arrays of pairs.

    Raises:
        DataError: The file is missing, empty, cut short, of an unknown kind, or not what its name says.
    """
    kind, compression = file_kind(location)
    readers = {"jsonl": _jsonl_records, "json": _json_records, "parquet": _parquet_records}
    num_records = 0
    for record in readers[kind](location, compression):
        num_records += 1
        yield record
    if num_records == 0:
        raise EmptyFileError(f"{location.name}: empty file, expected at least one record. Remove it or fill it.")


def file_kind(location: Location) -> tuple[str, str | None]:
    """Return what the name says: ``jsonl``, ``json`` or ``parquet``, and ``gzip``, ``zstd`` or None.

    Raises:
        DataError: The name ends in none of the known ways.
    """
    _, kind, compression = _split_name(location)
    if kind is None or (kind == "parquet" and compression):
        raise DataError(
            f"{location.name}: its name does not tell the kind of file. Expected .jsonl, .ndjson or .json, "
            "each also with .gz or .zst, or .parquet."
        )
    return kind, compression


def file_stem(location: Location) -> str:
    """Return the file's name without folder and known endings."""
    return _split_name(location)[0]


def _split_name(location: Location) -> tuple[str, str | None, str | None]:
    stem = location.path.rsplit("/", 1)[-1]
    found: list[str | None] = []
    for endings in (_COMPRESSIONS, _KINDS):
        ending = next((ending for ending in endings if stem.lower().endswith(ending)), None)
        stem = stem[: -len(ending)] if ending else stem
        found.append(endings[ending] if ending else None)
    return stem, found[1], found[0]


def file_digest(location: Location) -> str:
    """Return the SHA-256 of the file as it is stored, in hex.

    Raises:
        DataError: The file is missing.
    """
    digest = hashlib.sha256()
    with _opened(location, None) as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def read_text(location: Location) -> str:
    """Return a whole text file, decompressed, without a byte order mark.

    Raises:
        DataError: Missing, cut short, empty, or not UTF-8.
    """
    with _opened(location, file_kind(location)[1]) as stream:
        data = stream.read()
    try:
        text = data.removeprefix(_BYTE_ORDER_MARK).decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{location.name}: not UTF-8, byte {error.start} ({error.reason}). Convert the file."
        ) from error
    if not text.strip():
        raise EmptyFileError(f"{location.name}: empty file, expected at least one record. Remove it or fill it.")
    return text


@contextmanager
def _opened(location: Location, compression: str | None) -> Iterator[io.BufferedReader]:
    try:
        stream = location.filesystem.open_input_stream(location.path, compression=compression)
    except FileNotFoundError as error:
        raise DataError(f"{location.name}: no such file. Check the path.") from error
    try:
        with stream:
            yield io.BufferedReader(stream, _CHUNK_BYTES)
    except OSError as error:
        if compression is None:
            raise
        raise DataError(f"{location.name}: cut short or not {compression} ({error}). Fetch the file again.") from error


def _jsonl_records(location: Location, compression: str | None) -> Iterator[RawRecord | RejectedRecord]:
    with _opened(location, compression) as stream:
        for place, line in enumerate(stream, start=1):
            line = line.removesuffix(b"\n").removesuffix(b"\r")
            if place == 1:
                line = line.removeprefix(_BYTE_ORDER_MARK)
            if not line.strip():
                continue
            try:
                text = line.decode()
                yield RawRecord(place, text, parse_object(text))
            except UnicodeDecodeError as error:
                yield RejectedRecord(place, "invalid_utf8", f"byte {error.start} of the line: {error.reason}")
            except RowError as error:
                yield RejectedRecord(place, error.reason, error.detail)


def _json_records(location: Location, compression: str | None) -> Iterator[RawRecord | RejectedRecord]:
    elements = enumerate(iter_array(read_text(location)), start=1)
    while True:
        try:
            place, (text, value) = next(elements)
        except StopIteration:
            return
        except RowError as error:
            expected = "expected an array of objects" if error.reason == "not_array" else error.reason
            raise DataError(f"{location.name}: {expected}, found {error.detail}.") from error
        try:
            if isinstance(value, RowError):
                raise value
            yield RawRecord(place, text, as_object(value))
        except RowError as error:
            yield RejectedRecord(place, error.reason, error.detail)


def _parquet_records(location: Location, compression: str | None) -> Iterator[RawRecord | RejectedRecord]:
    place = 0
    for batch in _parquet_batches(location):
        for index in range(batch.num_rows):
            place += 1
            try:
                (row,) = batch.slice(index, 1).to_pylist()
            except UnicodeDecodeError as error:
                yield RejectedRecord(place, "invalid_utf8", f"a string column: {error.reason}")
                continue
            text = json.dumps(_plain(row), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
            yield RawRecord(place, text, json.loads(text))


def _parquet_batches(location: Location) -> Iterator[pa.RecordBatch]:
    try:
        with location.filesystem.open_input_file(location.path) as source:
            file = pq.ParquetFile(source)
            names = file.schema_arrow.names
            if len(set(names)) != len(names):
                raise DataError(f"{location.name}: two columns have one name, of {names}. Rename one.")
            yield from file.iter_batches(batch_size=_PARQUET_BATCH_ROWS)
    except FileNotFoundError as error:
        raise DataError(f"{location.name}: no such file. Check the path.") from error
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{location.name}: not a readable Parquet file ({error}). Fetch or write it again.") from error


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"nan": "NaN", "inf": "Infinity"}.get(str(value), "-Infinity")
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    return str(value)
