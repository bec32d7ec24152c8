"""Which warm-up later runs keep, and from when on."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rose_ray.config import parse_config
from rose_ray.distributed import checkpoints
from rose_ray.distributed.checkpoints import pin_warmup, pinned_warmup, warm_up
from rose_ray.distributed.job import Job
from rose_ray.errors import AlteredFileError
from rose_ray.filesystem import locate
from rose_ray.stages.ingest import IngestSettings, PoolFile, ingest_file
from rose_ray.stages.pool import settle_pool
from rose_ray.stages.report import status_lines
from rose_ray.stores.garbage import find_garbage, remove
from rose_ray.stores.manifest import Manifest, commit_artefact
from rose_ray.stores.runs import write_run
from rose_ray.stores.workspace import Workspace
from tests.distributed.tiny import tiny_content
from tests.tiny import write_jsonl


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """A job whose warm-up takes no training: its rows are all the pool's."""

    def train(job: Job, pool: Manifest, row_ids: list[str], made_from: dict[str, Any], folder: str) -> Manifest:
        return commit_artefact(job.workspace, "warmup", made_from, [], {}, {}, started=0.0, folder=folder)

    monkeypatch.setattr(checkpoints, "_train", train)
    monkeypatch.setattr(checkpoints, "_warmup_row_ids", lambda job, pool: [pool.key])
    config = parse_config(tiny_content(tmp_path, tmp_path / "ws"), [])
    job = Job(Workspace.open(config.workspace, create=True), config)
    job.__dict__["identity"] = SimpleNamespace(base="b", text="t", layout=SimpleNamespace(digest="l"))
    return job


def pool_of(job: Job, folder: Path, *names: str) -> Manifest:
    """Ingest files of two rows each."""
    manifests = []
    for name in names:
        rows = [
            {"messages": [{"role": "user", "content": f"{name}{n}"}, {"role": "assistant", "content": "a"}]}
            for n in range(2)
        ]
        file = PoolFile(locate(str(write_jsonl(folder / f"{name}.jsonl", rows))))
        manifests.append(ingest_file(job.workspace, file, IngestSettings(shard_rows=1)))
    pool = settle_pool(job.workspace, manifests)
    job.note("ingest", pool, 0.0, reused=False)
    return pool


def finish(job: Job) -> None:
    write_run(job.workspace, job.config.model_dump(mode="json"), job.result.stages, "finished")
    job.result.stages.clear()


def test_a_new_warmup_takes_the_place_of_the_pinned_one_when_it_is_told_to(job: Job, tmp_path: Path) -> None:
    first = warm_up(job, pool_of(job, tmp_path, "a"), new_warmup=False)
    assert pinned_warmup(job) == first
    grown = pool_of(job, tmp_path, "a", "b")
    assert warm_up(job, grown, new_warmup=False) == first
    second = warm_up(job, grown, new_warmup=True)
    assert second.folder != first.folder
    assert pinned_warmup(job) == first  # a run that dies from here on leaves later ones the old one
    assert warm_up(job, grown, new_warmup=False) == first
    assert warm_up(job, grown, new_warmup=True) == second
    pin_warmup(job, grown, second)
    assert pinned_warmup(job) == second == warm_up(job, grown, new_warmup=False)


@pytest.mark.parametrize("new_warmup", [False, True])
def test_what_a_finished_training_would_go_on_from_goes_when_it_is_found(
    job: Job, tmp_path: Path, new_warmup: bool
) -> None:
    pool = pool_of(job, tmp_path, "a")
    warmup = warm_up(job, pool, new_warmup=False)
    job.workspace.write(f"{warmup.folder}/resume/latest.json", b"{}")  # as a run leaves it that is killed here
    assert warm_up(job, pool, new_warmup) == warmup
    assert not job.workspace.exists(f"{warmup.folder}/resume/latest.json")


def test_a_pinned_warmup_whose_manifest_was_cut_short_is_not_trained_again(job: Job, tmp_path: Path) -> None:
    pool = pool_of(job, tmp_path, "a")
    first = warm_up(job, pool, new_warmup=False)
    job.workspace.write(f"{first.folder}/manifest.json", b"{")
    with pytest.raises(AlteredFileError, match=f"{first.folder}: the manifest or files of the pinned warm-up"):
        warm_up(job, pool, new_warmup=False)


def test_status_tells_what_share_the_warmup_has_seen_once_its_pool_is_gone(job: Job, tmp_path: Path) -> None:
    workspace, old = job.workspace, pool_of(job, tmp_path, "a")
    warm_up(job, old, new_warmup=False)
    finish(job)
    warm_up(job, pool_of(job, tmp_path, "a", "b"), new_warmup=False)
    finish(job)
    wanted = "; 50.0% of today's pool was there when its rows were drawn"
    assert wanted in "\n".join(status_lines(workspace))
    removed = {each.folder for each in remove(workspace, find_garbage(workspace, keep=1))}
    assert removed == {old.folder}
    assert wanted in "\n".join(status_lines(workspace))


def test_status_tells_which_warmup_later_runs_keep(job: Job, tmp_path: Path) -> None:
    warm_up(job, pool_of(job, tmp_path, "a"), new_warmup=False)
    job.result.stages.clear()
    warm_up(job, pool_of(job, tmp_path, "a", "b"), new_warmup=True)
    finish(job)
    assert "runs keep another one" in "\n".join(status_lines(job.workspace))
    (pin,) = job.workspace.list_folder("warmup/pins")
    assert job.result.warmup is not None
    job.workspace.write_json(pin, {"folder": job.result.warmup.folder, "pool": "0123"})
    assert "is not known: an earlier version made it" in "\n".join(status_lines(job.workspace))
