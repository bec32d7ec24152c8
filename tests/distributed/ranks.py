"""The ranks of gangs in the cluster that a test is connected to, and the loss of one."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import ray
from ray._private import state as ray_state

_SECONDS = 200


def kill_a_rank(killed: list[int], kind: str, when: Callable[[], bool]) -> None:
    """Kill a rank of this cluster as a lost machine would; other clusters of the machine have ranks too.

    Args:
        killed: Told the id of the process.
        kind: Class of the rank.
        when: Asked until it is so.
    """
    # Not `ray.util.state`: it finds a cluster by itself, or by RAY_ADDRESS, which may be another one of this machine.
    job = ray.get_runtime_context().get_job_id()
    deadline = time.monotonic() + _SECONDS
    while time.monotonic() < deadline:
        if when():
            actors = ray_state.actors(actor_state_name="ALIVE").values()
            pids = [each["Pid"] for each in actors if each["ActorClassName"] == kind and each["JobID"] == job]
            if pids and pids[0]:
                os.kill(pids[0], signal.SIGKILL)
                killed.append(pids[0])
                return
        time.sleep(0.02)
