"""A job as its users run it: two nodes, `ray job submit`, a node and the driver killed on the way, then new rows.

    python benchmarks/rehearsal.py CONFIG --out results [--new-rows 500] [--set model.dtype=bfloat16 ...]

On this machine, with nodes of ``--cpus`` each. The pool's last rows are held back at first. What is done:

1. ``plan``, on the cluster;
2. the run: at ``--lose-node-at`` of the shards the second node's raylet is killed (another joins in its place), at
   ``--kill-driver-at`` the driver; the job is submitted again and goes on;
3. the rows held back join the pool, and the job is submitted once more: their gradient passes are counted;
4. the run undisturbed, in a workspace of its own, by ``rose-ray run`` on one machine, ``plan`` before it and ``status``
   behind: its score tables must have the digests of step 2, and what was foretold stands beside what it took.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from benchmarks.timing import write_results
from rose_ray.config import load_config

ROOT = Path(__file__).resolve().parents[1]
RAY = str(Path(sys.executable).with_name("ray"))
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "RAY_AUTH_MODE": "disabled"}


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Nodes:
    """A cluster of `ray start` processes on this machine."""

    def __init__(self, folder: Path, cpus: float) -> None:
        self.cpus = cpus
        self.gcs, self.dashboard, self.count = free_port(), free_port(), 0
        self.log = open(folder / "nodes.log", "w", encoding="utf-8")  # noqa: SIM115  (closed with the nodes)
        head = [f"--port={self.gcs}", f"--dashboard-port={self.dashboard}"]
        self.processes = [self._start("--head", *head)]
        self.add()

    def _start(self, *arguments: str) -> subprocess.Popen[bytes]:
        # Nodes that share a host must not share a folder: the one would unpack a job's files over the other's.
        self.count += 1
        own = [f"--temp-dir=/tmp/rehearsal-{self.count}", f"--num-cpus={self.cpus:g}"]
        command = [RAY, "start", *arguments, *own, "--block", "--disable-usage-stats"]
        process = subprocess.Popen(
            command, env=ENVIRONMENT, stdout=self.log, stderr=subprocess.STDOUT, start_new_session=True
        )
        time.sleep(25)  # until its agents answer
        return process

    def add(self) -> None:
        """Let one more node join."""
        self.processes.append(self._start(f"--address=127.0.0.1:{self.gcs}"))

    def kill_last(self) -> None:
        """Kill the newest node's raylet, and with it all its workers."""
        os.killpg(self.processes.pop().pid, signal.SIGKILL)

    def stop(self) -> None:
        """End all nodes."""
        for process in self.processes[::-1]:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(30)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        self.log.close()

    def submit(self, name: str, script: str, *arguments: str) -> subprocess.Popen[str]:
        """Send a job; the process that follows its log."""
        address = f"http://127.0.0.1:{self.dashboard}"
        command = [RAY, "job", "submit", "--address", address, "--submission-id", name, "--working-dir", str(ROOT)]
        runtime = json.dumps({"env_vars": {"PYTHONPATH": str(ROOT)}})
        return subprocess.Popen(
            [*command, "--runtime-env-json", runtime, "--", sys.executable, f"jobs/{script}.py", *arguments],
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


@contextmanager
def nodes(folder: Path, cpus: float) -> Iterator[Nodes]:
    """Two nodes, gone in the end."""
    made = Nodes(folder, cpus)
    try:
        yield made
    finally:
        made.stop()


def split_pool(source: Path, folder: Path, new_rows: int) -> tuple[Path, Path]:
    """Write the pool without its last rows, and those; the files' names are in the order of reading."""
    with gzip.open(source, "rt", encoding="utf-8") as file:
        lines = file.readlines()
    parts = folder / "pool-1.jsonl", folder / "pool-2.jsonl"
    for part, rows in zip(parts, (lines[:-new_rows], lines[-new_rows:]), strict=True):
        part.write_text("".join(rows), encoding="utf-8")
    return parts


def write_config(path: Path, content: dict[str, Any], workspace: Path, pool: Sequence[Path], address: str) -> Path:
    """Write a configuration with this workspace, pool and address."""
    inputs = [{**content["pool"]["inputs"][0], "files": [str(each) for each in pool]}]
    ray = {**content["ray"], "address": address}
    changed = {**content, "workspace": str(workspace), "pool": {**content["pool"], "inputs": inputs}, "ray": ray}
    path.write_text(yaml.safe_dump(changed), encoding="utf-8")
    return path


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Wait until something holds.

    Raises:
        RuntimeError: The job ended before.
    """
    while not condition():
        if process.poll() is not None:
            raise RuntimeError(f"the job ended with {process.returncode}: {process.communicate()[0][-4000:]}")
        time.sleep(1)


def finish(process: subprocess.Popen[str], expected: int = 0) -> str:
    """Wait for a job's end and return what it said.

    Raises:
        RuntimeError: It ended with another exit code.
    """
    text, _ = process.communicate()
    if process.returncode != expected:
        raise RuntimeError(f"the job ended with {process.returncode}: {text[-4000:]}")
    return text


def rose_ray(*arguments: str) -> str:
    """Run a command on this machine and return what it said."""
    command = [sys.executable, "-m", "rose_ray", *arguments]
    done = subprocess.run(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} ended with {done.returncode}: {done.stdout[-4000:]}")
    return done.stdout


def digests(workspace: Path) -> dict[str, str]:
    """Digest of every target's newest score table and selection, as their manifests say."""
    found: dict[str, str] = {}
    for latest in sorted(workspace.glob("selections/*/latest.json")):
        selection = json.loads((workspace / json.loads(latest.read_text())["folder"] / "manifest.json").read_text())
        folders = [selection["folder"], *selection["facts"]["scores"]]
        for folder in folders:
            manifest = json.loads((workspace / folder / "manifest.json").read_text())
            found |= {file["path"]: file["sha256"] for file in manifest["files"] if file["path"].endswith(".parquet")}
    return found


def last_record(workspace: Path) -> dict[str, Any]:
    """The newest record of a run."""
    record: dict[str, Any] = json.loads(max(workspace.glob("runs/run-*.json")).read_text(encoding="utf-8"))
    return record


def stage_rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    """A row per stage of a run."""
    return [
        {
            "stage": stage["stage"],
            "was": "found" if stage["reused"] else "made",
            "seconds": round(stage["seconds"], 1),
            "counts": ", ".join(f"{value:,} {key}" for key, value in stage["counts"].items()),
        }
        for stage in record["stages"]
    ]


def disturbed_run(cluster: Nodes, config: Path, workspace: Path, shards: int, at: tuple[float, float]) -> str:
    """Run with a node lost and the driver killed; return what the second submission said."""

    def done() -> int:
        return sum(1 for _ in workspace.glob("features/*/*/manifest.json"))

    first = cluster.submit("first", "run", str(config))
    wait_for(lambda: done() >= at[0] * shards, first)
    print(f"{done()} of {shards} shards: the second node is killed", flush=True)
    cluster.kill_last()
    time.sleep(10)
    cluster.add()
    wait_for(lambda: done() >= at[1] * shards, first)
    print(f"{done()} of {shards} shards: the driver is killed", flush=True)
    lease = json.loads(max(workspace.glob("lease/*.json")).read_text(encoding="utf-8"))
    os.kill(lease["pid"], signal.SIGKILL)
    first.communicate()
    if first.returncode == 0:
        raise RuntimeError("a job whose driver was killed ended with 0")
    return finish(cluster.submit("second", "run", str(config)))


def main() -> None:
    """Rehearse, print, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--scratch", type=Path, default=Path("build/rehearsal"))
    parser.add_argument("--new-rows", type=int, default=500)
    parser.add_argument("--cpus", type=float, default=1.0)
    parser.add_argument("--lose-node-at", type=float, default=0.3)
    parser.add_argument("--kill-driver-at", type=float, default=0.6)
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    arguments = parser.parse_args()
    scratch = arguments.scratch.resolve()
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    loaded = load_config(arguments.config, arguments.overrides)
    content = loaded.model_dump(mode="json", exclude_unset=True)
    for target in content["targets"]:
        for pairs in target["pairs"]:
            pairs["files"] = [str(Path(each).resolve()) for each in pairs["files"]]
    content["model"]["base"] = str(Path(content["model"]["base"]).resolve())
    pool = split_pool(Path(content["pool"]["inputs"][0]["files"][0]), scratch, arguments.new_rows)
    rows = pool[0].read_bytes().count(b"\n")
    shards = int(rows * content["pool"].get("sample_fraction", 1.0)) // content["pool"].get("shard_rows", 512)
    workspace, other = scratch / "disturbed", scratch / "undisturbed"
    sections: dict[str, list[dict[str, Any]]] = {}
    config = write_config(scratch / "first.yaml", content, workspace, pool[:1], "auto")
    said: dict[str, str] = {}
    with nodes(scratch, arguments.cpus) as cluster:
        said["plan"] = finish(cluster.submit("plan", "stage", "plan", str(config)))
        print(said["plan"], flush=True)
        started = time.monotonic()
        at = (arguments.lose_node_at, arguments.kill_driver_at)
        said["disturbed"] = disturbed_run(cluster, config, workspace, shards, at)
        seconds = {"disturbed": time.monotonic() - started}
        sections["the run, second submission"] = stage_rows(last_record(workspace))
        events = last_record(workspace)["events"]
        before = digests(workspace)
        said["status"] = finish(cluster.submit("status", "stage", "status", str(config)))
        grown = write_config(scratch / "grown.yaml", content, workspace, pool, "auto")
        started = time.monotonic()
        said["grown"] = finish(cluster.submit("grown", "run", str(grown)))
        seconds["grown"] = time.monotonic() - started
        sections["with the new rows"] = stage_rows(last_record(workspace))
    print(said["status"], said["grown"], sep="\n", flush=True)
    plain = write_config(scratch / "plain.yaml", content, other, pool[:1], "local")
    said["plan, one machine"] = rose_ray("plan", str(plain))
    started = time.monotonic()
    said["undisturbed"] = rose_ray("run", str(plain))
    seconds["undisturbed"] = time.monotonic() - started
    said["status, one machine"] = rose_ray("status", str(plain))
    print(said["plan, one machine"], said["status, one machine"], sep="\n", flush=True)
    sections["undisturbed, on one machine"] = stage_rows(last_record(other))
    same = before == digests(other)
    print(f"same score tables and selections as the undisturbed run: {same}; seconds: {seconds}", flush=True)
    told = {"settings": arguments.overrides, "seconds": seconds, "events": events, "same digests": same}
    if arguments.out:
        write_results("rehearsal", sections, {**told, "digests": before}, arguments.out)
        for name, text in said.items():
            (arguments.out / f"rehearsal-{name.replace(', ', '-').replace(' ', '-')}.log").write_text(
                text, encoding="utf-8"
            )
    if not same:
        raise SystemExit("the score tables differ")


if __name__ == "__main__":
    main()
