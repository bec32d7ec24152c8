"""Runs in processes of their own, to be killed; what must be the same afterwards."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from rose_ray.distributed.engine import free_port
from rose_ray.stores.verify import verify
from rose_ray.stores.workspace import Workspace
from tests.distributed.reading import digests
from tests.distributed.tiny import tiny_content

ROOT = Path(__file__).parents[2]
SHARD_ROWS = 4
"""Small: a run can be stopped at many places."""

DEADLINE_SECONDS = 400.0
"""What takes so long hangs. On two cores of a CPU of 2017 that other work shared, some runs took more than 180."""


def environment(**settings: str) -> dict[str, str]:
    """This process's environment, with the project on the path."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **settings}


def write_config(
    folder: Path, inputs: Path, workspace: Path | str, stored_dtype: str | None = None, **ray: Any
) -> Path:
    """Write the tiny job's configuration with shards of `SHARD_ROWS` rows; ``ray`` is what stands under that key."""
    content = tiny_content(inputs, workspace)
    content["pool"]["shard_rows"] = SHARD_ROWS
    content["ray"] |= ray
    if stored_dtype is not None:
        content["gradients"]["stored_dtype"] = stored_dtype
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


@contextmanager
def real_cluster() -> Iterator[Any]:
    """Start a head to which nodes can be added; nodes have this process's environment as it is then."""
    from ray.cluster_utils import Cluster

    # Another Ray on this machine, such as the one that many tests share, has the usual port.
    head = {"num_cpus": 1, "include_dashboard": True, "dashboard_port": free_port()}
    made = Cluster(initialize_head=True, connect=False, head_node_args=head)
    try:
        yield made
    finally:
        made.shutdown()


@contextmanager
def started(config: Path, **settings: str) -> Iterator[subprocess.Popen[str]]:
    """Start ``rose-ray run`` in a process group of its own, which is gone in the end."""
    with open(config.parent / f"log-{time.time_ns()}", "w+", encoding="utf-8") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "rose_ray", "run", str(config)],
            env=environment(**settings),
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def said(config: Path) -> str:
    """What the newest run of this configuration printed."""
    newest = max(config.parent.glob("log-*"))
    return newest.read_text(encoding="utf-8")


def finish(config: Path, expected: int = 0, **settings: str) -> str:
    """Run to the end and return what was printed."""
    with started(config, **settings) as process:
        code = process.wait(DEADLINE_SECONDS)
    text = said(config)
    assert code == expected, text
    return text


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], every: float = 0.005) -> None:
    """Look every so many seconds until something holds; fail if the process ends before."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert process.poll() is None, f"the run ended with {process.returncode} before it was disturbed"
        assert time.monotonic() < deadline, "the run hangs"
        time.sleep(every)


def receipts(workspace: Path) -> list[Path]:
    """Receipts of finished shards."""
    return list(workspace.glob("features/*/*/manifest.json"))


def scoring_pids(workspace: Path) -> set[int]:
    """Processes that have finished a shard."""
    return {json.loads(path.read_text(encoding="utf-8"))["facts"]["pid"] for path in receipts(workspace)}


def copy_without_features(workspace: Path, place: Path, beyond: Sequence[str] = ()) -> Path:
    """Copy a finished workspace but for features and what is made of them."""
    left = ("features", "scores", "selections", "runs", "lease", *beyond)
    shutil.copytree(workspace, place, ignore=shutil.ignore_patterns(*left))
    return place


def tables(workspace: Path) -> dict[str, str]:
    """Digests of every feature and score table and of every selection."""
    kinds = (".parquet", ".jsonl")
    return {
        path: digest
        for stage in ("features", "scores", "selections")
        for path, digest in digests(workspace, stage).items()
        if path.endswith(kinds)
    }


def assert_same(workspace: Path, reference: Path) -> None:
    """The same tables, byte for byte, and nothing beside them."""
    assert tables(workspace) == tables(reference)
    findings = verify(Workspace.open(str(workspace)))
    assert findings.is_clean, findings
