"""One run at a time on a workspace.

A run creates ``lease/NUMBER.json``, one more than the last, where no such file exists yet: whoever creates it holds the
workspace, and the number is its fencing number. It renews its own file while it lives. Whoever finds a lease that is
neither released nor renewed takes the next number; from then on the old holder, should it wake up again, finds a
higher number before it writes anything, and stops, whatever the clocks say. Look and write are two steps: what slips in
between is a file of the content that its name stands for, written whole.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

from rose_ray.errors import LeaseError
from rose_ray.exclusive import create_exclusively
from rose_ray.stores.versions import utc_now
from rose_ray.stores.workspace import Workspace, lease_path, leases

logger = logging.getLogger(__name__)

_OWN: set[tuple[str, int]] = set()
"""Leases that this process holds: path of the workspace, number."""

RENEWALS_PER_TERM = 4
"""A lease is renewed so often before it could count as abandoned."""


@dataclass(frozen=True)
class Holder:
    """A run that has, or had, the workspace.

    Attributes:
        host: Its name, for people.
        machine: What tells one machine, boot and process space from another.
        pid, started: Of the process; both together name one process of the machine.
        job: Ray's submission id, if there is one.
        taken_at, renewed_at: UTC, for people.
        renewals: How often it was renewed: what shows, without any clock, that it lives.
        released: It ended.
    """

    host: str
    machine: str
    pid: int
    started: int
    job: str | None
    taken_at: str
    renewed_at: str
    renewals: int = 0
    released: bool = False

    @classmethod
    def here(cls) -> Holder:
        """This process."""
        now, pid = utc_now(), os.getpid()
        return cls(socket.gethostname(), _machine(), pid, _started(pid), _submission_id(), now, now)

    def __str__(self) -> str:
        job = f", job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}, since {self.taken_at}"

    def is_dead(self) -> bool:
        """Whether it is known to be gone: it ran on this machine and its process does not any more."""
        return self.machine == _machine() and _started(self.pid) != self.started


@contextmanager
def held(workspace: Workspace, term_seconds: float) -> Iterator[Workspace]:
    """Hold a workspace's lease; yields the workspace with its fence, which every commit then checks.

    Args:
        workspace: Where.
        term_seconds: A lease that is not renewed for so long counts as abandoned.

    Raises:
        LeaseError: Another run is alive on it, or its file system cannot keep runs apart.
    """
    number, holder = _take(workspace, term_seconds)
    stop = threading.Event()
    fenced = workspace.fenced(number)
    _OWN.add((workspace.root.path, number))
    keeper = threading.Thread(target=_renew, args=(fenced, number, holder, term_seconds, stop), daemon=True)
    keeper.start()
    try:
        yield fenced
    finally:
        stop.set()
        keeper.join()
        _OWN.discard((workspace.root.path, number))
        _release(fenced, number, holder)


@contextmanager
def opened(name: str, term_seconds: float | None, *, create: bool = False) -> Iterator[Workspace]:
    """Open a workspace for writing, and hold it.

    Args:
        name: Path or URI.
        term_seconds: As in `held`; None for no lease.
        create: Make it where there is none.

    Raises:
        LeaseError: Another run is at work on it.
        StoreError: There is none.
    """
    workspace = Workspace.open(name, create=create)
    if term_seconds is None:
        yield workspace
        return
    with held(workspace, term_seconds) as fenced:
        yield fenced


def abandoned_before(workspace: Workspace) -> Holder | None:
    """Return the run that this one has taken a held workspace over from, if it did."""
    number = workspace.fencing_number
    previous = _read(workspace, number - 1) if number is not None and number > 1 else None
    return None if previous is None or previous.released else previous


def find_holder(workspace: Workspace, number: int) -> tuple[Holder | None, bool]:
    """Return who took lease ``number``, and whether it is known to be gone: released, taken over from, or dead."""
    if not workspace.exists(lease_path(number)):
        return None, False
    holder = _read(workspace, number)
    return holder, holder.released or holder.is_dead() or leases(workspace)[-1] > number


def _take(workspace: Workspace, term_seconds: float) -> tuple[int, Holder]:
    while True:
        taken = leases(workspace)
        last = taken[-1] if taken else 0
        previous = _read(workspace, last) if last else None
        if previous is not None and not previous.released:
            _wait_for_end(workspace, last, previous, term_seconds)
        me = Holder.here()
        if create_exclusively(workspace.root, lease_path(last + 1), _bytes(me)):
            if previous is not None and not previous.released:
                logger.warning(f"taken over from a run that did not end: {previous}, last seen {previous.renewed_at}")
            return last + 1, me


def _wait_for_end(workspace: Workspace, number: int, holder: Holder, term_seconds: float) -> None:
    """Return once a lease is abandoned or released; watch it for a whole term where its process cannot be looked up."""
    if holder.machine == _machine():
        ours = holder.pid == os.getpid()  # a run in this process that ended and could not say so
        if holder.is_dead() or (ours and (workspace.root.path, number) not in _OWN):
            return
        raise _alive(workspace, holder)
    logger.info(f"another run had this workspace: {holder}; watching for {term_seconds:g} s whether it lives")
    deadline = time.monotonic() + term_seconds
    while time.monotonic() < deadline:
        time.sleep(min(1.0, term_seconds / (4 * RENEWALS_PER_TERM)))
        if leases(workspace)[-1] != number:
            return  # the caller looks at the new one
        seen = _read(workspace, number)
        if seen.released:
            return
        if seen.renewals != holder.renewals:
            raise _alive(workspace, holder)


def _alive(workspace: Workspace, holder: Holder) -> LeaseError:
    return LeaseError(
        f"workspace {workspace.root.name!r}: another run is at work on it: {holder}. Wait for it or stop it, or name "
        "another workspace."
    )


def _renew(workspace: Workspace, number: int, holder: Holder, term_seconds: float, stop: threading.Event) -> None:
    while not stop.wait(term_seconds / RENEWALS_PER_TERM):
        holder = replace(holder, renewals=holder.renewals + 1, renewed_at=utc_now())
        try:
            workspace.write(lease_path(number), _bytes(holder))
        except LeaseError as error:
            logger.error(str(error))
            return
        except OSError as error:
            logger.warning(f"the lease of this run cannot be renewed: {error}")


def _release(workspace: Workspace, number: int, holder: Holder) -> None:
    try:
        workspace.write(lease_path(number), _bytes(replace(holder, renewed_at=utc_now(), released=True)))
    except (OSError, LeaseError) as error:  # a full disk, for instance: what ended the run matters more
        logger.warning(f"the lease of this run cannot be released: {error}")


def _read(workspace: Workspace, number: int) -> Holder:
    return Holder(**workspace.read_json(lease_path(number)))


def _bytes(holder: Holder) -> bytes:
    content: dict[str, Any] = asdict(holder)
    return (json.dumps(content, indent=2) + "\n").encode()


def _submission_id() -> str | None:
    # What Ray gives to the driver of a submitted job.
    settings = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    found: str | None = settings.get("metadata", {}).get("job_submission_id")
    return found


def _machine() -> str:
    with open("/proc/sys/kernel/random/boot_id") as file:
        boot = file.read().strip()
    return f"{socket.gethostname()}/{boot}/{os.readlink('/proc/self/ns/pid')}"


def _started(pid: int) -> int:
    """Return when a process of this machine started, in clock ticks since boot; -1 where there is none."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return -1
    return -1 if fields[0] == "Z" else int(fields[19])  # a zombie does nothing any more
