"""The record of runs: configuration, stages, seconds. For people and for `status`; no result depends on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from rose_ray.stores.versions import package_versions, utc_now
from rose_ray.stores.workspace import Workspace

_FOLDER = "runs"

RUNNING = "running"
"""Outcome of a run that has begun and not said how it ended: it is at work, or was killed."""


@dataclass(frozen=True)
class StageRecord:
    """One stage of one run.

    Attributes:
        stage: Name, with the target where it has one.
        key: Of the artefact it made or found.
        folder: Where that lies, relative to the workspace.
        reused: True where it was there already.
        seconds: Wall time in this run.
        counts: Rows in and out, by name.
        num_bytes: Size of the artefact.
    """

    stage: str
    key: str
    folder: str
    reused: bool
    seconds: float
    counts: dict[str, int]
    num_bytes: int


def write_run(
    workspace: Workspace,
    config: dict[str, Any],
    stages: list[StageRecord],
    outcome: str,
    events: Sequence[str] = (),
    *,
    path: str | None = None,
) -> str:
    """Write the record of a run and return its path.

    Args:
        workspace: Where.
        config: The dumped configuration.
        stages: What was done, in order.
        outcome: `RUNNING`, ``finished``, or the error that ended it.
        events: What happened on the way.
        path: Of the record written when the run began, which this one replaces; the next number where not given.
    """
    began = utc_now() if path is None else workspace.read_json(path)["started_at"]
    path = path or f"{_FOLDER}/run-{len(_paths(workspace)) + 1:05d}.json"
    content = {
        "started_at": began,
        "finished_at": None if outcome == RUNNING else utc_now(),
        "outcome": outcome,
        "fencing_number": workspace.fencing_number,
        "events": list(events),
        "stages": [asdict(stage) for stage in stages],
        "versions": package_versions(),
        "config": config,
    }
    workspace.write_json(path, content)
    return path


def last_run(workspace: Workspace) -> dict[str, Any] | None:
    """Return the newest record, or None where nothing ran yet."""
    paths = _paths(workspace)
    content: dict[str, Any] | None = workspace.read_json(paths[-1]) if paths else None
    return content


def last_ended_run(workspace: Workspace) -> dict[str, Any] | None:
    """Return the newest record of a run that said how it ended, or None where none did."""
    runs = map(workspace.read_json, reversed(_paths(workspace)))
    return next((run for run in runs if run["outcome"] != RUNNING), None)


def finished_runs(workspace: Workspace) -> list[dict[str, Any]]:
    """Return the records of all runs that ended well, oldest first."""
    return [run for run in map(workspace.read_json, _paths(workspace)) if run["outcome"] == "finished"]


def since_last_finished(workspace: Workspace) -> tuple[datetime | None, list[dict[str, Any]]]:
    """Return when the last run that ended well was recorded, by the storage's clock, and the records after it.

    Without such a run the time is None and every record is returned.
    """
    later: list[dict[str, Any]] = []
    for path in reversed(_paths(workspace)):
        content = workspace.read_json(path)
        if content["outcome"] == "finished":
            return workspace.modified_at(path), later
        later.append(content)
    return None, later


def last_stage(workspace: Workspace, stage: str) -> dict[str, Any] | None:
    """Return a stage's record (see `StageRecord`) in the newest run that got as far, or None where none did."""
    for path in reversed(_paths(workspace)):
        for record in reversed(workspace.read_json(path)["stages"]):
            if record["stage"] == stage:
                found: dict[str, Any] = record
                return found
    return None


def _paths(workspace: Workspace) -> list[str]:
    return [path for path in workspace.list_folder(_FOLDER) if path.endswith(".json")]
