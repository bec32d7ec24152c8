"""Files that were altered, a workspace of another time, spaces that differ, a disk that is full."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from rose_ray.cli import app
from rose_ray.distributed.job import Job
from rose_ray.distributed.run import run_job
from rose_ray.distributed.tasks import ScorePlan, score_targets
from rose_ray.errors import AlteredFileError, SpaceMismatchError
from rose_ray.stores.workspace import FORMAT_VERSION
from tests.distributed.conftest import FinishedJob
from tests.distributed.reading import digests, made_stages, opened
from tests.distributed.tiny import NUM_SHARDS, third_target, tiny_content, tiny_job

pytestmark = pytest.mark.ray


def flip(path: Path) -> Path:
    """Change one byte where a Parquet file holds data, and keep the size: a look at the footer shows nothing."""
    data = bytearray(path.read_bytes())
    data[40] ^= 1
    path.write_bytes(data)
    return path


READ_FOR_SCORES = ["targets.0.objective=less", "targets.1.objective=less"]


@pytest.mark.parametrize(
    ("pattern", "overrides"),
    [
        ("features/*/*-00001/checkpoint-2.parquet", READ_FOR_SCORES),
        ("bank/*/checkpoint-1.parquet", READ_FOR_SCORES),
        ("pool/*/duplicates.parquet", READ_FOR_SCORES),
        ("ingest/*/shard-00000.parquet", READ_FOR_SCORES),
        ("scores/alpha/*/scores.parquet", ["targets.0.selection.count=3"]),
    ],
)
def test_an_altered_file_is_found_when_it_is_read(
    finished: FinishedJob, copied: Path, pattern: str, overrides: list[str]
) -> None:
    altered = flip(sorted(copied.glob(pattern))[0])
    with pytest.raises(AlteredFileError) as raised:
        run_job(tiny_job(finished.inputs, copied, overrides))
    assert str(raised.value).startswith(f"{altered}: ") and "altered or cut short" in str(raised.value)


def test_an_altered_checkpoint_is_found_by_the_actors(finished: FinishedJob, copied: Path) -> None:
    warmup = finished.result.warmup
    assert warmup is not None
    job = Job(opened(copied), finished.config.model_copy(update={"workspace": str(copied)}))
    spec = job.spec(warmup, max_batch_tokens=512)
    assert [checkpoint.name for checkpoint in spec.read_checkpoints()]
    for name in ("adapter_model.safetensors", "moments.safetensors", "optimizer_state.json"):
        altered = flip(copied / warmup.folder / "checkpoint-2" / name)
        with pytest.raises(AlteredFileError, match=name):
            spec.read_checkpoints()
        flip(altered)


def test_a_damaged_artefact_is_made_again_with_the_same_bytes(finished: FinishedJob, copied: Path) -> None:
    damaged = [
        next(copied.glob(pattern))
        for pattern in (
            "scores/alpha/*/scores.parquet",
            "selections/alpha/*/selected.jsonl",
            "pool/*/duplicates.parquet",
        )
    ]
    damaged[0].unlink()
    os.truncate(damaged[1], 10)
    damaged[2].write_bytes(b"")
    run_job(tiny_job(finished.inputs, copied))
    before, after = digests(finished.workspace), digests(copied)
    changed = {path for path in before if before[path] != after[path]}
    assert {path.split("/")[-1] for path in changed} == {"manifest.json"} and len(changed) == len(damaged)


def test_what_has_no_readable_manifest_is_made_again_with_the_same_bytes(finished: FinishedJob, copied: Path) -> None:
    patterns = ("ingest/*", "pool/*", "bank/*", "scores/alpha/*", "selections/alpha/*")
    for pattern in patterns:
        manifest = next(copied.glob(f"{pattern}/manifest.json"))
        os.truncate(manifest, manifest.stat().st_size // 2)
    run_job(tiny_job(finished.inputs, copied))
    before, after = digests(finished.workspace), digests(copied)
    changed = {path for path in before if before[path] != after[path]}
    assert {path.split("/")[-1] for path in changed} == {"manifest.json"} and len(changed) == len(patterns)


def test_a_pinned_warmup_without_a_readable_manifest_ends_the_run(finished: FinishedJob, copied: Path) -> None:
    manifest = next(copied.glob("warmup/*/manifest.json"))
    os.truncate(manifest, manifest.stat().st_size // 2)
    with pytest.raises(AlteredFileError, match="pinned warm-up"):
        run_job(tiny_job(finished.inputs, copied))


def test_altered_files_are_made_again_once_verify_was_told_to(finished: FinishedJob, copied: Path) -> None:
    altered = flip(sorted(copied.glob("features/*/*-00001/checkpoint-2.parquet"))[0])
    assert CliRunner().invoke(app, ["verify", str(copied), "--delete-damaged"]).exit_code == 0
    assert made_stages(run_job(tiny_job(finished.inputs, copied)).stages) == ["features"]
    assert digests(altered.parent)[altered.name] == digests(finished.workspace)[altered.relative_to(copied).as_posix()]


@pytest.mark.parametrize("command", ["validate", "run", "status"])
def test_a_workspace_of_a_newer_format_is_refused(finished: FinishedJob, copied: Path, command: str) -> None:
    (copied / "rose_ray.json").write_text(json.dumps({"format": FORMAT_VERSION + 1}), encoding="utf-8")
    before = digests(copied)
    config = copied.parent / "job.yaml"
    config.write_text(yaml.safe_dump(tiny_content(finished.inputs, copied)), encoding="utf-8")
    result = CliRunner().invoke(app, [command, str(config)])
    assert result.exit_code == 1
    assert result.stderr == (
        f"error: workspace '{copied}' has format {FORMAT_VERSION + 1}, this rose_ray reads up to {FORMAT_VERSION}. "
        "Upgrade rose_ray, or name another workspace.\n"
    )
    assert digests(copied) == before


def test_bank_and_features_of_different_spaces_are_refused(finished: FinishedJob, copied: Path) -> None:
    result, target = finished.result, finished.config.targets[0]
    assert result.pool is not None
    scores = result.scores["alpha"]
    features = scores.facts["features"]
    other = {**features, "space": {**features["space"], "projection": "rademacher/v1/dim=64/seed=1"}}
    with pytest.raises(
        SpaceMismatchError, match=r"different spaces:\s+projection: features 'rademacher.* bank '.*sketch"
    ):
        plan = ScorePlan(target, result.banks["alpha"], scores.made_from, scores.folder)
        score_targets(opened(copied), result.pool, other, [plan])


def test_a_full_disk_under_the_driver(
    finished: FinishedJob, copied: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    content = tiny_content(finished.inputs, copied)
    content["targets"].append(third_target(finished.inputs))
    config = copied.parent / "job.yaml"
    config.write_text(yaml.safe_dump(content), encoding="utf-8")
    before = set(copied.rglob("*"))

    synced = []

    def no_space(descriptor: int) -> None:  # the kernel may say so no earlier than here
        synced.append(descriptor)
        if len(synced) > 2:  # the lease is taken, and the run's beginning recorded, while there is room
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", no_space)
        result = CliRunner().invoke(app, ["bank", str(config)])
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    assert re.fullmatch(
        rf"error: {copied}/bank/\w+/checkpoint-1\.parquet: No space left on device. What was finished is kept; .*\n",
        result.stderr,
    )
    (said,) = (message for message in caplog.messages if "record of this run" in message)
    assert re.search(r"cannot be written: .*No space left on device: '.*/runs/run-00002\.json'", said)
    assert any("lease of this run cannot be released" in message for message in caplog.messages)
    new = {path.name for path in set(copied.rglob("*")) - before if path.is_file()}
    assert new == {"00000002.json", "run-00002.json"}
    assert json.loads((copied / "runs" / "run-00002.json").read_text(encoding="utf-8"))["outcome"] == "running"

    result = CliRunner().invoke(app, ["bank", str(config)])
    assert result.exit_code == 0
    assert [line.split()[1] for line in result.stdout.splitlines() if " made " in line] == ["gamma"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of two megabytes."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("a small file system cannot be mounted here: needs Linux and root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_ends_with_one_message_and_the_next_run_goes_on(finished: FinishedJob, small_disk: Path) -> None:
    workspace = small_disk / "workspace"
    shutil.copytree(finished.workspace, workspace, ignore=shutil.ignore_patterns("features"))
    config = small_disk / "job.yaml"
    config.write_text(yaml.safe_dump(tiny_content(finished.inputs, workspace)), encoding="utf-8")
    _leave_room_for_a_shard(finished, small_disk)
    result = CliRunner().invoke(app, ["features", str(config)])
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    assert re.fullmatch(
        rf"error: {workspace}/\S+: No space left on device. What was finished is kept; .*\n", result.stderr
    )
    finished_shards = list(workspace.glob("features/*/*/manifest.json"))
    assert len(finished_shards) < NUM_SHARDS and not list(workspace.rglob("*.tmp"))
    receipts = {path: path.read_bytes() for path in finished_shards}

    (small_disk / "fill").unlink()
    again = run_job(tiny_job(finished.inputs, workspace))
    assert made_stages(again.stages) == ["features"]
    assert {path: path.read_bytes() for path in finished_shards} == receipts
    tables = [
        {path: digest for path, digest in digests(each, "features").items() if path.endswith(".parquet")}
        for each in (finished.workspace, workspace)
    ]
    assert tables[0] == tables[1]


def _leave_room_for_a_shard(finished: FinishedJob, disk: Path) -> None:
    shard = next(finished.workspace.glob("features/*/*/manifest.json")).parent
    status = os.statvfs(disk)
    blocks = 5 + sum(1 + path.stat().st_size // status.f_bsize for path in shard.iterdir()) * 3 // 2
    (disk / "fill").write_bytes(b"\0" * (status.f_bavail - blocks) * status.f_bsize)
