"""The record of runs."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from rose_ray.stores.runs import StageRecord, last_run, last_stage, write_run
from rose_ray.stores.versions import package_versions, utc_now
from rose_ray.stores.workspace import Workspace

STAGE = StageRecord("score a", "0123", "scores/a/0123", False, 1.5, {"scored": 3}, 100)


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace.open(str(tmp_path / "workspace"), create=True)


def test_no_run_yet(workspace: Workspace) -> None:
    assert last_run(workspace) is None


def test_the_newest_run_is_the_last_one(workspace: Workspace) -> None:
    paths = [write_run(workspace, {"number": number}, [STAGE], "finished") for number in range(12)]
    assert paths == sorted(paths) and len(set(paths)) == 12
    run = last_run(workspace)
    assert run is not None
    assert run["config"] == {"number": 11} and run["outcome"] == "finished"
    assert [StageRecord(**stage) for stage in run["stages"]] == [STAGE] and run["stages"] == [asdict(STAGE)]
    assert run["versions"] == package_versions()


def test_a_stage_is_looked_for_in_the_newest_run_that_has_it(workspace: Workspace) -> None:
    assert last_stage(workspace, "score a") is None
    ingest = replace(STAGE, stage="ingest")
    for stages in ([STAGE], [ingest, replace(STAGE, key="4567")], [ingest], []):
        write_run(workspace, {}, stages, "finished")
    assert last_stage(workspace, "score a") == asdict(replace(STAGE, key="4567"))
    assert last_stage(workspace, "score b") is None


def test_versions_and_times() -> None:
    versions = package_versions()
    assert {"python", "rose_ray", "torch", "ray", "deepspeed", "pyarrow"} <= set(versions)
    versions["torch"] = "changed"
    assert package_versions()["torch"] != "changed"
    assert utc_now().endswith("+00:00") and len(utc_now()) == len("2025-01-01T00:00:00+00:00")
