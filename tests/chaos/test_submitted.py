"""Nodes made by ``ray start`` and a job sent by ``ray job submit``, its driver killed, sent again."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.disturbed import ROOT, assert_same, environment, receipts, wait_for, write_config

pytestmark = [pytest.mark.chaos, pytest.mark.ray]

RAY = str(Path(sys.executable).with_name("ray"))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture
def nodes() -> Iterator[str]:
    """Two nodes with temporary folders of their own; yields the dashboard's address."""
    gcs, dashboard = free_port(), free_port()
    with tempfile.TemporaryDirectory(
        prefix="rr", ignore_cleanup_errors=True
    ) as folder:  # a short name: sockets lie in it
        head = ["--head", f"--port={gcs}", f"--dashboard-port={dashboard}", f"--temp-dir={folder}/a", "--num-cpus=1"]
        other = [f"--address=127.0.0.1:{gcs}", "--num-cpus=1"]
        processes = []
        try:
            for arguments in (head, other):
                processes.append(
                    subprocess.Popen(
                        [RAY, "start", *arguments, "--block", "--disable-usage-stats"],
                        env=environment(),
                        stdout=subprocess.DEVNULL,
                        stderr=subprocess.DEVNULL,
                        start_new_session=True,
                    )
                )
                time.sleep(8)
            yield f"http://127.0.0.1:{dashboard}"
        finally:
            for process in processes[::-1]:
                os.killpg(process.pid, signal.SIGTERM)
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)


def submitted(address: str, name: str, config: Path) -> subprocess.Popen[str]:
    command = [RAY, "job", "submit", "--address", address, "--submission-id", name, "--working-dir", str(ROOT / "jobs")]
    runtime = json.dumps({"env_vars": {"PYTHONPATH": str(ROOT)}})
    return subprocess.Popen(
        [*command, "--runtime-env-json", runtime, "--", sys.executable, "run.py", str(config)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_submitted_job_is_killed_and_sent_again(nodes: str, inputs: Path, reference: Path, workspace: Path) -> None:
    config = write_config(workspace.parent, inputs, workspace, address="auto", actors=2, cpus_per_actor=0.25)
    first = submitted(nodes, "first", config)
    wait_for(lambda: len(receipts(workspace)) >= len(receipts(reference)) // 2, first)
    lease = json.loads((workspace / "lease/00000001.json").read_text(encoding="utf-8"))
    assert lease["job"] == "first"
    os.kill(lease["pid"], signal.SIGKILL)
    assert first.wait(120) != 0
    second = submitted(nodes, "second", config)
    text, _ = second.communicate(timeout=170)
    assert second.returncode == 0, text
    assert "lease taken over from a run that did not end" in text and "job first" in text
    assert_same(workspace, reference)
