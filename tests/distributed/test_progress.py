"""The line of progress: what it says, and how often, on a terminal and in a log; and what is said without any."""

from __future__ import annotations

import io
import logging
import sys
import time

import pytest

from rose_ray.config.cluster import RayConfig
from rose_ray.distributed import progress
from rose_ray.distributed.progress import Progress
from rose_ray.distributed.waiting import said_while_waiting


class Clock:
    """Stands still until it is told how late it is."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class Screen(io.StringIO):
    """Standard error on a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def advance(shown: Progress, clock: Clock, seconds: float, count: int, note: str = "") -> None:
    clock.now += seconds
    shown.advance(count, note)


def test_a_log_gets_a_line_every_five_seconds_and_one_at_the_end(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    caplog.set_level(logging.INFO, logger="rose_ray")
    shown = Progress("features", 4000, "rows")
    advance(shown, clock, 2, 1000, "shard a")  # start-up, which the rate leaves out
    advance(shown, clock, 2.9, 400)
    advance(shown, clock, 1.1, 400, "shard b")
    advance(shown, clock, 4.9, 100)
    advance(shown, clock, 0.1, 2100)
    assert caplog.messages == [
        "features: 1,800/4,000 rows, 200.0/s, 0:11 left, shard b",
        "features: 4,000/4,000 rows, 333.3/s, took 0:11",
    ]
    assert not sys.stderr.getvalue()  # type: ignore[attr-defined]


def test_a_terminal_gets_one_line_that_is_redrawn(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    caplog.set_level(logging.INFO, logger="rose_ray")
    shown = Progress("warm-up", 10, "samples")
    advance(shown, clock, 1, 1)
    advance(shown, clock, 0.4, 1)
    advance(shown, clock, 3600.6, 3, "loss 0.5")
    advance(shown, clock, 0.1, 5)
    lines = screen.getvalue().split("\r\x1b[K")
    assert lines[1:] == [
        "warm-up: 1/10 samples, 1.0/s, 0:09 left",
        "warm-up: 5/10 samples, 0.0/s, 1:15:01 left, loss 0.5",
        "warm-up: 10/10 samples, 0.0/s, took 1:00:02\n",
    ]
    assert not caplog.messages


def test_all_at_once(clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    caplog.set_level(logging.INFO, logger="rose_ray")
    Progress("features", 3, "rows").advance(3)
    assert caplog.messages == ["features: 3/3 rows, 0.0/s, took 0:00"]


@pytest.mark.ray
def test_a_stage_that_waits_says_what_is_free(ray_cluster: None, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="rose_ray")
    shown = Progress("features", 10, "rows")
    with said_while_waiting(shown, RayConfig(), seconds=0.5):
        time.sleep(0.8)
    line = caplog.messages[0]
    assert line.startswith("features: nothing finished in 0.5 s; free on the cluster: ")
    assert line.endswith("of 2 CPU; each of 1 actors needs 1 CPU, a reading task 0.25 CPU")
