"""Ranks that share a model give what one process gives, and come back when one of them dies."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
from ray.util import placement_group_table
from ray.util.state import list_actors

from rose_ray.config import parse_config
from rose_ray.distributed.actors import ScoringSpec
from rose_ray.distributed.checkpoints import warm_up
from rose_ray.distributed.engine import check_offload
from rose_ray.distributed.gang import Gang, Rank, released_gangs
from rose_ray.distributed.ingest import ingest
from rose_ray.distributed.job import Job
from rose_ray.distributed.roll import Enrolment
from rose_ray.distributed.run import run_job
from rose_ray.distributed.spaces import SpaceSpec
from rose_ray.errors import ConfigError, ResourceError
from rose_ray.stores.workspace import Workspace
from tests.distributed.conftest import FinishedJob, copy_up_to_warmup
from tests.distributed.ranks import kill_a_rank
from tests.distributed.reading import made_stages
from tests.distributed.tiny import MAX_TOKENS, tiny_content

SETTINGS = [
    "model.deepspeed.zero_stage=3",
    "ray.ranks_per_actor=2",
    "ray.cpus_per_actor=0.25",
    "gradients.stored_dtype=float32",
]

SCORE_BOUND = 2e-6
"""Gathered weights are the same bits and batches the same rows; what is left is the order of float32 sums, 1e-7 or so
of a vector's length, in either side of an inner product of unit vectors, over checkpoints."""


def scores(workspace: Path) -> dict[str, np.ndarray]:
    (path,) = workspace.glob("scores/alpha/*/scores.parquet")
    table = pq.read_table(path)
    order = np.argsort(table["row_id"].to_numpy())
    return {name: table[name].to_numpy()[order] for name in ("row_id", "score", "gradient_norm")}


