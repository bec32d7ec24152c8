"""Memory and disk run out."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from rose_ray.stores.verify import verify
from rose_ray.stores.workspace import Workspace
from tests.chaos.disturbed import assert_same, copy_without_features, finish, receipts, write_config
from tests.distributed.tiny import MAX_TOKENS, SUBTASKS

pytestmark = [pytest.mark.chaos, pytest.mark.ray]

HALVED_SCORE_BOUND = 2e-4
"""Of other sums in other batches a float16 feature may round the other way in its last place, 2**-12 of a number near
0.5; an influence averages 64 of them."""


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


def test_batches_that_do_not_fit_are_halved(inputs: Path, reference: Path, workspace: Path) -> None:
    config = write_config(workspace.parent, inputs, workspace)
    text = finish(config, ROSE_RAY_FAILPOINT=f"out_of_memory:{MAX_TOKENS}")
    assert "batches halved for memory: " in text
    assert scores(workspace).keys() == scores(reference).keys() and rejected(workspace) == rejected(reference)
    assert_close(scores(workspace), scores(reference))
    assert verify(Workspace.open(str(workspace))).is_clean


def test_a_row_that_does_not_fit_alone_is_rejected_and_its_neighbours_are_not(
    inputs: Path, reference: Path, workspace: Path
) -> None:
    config = write_config(workspace.parent, inputs, workspace)
    text = finish(config, ROSE_RAY_FAILPOINT=f"out_of_memory:{MAX_TOKENS - 1}")
    assert "batches halved for memory: " in text
    lost = {row for row, reason in rejected(workspace).items() if reason == "out_of_memory"}
    assert lost and scores(workspace).keys() == scores(reference).keys() - lost
    assert rejected(workspace).keys() - lost == rejected(reference).keys()
    assert_close(scores(workspace), scores(reference))


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


def test_a_full_disk(inputs: Path, reference: Path, small_disk: Path) -> None:
    workspace = copy_without_features(reference, small_disk / "workspace")
    config = write_config(small_disk.parent / "config", inputs, workspace)
    status = shutil.disk_usage(small_disk)
    (small_disk / "fill").write_bytes(b"\0" * (status.free - 200_000))
    text = finish(config, expected=1)
    assert "No space left on device. What was finished is kept; run again" in text
    assert 0 < len(receipts(workspace)) < len(receipts(reference)) and not list(workspace.rglob("*.tmp"))
    (small_disk / "fill").unlink()
    finish(config)
    assert_same(workspace, reference)
