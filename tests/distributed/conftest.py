"""A finished job that the tests copy instead of computing it again."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from rose_ray.config import JobConfig
from tests.distributed.tiny import tiny_job, write_inputs

if TYPE_CHECKING:
    from rose_ray.distributed.job import RunResult


@dataclass(frozen=True)
class FinishedJob:
    """A job that ran: its inputs, configuration, workspace and what it returned."""

    inputs: Path
    config: JobConfig
    workspace: Path
    result: RunResult


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `write_inputs`."""
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


@pytest.fixture(scope="session")
def finished(ray_cluster: None, inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> FinishedJob:
    """The job of `tiny_job`, run once. Its workspace is not to be written to."""
    from rose_ray.distributed.run import run_job

    workspace = tmp_path_factory.mktemp("finished") / "workspace"
    config = tiny_job(inputs, workspace)
    return FinishedJob(inputs, config, workspace, run_job(config))


@pytest.fixture
def copied(finished: FinishedJob, tmp_path: Path) -> Path:
    """A copy of the finished job's workspace."""
    workspace = tmp_path / "workspace"
    shutil.copytree(finished.workspace, workspace)
    return workspace


def copy_up_to_warmup(finished: FinishedJob, workspace: Path) -> None:
    """Copy the finished job's workspace, less what follows the warm-up."""
    shutil.copytree(finished.workspace, workspace)
    for stage in ("bank", "features", "scores", "selections", "budgets"):
        shutil.rmtree(workspace / stage, ignore_errors=True)


_FIRST, _SECOND = "m", "n"


@dataclass(frozen=True)
class GrownJob:
    """The finished job with a third file, whose name sorts first, and three damaged files.

    Attributes:
        damaged: Shards whose features were damaged.
        workspace, config, result: Of the grown job.
    """

    damaged: list[str]
    workspace: Path
    config: JobConfig
    result: RunResult


def shards_of(finished: FinishedJob, stem: str) -> list[str]:
    pool = finished.result.pool
    assert pool is not None
    keys = {Path(file["file"]).stem: file["ingest_key"] for file in pool.facts["files"]}
    return [entry["shard"] for entry in pool.facts["shards"] if entry["shard"].startswith(keys[stem])]


@pytest.fixture(scope="session")
def grown(finished: FinishedJob, tmp_path_factory: pytest.TempPathFactory) -> GrownJob:
    """The finished job after its pool grew, run once. Its workspace is not to be written to."""
    from rose_ray.distributed.run import run_job

    folder = tmp_path_factory.mktemp("grown")
    workspace = folder / "workspace"
    shutil.copytree(finished.workspace, workspace)
    for source, name in (("third", "a"), ("m", "m"), ("n", "n")):
        shutil.copy(finished.inputs / f"{source}.jsonl", folder / f"{name}.jsonl")
    (features,) = (workspace / "features").iterdir()
    deleted, cut = shards_of(finished, _FIRST)[0], shards_of(finished, _SECOND)[1]
    (features / deleted / "checkpoint-2.parquet").unlink()
    os.truncate(features / cut / "checkpoint-1.parquet", 100)
    os.truncate(workspace / "ingest" / cut.split("-")[0] / "shard-00000.parquet", 100)
    config = tiny_job(finished.inputs, workspace, [f"pool.inputs.0.files=['{folder}/*.jsonl']"])
    return GrownJob([deleted, cut], workspace, config, run_job(config))
