"""Pool, workspace and selection in a bucket: killed, and gone on with."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from rose_ray.stores.verify import verify
from rose_ray.stores.workspace import Workspace
from tests.buckets import local_bucket
from tests.chaos.disturbed import finish, real_cluster, receipts, started, tables, wait_for, write_config

pytestmark = [pytest.mark.chaos, pytest.mark.ray]


@pytest.fixture
def bucket(inputs: Path) -> Iterator[tuple[Any, str]]:
    """A client, and the options of URIs; the pool lies at ``s3://chaos/pool``."""
    with local_bucket("chaos") as (client, options):
        for name in ("m.jsonl", "n.jsonl"):
            client.upload_file(str(inputs / name), "chaos", f"pool/{name}")
        yield client, options


@pytest.fixture
def nodes(bucket: tuple[Any, str]) -> Iterator[str]:
    """Address of two nodes, which are started last: they have to know what opens the bucket."""
    with real_cluster() as made:
        made.add_node(num_cpus=1)
        yield made.address


def keys(client: Any, below: str) -> list[str]:
    """Keys of a bucket's objects."""
    pages = client.get_paginator("list_objects_v2").paginate(Bucket="chaos", Prefix=f"workspace/{below}")
    return [each["Key"] for page in pages for each in page.get("Contents", [])]


def test_killed_and_finished(
    bucket: tuple[Any, str], nodes: str, inputs: Path, reference: Path, tmp_path: Path
) -> None:
    client, options = bucket
    name = f"s3://chaos/workspace{options}"
    config = write_config(tmp_path, inputs, name, address=nodes, actors=2, cpus_per_actor=0.25)
    content = yaml.safe_load(config.read_text(encoding="utf-8"))
    content["pool"]["inputs"] = [{"files": [f"s3://chaos/pool/{each}.jsonl{options}"]} for each in "mn"]
    config.write_text(yaml.safe_dump(content), encoding="utf-8")

    def num_receipts() -> int:
        return sum(key.endswith("/manifest.json") for key in keys(client, "features/"))

    with started(config) as process:
        # The bucket's server runs in this process: asked without a pause, it would have no time for the run.
        wait_for(lambda: num_receipts() >= len(receipts(reference)) // 2, process, every=0.25)
        process.kill()
        process.wait()
    before = num_receipts()
    text = finish(config)
    assert "lease taken over from a run that did not end" in text and before < num_receipts()
    wanted = tables(reference)
    found = {
        key.removeprefix("workspace/"): hashlib.sha256(
            client.get_object(Bucket="chaos", Key=key)["Body"].read()
        ).hexdigest()
        for stage in ("features/", "scores/", "selections/")
        for key in keys(client, stage)
        if key.endswith((".parquet", ".jsonl"))
    }
    assert found == wanted
    assert verify(Workspace.open(name)).is_clean
