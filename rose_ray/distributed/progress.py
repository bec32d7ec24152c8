"""How far a stage is, how fast, and how long it still takes."""

from __future__ import annotations

import logging
import sys
import time

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 5.0


class Progress:
    """Logs ``stage: done/total unit, rate, time left`` every few seconds, and once at the end.

    On a terminal the line is redrawn in place; elsewhere every report is a line of the log.

    Args:
        stage: What is running.
        total: Units in all.
        unit: What is counted, in the plural.
        quiet: Say nothing: for all workers but one.
    """

    def __init__(self, stage: str, total: int, unit: str, *, quiet: bool = False) -> None:
        self.stage, self.total, self.unit, self.quiet = stage, total, unit, quiet
        self.done = 0
        self._start = self._last = time.monotonic()
        self._inline = sys.stderr.isatty()

    def advance(self, count: int, note: str = "") -> None:
        """Count ``count`` more units as done."""
        self.done += count
        now = time.monotonic()
        finished = self.done >= self.total
        if self.quiet or not (finished or now - self._last >= (0.5 if self._inline else _SECONDS_BETWEEN_LINES)):
            return
        self._last = now
        line = self._line(now - self._start, note)
        if self._inline:
            print(f"\r\x1b[K{line}", end="\n" if finished else "", file=sys.stderr, flush=True)
        else:
            logger.info(line)

    def _line(self, seconds: float, note: str) -> str:
        rate = self.done / seconds if seconds > 0 else 0.0
        left = (self.total - self.done) / rate if rate else 0.0
        ending = f"{_clock(left)} left" if self.done < self.total else f"took {_clock(seconds)}"
        extra = f", {note}" if note else ""
        return f"{self.stage}: {self.done:,}/{self.total:,} {self.unit}, {rate:,.1f}/s, {ending}{extra}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
