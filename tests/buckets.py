"""An S3 API on this machine: a real server that pyarrow and boto3 speak to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

_KEYS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_EC2_METADATA_DISABLED": "true"}


@contextmanager
def local_bucket(name: str) -> Iterator[tuple[Any, str]]:
    """Serve an empty bucket; yield a client, and the options that a URI of it ends in."""
    with pytest.MonkeyPatch.context() as patch:
        for key, value in _KEYS.items():
            patch.setenv(key, value)
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        try:
            host, port = server.get_host_and_port()
            client = boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1")
            client.create_bucket(Bucket=name)
            yield client, f"?endpoint_override={host}:{port}&scheme=http&region=us-east-1"
        finally:
            server.stop()
