"""How far a stage is, how fast, and how long it still takes."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 5.0


class Progress:
    """Logs ``stage: done/total unit, rate, time left`` every few seconds, and once at the end.

    On a terminal the line is redrawn in place; elsewhere every report is a line of the log.

    Args:
        stage: What is running.
        total: Units in all.
        unit: What is counted, in the plural.
    """

    def __init__(self, stage: str, total: int, unit: str) -> None:
        self.stage, self.total, self.unit = stage, total, unit
        self.done = 0
        self._start = self._last = time.monotonic()
        self._first: tuple[float, int] | None = None  # when the first units came, and how many: start-up is no rate
        self._inline = sys.stderr.isatty()

    def advance(self, count: int, note: str = "") -> None:
        """Count ``count`` more units as done."""
        self.done += count
        now = time.monotonic()
        self._first = self._first or (now, self.done)
        finished = self.done >= self.total
        if not (finished or now - self._last >= (0.5 if self._inline else _SECONDS_BETWEEN_LINES)):
            return
        self._last = now
        line = self._line(now, note)
        if self._inline:
            print(f"\r\x1b[K{line}", end="\n" if finished else "", file=sys.stderr, flush=True)
        else:
            logger.info(line)

    def _line(self, now: float, note: str) -> str:
        seconds = now - self._start
        assert self._first is not None
        since, before = self._first if now > self._first[0] else (self._start, 0)
        rate = (self.done - before) / (now - since) if now > since else 0.0
        left = (self.total - self.done) / rate if rate else 0.0
        ending = f"{_clock(left)} left" if self.done < self.total else f"took {_clock(seconds)}"
        extra = f", {note}" if note else ""
        return f"{self.stage}: {self.done:,}/{self.total:,} {self.unit}, {rate:,.1f}/s, {ending}{extra}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class _Board:
    """A Ray actor between workers that report and the driver that shows: Ray Train's driver only waits."""

    def __init__(self) -> None:
        self.total, self.done, self.note = 0, 0, ""

    def start(self, total: int, done: int) -> None:
        self.total, self.done = total, done  # workers that go on after others, lost ones, begin where those were saved

    def advance(self, count: int, note: str) -> None:
        self.done, self.note = self.done + count, note

    def read(self) -> tuple[int, int, str]:
        return self.total, self.done, self.note


@contextmanager
def shown_progress(stage: str, unit: str) -> Iterator[Any]:
    """Give workers a board to report to (``start``, ``advance``), and show what stands on it."""
    board: Any = ray.remote(num_cpus=0)(_Board).remote()
    finished = threading.Event()
    watcher = threading.Thread(target=_watch, args=(board, stage, unit, finished), daemon=True)
    watcher.start()
    try:
        yield board
    finally:
        finished.set()
        watcher.join()
        ray.kill(board)


def _watch(board: Any, stage: str, unit: str, finished: threading.Event) -> None:
    progress: Progress | None = None
    last = False
    while not last:
        last = finished.wait(0.5)  # read once more after the end: the last report counts
        total, done, note = ray.get(board.read.remote())
        if total and progress is None:
            progress = Progress(stage, total, unit)
        if progress is not None and done > progress.done:
            progress.advance(done - progress.done, note)
