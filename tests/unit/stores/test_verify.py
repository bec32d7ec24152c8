"""What a look and a read find wrong with stored files, and what is left of writers that died."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import yaml
from typer.testing import CliRunner

from rose_ray.cli import app
from rose_ray.errors import LeaseError
from rose_ray.stores.features import shard_folder
from rose_ray.stores.lease import held
from rose_ray.stores.leftovers import is_leftover, sweep_shared
from rose_ray.stores.manifest import Manifest, commit_artefact, commit_manifest
from rose_ray.stores.shards import FEATURES, why_missing, write_arrays
from rose_ray.stores.verify import delete_orphans, verify, verify_lines
from rose_ray.stores.workspace import Workspace
from tests.distributed.tiny import tiny_content

LEFTOVER = f"{'0' * 32}.tmp"


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace.open(str(tmp_path / "ws"), create=True)


def shard(workspace: Workspace, name: str = "s", skipped: tuple[str, ...] = ()) -> Manifest:
    """Commit a shard of features of one checkpoint."""
    folder = shard_folder("key", name)
    table = pa.table({"row_id": [f"{name}-{n}" for n in range(200)], "number": list(range(200))})
    files = [workspace.write_table(f"{folder}/checkpoint-1.parquet", table)]
    made_from = {"features": "key", "shard": name}
    facts = {"skipped": list(skipped)}
    return commit_artefact(workspace, "features", made_from, files, {}, facts, started=0.0, folder=folder)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 7)


def overwrite_footer(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-8] + b"\0" * 8)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, "missing"),
        (cut, r"[\d,]+ bytes instead of [\d,]+"),
        (overwrite_footer, "no readable Parquet footer"),
    ],
)
def test_a_look_finds_files_that_were_cut_short(
    workspace: Workspace, damage: Callable[[Path], None], message: str
) -> None:
    manifest = shard(workspace)
    assert why_missing(workspace, FEATURES, "key", "s", []) is None
    path = manifest.files[0].path
    damage(Path(workspace.root.path) / path)
    reason = why_missing(workspace, FEATURES, "key", "s", [])
    assert reason is not None and re.match(rf"{path}: {message}", reason)
    shard(workspace)
    assert why_missing(workspace, FEATURES, "key", "s", []) is None


def test_other_reasons_to_make_a_shard(workspace: Workspace) -> None:
    assert why_missing(workspace, FEATURES, "key", "s", []) == ""
    manifest = shard(workspace, skipped=("a",))
    assert why_missing(workspace, FEATURES, "key", "s", ["a", "b"]) is None
    assert "other rows were wanted" in str(why_missing(workspace, FEATURES, "key", "s", ["b"]))
    workspace.write(f"{manifest.folder}/manifest.json", b"{")
    assert "not JSON" in str(why_missing(workspace, FEATURES, "key", "s", ["a"]))


def test_verify_names_what_is_altered_missing_and_orphaned(workspace: Workspace) -> None:
    root = Path(workspace.root.path)
    made = {name: shard(workspace, name) for name in ("whole", "altered", "cut", "gone", "unread")}
    for path in ("runs/run-00001.json", "features/key/space.json", "warmup/pins/a.json", "budgets/b.json"):
        workspace.write_json(path, {})
    with held(workspace, 60.0):
        pass
    assert verify(workspace).is_clean

    flip(root / made["altered"].files[0].path)
    cut(root / made["cut"].files[0].path)
    (root / made["gone"].files[0].path).unlink()
    workspace.write(f"{made['unread'].folder}/manifest.json", b"{")
    extra = f"{made['whole'].folder}/extra.parquet"
    begun = f"{shard_folder('key', 'begun')}/checkpoint-1.parquet"
    tmp = f"{made['whole'].folder}/checkpoint-1.parquet.{LEFTOVER}"
    for path in (extra, begun, tmp):
        workspace.write(path, b"x")
    told: list[tuple[int, int]] = []
    findings = verify(workspace, lambda done, total: told.append((done, total)))
    altered, cut_short, unread = (made[name] for name in ("altered", "cut", "unread"))
    assert findings.altered.keys() == {
        altered.files[0].path,
        cut_short.files[0].path,
        f"{unread.folder}/manifest.json",
    }
    assert findings.altered[altered.files[0].path] == "content differs from its SHA-256"
    assert findings.missing == [made["gone"].files[0].path]
    assert findings.orphans == {
        extra: "not in its folder's manifest",
        begun: "of an artefact that was never finished",
        tmp: "written beside its place and never renamed",
        unread.files[0].path: "not in its folder's manifest",
    }
    assert told == sorted(told) and len(told) == findings.num_files == 4
    text = "\n".join(verify_lines(workspace, findings, deleted_orphans=False, deleted_damaged=False))
    assert f"missing   {made['gone'].files[0].path}\n" in text and f"orphaned  {begun}: of an" in text
    assert f"\n  {altered.folder}\n" in text and "--delete-orphans" in text

    delete_orphans(workspace, findings)
    assert not verify(workspace).orphans.keys() & {extra, begun, tmp}


def test_the_state_of_a_training_is_an_orphan_once_it_has_ended(workspace: Workspace) -> None:
    state = workspace.write("warmup/0123/resume/update-1/state.safetensors", b"x").path
    assert verify(workspace).is_clean
    commit_artefact(workspace, "warmup", {}, [], {}, {}, started=0.0, folder="warmup/0123")
    findings = verify(workspace)
    assert findings.orphans == {state: "the state of a training that has ended"}
    delete_orphans(workspace, findings)
    assert verify(workspace).is_clean


def test_the_command_takes_a_workspace_or_a_configuration(workspace: Workspace, tmp_path: Path) -> None:
    shard(workspace)
    workspace.write("features/key/begun/checkpoint-1.parquet", b"x")
    config = tmp_path / "job.yaml"
    config.write_text(yaml.safe_dump(tiny_content(tmp_path, workspace.root.path)), encoding="utf-8")
    for name in (str(config), workspace.root.path):
        result = CliRunner().invoke(app, ["verify", name])
        assert result.exit_code == 1 and "1 artefacts, 1 files" in result.stdout
        assert "orphaned  features/key/begun/checkpoint-1.parquet: of an artefact" in result.stdout
    result = CliRunner().invoke(app, ["verify", str(config), "--delete-orphans"])
    assert result.exit_code == 0 and "deleted   features/key/begun" in result.stdout
    result = CliRunner().invoke(app, ["verify", workspace.root.path])
    assert result.exit_code == 0 and result.stdout.endswith("whole: nothing altered, missing or orphaned\n")
    result = CliRunner().invoke(app, ["verify", str(tmp_path / "nowhere")])
    assert result.exit_code == 1 and "no workspace at" in result.stderr


def test_damaged_artefacts_count_as_unfinished_once_asked_for(workspace: Workspace) -> None:
    root = Path(workspace.root.path)
    made = {name: shard(workspace, name) for name in ("whole", "altered", "gone", "unread")}
    checkpoint = write_arrays(
        workspace, "warmup/0123/checkpoint-1/adapter_model.safetensors", {"a": np.zeros(9), "b": np.zeros(0)}
    )
    warmup = commit_artefact(workspace, "warmup", {}, [checkpoint], {}, {}, started=0.0, folder="warmup/0123")
    flip(root / made["altered"].files[0].path)
    (root / made["gone"].files[0].path).unlink()
    workspace.write(f"{made['unread'].folder}/manifest.json", b"{")
    flip(root / checkpoint.path)
    result = CliRunner().invoke(app, ["verify", workspace.root.path])
    assert result.exit_code == 1
    advice = "Add --delete-damaged and run again: these are made anew, with the same bytes."
    assert f"{advice}\n  {made['altered'].folder}\n" in result.stdout
    result = CliRunner().invoke(app, ["verify", workspace.root.path, "--delete-damaged"])
    assert result.exit_code == 1  # for the warm-up
    assert "with --new-warmup:\n  warmup/0123\n" in result.stdout and "/checkpoint-1\n" not in result.stdout
    left = {path.parent.relative_to(root).as_posix() for path in root.rglob("manifest.json")}
    assert left == {made["whole"].folder, warmup.folder}
    for name in ("altered", "gone", "unread"):
        assert why_missing(workspace, FEATURES, "key", name, []) == ""
        shard(workspace, name)
    flip(root / checkpoint.path)
    assert verify(workspace).is_clean
    flip(root / made["altered"].files[0].path)
    assert CliRunner().invoke(app, ["verify", workspace.root.path, "--delete-damaged"]).exit_code == 0


def test_a_run_at_work_keeps_its_unfinished_files(workspace: Workspace) -> None:
    workspace.write("features/key/begun/checkpoint-1.parquet", b"x")
    with held(workspace, 60.0):
        results = [
            CliRunner().invoke(app, ["verify", workspace.root.path, option])
            for option in ("--delete-orphans", "--delete-damaged")
        ]
    assert all(each.exit_code == 1 and "another run is at work on it" in each.stderr for each in results)
    assert workspace.exists("features/key/begun/checkpoint-1.parquet")


def test_a_run_that_was_taken_over_from_sweeps_nothing(workspace: Workspace) -> None:
    manifest = shard(workspace)
    beside = f"{manifest.files[0].path}.{LEFTOVER}"
    workspace.write(beside, b"its successor writes here")
    workspace.write("lease/00000002.json", b"{}")
    with pytest.raises(LeaseError):
        commit_manifest(workspace.fenced(1), manifest)
    assert workspace.exists(beside)


def test_commits_and_runs_sweep_what_dead_writers_left(workspace: Workspace) -> None:
    root = Path(workspace.root.path)
    manifest = shard(workspace)
    beside = f"{manifest.files[0].path}.{LEFTOVER}"
    others = [f"runs/run-00001.json.{LEFTOVER}", f"rose_ray.json.{LEFTOVER}", f"lease/00000001.json.{LEFTOVER}"]
    for path in (beside, *others, "runs/notes.tmp"):
        workspace.write(path, b"x")
    assert is_leftover(beside) and not is_leftover("runs/notes.tmp")
    shard(workspace)
    assert not (root / beside).exists()
    own = f"lease/00000002.json.{LEFTOVER}"
    workspace.write(own, b"x")
    sweep_shared(workspace.fenced(2))
    left = {path.relative_to(root).as_posix() for path in root.rglob("*.tmp")}
    assert left == {"runs/notes.tmp", own}  # its own lease is being renewed
