"""The roll of scoring actors: how many were lost, and whether they only ever die.

Ray starts a dead actor again and gives it its shard again, without end. An actor that finds too many starts since the
last finished shard ends the run instead.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rose_ray.errors import ResourceError

MAX_BARREN_DEATHS = 3
"""Actors that may die one after the other without a shard finished in between."""


class _Roll:
    """A Ray actor that every scoring actor reports to."""

    def __init__(self, num_actors: int) -> None:
        self.num_actors = num_actors
        self.starts: list[str] = []
        self.since_finished: list[str] = []

    def enrol(self, who: str) -> list[str]:
        """Note a start; return those before it that must have died in vain, where they are too many."""
        self.starts.append(who)
        self.since_finished.append(who)
        barren = len(self.since_finished) - self.num_actors
        return self.since_finished[:-1] if barren > MAX_BARREN_DEATHS else []

    def finished(self) -> None:
        self.since_finished.clear()

    def num_lost(self) -> int:
        return max(0, len(self.starts) - self.num_actors)


@contextmanager
def called_roll(num_actors: int) -> Iterator[Any]:
    """Keep a roll on the driver's node while so many actors are at work."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    roll: Any = (
        ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(_Roll)
        .options(scheduling_strategy=here)
        .remote(num_actors)
    )
    try:
        yield roll
    finally:
        ray.kill(roll)


def enrol(roll: Any) -> ResourceError | None:
    """Report this process as a scoring actor that starts; return what to end the run with, if others only died."""
    died = ray.get(roll.enrol.remote(f"process {os.getpid()} on {socket.gethostname()}"))
    if not died:
        return None
    return ResourceError(
        f"scoring actors died again and again without finishing a shard; the last were {', '.join(died[-3:])}. Look "
        "into Ray's logs of these processes. Often memory of the machine is used up: lower gradients.max_batch_tokens, "
        "or let fewer actors share a machine. What was finished is kept."
    )
