"""What is wrong with a stored file, told from its record: at a glance, or by reading all of it."""

from __future__ import annotations

import hashlib
import json

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from rose_ray.stores.workspace import FileRecord, Workspace

_BLOCK_BYTES = 1 << 20
_LENGTH_BYTES = 8


def visible_fault(workspace: Workspace, record: FileRecord) -> str | None:
    """Return what a look at size and Parquet footer, or safetensors header, shows to be wrong, or None."""
    location = workspace.location(record.path)
    info = location.filesystem.get_file_info(location.path)
    if info.type != fs.FileType.File:
        return "missing"
    if info.size != record.num_bytes:
        return f"{info.size:,} bytes instead of {record.num_bytes:,}"
    if record.path.endswith(".safetensors"):
        return _header_fault(workspace, record)
    return _footer_fault(workspace, record) if record.path.endswith(".parquet") else None


def hidden_fault(workspace: Workspace, record: FileRecord) -> str | None:
    """Return what reading the whole file shows to be wrong, or None; a block of it is held at a time."""
    location, digest = workspace.location(record.path), hashlib.sha256()
    with location.filesystem.open_input_stream(location.path, compression=None) as stream:
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
    return None if digest.hexdigest() == record.sha256 else "content differs from its SHA-256"


def _footer_fault(workspace: Workspace, record: FileRecord) -> str | None:
    location = workspace.location(record.path)
    try:
        with location.filesystem.open_input_file(location.path) as file:
            num_rows = pq.read_metadata(file).num_rows
    except (pa.ArrowException, OSError) as error:
        return f"no readable Parquet footer ({str(error).splitlines()[0]})"
    return None if num_rows == record.num_rows else f"{num_rows:,} rows instead of {record.num_rows:,}"


def _header_fault(workspace: Workspace, record: FileRecord) -> str | None:
    # Eight bytes hold the header's length; it is JSON and says where each tensor ends, counted from the header's end.
    location = workspace.location(record.path)
    with location.filesystem.open_input_file(location.path) as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        text = file.read(min(length, record.num_bytes))
    try:
        ends = [each["data_offsets"][1] for name, each in json.loads(text).items() if name != "__metadata__"]
    except (ValueError, AttributeError, KeyError, TypeError, IndexError) as error:
        return f"no readable safetensors header ({error!r})"
    expected = _LENGTH_BYTES + length + max(ends, default=0)
    return None if expected == record.num_bytes else f"its safetensors header ends at {expected:,} bytes"
