"""A pool that grows, with damage on the way: only what is new or damaged is computed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from rose_ray.distributed.job import RunResult
from rose_ray.distributed.run import run_job
from tests.distributed import tiny
from tests.distributed.conftest import FinishedJob, GrownJob
from tests.distributed.reading import digests, made_stages, opened, read_file

pytestmark = pytest.mark.ray

NUM_NEW = 8
NUM_TAKEN_OVER = 3


def test_the_warmup_stays(finished: FinishedJob, grown: GrownJob) -> None:
    assert finished.result.warmup is not None
    assert grown.result.warmup == finished.result.warmup
    targets = [f"{stage} {name}" for stage in ("score", "select") for name in ("alpha", "beta")]
    assert made_stages(grown.result.stages) == ["ingest", "features", *targets]


def test_the_first_file_owns_what_several_hold(finished: FinishedJob, grown: GrownJob) -> None:
    pool = grown.result.pool
    assert pool is not None
    assert pool.counts["unique"] == tiny.NUM_UNIQUE + NUM_NEW
    assert pool.counts["duplicates"] == tiny.NUM_DUPLICATES + NUM_TAKEN_OVER
    assert Path(pool.facts["files"][0]["file"]).name == "a.jsonl"
    new = pool.facts["shards"][0]["shard"]
    duplicates = read_file(grown.workspace, pool, "duplicates.parquet")
    taken = {row["row_id"] for row in duplicates.to_pylist() if row["owner"] == new}
    table = read_file(grown.workspace, grown.result.scores["alpha"], "scores.parquet")
    shards = dict(zip(table["row_id"].to_pylist(), table["shard"].to_pylist(), strict=True))
    before = read_file(finished.workspace, finished.result.scores["alpha"], "scores.parquet")
    assert len(taken) == NUM_TAKEN_OVER <= len(taken & set(before["row_id"].to_pylist()))
    assert {shards[row_id] for row_id in taken} == {new}
    assert grown.result.scores["alpha"].counts == {
        "unique": tiny.NUM_UNIQUE + NUM_NEW,
        "scored": tiny.NUM_UNIQUE + NUM_NEW - 1,
        "rejected": 1,
    }


def test_only_new_and_damaged_shards_are_computed(finished: FinishedJob, grown: GrownJob) -> None:
    before, after = digests(finished.workspace, "features"), digests(grown.workspace, "features")
    changed = {path for path, digest in before.items() if after[path] != digest}
    assert {path.split("/")[2] for path in changed} == set(grown.damaged)
    # The numbers came out as before, byte for byte; only the receipts are new.
    assert {path.split("/")[-1] for path in changed} == {"manifest.json"}
    assert grown.result.pool is not None
    new = grown.result.pool.facts["shards"][0]["shard"]
    summary = f"pool-{grown.result.pool.key}.json"
    assert {path.split("/")[2] for path in set(after) - set(before)} == {new, summary}
    path = f"ingest/{grown.damaged[1].split('-')[0]}/shard-00000.parquet"
    shards = [opened(workspace).read_table(path) for workspace in (grown.workspace, finished.workspace)]
    renewed, original = (shard.drop_columns("file") for shard in shards)  # which is where the test put it
    assert renewed.equals(original)


def test_scores_of_old_rows_stay(finished: FinishedJob, grown: GrownJob) -> None:
    def scores(workspace: Path, result: RunResult) -> dict[str, float]:
        table = read_file(workspace, result.scores["alpha"], "scores.parquet")
        return dict(zip(table["row_id"].to_pylist(), table["score"].to_pylist(), strict=True))

    before, after = scores(finished.workspace, finished.result), scores(grown.workspace, grown.result)
    moved = read_file(grown.workspace, grown.result.scores["alpha"], "scores.parquet")
    assert grown.result.pool is not None
    new = grown.result.pool.facts["shards"][0]["shard"]
    elsewhere = {row["row_id"] for row in moved.to_pylist() if row["shard"] == new}
    assert set(before) <= set(after)
    assert all(after[row_id] == score for row_id, score in before.items() if row_id not in elsewhere)


def test_new_warmup_on_two_workers_replaces_the_pinned_one(grown: GrownJob, tmp_path: Path) -> None:
    settings = {"workers": 2, "zero_stage": 2, "epochs": tiny.NUM_EPOCHS}  # workers and stage are no part of the key
    workspace = tmp_path / "workspace"
    shutil.copytree(grown.workspace, workspace)
    warmup = grown.config.warmup.model_copy(update=settings)
    config = grown.config.model_copy(update={"warmup": warmup, "workspace": str(workspace)})
    pinned = grown.result.warmup
    assert pinned is not None
    before = digests(workspace, pinned.folder)
    stages = ("ingest", "warmup")
    result = run_job(config, stages=stages, new_warmup=True)
    assert result.warmup is not None and result.warmup.folder != pinned.folder
    assert result.warmup.counts["rows"] == round(0.3 * (tiny.NUM_UNIQUE + NUM_NEW))
    assert all(checkpoint["loss"] > 0 for checkpoint in result.warmup.facts["checkpoints"])
    assert digests(workspace, pinned.folder) == before
    assert run_job(config, stages=stages).warmup == result.warmup


def test_a_new_warmup_counts_once_its_scores_are_made(
    grown: GrownJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = tmp_path / "workspace"
    shutil.copytree(grown.workspace, workspace)
    config = grown.config.model_copy(update={"workspace": str(workspace)})

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("rose_ray.distributed.run.make_features", killed)
        run_job(config, new_warmup=True)
    nightly = run_job(config)
    assert nightly.warmup == grown.result.warmup and made_stages(nightly.stages) == []
    renewed = run_job(config, new_warmup=True)
    assert renewed.warmup is not None and renewed.warmup != grown.result.warmup
    assert "warmup" not in made_stages(renewed.stages)
    assert run_job(config).warmup == renewed.warmup
