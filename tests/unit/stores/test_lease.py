"""One run at a time: real files, real processes, a real S3 API."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from pyarrow import fs

from rose_ray.errors import LeaseError
from rose_ray.exclusive import create_exclusively
from rose_ray.filesystem import Location, child, read_bytes
from rose_ray.stores.lease import Holder, held
from rose_ray.stores.manifest import commit_artefact, read_manifest
from rose_ray.stores.workspace import Workspace, lease_path, leases

TERM = 0.4
"""Seconds; a tenth of it is still far more than a renewal of a local file takes."""


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace.open(str(tmp_path / "ws"), create=True)


def elsewhere(**changes: object) -> Holder:
    """A holder on a machine whose processes cannot be looked up."""
    return replace(Holder.here(), host="other", machine="other/boot/pid", **changes)  # type: ignore[arg-type]


def put(workspace: Workspace, number: int, holder: Holder) -> None:
    workspace.write(lease_path(number), json.dumps(asdict(holder)).encode())


def test_a_lease_is_numbered_renewed_and_released(workspace: Workspace) -> None:
    for number in (1, 2):
        with held(workspace, TERM) as fenced:
            assert fenced.fencing_number == number
            holder = Holder(**workspace.read_json(lease_path(number)))
            assert holder.pid == os.getpid() and not holder.released
            deadline = time.monotonic() + 20
            while Holder(**workspace.read_json(lease_path(number))).renewals == 0:
                assert time.monotonic() < deadline
                time.sleep(0.01)
        assert Holder(**workspace.read_json(lease_path(number))).released
    assert leases(workspace) == [1, 2]


def test_a_live_run_of_this_machine_is_not_disturbed(workspace: Workspace) -> None:
    message = f"process {os.getpid()} on .*Wait for it or stop it"
    with held(workspace, 3600.0), pytest.raises(LeaseError, match=message), held(workspace, 3600.0):
        pass
    assert leases(workspace) == [1]


def test_a_live_run_of_another_machine_is_known_by_its_renewals(workspace: Workspace) -> None:
    put(workspace, 1, elsewhere())
    stop = threading.Event()

    def renew() -> None:
        renewals = 0
        while not stop.wait(TERM / 8):
            renewals += 1
            put(workspace, 1, elsewhere(renewals=renewals))

    keeper = threading.Thread(target=renew)
    keeper.start()
    try:
        with pytest.raises(LeaseError, match=r"at work on it: process .* on other"), held(workspace, 20 * TERM):
            pass
    finally:
        stop.set()
        keeper.join()


def test_a_silent_run_of_another_machine_is_taken_over_from(
    workspace: Workspace, caplog: pytest.LogCaptureFixture
) -> None:
    put(workspace, 1, elsewhere())
    with held(workspace, TERM) as fenced:
        assert fenced.fencing_number == 2
    assert "taken over from a run that did not end: process" in caplog.text


def test_a_killed_process_is_taken_over_from_at_once(workspace: Workspace) -> None:
    script = (
        "import sys, time\n"
        "from rose_ray.stores.lease import held\n"
        "from rose_ray.stores.workspace import Workspace\n"
        "with held(Workspace.open(sys.argv[1]), 3600.0):\n"
        "    print('held', flush=True)\n"
        "    time.sleep(600)\n"
    )
    other = subprocess.Popen([sys.executable, "-c", script, workspace.root.path], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    with pytest.raises(LeaseError, match=f"process {other.pid}"), held(workspace, 3600.0):
        pass
    other.send_signal(signal.SIGKILL)
    other.wait()
    with held(workspace, 3600.0) as fenced:  # a whole term is not waited for
        assert fenced.fencing_number == 2


def test_a_run_that_was_taken_over_from_writes_nothing_more(workspace: Workspace) -> None:
    with held(workspace, 3600.0) as old:
        assert create_exclusively(workspace.root, lease_path(2), json.dumps(asdict(elsewhere())).encode())
        with pytest.raises(LeaseError, match="another run took it over while this one, lease 1"):
            commit_artefact(old, "stage", {"a": 1}, [], {}, {}, started=0.0)
    assert workspace.list_folder("stage") == []
    assert not Holder(**workspace.read_json(lease_path(1))).released


def test_commits_carry_the_fencing_number(workspace: Workspace) -> None:
    with held(workspace, 3600.0) as fenced:
        made = commit_artefact(fenced, "stage", {"a": 1}, [], {}, {}, started=0.0)
    assert read_manifest(workspace, made.folder).fencing_number == 1


def test_many_at_once_one_wins(workspace: Workspace) -> None:
    won: list[bool] = []
    start = threading.Barrier(8)

    def attempt(number: int) -> None:
        start.wait()
        won.append(create_exclusively(workspace.root, "some/file", str(number).encode() * 1000))

    threads = [threading.Thread(target=attempt, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(won) == 1
    content = read_bytes(child(workspace.root, "some/file"))
    assert len(set(content)) == 1 and len(content) == 1000  # one writer's, whole
    assert workspace.list_folder("some") == ["some/file"]


def test_a_file_system_without_conditional_writes_is_refused() -> None:
    root = Location(fs.SubTreeFileSystem("/tmp", fs.LocalFileSystem()), "ws", "odd://ws")
    with pytest.raises(LeaseError, match=r"subtree has no conditional write.*lease\.enabled"):
        create_exclusively(root, "a", b"")
