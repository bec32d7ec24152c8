"""Memory and disk run out."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from rose_ray.stores.verify import verify
from rose_ray.stores.workspace import Workspace
from tests.chaos.disturbed import assert_same, copy_without_features, finish, receipts, write_config
from tests.distributed.tiny import MAX_TOKENS, SUBTASKS

pytestmark = [pytest.mark.chaos, pytest.mark.ray]

WHOLE = "float32"
"""How features are stored here: coarser types would round what is compared."""

TWO_ACTORS = {"actors": 2, "cpus_per_actor": 0.25}

HALVED_SCORE_BOUND = 1e-5
"""Of other batches only the order of float32 sums differs: cosines of such features moved by 1.5e-6 at most where
batches of 512 tokens became ones of 96."""


def scores(workspace: Path) -> dict[str, float]:
    """Score of every row of the first target."""
    (path,) = workspace.glob("scores/alpha/*/scores.parquet")
    table = pq.read_table(path)
    assert all(f"subtask_{name}" in table.column_names for name in SUBTASKS)
    return dict(zip(table["row_id"].to_pylist(), table["score"].to_pylist(), strict=True))


def rejected(workspace: Path) -> dict[str, str]:
    """Reason of every row of the first target that was not scored."""
    (path,) = workspace.glob("scores/alpha/*/rejected.parquet")
    table = pq.read_table(path)
    return dict(zip(table["row_id"].to_pylist(), table["reason"].to_pylist(), strict=True))


def assert_close(found: dict[str, float], wanted: dict[str, float]) -> None:
    """Scores of the same rows agree within the bound."""
    apart = np.array([found[row] - wanted[row] for row in found])
    assert np.abs(apart).max() <= HALVED_SCORE_BOUND


@pytest.fixture(scope="module", autouse=True)
def second_node(cluster: Any) -> Any:
    return cluster.add_node(num_cpus=1)


@pytest.fixture(scope="module")
def whole(inputs: Path, reference: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed run with features kept whole: a bound on scores is then one on what was computed."""
    folder = tmp_path_factory.mktemp("whole")
    workspace = copy_without_features(reference, folder / "workspace")
    finish(write_config(folder, inputs, workspace, WHOLE))
    return workspace


def test_batches_that_do_not_fit_are_halved(cluster: Any, inputs: Path, whole: Path, workspace: Path) -> None:
    config = write_config(workspace.parent, inputs, workspace, WHOLE, address=cluster.address, **TWO_ACTORS)
    text = finish(config, ROSE_RAY_FAILPOINT=f"out_of_memory:{MAX_TOKENS}")
    assert "batches halved for memory: " in text
    assert scores(workspace).keys() == scores(whole).keys() and rejected(workspace) == rejected(whole)
    assert_close(scores(workspace), scores(whole))
    assert verify(Workspace.open(str(workspace))).is_clean


def test_a_row_that_does_not_fit_alone_is_rejected_and_its_neighbours_are_not(
    cluster: Any, inputs: Path, whole: Path, workspace: Path
) -> None:
    config = write_config(workspace.parent, inputs, workspace, WHOLE, address=cluster.address, **TWO_ACTORS)
    text = finish(config, ROSE_RAY_FAILPOINT=f"out_of_memory:{MAX_TOKENS - 1}")
    assert "batches halved for memory: " in text
    lost = {row for row, reason in rejected(workspace).items() if reason == "out_of_memory"}
    assert lost and scores(workspace).keys() == scores(whole).keys() - lost
    assert rejected(workspace).keys() - lost == rejected(whole).keys()
    assert_close(scores(workspace), scores(whole))
    assert verify(Workspace.open(str(workspace))).is_clean


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of two megabytes."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("a small file system cannot be mounted here: needs Linux and root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk(cluster: Any, inputs: Path, reference: Path, small_disk: Path) -> None:
    workspace = copy_without_features(reference, small_disk / "workspace")
    config = write_config(small_disk.parent / "config", inputs, workspace, address=cluster.address, **TWO_ACTORS)
    status = shutil.disk_usage(small_disk)
    (small_disk / "fill").write_bytes(b"\0" * (status.free - 200_000))
    text = finish(config, expected=1)
    assert "No space left on device. What was finished is kept; run again" in text
    assert 0 < len(receipts(workspace)) < len(receipts(reference)) and not list(workspace.rglob("*.tmp"))
    (small_disk / "fill").unlink()
    finish(config)
    assert_same(workspace, reference)
