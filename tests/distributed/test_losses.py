"""What was lost on the way reaches the closing summary. None of this starts Ray."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.core.generated.common_pb2 import NodeDeathInfo
from ray.exceptions import ActorDiedError

from rose_ray.distributed import gang as gangs
from rose_ray.distributed import roll as rolls
from rose_ray.distributed import warmup
from rose_ray.distributed.job import Job
from rose_ray.distributed.resources import NodeLosses
from rose_ray.distributed.roll import MAX_BARREN_DEATHS, Enrolment, loss_lines
from rose_ray.distributed.run import _tell_losses
from rose_ray.distributed.training import WarmupJob
from rose_ray.errors import DataError, ResourceError
from rose_ray.model.layout import ParameterLayout
from rose_ray.stores.workspace import Workspace
from tests.distributed.tiny import tiny_job


class LocalRoll:
    """The roll itself, called in this process as Ray would call it elsewhere."""

    def __init__(self, num_actors: int) -> None:
        self.roll = rolls._Roll(num_actors)

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=getattr(self.roll, name))


@pytest.fixture
def local_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "get", lambda value: value)


def test_lost_workers_on_pairs_are_counted_and_end_the_run_when_they_only_die(local_calls: None) -> None:
    roll = LocalRoll(1)
    for _ in range(1 + MAX_BARREN_DEATHS):
        Enrolment(roll, "bank workers", "a target").check()
    with pytest.raises(ResourceError, match="bank workers died again and again without finishing a target; the last"):
        Enrolment(roll, "bank workers", "a target").check()
    assert loss_lines("bank workers", *roll.roll.losses()) == ["bank workers lost and replaced: 4"]


def test_finished_work_clears_the_deaths_before_it(local_calls: None) -> None:
    roll = LocalRoll(1)
    for _ in range(3 * MAX_BARREN_DEATHS):
        place = Enrolment(roll)
        place.check()
        place.finished()
    assert loss_lines("scoring actors", *roll.roll.losses()) == ["scoring actors lost and replaced: 8"]
    assert loss_lines("scoring actors", 0, 0) == []


class FallingApart(gangs.Gang):
    """A gang whose ranks die in the first calls."""

    deaths = 2

    def _start(self) -> None:
        pass

    def _together(self, references: list[Any]) -> list[Any]:
        self.deaths -= 1
        if self.deaths >= 0:
            raise ActorDiedError()
        return ["done"]


def test_a_gang_that_came_apart_is_told(local_calls: None, tmp_path: Path) -> None:
    roll = LocalRoll(1)
    workspace = Workspace.open(str(tmp_path / "workspace"), create=True)
    config = tiny_job(tmp_path, tmp_path / "workspace")
    job = Job(workspace, config)
    vars(job)["identity"] = SimpleNamespace(layout=ParameterLayout((("a", (2, 2)),)))
    gang = FallingApart(job.spec(None, 512), Enrolment(roll))
    assert gang.call("parts", lambda rank: ()) == ["done"]
    told = loss_lines("scoring actors", *roll.roll.losses())
    assert told == ["scoring actors: gangs that came apart and were started again: 2"]
    assert gang.spec.roll is None


def node(name: str, reason: int | None = None) -> dict[str, Any]:
    return {"NodeID": name, "NodeManagerAddress": "host", "Alive": reason is None, "DeathReason": reason or 0}


def test_nodes_that_joined_later_and_died_are_lost_and_idle_ones_are_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ended, fell = NodeDeathInfo.EXPECTED_TERMINATION, NodeDeathInfo.UNEXPECTED_TERMINATION
    idle = NodeDeathInfo.AUTOSCALER_DRAIN_IDLE
    nodes = [node("old", fell), node("head"), node("first")]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    job, losses = SimpleNamespace(result=SimpleNamespace(events=[])), NodeLosses()
    nodes = [node("old", fell), node("head"), node("first", ended), node("later", fell), node("spare", idle)]
    _tell_losses(job, losses)  # type: ignore[arg-type]
    assert job.result.events == ["node lost: host (first)", "node lost: host (later)"]
    losses.idle_may_go = True
    nodes += [node("let go", ended), node("died", fell)]
    _tell_losses(job, losses)  # type: ignore[arg-type]
    assert job.result.events[2:] == ["node lost: host (died)"]


def warmup_job(folder: Path) -> WarmupJob:
    config = tiny_job(folder, folder / "workspace")
    workspace = Workspace.open(str(folder / "workspace"), create=True)
    samples = workspace.write("warmup/key/samples.parquet", b"")
    return WarmupJob(workspace, "warmup/key", samples, config.model, config.lora, config.warmup, "cpu", 1)


def test_restarts_of_the_warm_up_are_events(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    job, failures = warmup_job(tmp_path), [ActorDiedError(), ConnectionError("reset")]
    job.workspace.write_json("warmup/key/training.json", [])

    def fit(job: WarmupJob, resources: dict[str, float]) -> None:
        if failures:
            raise failures.pop(0)

    monkeypatch.setattr(warmup, "_fit", fit)
    monkeypatch.setattr(warmup, "shown_progress", lambda *_: nullcontext())
    events: list[str] = []
    assert warmup.run_warmup(job, cpus_per_worker=1, gpus_per_worker=0, events=events) == []
    assert events == [
        "warm-up: its workers were lost (ActorDiedError); restart 1 of 2",
        "warm-up: its workers were lost (ConnectionError); restart 2 of 2",
    ]
    failures.append(DataError("would only come again"))
    with pytest.raises(DataError):
        warmup.run_warmup(job, cpus_per_worker=1, gpus_per_worker=0, events=events)
    assert len(events) == 2
