"""A workspace: a folder on any filesystem, holding every artefact of a job.

Files are named by their path relative to the workspace. Each file that matters is listed in a manifest with its
size and digest; readers check both, so an altered file is an error and not a wrong score.
"""

from __future__ import annotations

import hashlib
import io
import json
import posixpath
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from rose_ray.errors import AlteredFileError, LeaseError, NewerFormatError, StoreError
from rose_ray.filesystem import Location, child, locate, open_for_writing, read_bytes

FORMAT_VERSION = 1
"""Version of the workspace layout. Readers refuse a higher one."""

_FORMAT_FILE = "rose_ray.json"
_LEASE_FOLDER = "lease"

_BLOCK_BYTES = 1 << 22


@dataclass(frozen=True)
class FileRecord:
    """What a manifest knows of one file.

    Attributes:
        path: Relative to the workspace.
        num_bytes: Size.
        sha256: Hex digest of the content.
        num_rows: Rows of a table, -1 for other files.
    """

    path: str
    num_bytes: int
    sha256: str
    num_rows: int = -1


def lease_path(number: int) -> str:
    """Return the file of lease ``number``, relative to the workspace."""
    return f"{_LEASE_FOLDER}/{number:08d}.json"


def leases(workspace: Workspace) -> list[int]:
    """Return the numbers of all leases ever taken, rising."""
    names = (posixpath.basename(path) for path in workspace.list_folder(_LEASE_FOLDER))
    return [int(name.removesuffix(".json")) for name in names if name.endswith(".json")]


class FileWriter(io.RawIOBase):
    """A file being written, its size and digest counted on the way. For `Workspace.writer`.

    Args:
        path: Relative to the workspace.
        stream: Where the bytes go; whoever opened it closes it.
    """

    def __init__(self, path: str, stream: BinaryIO) -> None:
        self.path, self._stream, self._num_bytes, self._sha256 = path, stream, 0, hashlib.sha256()

    def writable(self) -> bool:
        """Always."""
        return True

    def write(self, data: Any) -> int:
        """Write a bytes-like object."""
        view = memoryview(data)
        self._stream.write(view)
        self._sha256.update(view)
        self._num_bytes += view.nbytes
        return view.nbytes

    def record(self, num_rows: int = -1) -> FileRecord:
        """What a manifest has to know of what was written."""
        return FileRecord(self.path, self._num_bytes, self._sha256.hexdigest(), num_rows)


