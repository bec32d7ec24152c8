"""The record of runs."""

from __future__ import annotations

import os
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from rose_ray.stages.report import status_lines
from rose_ray.stores.lease import held
from rose_ray.stores.runs import (
    RUNNING,
    StageRecord,
    finished_runs,
    last_ended_run,
    last_run,
    last_stage,
    since_last_finished,
    write_run,
)
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


def test_a_run_leaves_a_record_when_it_begins(workspace: Workspace) -> None:
    write_run(workspace, {"number": 1}, [STAGE], "finished")
    path = write_run(workspace.fenced(2), {"number": 2}, [], RUNNING)
    begun = last_run(workspace)
    assert begun is not None and (begun["config"], begun["outcome"]) == ({"number": 2}, RUNNING)
    assert begun["finished_at"] is None and begun["fencing_number"] == 2
    ended = last_ended_run(workspace)
    assert ended is not None and ended["config"] == {"number": 1}
    assert since_last_finished(workspace)[1] == [begun] and finished_runs(workspace) == [ended]
    assert write_run(workspace, {"number": 2}, [STAGE], "finished", path=path) == path
    run = last_run(workspace)
    assert run == last_ended_run(workspace) == finished_runs(workspace)[-1] and len(finished_runs(workspace)) == 2
    assert run is not None and run["started_at"] == begun["started_at"] and run["finished_at"] is not None


def test_status_tells_a_run_at_work_from_one_that_was_killed(workspace: Workspace) -> None:
    def said() -> str:
        return "\n".join(status_lines(workspace))

    write_run(workspace, {}, [], RUNNING)
    assert "and has not ended: at work, or killed; without a lease" in said() and "last run:" not in said()
    write_run(workspace, {}, [STAGE], "finished")
    assert "last run: finished" in said() and "a run" not in said()
    with held(workspace, 3600.0) as fenced:
        write_run(fenced, {}, [], RUNNING)
        assert f"a run is at work: process {os.getpid()} on " in said() and "last seen" in said()
        assert "last run: finished" in said() and STAGE.folder in said()
    assert "and was killed or cut off before its end: process" in said()


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
