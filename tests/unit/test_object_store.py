"""Pool and workspace on an S3 API: a real server on this machine, spoken to by pyarrow alone."""

from __future__ import annotations

import json
import pickle

import pyarrow as pa
import pytest

from rose_ray.errors import DataError, LeaseError, StoreError
from rose_ray.exclusive import create_exclusively
from rose_ray.filesystem import expand, locate, read_bytes
from rose_ray.stages.ingest import IngestSettings, PoolFile, ingest_file
from rose_ray.stages.pool import read_pool_shard, settle_pool
from rose_ray.stores.lease import held
from rose_ray.stores.manifest import find_manifest
from rose_ray.stores.workspace import Workspace
from tests.buckets import local_bucket


@pytest.fixture(scope="module")
def served():
    with local_bucket("pool") as (client, options):
        for name, numbers in (("a", range(5)), ("b", range(3, 8))):
            rows = [
                {"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "a"}]}
                for n in numbers
            ]
            body = "".join(json.dumps(row) + "\n" for row in rows).encode()
            client.put_object(Bucket="pool", Key=f"rows/{name}.jsonl", Body=body)
        yield client, lambda path: f"s3://pool/{path}{options}&allow_bucket_creation=true"


@pytest.fixture
def client(served):
    return served[0]


@pytest.fixture
def bucket(served):
    return served[1]


def test_pool_and_workspace_live_in_a_bucket(bucket):
    workspace = Workspace.open(bucket("ws"), create=True)
    files = expand([bucket("rows/*.jsonl")])
    assert [file.name for file in files] == ["s3://pool/rows/a.jsonl", "s3://pool/rows/b.jsonl"]
    manifests = [ingest_file(workspace, PoolFile(file), IngestSettings(shard_rows=2)) for file in files]
    pool = settle_pool(workspace, manifests)
    assert pool.counts == {"rows_read": 10, "unique": 8, "duplicates": 2, "rejected": 0, "unsampled": 0}
    again = Workspace.open(bucket("ws"))
    rows = [read_pool_shard(again, pool, entry["shard"]).num_rows for entry in pool.facts["shards"]]
    assert sum(rows) == 8
    assert find_manifest(again, pool.folder) == pool


def test_missing_things_in_a_bucket_are_named(bucket):
    with pytest.raises(DataError, match="nowhere"):
        expand([bucket("rows/nowhere.jsonl")])
    with pytest.raises(DataError, match="matches no file"):
        expand([bucket("rows/*.parquet")])
    with pytest.raises(StoreError, match="no workspace"):
        Workspace.open(bucket("elsewhere"))


def test_a_rewritten_file_is_whole(bucket):
    workspace = Workspace.open(bucket("ws"), create=True)
    for content in (b"first", b"second"):
        record = workspace.write("some/file", content)
        assert read_bytes(locate(bucket("ws/some/file"))) == content
    assert workspace.is_intact(record)
    assert workspace.list_folder("some") == ["some/file"]


def test_one_run_at_a_time_holds_a_bucket(bucket):
    workspace = Workspace.open(bucket("leased"), create=True)
    with held(workspace, 3600.0) as fenced:
        assert fenced.fencing_number == 1
        with pytest.raises(LeaseError, match="another run is at work on it"), held(workspace, 3600.0):
            pass
    with held(workspace, 3600.0) as fenced:
        assert fenced.fencing_number == 2
        assert not create_exclusively(workspace.root, "lease/00000002.json", b"")


def test_a_table_is_streamed_into_a_bucket_and_read_in_parts(bucket):
    workspace = Workspace.open(bucket("ws"), create=True)
    parts = [pa.table({"number": range(start, start + 3)}) for start in (0, 3)]
    record = workspace.write_tables("tables/t.parquet", parts, parts[0].schema)
    table = workspace.open_table("tables/t.parquet", record)
    assert [table.read_row_group(number)["number"].to_pylist() for number in (0, 1)] == [[0, 1, 2], [3, 4, 5]]

    def failing():
        yield parts[0]
        raise KeyError("stop")

    with pytest.raises(KeyError):
        workspace.write_tables("tables/part.parquet", failing(), parts[0].schema)
    assert workspace.list_folder("tables") == ["tables/t.parquet"]


def test_a_run_that_was_taken_over_from_harms_no_file_of_its_successor(bucket):
    workspace = Workspace.open(bucket("taken-over"), create=True)
    path, content = "features/key/shard/checkpoint-1.parquet", b"whole" * 100
    with pytest.raises(LeaseError, match="another run took it over"), workspace.fenced(1).writer(path) as writer:
        writer.write(b"a part")
        workspace.write_json("lease/00000002.json", {})
        record = workspace.fenced(2).write(path, content)
    assert workspace.read(path, record) == content


def test_a_second_attempt_that_fails_harms_no_file_of_the_first(bucket):
    workspace = Workspace.open(bucket("ws"), create=True)
    record = workspace.write("attempts/file", b"whole")
    with pytest.raises(KeyError), workspace.writer("attempts/file") as writer:
        writer.write(b"a part")
        raise KeyError("stop")
    assert workspace.read("attempts/file", record) == b"whole"


@pytest.mark.parametrize("content", [b"", b"small" * 20, bytes(range(256)) * 4096 * 12])
def test_small_files_go_by_one_put_and_large_ones_in_parts(bucket, client, content):
    workspace = pickle.loads(pickle.dumps(Workspace.open(bucket("ws"), create=True)))
    record = workspace.write("puts/file", content)
    assert workspace.read("puts/file", record) == content
    in_parts = "-" in client.head_object(Bucket="pool", Key="ws/puts/file")["ETag"]
    assert in_parts == (len(content) > 10_000_000)
    assert not client.list_multipart_uploads(Bucket="pool").get("Uploads")


def test_a_setting_of_the_uri_stands(bucket):
    location = locate(f"{bucket('ws')}&allow_delayed_open=false")
    assert "allow_delayed_open=true" not in location.name
    assert "'allow_delayed_open': False" in str(location.filesystem.__reduce__())
    assert "'allow_delayed_open': True" in str(locate(bucket("ws")).filesystem.__reduce__())
