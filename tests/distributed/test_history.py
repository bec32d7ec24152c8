"""The same selection again and again: versions, what changed between them, going back, and clearing up."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from pyarrow import fs
from typer.testing import CliRunner

from rose_ray.cli import app
from rose_ray.config import JobConfig
from rose_ray.distributed.job import RunResult
from rose_ray.distributed.run import run_job
from rose_ray.errors import AlteredFileError, StoreError
from rose_ray.stages.collect import collect_garbage
from rose_ray.stages.drift import drift
from rose_ray.stages.pool import pool_row_ids
from rose_ray.stages.report import status_lines
from rose_ray.stages.restore import restore_version
from rose_ray.stores.garbage import find_garbage, remove
from rose_ray.stores.history import find_version, latest_version, make_latest, read_version, versions
from rose_ray.stores.workspace import Workspace
from tests.buckets import local_bucket
from tests.distributed import tiny
from tests.distributed.conftest import FinishedJob, GrownJob
from tests.distributed.reading import digests, made_stages, opened, read_file

pytestmark = pytest.mark.ray


@dataclass(frozen=True)
class Copy:
    """A copy of the grown job's workspace, to be written to."""

    path: Path
    config: JobConfig

    @property
    def workspace(self) -> Workspace:
        return Workspace.open(str(self.path))


@pytest.fixture
def job(grown: GrownJob, tmp_path: Path) -> Copy:
    path = tmp_path / "workspace"
    shutil.copytree(grown.workspace, path)
    return Copy(path, grown.config.model_copy(update={"workspace": str(path)}))


def test_only_new_rows_cost_gradient_passes(finished: FinishedJob, grown: GrownJob) -> None:
    def passes(stages: list) -> int:
        return next(stage.counts["gradient passes"] for stage in stages if stage.stage == "features")

    scored = tiny.NUM_UNIQUE - 1  # one row is too long
    assert passes(finished.result.stages) == scored * tiny.NUM_EPOCHS
    assert grown.result.pool is not None
    sizes = {entry["shard"]: entry["num_rows"] for entry in grown.result.pool.facts["shards"]}
    first = grown.result.pool.facts["shards"][0]
    damaged = sum(sizes[shard] for shard in grown.damaged)
    rejected = 1 if "-00001" in grown.damaged[1] else 0
    # A shard's rows are scored whole: which of them count is settled beside it.
    assert passes(grown.result.stages) <= (first["num_rows"] + damaged) * tiny.NUM_EPOCHS
    assert passes(grown.result.stages) >= (first["num_rows"] + damaged - rejected - tiny.NUM_SHARED) * tiny.NUM_EPOCHS


def test_a_file_that_comes_costs_its_new_rows_and_one_that_goes_costs_none(finished: FinishedJob, copied: Path) -> None:
    first, second, third = (f"{finished.inputs}/{name}.jsonl" for name in ("m", "n", "third"))
    num_new = 8  # of the third file; the first holds its other rows
    grown = run_job(tiny.tiny_job(finished.inputs, copied, [f"pool.inputs.0.files=['{first}','{second}','{third}']"]))
    assert feature_passes(grown) == [num_new * tiny.NUM_EPOCHS]
    less = run_job(tiny.tiny_job(finished.inputs, copied, [f"pool.inputs.0.files=['{first}','{third}']"]))
    assert feature_passes(less) == [0]
    targets = [f"{stage} {name}" for stage in ("score", "select") for name in ("alpha", "beta")]
    assert made_stages(less.stages) == ["ingest", *targets]
    assert less.pool is not None and less.pool.counts["unique"] == tiny.NUM_FIRST + num_new
    assert less.scores["alpha"].counts["scored"] == tiny.NUM_FIRST + num_new
    left = set(pool_row_ids(opened(copied), less.pool))
    for selection in less.selections.values():
        assert set(read_file(copied, selection, "selected.parquet")["row_id"].to_pylist()) <= left


