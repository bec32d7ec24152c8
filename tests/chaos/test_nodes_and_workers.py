"""Workers and nodes are lost while the run goes on."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.disturbed import (
    assert_same,
    copy_without_features,
    finish,
    receipts,
    said,
    scoring_pids,
    started,
    wait_for,
    write_config,
)

pytestmark = [pytest.mark.chaos, pytest.mark.ray]

TWO_ACTORS = {"actors": 2, "cpus_per_actor": 0.25}
DEATHS = r"scoring actors lost and replaced: [1-9]"


@pytest.fixture
def counts(tmp_path: Path) -> Path:
    """Where failpoints are counted."""
    folder = tmp_path / "counts"
    folder.mkdir()
    return folder


def test_a_worker_is_killed(cluster: Any, inputs: Path, reference: Path, workspace: Path) -> None:
    config = write_config(workspace.parent, inputs, workspace, address=cluster.address, actors=1, cpus_per_actor=0.25)
    with started(config) as process:
        wait_for(lambda: len(receipts(workspace)) >= 3, process)
        for pid in scoring_pids(workspace):
            os.kill(pid, signal.SIGKILL)
        assert process.wait(120) == 0, said(config)
    assert_same(workspace, reference)
    assert re.search(DEATHS, said(config))


@pytest.mark.parametrize("place", ["mid_batch", "before_receipt", "actor_start"])
def test_a_worker_dies_once_at(
    cluster: Any, inputs: Path, reference: Path, workspace: Path, counts: Path, place: str
) -> None:
    config = write_config(workspace.parent, inputs, workspace, address=cluster.address, actors=1, cpus_per_actor=0.25)
    text = finish(config, ROSE_RAY_FAILPOINT=f"{place}:1", ROSE_RAY_FAILPOINT_COUNTS=str(counts))
    assert_same(workspace, reference)
    assert list(counts.iterdir()) and re.search(DEATHS, text)


@pytest.mark.parametrize("place", ["actor_start", "mid_batch"])
def test_workers_that_always_die_end_the_run_with_an_exact_error(
    cluster: Any, inputs: Path, reference: Path, workspace: Path, place: str
) -> None:
    config = write_config(workspace.parent, inputs, workspace, address=cluster.address, actors=1, cpus_per_actor=0.25)
    text = finish(config, expected=1, ROSE_RAY_FAILPOINT=place)
    assert "error: scoring actors died again and again without finishing a shard; the last were process " in text
    finish(config)
    assert_same(workspace, reference)


def test_a_worker_dies_once_while_banks_are_made(
    cluster: Any, inputs: Path, reference: Path, tmp_path: Path, counts: Path
) -> None:
    workspace = copy_without_features(reference, tmp_path / "workspace", beyond=["bank"])
    config = write_config(tmp_path, inputs, workspace, address=cluster.address, actors=1, cpus_per_actor=0.25)
    text = finish(config, ROSE_RAY_FAILPOINT="mid_pairs:1", ROSE_RAY_FAILPOINT_COUNTS=str(counts))
    assert_same(workspace, reference)
    assert "bank workers lost and replaced: 1" in text and not re.search(DEATHS, text)


def test_workers_that_always_die_while_banks_are_made_end_the_run_with_an_exact_error(
    cluster: Any, inputs: Path, reference: Path, tmp_path: Path
) -> None:
    workspace = copy_without_features(reference, tmp_path / "workspace", beyond=["bank"])
    config = write_config(tmp_path, inputs, workspace, address=cluster.address, actors=1, cpus_per_actor=0.25)
    text = finish(config, expected=1, ROSE_RAY_FAILPOINT="mid_pairs")
    assert "error: bank workers died again and again without finishing a target; the last were process " in text
    finish(config)
    assert_same(workspace, reference)


def test_a_node_is_lost(cluster: Any, inputs: Path, reference: Path, workspace: Path) -> None:
    node = cluster.add_node(num_cpus=1)
    config = write_config(workspace.parent, inputs, workspace, address=cluster.address, **TWO_ACTORS)
    with started(config) as process:
        wait_for(lambda: len(receipts(workspace)) >= 3, process)
        cluster.remove_node(node, allow_graceful=False)
        assert process.wait(170) == 0, said(config)
    assert_same(workspace, reference)
    assert "node lost: " in said(config)
