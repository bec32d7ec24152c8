"""The ranks of gangs in this session's Ray, and the loss of one."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

from ray.util.state import list_actors

_SECONDS = 200


def kill_a_rank(killed: list[int], kind: str, when: Callable[[], bool]) -> None:
    """Kill a rank of this cluster as a lost machine would; other clusters of the machine have ranks too.

    Args:
        killed: Told the id of the process.
        kind: Class of the rank.
        when: Asked until it is so.
    """
    deadline = time.monotonic() + _SECONDS
    while time.monotonic() < deadline:
        if when():
            alive = list_actors(filters=[("class_name", "=", kind), ("state", "=", "ALIVE")])
            if alive and alive[0].pid:
                os.kill(alive[0].pid, signal.SIGKILL)
                killed.append(alive[0].pid)
                return
        time.sleep(0.02)