def feature_passes(result: RunResult) -> list[int]:
    return [stage.counts["gradient passes"] for stage in result.stages if stage.stage == "features"]


def test_a_run_that_changes_nothing_makes_no_version(grown: GrownJob, job: Copy) -> None:
    before = versions(job.workspace, "alpha")
    assert [version.number for version in before] == [1, 2]
    assert before[0].pool != before[1].pool
    result = run_job(job.config)
    assert made_stages(result.stages) == []
    assert versions(job.workspace, "alpha") == before
    passes = [stage.counts["gradient passes"] for stage in result.stages if stage.stage == "features"]
    assert passes == [0]


def test_drift_is_what_the_tables_say(finished: FinishedJob, grown: GrownJob) -> None:
    workspace = Workspace.open(str(grown.workspace))
    old, new = (read_version(workspace, "alpha", find_version(workspace, "alpha", which)) for which in ("1", "latest"))
    found = drift(workspace, old, new)
    rows = [pq.read_table(grown.workspace / each.folder / "selected.parquet").to_pylist() for each in (old, new)]
    before, after = ({row["row_id"]: row for row in each} for each in rows)
    assert (found.num_old, found.num_new) == (len(before), len(after))
    assert found.num_common == len(before.keys() & after.keys())
    assert found.jaccard == len(before.keys() & after.keys()) / len(before.keys() | after.keys())
    assert sum(found.gained.values()) == len(after.keys() - before.keys())
    assert sum(found.lost.values()) == len(before.keys() - after.keys())
    scores = [pq.read_table(grown.workspace / each.facts["scores"][0] / "scores.parquet") for each in (old, new)]
    known = {*scores[0]["row_id"].to_pylist()}
    assert found.num_new_rows == len(after.keys() - known)
    assert found.num_gone == 0
    # Shared rows were scored by the same features, so their scores stand.
    shift = found.shifts["score"]
    assert shift.num_rows == tiny.NUM_UNIQUE - 1
    assert shift.quantiles[1] == pytest.approx(0, abs=1e-6) and shift.spearman == pytest.approx(1, abs=1e-6)
    assert set(found.shifts) == {"score", *tiny.SUBTASKS}


def test_an_older_version_comes_back(job: Copy) -> None:
    first, second = versions(job.workspace, "alpha")
    now = restore_version(job.workspace, "alpha", 1)
    assert (now.number, now.restores, now.folder) == (3, 1, first.folder)
    assert latest_version(job.workspace, "alpha") == now
    run_job(job.config)  # today's pool is selected from again
    latest = latest_version(job.workspace, "alpha")
    assert latest is not None and (latest.number, latest.folder) == (4, second.folder)
    with pytest.raises(StoreError, match=r"alpha: no version '9'; the workspace has versions 1 to 4"):
        restore_version(job.workspace, "alpha", 9)


def test_an_altered_version_does_not_come_back(job: Copy) -> None:
    path = job.path / versions(job.workspace, "alpha")[0].folder / "selected.jsonl"
    data = bytearray(path.read_bytes())
    data[10] ^= 1
    path.write_bytes(data)
    with pytest.raises(AlteredFileError, match=r"selected\.jsonl"):
        restore_version(job.workspace, "alpha", 1)
    assert len(versions(job.workspace, "alpha")) == 2


def test_a_version_that_was_written_and_not_said_is_taken_up(job: Copy) -> None:
    workspace = job.workspace
    first, second = versions(workspace, "alpha")
    workspace.write_json("selections/alpha/latest.json", {"folder": first.folder, "number": first.number})
    assert make_latest(workspace, "alpha", read_version(workspace, "alpha", second), second.pool) == second
    assert latest_version(workspace, "alpha") == second


def test_nothing_that_is_kept_is_garbage(job: Copy) -> None:
    assert find_garbage(job.workspace, keep=5) == []
    assert "nothing to remove" in next(iter(collect_garbage(job.workspace, 5, delete=False)))