@pytest.fixture(scope="module")
def plain(finished: FinishedJob, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """Scores of the finished job's own warm-up by one process a model, features kept whole."""
    workspace = tmp_path_factory.mktemp("plain") / "workspace"
    copy_up_to_warmup(finished, workspace)
    content = tiny_content(finished.inputs, workspace)
    run_job(parse_config(content, ["gradients.stored_dtype=float32"]))
    return scores(workspace)


@pytest.mark.ray
def test_a_gang_scores_as_one_process_does(finished: FinishedJob, plain: dict[str, np.ndarray], tmp_path: Path) -> None:
    copy_up_to_warmup(finished, tmp_path / "workspace")
    content = tiny_content(finished.inputs, tmp_path / "workspace")
    free, killed = ray.available_resources()["CPU"], list[int]()

    def shard_finished() -> bool:
        return any((tmp_path / "workspace").glob("features/*/*/manifest.json"))

    killer = threading.Thread(target=kill_a_rank, args=(killed, "Rank", shard_finished))
    killer.start()
    result = run_job(parse_config(content, SETTINGS))
    killer.join()
    assert len(killed) == 1
    assert "scoring actors: gangs that came apart and were started again: 1" in result.events
    assert [group["state"] for group in placement_group_table().values() if "gang" in group["name"]] == 2 * ["REMOVED"]
    assert "features" in made_stages(result.stages) and "bank alpha" in made_stages(result.stages)
    found = scores(tmp_path / "workspace")
    assert found["row_id"].tolist() == plain["row_id"].tolist()
    np.testing.assert_allclose(found["score"], plain["score"], atol=SCORE_BOUND)
    np.testing.assert_allclose(found["gradient_norm"], plain["gradient_norm"], rtol=1e-5)
    deadline = time.monotonic() + 30  # what is killed is gone a little later
    while ray.available_resources()["CPU"] < free:
        assert time.monotonic() < deadline, holders()
        time.sleep(0.2)


def holders() -> str:
    """Who may hold resources of the cluster, for a message."""
    groups = [(group["name"], group["state"], group["bundles"]) for group in placement_group_table().values()]
    actors = [(each.class_name, each.state, each.required_resources) for each in list_actors(detail=True)]
    held = [actor for actor in actors if actor[1] != "DEAD" and actor[2]]
    return f"{ray.available_resources()}; groups {[group for group in groups if group[1] != 'REMOVED']}; actors {held}"


@pytest.mark.ray
def test_more_ranks_than_the_cluster_has_are_refused_at_once(finished: FinishedJob, tmp_path: Path) -> None:
    content = tiny_content(finished.inputs, tmp_path / "workspace")
    with pytest.raises(ResourceError, match=r"1 actors x 9 ranks of 0\.25 CPU.*room for 8"):
        run_job(parse_config(content, [*SETTINGS, "ray.ranks_per_actor=9"]))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["ray.ranks_per_actor=2"], "ranks share a model only under"),
        (["model.deepspeed.offload_parameters=nvme", "model.deepspeed.zero_stage=3"], "nvme_path go together"),
        (["model.deepspeed.nvme_path=/disk", "model.deepspeed.zero_stage=3"], "nvme_path go together"),
    ],
)
def test_settings_that_do_not_go_together(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(tiny_content(tmp_path, tmp_path / "workspace"), overrides)


def test_nvme_is_refused_with_the_reason_where_it_cannot_work(tmp_path: Path) -> None:
    settings = ["model.deepspeed.zero_stage=3", "model.deepspeed.offload_parameters=nvme"]
    settings += [f"model.deepspeed.nvme_path={tmp_path}"]
    config = parse_config(tiny_content(tmp_path, tmp_path / "workspace"), settings)
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if AsyncIOBuilder().is_compatible(verbose=False):
        check_offload(config.model, "cpu")
    else:
        with pytest.raises(ResourceError, match="async_io operator, which cannot be built on"):
            check_offload(config.model, "cpu")


class ScarceRank(Rank):
    """The second has no room for two of the longest rows."""

    def budget(self, spaces: Sequence[SpaceSpec]) -> int:
        if self.number == 1:
            os.environ["ROSE_RAY_FAILPOINT"] = f"out_of_memory:{MAX_TOKENS}"
        return super().budget(spaces)


class ScarceGang(Gang):
    kind = ScarceRank


@pytest.mark.ray
def test_a_rank_without_room_for_two_rows_leaves_no_other_waiting(finished: FinishedJob, tmp_path: Path) -> None:
    copy_up_to_warmup(finished, tmp_path / "workspace")
    config = parse_config(tiny_content(finished.inputs, tmp_path / "workspace"), SETTINGS)
    job = Job(Workspace.open(config.workspace), config)
    warmup = warm_up(job, ingest(job), False)
    spaces = [each.spec for each in job.feature_sets(warmup).values()]
    spec = replace(job.spec(warmup, 2 * MAX_TOKENS, spaces), stall_seconds=600)
    message = rf"2 rows of {MAX_TOKENS} tokens did not fit .* set gradients.max_batch_tokens to {MAX_TOKENS} or so"
    began = time.monotonic()
    with released_gangs(spec), pytest.raises(ResourceError, match=message):
        ScarceGang(spec, Enrolment(None)).call("budget", lambda rank: (spaces,))
    assert time.monotonic() - began < spec.stall_seconds / 2  # not told by the stall


class BrokenRank:
    """The first raises what a broken collective would; the second, which broke it, is seen to die later."""

    def __init__(self, spec: Any, number: int) -> None:
        self.number = number

    def place(self) -> tuple[str, int]:
        return "", 0

    def join(self, address: str, port: int) -> None:
        pass

    def work(self) -> None:
        if self.number == 0:
            raise RuntimeError("Connection closed by peer")
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)


class BrokenGang(Gang):
    kind = BrokenRank  # type: ignore[assignment]
    max_restarts = 1


@pytest.mark.ray
def test_a_rank_whose_partner_died_is_not_blamed(ray_cluster: None) -> None:
    spec: Any = ScoringSpec(*[None] * 5, (), (), "cpu", 1, 512, ranks=2, cpus=0.1)  # type: ignore[arg-type]
    with released_gangs(spec), pytest.raises(ResourceError, match=r"of 2 ranks came apart 2 times.*actor died"):
        BrokenGang(spec, Enrolment(None)).call("work", lambda rank: ())
