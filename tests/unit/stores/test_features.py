"""When a shard of features counts as done."""

from __future__ import annotations

import time
from pathlib import Path

import pyarrow as pa
import pytest

from rose_ray.errors import AlteredFileError
from rose_ray.stores.features import (
    REJECTED_FILE,
    checkpoint_file,
    find_shard,
    mixed_settings,
    read_shard_features,
    shard_folder,
)
from rose_ray.stores.manifest import Manifest, commit_artefact
from rose_ray.stores.workspace import Workspace

KEY, SHARD = "0123", "4567-00000"
CHECKPOINTS = ["checkpoint-1", "checkpoint-2"]


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace.open(str(tmp_path / "workspace"), create=True)


def store(workspace: Workspace, skipped: list[str]) -> Manifest:
    folder = shard_folder(KEY, SHARD)
    tables = {checkpoint_file(name): pa.table({"row_id": [name]}) for name in CHECKPOINTS}
    tables[REJECTED_FILE] = pa.table({"row_id": ["r"]})
    files = [workspace.write_table(f"{folder}/{name}", table) for name, table in tables.items()]
    facts = {"skipped": skipped}
    made_from = {"features": KEY, "shard": SHARD}
    return commit_artefact(
        workspace, "features", made_from, files, {"rows": 2}, facts, started=time.monotonic(), folder=folder
    )


@pytest.mark.parametrize(
    ("skipped_then", "skipped_now", "done"),
    [
        ([], [], True),
        ([], ["a"], True),  # it covers more than is wanted
        (["a"], ["a", "b"], True),
        (["a"], [], False),  # the file that held `a` is gone, so `a` is wanted here
        (["a"], ["b"], False),
    ],
)
def test_a_receipt_must_cover_the_rows_wanted_now(
    workspace: Workspace, skipped_then: list[str], skipped_now: list[str], done: bool
) -> None:
    receipt = store(workspace, skipped_then)
    assert find_shard(workspace, KEY, SHARD, skipped_now) == (receipt if done else None)


def test_features_without_receipt_or_with_a_short_file_count_for_nothing(workspace: Workspace) -> None:
    assert find_shard(workspace, KEY, SHARD, []) is None
    receipt = store(workspace, [])
    workspace.write(receipt.files[1].path, b"PAR1")
    assert find_shard(workspace, KEY, SHARD, []) is None
    assert find_shard(workspace, "other", SHARD, []) is None


def test_features_are_read_checked_and_in_the_order_of_training(workspace: Workspace) -> None:
    receipt = store(workspace, [])
    stored = read_shard_features(workspace, receipt, CHECKPOINTS)
    assert [table["row_id"].to_pylist() for table in stored.tables] == [["checkpoint-1"], ["checkpoint-2"]]
    assert stored.rejected["row_id"].to_pylist() == ["r"]
    data = workspace.read(receipt.files[1].path)
    workspace.write(receipt.files[1].path, data[:-1] + b"?")
    with pytest.raises(AlteredFileError, match=r"checkpoint-2\.parquet"):
        read_shard_features(workspace, receipt, CHECKPOINTS)
    with pytest.raises(AlteredFileError, match=r"does not list 'checkpoint-3\.parquet'"):
        read_shard_features(workspace, receipt, [*CHECKPOINTS, "checkpoint-3"])


def test_what_differs_among_shards_is_named() -> None:
    one, other = {"device": "cpu", "max_batch_tokens": 512}, {"device": "cuda", "max_batch_tokens": 512}
    assert mixed_settings([one, {}, one]) == ""
    assert mixed_settings([one, other, one, {}]) == "device cpu (2 shards), cuda (1 shards)"