def test_what_only_old_versions_need_goes(job: Copy) -> None:
    workspace, before = job.workspace, digests(job.path)
    garbage = find_garbage(workspace, keep=1)
    first = versions(workspace, "alpha")[0]
    folders = {each.folder for each in garbage}
    assert first.folder in folders and f"pool/{first.pool}" in folders
    assert {each.kind for each in garbage} == {"pool", "scores", "selections"}  # features serve the new pool as well
    assert list(collect_garbage(workspace, 1, delete=False))[-1].endswith("nothing was removed: add --delete")
    assert digests(job.path) == before
    list(collect_garbage(workspace, 1, delete=True))
    after = digests(job.path)
    assert set(before) - set(after) == {p for p in before if any(p.startswith(f"{folder}/") for folder in folders)}
    assert all(before[path] == digest for path, digest in after.items())
    assert find_garbage(workspace, keep=1) == []
    assert made_stages(run_job(job.config).stages) == []
    with pytest.raises(StoreError, match="version 1 is not there any more"):
        restore_version(workspace, "alpha", 1)


def test_an_interrupted_collection_leaves_nothing_half_that_counts(job: Copy) -> None:
    workspace = job.workspace
    removing = remove(workspace, find_garbage(workspace, keep=1))
    next(removing)
    removing.close()
    assert find_garbage(workspace, keep=1) != []
    assert made_stages(run_job(job.config).stages) == []
    list(remove(workspace, find_garbage(workspace, keep=1)))
    assert find_garbage(workspace, keep=1) == []


def test_what_an_unfinished_run_left_stays_unless_asked_for(job: Copy) -> None:
    workspace = job.workspace
    workspace.write("features/0123456789abcdef/shard/checkpoint-1.parquet", b"paid for")
    (left,) = [each for each in find_garbage(workspace, keep=1) if each.unfinished]
    assert left.folder == "features/0123456789abcdef"
    assert "--unfinished" in "\n".join(collect_garbage(workspace, 1, delete=True))
    assert find_garbage(workspace, keep=1) == [left]
    list(collect_garbage(workspace, 1, delete=True, unfinished=True))
    assert find_garbage(workspace, keep=1) == []


def test_in_a_bucket_it_is_the_same(job: Copy) -> None:
    with local_bucket("history") as (_, options):
        there = Workspace.open(f"s3://history/workspace{options}", create=True)
        fs.copy_files(str(job.path), there.root.path, destination_filesystem=there.root.filesystem)
        _check_the_same(there, job.workspace)


def _check_the_same(there: Workspace, here: Workspace) -> None:
    assert [versions(there, name) for name in ("alpha", "beta")] == [versions(here, name) for name in ("alpha", "beta")]
    garbage = [(each.folder, each.num_bytes) for each in find_garbage(there, keep=1)]
    assert garbage == [(each.folder, each.num_bytes) for each in find_garbage(here, keep=1)] != []
    list(collect_garbage(there, 1, delete=True, unfinished=True))
    assert find_garbage(there, keep=1) == []


def test_commands(job: Copy, tmp_path: Path) -> None:
    config = tmp_path / "job.json"  # JSON is YAML
    config.write_text(json.dumps(job.config.model_dump(mode="json", exclude_none=True)))

    def said(*arguments: str) -> str:
        result = CliRunner().invoke(app, [*arguments])
        assert result.exit_code == 0, result.output
        return result.output

    listed = said("selections", str(config))
    assert listed.count("latest") == 2 and "another pool" in listed
    report = said("diff", str(config), "alpha", "--out", str(tmp_path / "drift.json"))
    assert "version 1" in report and "gained by source" in report
    assert json.loads((tmp_path / "drift.json").read_text())["num_new"] == 12
    assert "version 3 restores version 1" in said("restore", str(config), "alpha", "1")
    assert "add --delete" in said("gc", str(config), "--keep", "1") or "nothing to remove" in listed
    assert "100.0%" not in "\n".join(status_lines(job.workspace))
