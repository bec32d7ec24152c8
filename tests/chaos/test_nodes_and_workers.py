"""Workers and nodes are lost while the run goes on."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.disturbed import assert_same, finish, receipts, said, scoring_pids, started, wait_for, write_config

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


def test_a_node_is_lost(cluster: Any, inputs: Path, reference: Path, workspace: Path) -> None:
    node = cluster.add_node(num_cpus=1)
    config = write_config(workspace.parent, inputs, workspace, address=cluster.address, **TWO_ACTORS)
    with started(config) as process:
        wait_for(lambda: len(receipts(workspace)) >= 3, process)
        cluster.remove_node(node, allow_graceful=False)
        assert process.wait(170) == 0, said(config)
    assert_same(workspace, reference)
    assert "node lost: " in said(config)