class Workspace:
    """Read and write artefacts below one location. Cheap to pickle and to open again in another process."""

    def __init__(self, root: Location, fencing_number: int | None = None) -> None:
        self.root, self.fencing_number = root, fencing_number

    def fenced(self, number: int) -> Workspace:
        """Return the same workspace for a run that holds lease ``number``."""
        return Workspace(self.root, number)

    def check_fence(self) -> None:
        """Make sure that no later run has taken this workspace over.

        Raises:
            LeaseError: One has.
        """
        if self.fencing_number is not None and self.exists(lease_path(self.fencing_number + 1)):
            raise LeaseError(
                f"workspace {self.root.name!r}: another run took it over while this one, lease {self.fencing_number}, "
                "was out of touch. This run ends; the other goes on with what it finished."
            )

    @classmethod
    def open(cls, name: str, *, create: bool = False, relative_to: str = "") -> Workspace:
        """Open a workspace, or make it when ``create`` is set.

        Raises:
            StoreError: There is none, or its format file cannot be read.
            NewerFormatError: A later version of rose_ray wrote it.
        """
        workspace = cls(locate(name, relative_to=relative_to))
        if workspace.check_format():
            return workspace
        if create:
            workspace.write_json(_FORMAT_FILE, {"format": FORMAT_VERSION})
        else:
            raise StoreError(f"no workspace at {name!r}. `rose-ray run CONFIG` makes one; check `workspace:`.")
        return workspace

    def check_format(self) -> bool:
        """Whether there is a workspace here that this version reads; raises as `open` does."""
        if not self.exists(_FORMAT_FILE):
            return False
        content = self.read_json(_FORMAT_FILE)
        version = content.get("format") if isinstance(content, dict) else content
        if not isinstance(version, int):
            raise StoreError(
                f"{self.root.name}/{_FORMAT_FILE}: expected a whole number at 'format', found {version!r}."
            )
        if version > FORMAT_VERSION:
            raise NewerFormatError(
                f"workspace {self.root.name!r} has format {version}, this rose_ray reads up to {FORMAT_VERSION}. "
                "Upgrade rose_ray, or name another workspace."
            )
        return True

    def location(self, path: str) -> Location:
        """Return where ``path`` lives.

        Raises:
            StoreError: ``path`` would leave the workspace.
        """
        if path.startswith("/") or ".." in path.split("/"):
            raise StoreError(f"{path!r} is not inside the workspace.")
        return child(self.root, path)

    def exists(self, path: str) -> bool:
        """Whether a file is there."""
        return bool(self._info(path).type == fs.FileType.File)

    def _info(self, path: str) -> fs.FileInfo:
        return self.root.filesystem.get_file_info(self.location(path).path)

    def modified_at(self, path: str) -> datetime | None:
        """When a file was last written, by the storage's clock; None where it keeps no times."""
        when: datetime | None = self._info(path).mtime
        return when

    def list_folder(self, path: str, *, recursive: bool = False) -> list[str]:
        """Return the files and folders below ``path``, relative to the workspace, sorted; [] where it is missing."""
        selector = fs.FileSelector(self.location(path).path, recursive=recursive, allow_not_found=True)
        infos = self.root.filesystem.get_file_info(selector)
        return sorted(posixpath.relpath(info.path, self.root.path) for info in infos)

    @contextmanager
    def writer(self, path: str) -> Iterator[FileWriter]:
        """Give a writer for one file, which is there once the block ends without an error; then it has a record.

        Raises:
            LeaseError: A later run has taken the workspace over; the file is not there then.
        """
        self.check_fence()
        with open_for_writing(self.location(path)) as stream:
            writer = FileWriter(path, stream)
            yield writer
            self.check_fence()

    def write(self, path: str, data: bytes, *, num_rows: int = -1) -> FileRecord:
        """Write a file atomically and return its record; raises as `writer` does."""
        with self.writer(path) as writer:
            writer.write(data)
        return writer.record(num_rows)

    def write_json(self, path: str, content: Any) -> FileRecord:
        """Write JSON, keys in the order given, for people to read."""
        return self.write(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())

    def write_table(self, path: str, table: pa.Table) -> FileRecord:
        """Write one Parquet file atomically. The same table gives the same bytes."""
        return self.write_tables(path, [table], table.schema)

    def write_tables(self, path: str, tables: Iterable[pa.Table], schema: pa.Schema) -> FileRecord:
        """Write tables, one after the other, to one Parquet file, each its own row groups; as `write_table`."""
        num_rows = 0
        with self.writer(path) as writer:
            options = {"compression": "zstd", "write_statistics": False, "use_dictionary": _repetitive(schema)}
            with pq.ParquetWriter(writer, schema, **options) as parquet:
                for table in tables:
                    parquet.write_table(table)
                    num_rows += table.num_rows
        return writer.record(num_rows)

    def read(self, path: str, record: FileRecord | None = None) -> bytes:
        """Return a file; with its record, only if size and digest agree.

        Raises:
            StoreError: The file is missing.
            AlteredFileError: It differs from its record.
        """
        if not self.exists(path):
            raise StoreError(f"{self.location(path).name}: no such file. Run the stage that makes it again.")
        data = read_bytes(self.location(path))
        if record is not None:
            self._check(path, record, len(data), hashlib.sha256(data).hexdigest())
        return data

    def _check(self, path: str, record: FileRecord, num_bytes: int, sha256: str) -> None:
        if (num_bytes, sha256) != (record.num_bytes, record.sha256):
            raise AlteredFileError(
                f"{self.location(path).name}: {num_bytes} bytes that differ from the {record.num_bytes} bytes its "
                "manifest lists. The file was altered or cut short; delete it, or all that is damaged with "
                "`rose-ray verify --delete-damaged`, and run again."
            )

    def _not_parquet(self, path: str, error: Exception) -> AlteredFileError:
        return AlteredFileError(
            f"{self.location(path).name}: not a readable Parquet file ({error}). Delete it and run again."
        )

    def read_json(self, path: str, record: FileRecord | None = None) -> Any:
        """Return parsed JSON.

        Raises:
            StoreError: Missing, or not JSON.
        """
        try:
            return json.loads(self.read(path, record))
        except ValueError as error:
            raise AlteredFileError(
                f"{self.location(path).name}: not JSON ({error}). Delete it and run again."
            ) from error

    def read_table(self, path: str, record: FileRecord | None = None, columns: list[str] | None = None) -> pa.Table:
        """Return a Parquet table, checked against its record where one is given.

        Raises:
            StoreError: The file is missing.
            AlteredFileError: It differs from its record, or is not Parquet.
        """
        data = self.read(path, record)
        try:
            return pq.read_table(pa.BufferReader(data), columns=columns)
        except (pa.ArrowException, OSError) as error:
            raise self._not_parquet(path, error) from error

    def open_table(self, path: str, record: FileRecord) -> pq.ParquetFile:
        """Open a Parquet table that may not fit into memory, after one reading to check it against its record.

        Raises:
            StoreError: The file is missing.
            AlteredFileError: It differs from its record, or is not Parquet.
        """
        if not self.exists(path):
            raise StoreError(f"{self.location(path).name}: no such file. Run the stage that makes it again.")
        location, sha256, num_bytes = self.location(path), hashlib.sha256(), 0
        with location.filesystem.open_input_stream(location.path, compression=None) as stream:
            while block := stream.read(_BLOCK_BYTES):
                sha256.update(block)
                num_bytes += len(block)
        self._check(path, record, num_bytes, sha256.hexdigest())
        try:
            return pq.ParquetFile(location.filesystem.open_input_file(location.path))
        except (pa.ArrowException, OSError) as error:
            raise self._not_parquet(path, error) from error

    def is_intact(self, record: FileRecord) -> bool:
        """Whether the file is there with the size its record gives. A look, not a read."""
        info = self._info(record.path)
        return bool(info.type == fs.FileType.File and info.size == record.num_bytes)

    def list_subfolders(self, path: str) -> list[str]:
        """Return the folders directly below ``path``, relative to the workspace, sorted; [] where it is missing."""
        selector = fs.FileSelector(self.location(path).path, allow_not_found=True)
        infos = self.root.filesystem.get_file_info(selector)
        folders = (info.path for info in infos if info.type == fs.FileType.Directory)
        return sorted(posixpath.relpath(folder, self.root.path) for folder in folders)

    def delete_file(self, path: str) -> None:
        """Remove a file, if it is there."""
        self.check_fence()
        if self.exists(path):
            self.root.filesystem.delete_file(self.location(path).path)

    def delete_folder(self, path: str) -> None:
        """Remove a folder and all below it, if it is there."""
        self.check_fence()
        if self._info(path).type == fs.FileType.Directory:
            self.root.filesystem.delete_dir(self.location(path).path)


def _repetitive(schema: pa.Schema) -> list[str]:
    """Columns worth a dictionary: all but vectors of floats, which it makes larger and four times slower to read."""
    paths = []
    for field in schema:
        is_list = pa.types.is_fixed_size_list(field.type) or pa.types.is_list(field.type)
        if not (pa.types.is_fixed_size_list(field.type) and pa.types.is_floating(field.type.value_type)):
            paths.append(f"{field.name}.list.element" if is_list else field.name)
    return paths
