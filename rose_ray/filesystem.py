"""Opening paths and URIs: the one place that talks to ``pyarrow.fs``.

A *location* is a plain path (``data/pool.jsonl``) or a URI (``s3://bucket/pool.jsonl``). Both go through the same
code, so whatever ``pyarrow.fs`` opens can hold a pool, a pair file or a workspace.
"""

from __future__ import annotations

import errno
import fnmatch
import os
import posixpath
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

from pyarrow import fs

from rose_ray.errors import DataError

_GLOB_CHARACTERS = frozenset("*?[")


@dataclass(frozen=True)
class Location:
    """A file or folder on some filesystem.

    Attributes:
        filesystem: Where it lives.
        path: Its path on that filesystem, without a trailing slash.
        name: How the user wrote it, or the same path for a match of a pattern: for messages and tables.
    """

    filesystem: fs.FileSystem
    path: str
    name: str


def locate(name: str, *, relative_to: str = "") -> Location:
    """Resolve a path or URI. Relative paths start at ``relative_to`` (default: the working directory).

    Raises:
        DataError: No filesystem understands the URI.
    """
    if "://" in name:
        try:
            filesystem, path = fs.FileSystem.from_uri(_with_plain_puts(name))
        except (ValueError, OSError) as error:
            raise DataError(
                f"cannot open {name!r}: {error}. Use a local path or a URI that pyarrow.fs knows."
            ) from error
        return Location(filesystem, path.rstrip("/"), name)
    # Asks for the working directory only where the name needs it: a submitted driver's may be cleared away meanwhile.
    path = os.path.abspath(os.path.join(relative_to, os.path.expanduser(name)))
    return Location(fs.LocalFileSystem(), path, name)


def _with_plain_puts(uri: str) -> str:
    # Otherwise a file of any size opens a multipart upload, which a writer that is killed leaves behind.
    if not uri.startswith("s3://") or "allow_delayed_open=" in uri:
        return uri
    return f"{uri}{'&' if '?' in uri else '?'}allow_delayed_open=true"


def child(parent: Location, *parts: str) -> Location:
    """Return the location ``parent/parts...``."""
    name, _, _ = parent.name.partition("?")  # a URI's options say how to reach it, not where it is
    return Location(parent.filesystem, posixpath.join(parent.path, *parts), posixpath.join(name, *parts))


def expand(patterns: Sequence[str], *, relative_to: str = "") -> list[Location]:
    """Turn files and glob patterns into files: patterns in the order given, matches of one pattern by name.

    ``*`` stays within one folder, ``**`` spans folders. A file named twice is read once.

    Raises:
        DataError: A file is missing, or a pattern matches nothing.
    """
    files: dict[str, Location] = {}
    for pattern in patterns:
        location = locate(pattern, relative_to=relative_to)
        for match in _matches(location) if _is_pattern(location) else [_existing(location)]:
            files.setdefault(match.path, match)
    return list(files.values())


def _is_pattern(location: Location) -> bool:
    # A file whose own name holds brackets is a file.
    return bool(_GLOB_CHARACTERS & set(location.path)) and not location.filesystem.get_file_info(location.path).is_file


def _existing(location: Location) -> Location:
    info = location.filesystem.get_file_info(location.path)
    if info.type == fs.FileType.File:
        return location
    found = "a folder" if info.type == fs.FileType.Directory else "nothing"
    raise DataError(f"{location.name!r}: expected a file, found {found} at {location.path!r}. Check the path.")


def _matches(location: Location) -> list[Location]:
    fixed: list[str] = []
    parts = location.path.split("/")
    for part in parts:
        if _GLOB_CHARACTERS & set(part):
            break
        fixed.append(part)
    selector = fs.FileSelector("/".join(fixed) or "/", recursive=True, allow_not_found=True)
    matches = sorted(
        info.path
        for info in location.filesystem.get_file_info(selector)
        if info.type == fs.FileType.File and _path_matches(info.path.split("/"), parts)
    )
    if not matches:
        raise DataError(f"pattern {location.name!r} matches no file (looked under {'/'.join(fixed)!r}).")
    scheme, separator, _ = location.name.rpartition("://") if "://" in location.name else ("", "", "")
    return [Location(location.filesystem, path, f"{scheme}{separator}{path}") for path in matches]


def _path_matches(path: list[str], pattern: list[str]) -> bool:
    if not pattern:
        return not path
    if pattern[0] == "**":
        return any(_path_matches(path[skip:], pattern[1:]) for skip in range(len(path) + 1))
    return bool(path) and fnmatch.fnmatchcase(path[0], pattern[0]) and _path_matches(path[1:], pattern[1:])


@contextmanager
def open_for_writing(location: Location) -> Iterator[BinaryIO]:
    """Give a stream for a whole file, so that readers see the old content, or the new, and never a part.

    A local file is written beside its place, synced and renamed. For an object store it is written into the folder for
    temporary files, and goes to its place once the block has ended without an error.

    Raises:
        OSError: The disk is full or the folder cannot be written; nothing is left behind.
    """
    if not isinstance(location.filesystem, fs.LocalFileSystem):
        yield from _open_object(location)
        return
    os.makedirs(posixpath.dirname(location.path), exist_ok=True)
    temporary = f"{location.path}.{uuid.uuid4().hex}.tmp"
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, location.path)
    except BaseException as error:
        if os.path.exists(temporary):
            os.unlink(temporary)
        if isinstance(error, OSError):
            error.filename = location.name  # a failed write does not say where
        raise


def _open_object(location: Location) -> Iterator[BinaryIO]:
    # A stream to an object store cannot be given up: closing it, as any error does, would put a part in its place.
    with tempfile.TemporaryFile(prefix="rose_ray-") as staged:
        try:
            yield staged
            staged.flush()
        except OSError as error:
            if error.errno == errno.ENOSPC and error.filename is None:
                error.filename = tempfile.gettempdir()  # a failed write does not say where
            raise
        staged.seek(0)
        location.filesystem.create_dir(posixpath.dirname(location.path), recursive=True)
        # In one native call, which no interrupt can end halfway; the file has no name but this one.
        fs.copy_files(
            f"/dev/fd/{staged.fileno()}",
            location.path,
            source_filesystem=fs.LocalFileSystem(),
            destination_filesystem=location.filesystem,
        )


def write_bytes(location: Location, data: bytes) -> None:
    """Write a whole file at once; raises as `open_for_writing`."""
    with open_for_writing(location) as stream:
        stream.write(data)


def read_bytes(location: Location) -> bytes:
    """Return a whole file, uncompressed as stored."""
    # A file knows its size and is read in one request; a stream is read in many small ones.
    with location.filesystem.open_input_file(location.path) as file:
        data: bytes = file.read()
    return data
