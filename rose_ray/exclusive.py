"""Creating a file only where there is none: what keeps two runs apart.

A local or network file system does it with a hard link, S3 with a conditional PUT. ``pyarrow.fs`` can do neither, so S3
is spoken to through boto3 here (`pip install 'rose-ray[s3]'`), with the options of the same URI.
"""

from __future__ import annotations

import os
import posixpath
import uuid
from typing import Any
from urllib.parse import parse_qs, urlsplit

from pyarrow import fs

from rose_ray.errors import LeaseError
from rose_ray.filesystem import Location, child

_ADVICE = "Set lease.enabled to false if you make sure yourself that one run at a time writes to it."


def create_exclusively(root: Location, path: str, data: bytes) -> bool:
    """Create a file with its whole content, unless there is one; return whether it was created.

    Args:
        root: A folder as the user named it, its URI's options included.
        path: Of the file, below it.
        data: Content.

    Raises:
        LeaseError: The file system of ``root`` has no way to do this.
        OSError: The folder cannot be written.
    """
    if isinstance(root.filesystem, fs.LocalFileSystem):
        return _link(child(root, path), data)
    if isinstance(root.filesystem, fs.S3FileSystem):
        return _conditional_put(root, posixpath.join(root.path, path), data)
    raise LeaseError(
        f"workspace {root.name!r}: {root.filesystem.type_name} has no conditional write that could keep two runs "
        f"apart. {_ADVICE}"
    )


def _link(location: Location, data: bytes) -> bool:
    os.makedirs(posixpath.dirname(location.path), exist_ok=True)
    temporary = f"{location.path}.{uuid.uuid4().hex}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, location.path)
        except FileExistsError:
            return False
        return True
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def _conditional_put(root: Location, path: str, data: bytes) -> bool:
    from botocore.exceptions import ClientError

    bucket, _, key = path.partition("/")
    try:
        _s3_client(root.name).put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*")
    except ClientError as error:
        status = error.response["ResponseMetadata"]["HTTPStatusCode"]
        if status in (409, 412):  # a conflict is another's PUT under way: it was first
            return False
        if status == 501:
            raise LeaseError(
                f"workspace {root.name!r}: this object store knows no conditional PUT. {_ADVICE}"
            ) from error
        raise OSError(f"{root.name}: {error}") from error
    return True


def _s3_client(uri: str) -> Any:
    try:
        import boto3
    except ImportError as error:
        raise LeaseError(
            f"workspace {uri!r}: keeping two runs apart on S3 needs boto3: pip install 'rose-ray[s3]'. {_ADVICE}"
        ) from error
    options = {name: values[-1] for name, values in parse_qs(urlsplit(uri).query).items()}
    endpoint = options.get("endpoint_override")
    if endpoint and "://" not in endpoint:
        endpoint = f"{options.get('scheme', 'https')}://{endpoint}"
    return boto3.client("s3", endpoint_url=endpoint, region_name=options.get("region"))
