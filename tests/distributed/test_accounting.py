"""Accounting reads receipts side by side, and says where shards were computed in different ways. Without Ray."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from rose_ray.distributed import features, methods
from rose_ray.distributed.bank import budget_to_lower, remember_halved
from rose_ray.distributed.job import Job
from rose_ray.errors import AccountingError
from rose_ray.stores.manifest import Manifest, artefact_key, commit_artefact
from rose_ray.stores.read_ahead import MOST_LOOKS
from rose_ray.stores.shards import LENGTHS, commit_shard
from rose_ray.stores.workspace import Workspace
from tests.distributed.tiny import tiny_job

NUM_SHARDS = MOST_LOOKS


@pytest.fixture
def job(tmp_path: Path) -> Job:
    workspace = Workspace.open(str(tmp_path / "workspace"), create=True)
    return Job(workspace, tiny_job(tmp_path, tmp_path / "workspace"))


@pytest.fixture
def pool() -> Any:
    entries = [{"shard": f"f-{number}", "num_rows": 3, "num_skipped": 0} for number in range(NUM_SHARDS)]
    return SimpleNamespace(key="pool", facts={"shards": entries})


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, str], None]:
    """Make a function wait until all shards are looked at: one after the other, it never returns."""
    barrier = threading.Barrier(NUM_SHARDS)

    def patch(module: Any, name: str) -> None:
        look = getattr(module, name)

        def slow(*arguments: Any) -> Any:
            barrier.wait(timeout=20)
            return look(*arguments)

        monkeypatch.setattr(module, name, slow)

    return patch


def store(job: Job, number: int, **settings: Any) -> Manifest:
    folder = f"features/key/f-{number}"
    files = [job.workspace.write(f"{folder}/{name}.parquet", b"x") for name in ("checkpoint-1", "rejected")]
    facts = {"skipped": [], "num_rows_cut": 0, "num_tokens": 10, "num_positions": 12, "num_halvings": 0}
    told = facts | ({"computed_with": settings} if settings else {})
    counts = {"rows": 3, "scored": 2, "rejected": 1}
    return commit_artefact(
        job.workspace, "features", {"n": number}, files, counts, told, started=time.monotonic(), folder=folder
    )


def account(job: Job, pool: Any, made: set[str]) -> None:
    features._account_features(job, pool, "features", "key", {}, time.monotonic(), made)


def test_receipts_of_features_are_read_side_by_side(
    job: Job, pool: Any, together: Callable[[Any, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(NUM_SHARDS):
        store(job, number, max_batch_tokens=512)
    together(features, "find_shard")
    account(job, pool, {"f-0", "f-5"})
    (stage,) = job.result.stages
    assert (stage.counts["rows"], stage.counts["scored"]) == (3 * NUM_SHARDS, 2 * NUM_SHARDS)
    assert stage.counts["gradient passes"] == 4 and job.result.events == []


def test_receipts_of_methods_are_read_side_by_side(
    job: Job, pool: Any, together: Callable[[Any, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "put", lambda value: value)
    monkeypatch.setattr(methods, "skipped_rows", lambda *_: {})
    for number in range(NUM_SHARDS):
        commit_shard(job.workspace, LENGTHS, "key", f"f-{number}", [], {"rows": 3}, [], started=time.monotonic())
    view = methods._Pool(job, pool)
    together(methods, "find_receipt")
    assert view.totals(LENGTHS, "key", "lengths") == ({"rows": 3 * NUM_SHARDS}, 0)


def test_a_shard_that_is_missing_is_named(job: Job, pool: Any) -> None:
    for number in range(NUM_SHARDS - 1):
        store(job, number)
    with pytest.raises(AccountingError, match=f"features: shard f-{NUM_SHARDS - 1} is not complete"):
        account(job, pool, set())


def test_shards_that_were_computed_in_different_ways_are_said(
    job: Job, pool: Any, caplog: pytest.LogCaptureFixture
) -> None:
    store(job, 0)  # of an earlier version, which did not tell
    for number in range(1, NUM_SHARDS):
        store(job, number, device="cpu", max_batch_tokens=512 if number < 4 else 1024)
    account(job, pool, {"f-0"})
    (event,) = job.result.events
    assert event == (
        "features: shards were computed in different ways, so scores agree within rounding alone: "
        f"max_batch_tokens 1024 ({NUM_SHARDS - 4} shards), 512 (3 shards)"
    )
    assert event in caplog.text


def test_a_halved_bound_is_remembered_on_a_gpu_where_it_was_measured(job: Job, tmp_path: Path) -> None:
    file = f"budgets/{artefact_key({})}.json"
    job.workspace.write_json(file, {"max_batch_tokens": 4096})
    for halved, remembered in ((1024, 1024), (2048, 1024), (512, 512)):
        remember_halved(job.workspace, file, halved)
        assert job.workspace.read_json(file) == {"max_batch_tokens": remembered}


@pytest.mark.parametrize(("tokens", "gpus", "lowers"), [("auto", 1, True), ("auto", 0, False), (512, 1, False)])
def test_which_bounds_are_lowered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokens: str | int, gpus: int, lowers: bool
) -> None:
    settings = [f"gradients.max_batch_tokens={tokens}", f"ray.gpus_per_actor={gpus}"]
    workspace = Workspace.open(str(tmp_path / "workspace"), create=True)
    job = Job(workspace, tiny_job(tmp_path, tmp_path / "workspace", settings))
    monkeypatch.setattr(Job, "budget_file", lambda *_: "budgets/key.json")
    assert budget_to_lower(job, None) == ("budgets/key.json" if lowers else None)  # type: ignore[arg-type]
