"""Places that fail on purpose, and only then."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rose_ray.failpoints import failpoint_environment, failpoint_number

ROOT = Path(__file__).parents[2]


def die(**settings: str) -> int:
    """Pass a failpoint in a process of its own; return how that ended."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **settings}
    script = "from rose_ray.failpoints import die_at; die_at('here')"
    return subprocess.run([sys.executable, "-c", script], env=environment, check=False, timeout=60).returncode


def test_nothing_fails_unless_asked() -> None:
    assert die() == die(ROSE_RAY_FAILPOINT="elsewhere") == 0
    assert failpoint_environment() == {}


def test_a_place_fails_so_often_in_all(tmp_path: Path) -> None:
    settings = {"ROSE_RAY_FAILPOINT": "here:2", "ROSE_RAY_FAILPOINT_COUNTS": str(tmp_path)}
    assert [die(**settings) for _ in range(3)] == [-signal.SIGKILL, -signal.SIGKILL, 0]
    assert die(ROSE_RAY_FAILPOINT="here") == -signal.SIGKILL


def test_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROSE_RAY_FAILPOINT", "out_of_memory:96")
    assert failpoint_number("out_of_memory") == 96 and failpoint_number("mid_batch") is None
    assert failpoint_environment() == {"ROSE_RAY_FAILPOINT": "out_of_memory:96"}
