"""A finished job that the tests copy instead of computing it again."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from rose_ray.config import JobConfig
from tests.distributed.session import local_ray
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
def ray_cluster() -> Iterator[None]:
    """See `local_ray`."""
    with local_ray():
        yield


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
