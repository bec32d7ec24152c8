"""Processes of the warm-up are killed for real; what comes out is what an undisturbed one makes, to the last bit."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.distributed.reading import digests
from tests.distributed.session import local_ray
from tests.distributed.tiny import tiny_content, write_inputs

pytestmark = [pytest.mark.chaos, pytest.mark.ray, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
SECONDS = 240
"""For anything that is waited for: starting Ray and two workers takes some twenty on a slow machine."""

WARMUP = {
    "fraction": 1.0,
    "epochs": 6,
    "batch_size": 2,
    "learning_rate": 2e-3,
    "workers": 2,
    "save_steps": 3,
}
UPDATES_AN_EPOCH = 35
"""Of 69 rows that make a sample; the kill comes in the second of them."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with local_ray():
        yield


@pytest.fixture(scope="module", params=[2, 3], ids=lambda stage: f"zero-{stage}")
def zero_stage(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def content_of(inputs: Path, workspace: Path, zero_stage: int) -> dict[str, Any]:
    content = tiny_content(inputs, workspace)
    content["warmup"] = {**WARMUP, "zero_stage": zero_stage}
    content["lora"]["dropout"] = 0.2
    return content


def warm_up(inputs: Path, workspace: Path, zero_stage: int) -> None:
    from rose_ray.config import parse_config
    from rose_ray.distributed.run import run_job

    run_job(parse_config(content_of(inputs, workspace, zero_stage), []), stages=("ingest", "warmup"))


def made(workspace: Path) -> dict[str, str]:
    """Digests of all that the warm-up made; a manifest holds times."""
    found = {path: digest for path, digest in digests(workspace, "warmup").items() if "manifest" not in path}
    assert sum("checkpoint-" in path for path in found) == 4 * WARMUP["epochs"]  # type: ignore[operator]
    assert not [path for path in found if "/resume/" in path]
    return found


@pytest.fixture(scope="module")
def undisturbed(
    cluster: None, zero_stage: int, inputs: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    workspace = tmp_path_factory.mktemp("undisturbed") / "workspace"
    warm_up(inputs, workspace, zero_stage)
    return made(workspace)


def num_saved(workspace: Path) -> int:
    """Updates that the newest saved state knows of."""
    for pointer in workspace.glob("warmup/*/resume/latest.json"):
        return int(json.loads(pointer.read_text(encoding="utf-8"))["num_updates"])
    return 0


def wait_for(condition: Callable[[], Any], what: str) -> Any:
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(0.01)
    raise AssertionError(f"waited {SECONDS} s for {what}")


def test_a_worker_is_killed(
    undisturbed: dict[str, str], zero_stage: int, inputs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from ray.util.state import list_actors

    workspace, killed = tmp_path / "workspace", []

    def workers() -> list[Any]:
        alive = list_actors(filters=[("class_name", "=", "RayTrainWorker"), ("state", "=", "ALIVE")])
        return alive if len(alive) == WARMUP["workers"] else []

    def kill() -> None:
        pids = [worker.pid for worker in wait_for(workers, "the workers")]
        wait_for(lambda: num_saved(workspace) > UPDATES_AN_EPOCH, "the second epoch")
        os.kill(pids[1], signal.SIGKILL)
        killed.append(num_saved(workspace))

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    with caplog.at_level(logging.INFO, logger="rose_ray"):
        warm_up(inputs, workspace, zero_stage)
    killer.join()
    assert killed and UPDATES_AN_EPOCH < killed[0] < 5 * UPDATES_AN_EPOCH
    assert "warm-up: its workers were lost (" in caplog.text and "; restart 1 of 2" in caplog.text
    assert "warm-up: going on after " in caplog.text
    assert made(workspace) == undisturbed


def test_the_driver_is_killed(undisturbed: dict[str, str], zero_stage: int, inputs: Path, tmp_path: Path) -> None:
    workspace, config = tmp_path / "workspace", tmp_path / "job.yaml"
    config.write_text(yaml.safe_dump(content_of(inputs, workspace, zero_stage)), encoding="utf-8")
    command = [sys.executable, "-m", "rose_ray", "warmup", str(config)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with (tmp_path / "log").open("wb") as log:
        driver = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log)
    try:
        wait_for(lambda: num_saved(workspace) > UPDATES_AN_EPOCH or driver.poll() is not None, "the second epoch")
        assert driver.poll() is None, (tmp_path / "log").read_text(encoding="utf-8")
    finally:
        driver.kill()
        driver.wait()
    wait_for(lambda: _stands_still(workspace), "its workers to go with it")
    assert not list(workspace.glob("warmup/*/manifest.json"))
    again = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=SECONDS
    )
    assert again.returncode == 0, again.stderr
    assert "warm-up: going on after " in again.stderr
    assert made(workspace) == undisturbed


def _stands_still(workspace: Path) -> bool:
    before = num_saved(workspace)
    time.sleep(3.0)
    return num_saved(workspace) == before
