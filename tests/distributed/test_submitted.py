"""jobs/ as users run them: submitted to a cluster of its own processes, followed, stopped, submitted again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.distributed.conftest import FinishedJob, copy_up_to_warmup
from tests.distributed.tiny import tiny_content

ROOT = Path(__file__).parents[2]
RAY = Path(sys.executable).parent / "ray"
START_SECONDS, RUN_SECONDS = 90, 300
SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "not-to-be-written-1",
    "HF_TOKEN": "hf_not-to-be-written-2",
    "RAY_AUTH_TOKEN": "not-to-be-written-3" * 4,
}
"""Given to the cluster and to whoever submits; they may turn up nowhere."""

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@dataclass(frozen=True)
class Head:
    """A running head node's job server."""

    address: str

    def ray(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a ``ray job`` command against it from the checkout."""
        command = [str(RAY), "job", arguments[0], "--address", self.address, *arguments[1:]]
        environment = {**os.environ, **SECRETS, "RAY_AUTH_MODE": "token", "PYTHONUNBUFFERED": "1"}
        return subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=RUN_SECONDS, check=False
        )

    def submit(self, *arguments: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        """Submit a command with the checkout as its working directory."""
        return self.ray("submit", "--working-dir", ".", *options, "--", "python", *arguments)


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    folder = tempfile.mkdtemp(prefix="rr-", dir="/tmp")  # sockets below it have a limit of 107 characters
    gcs, dashboard = free_port(), free_port()
    command = [str(RAY), "start", "--head", "--block", f"--port={gcs}", f"--temp-dir={folder}", "--num-cpus=2"]
    command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", "--disable-usage-stats"]
    # Another Ray on this machine has the usual ports of these, and without its agent a node takes no job.
    command += [f"--{name}-port={free_port()}" for name in ("dashboard-agent-listen", "dashboard-agent-grpc")]
    command += [f"--{name}-port={free_port()}" for name in ("metrics-export", "runtime-env-agent")]
    path = f"{RAY.parent}:{os.environ['PATH']}"  # where the nodes find the python of the submitted command
    environment = {**os.environ, **SECRETS, "RAY_AUTH_MODE": "token", "PYTHONPATH": str(ROOT), "PATH": path}
    with open(Path(folder) / "head.log", "w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        address = f"http://127.0.0.1:{dashboard}"
        wait_until(lambda: answers(f"{address}/api/version"), START_SECONDS, "the head's job server")
        made = Head(address)
        # It answers before it can take a job.
        wait_until(lambda: made.submit("-c", "pass").returncode == 0, START_SECONDS, "the head's first job")
        yield made
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(5)  # with time it would end by itself, half a minute after
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def answers(url: str) -> bool:
    try:
        request = urllib.request.Request(url, headers={"Authorization": f"Bearer {SECRETS['RAY_AUTH_TOKEN']}"})
        with urllib.request.urlopen(request, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def wait_until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come within {seconds} s"
        time.sleep(0.1)


def test_a_stopped_job_is_finished_by_the_next(head: Head, finished: FinishedJob, tmp_path: Path) -> None:
    workspace, config = tmp_path / "workspace", tmp_path / "job.json"  # JSON is YAML
    copy_up_to_warmup(finished, workspace)
    content = tiny_content(finished.inputs, workspace)
    content["ray"]["address"] = "auto"
    config.write_text(json.dumps(content))
    num_before = len(list(workspace.glob("lease/*.json")))

    name = ("--submission-id", "first", "--no-wait")
    assert head.submit("jobs/run.py", str(config), options=name).returncode == 0
    wait_until(lambda: bool(list(workspace.glob("bank/*/manifest.json"))), RUN_SECONDS, "a bank")
    assert head.ray("stop", "first").returncode == 0
    assert "was stopped" in head.ray("status", "first").stdout
    assert not list(workspace.glob("selections/*/latest.json"))

    second = head.submit("jobs/run.py", str(config))
    said = second.stdout + second.stderr
    assert second.returncode == 0, said
    leases = [json.loads(path.read_text()) for path in sorted((workspace / "lease").glob("*.json"))]
    assert leases[num_before]["job"] == "first"
    assert len(leases) > num_before + 1 and all(lease["released"] for lease in leases[num_before + 1 :])
    assert "pool/" in said and "features: made" in said  # followed to the end
    assert {path.parent.name for path in workspace.glob("selections/*/latest.json")} == {"alpha", "beta"}
    written = said.encode() + b"".join(path.read_bytes() for path in workspace.rglob("*") if path.is_file())
    assert not any(secret.encode() in written for secret in SECRETS.values())


def test_a_job_that_fails_says_why_and_ends_with_an_error(head: Head) -> None:
    failed = head.submit("jobs/stage.py", "features", "nowhere.yaml")
    assert failed.returncode != 0
    assert "cannot read 'nowhere.yaml'" in failed.stdout + failed.stderr
