"""Places at which a run can be made to fail, for tests of what it does then.

``ROSE_RAY_FAILPOINT=NAME`` fails whenever the place ``NAME`` is reached, ``NAME:NUMBER`` as its place says:

- ``before_receipt``: the process is killed between the data of a shard and its receipt; NUMBER times in all.
- ``mid_batch``: it is killed within a backward pass; NUMBER times in all.
- ``mid_pairs``: it is killed within the work on a target's pairs, for its bank or basis; NUMBER times in all.
- ``actor_start``: it is killed when a scoring actor starts; NUMBER times in all.
- ``out_of_memory``: torch's error is raised for batches of more than NUMBER positions.

Times are counted across processes, in the folder ``ROSE_RAY_FAILPOINT_COUNTS``. Unset, a place costs one look at the
environment.
"""

from __future__ import annotations

import os
import signal

VARIABLE = "ROSE_RAY_FAILPOINT"
COUNTS_VARIABLE = "ROSE_RAY_FAILPOINT_COUNTS"


def failpoint_environment() -> dict[str, str]:
    """What a worker's environment needs for it to fail as this process would."""
    return {name: os.environ[name] for name in (VARIABLE, COUNTS_VARIABLE) if name in os.environ}


def failpoint_number(name: str) -> int | None:
    """Return the number of the failpoint if it is set: 0 where it has none, None where it is not set."""
    chosen, _, number = os.environ.get(VARIABLE, "").partition(":")
    return int(number or 0) if chosen == name else None


def die_at(name: str) -> None:
    """Kill this process as a lost machine would, if the failpoint is set and has not been used up."""
    times = failpoint_number(name)
    if times is not None and (times == 0 or _count(name, times)):
        os.kill(os.getpid(), signal.SIGKILL)


def _count(name: str, times: int) -> bool:
    """Take the next of so many turns, among all processes; False where none is left."""
    folder = os.environ[COUNTS_VARIABLE]
    for turn in range(times):
        try:
            os.close(os.open(os.path.join(folder, f"{name}-{turn}"), os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            continue
        return True
    return False
