"""The driver is killed at every stage of the features; the next run goes on and ends with the same bytes."""

from __future__ import annotations

import json
import os
import signal
from math import ceil
from pathlib import Path
from typing import Any

import pytest

from rose_ray.stores.lease import Holder
from tests.chaos.disturbed import assert_same, finish, receipts, started, tables, wait_for, write_config

pytestmark = [pytest.mark.chaos, pytest.mark.ray]

TWO_ACTORS = {"actors": 2, "cpus_per_actor": 0.25}


@pytest.fixture(scope="module", autouse=True)
def second_node(cluster: Any) -> Any:
    return cluster.add_node(num_cpus=1)


@pytest.mark.parametrize("percent", [10, 25, 50, 75, 90, 100])
def test_killed_after_so_many_shards(
    cluster: Any, inputs: Path, reference: Path, workspace: Path, percent: int
) -> None:
    config = write_config(workspace.parent, inputs, workspace, address=cluster.address, **TWO_ACTORS)
    wanted = ceil(len(receipts(reference)) * percent / 100)
    with started(config) as process:
        wait_for(lambda: len(receipts(workspace)) >= wanted, process)
        process.kill()
        process.wait()
    kept = {path: path.read_bytes() for path in receipts(workspace)}
    text = finish(config)
    assert_same(workspace, reference)
    # What one killed had finished is not done again. A shard that was being finished then may have got its receipt.
    assert {path: path.read_bytes() for path in kept} == kept
    assert f"lease taken over from a run that did not end: process {process.pid} " in text


def test_two_nodes_from_the_first_file_on(cluster: Any, inputs: Path, reference: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, inputs, tmp_path / "workspace", address=cluster.address, **TWO_ACTORS)
    finish(config)
    assert_same(tmp_path / "workspace", reference)


def test_a_second_run_is_refused_while_the_first_is_alive(
    cluster: Any, inputs: Path, reference: Path, workspace: Path
) -> None:
    config = write_config(workspace.parent, inputs, workspace, address=cluster.address, **TWO_ACTORS)
    other = write_config(workspace.parent / "other", inputs, workspace, address=cluster.address, **TWO_ACTORS)
    with started(config) as process:
        wait_for(lambda: len(receipts(workspace)) >= 1, process)
        os.kill(process.pid, signal.SIGSTOP)  # alive, and slow
        text = finish(other, expected=1)
        os.kill(process.pid, signal.SIGCONT)
        assert process.wait(120) == 0
    assert f"another run is at work on it: process {process.pid} on " in text and ", since " in text
    assert_same(workspace, reference)
    assert not tables(workspace.parent / "other")


def test_a_run_that_was_taken_over_from_stops(cluster: Any, inputs: Path, reference: Path, workspace: Path) -> None:
    config = write_config(workspace.parent, inputs, workspace, address=cluster.address, **TWO_ACTORS)
    with started(config) as process:
        wait_for(lambda: len(receipts(workspace)) >= 1, process)
        first = Holder(**json.loads((workspace / "lease/00000001.json").read_text(encoding="utf-8")))
        later = {**vars(first), "pid": process.pid, "started": -2, "released": True}
        (workspace / "lease/00000002.json").write_text(json.dumps(later), encoding="utf-8")
        assert process.wait(120) == 1
    number = len(receipts(workspace))
    finish(config)
    assert number < len(receipts(workspace))
    assert_same(workspace, reference)
