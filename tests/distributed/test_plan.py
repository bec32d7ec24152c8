"""`plan` foretells the stages that a run then takes, and leaves nothing behind but the pool and the prediction."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from ray.util import placement_group_table

from rose_ray.config import parse_config
from rose_ray.distributed.plan import plan_job
from rose_ray.distributed.run import run_job
from rose_ray.errors import ResourceError
from rose_ray.stages.report import status_lines
from rose_ray.stores.plans import write_plan
from rose_ray.stores.workspace import Workspace
from tests.distributed.conftest import FinishedJob
from tests.distributed.ranks import kill_a_rank
from tests.distributed.tiny import NUM_EPOCHS, NUM_SHARDS, NUM_UNIQUE, third_target, tiny_content, tiny_job

pytestmark = pytest.mark.ray


def test_a_plan_names_the_stages_of_the_run(finished: FinishedJob, tmp_path: Path) -> None:
    config = tiny_job(finished.inputs, tmp_path / "workspace")
    made = plan_job(config, probe_rows=8)
    ran = {stage.stage for stage in finished.result.stages}
    assert set(made.plan.seconds) == ran - {"ingest", *(name for name in ran if name.startswith("select"))}
    assert all(seconds >= 0 for seconds in made.plan.seconds.values())
    assert sum(made.work.shard_rows) == NUM_UNIQUE and made.num_shards == NUM_SHARDS
    assert made.work.num_checkpoints == NUM_EPOCHS
    assert made.tokens.num_rejected == 1  # the overlong row
    # Every row was looked at, so counts are exact.
    warmup = finished.result.warmup
    assert warmup is not None and made.plan.num_bytes["warmup"] <= warmup.num_bytes
    left = {path.name for path in (tmp_path / "workspace").iterdir()}
    assert left == {"rose_ray.json", "ingest", "pool", "plans", "lease"}


def test_exact_targets_are_foretold_under_the_names_of_their_stages(finished: FinishedJob, copied: Path) -> None:
    config = tiny_job(finished.inputs, copied, ["targets.1.exact=true"])
    made = plan_job(config, probe_rows=4)
    assert [line.partition(",")[0] for line in made.work.basis_lines] == ["basis beta: both sides of every pair"]
    assert made.work.spaces == ["", "beta"] and list(made.work.basis_tokens) == ["beta"]
    assert {"basis beta", "bank beta", "features beta", "score beta"} <= set(made.plan.seconds)
    ran = {stage.stage for stage in run_job(config).stages if not stage.reused}
    assert {"basis beta", "bank beta", "features beta", "score beta", "select beta"} == ran
    work = plan_job(config, probe_rows=0).work
    assert (work.spaces, work.basis_tokens, work.shard_rows) == ([], {}, [])


def test_what_no_node_can_offload_is_refused_before_the_pool_is_read(finished: FinishedJob, tmp_path: Path) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if AsyncIOBuilder().is_compatible(verbose=False):
        pytest.skip("this node has what DeepSpeed needs for a disk")
    settings = ["model.deepspeed.zero_stage=3", "model.deepspeed.offload_parameters=nvme"]
    config = tiny_job(finished.inputs, tmp_path / "workspace", [*settings, f"model.deepspeed.nvme_path={tmp_path}"])
    with pytest.raises(ResourceError, match="async_io operator, which cannot be built on"):
        plan_job(config, probe_rows=0)
    assert not (tmp_path / "workspace" / "pool").exists()


GANG = ["model.deepspeed.zero_stage=3", "ray.ranks_per_actor=2", "ray.cpus_per_actor=0.25"]


def test_ranks_that_share_a_model_are_probed_together(finished: FinishedJob, tmp_path: Path) -> None:
    settings = [*GANG, "warmup.zero_stage=3", "warmup.workers=2", "targets.1.exact=true"]
    before = set(placement_group_table())
    made = plan_job(tiny_job(finished.inputs, tmp_path / "workspace", settings), probe_rows=4)
    assert {"warmup", "basis beta", "bank alpha", "features", "features beta", "score beta"} < set(made.plan.seconds)
    hours, seconds, rates = made.plan.device_hours, made.plan.seconds, made.rates
    for stage, num_ranks in (("warmup", 2), ("basis beta", 2), ("bank alpha", 2), ("features", 2)):
        assert hours[stage] == pytest.approx(num_ranks * seconds[stage] / 3600) and hours[stage] > 0
    assert rates is not None and min(rates.scoring, rates.training, *rates.pairs.values()) > 0
    # A rank holds no less than its part of the base, and other ranks have their part of the machine.
    assert made.work.base_bytes / 2 < rates.peak_bytes < rates.available_bytes
    groups = [group["state"] for key, group in placement_group_table().items() if key not in before]
    assert groups == 2 * ["REMOVED"]  # one scored, one trained
    assert not (tmp_path / "workspace" / "probe").exists()


def test_a_rank_that_dies_ends_the_probe_with_one_message(finished: FinishedJob, copied: Path) -> None:
    content = tiny_content(finished.inputs, copied)
    content["targets"].append(third_target(finished.inputs))
    killed = list[int]()
    killer = threading.Thread(target=kill_a_rank, args=(killed, "ProbeRank", lambda: True))
    killer.start()
    with pytest.raises(ResourceError, match=r"plan: the probe's gang of 2 ranks came apart: .*--probe 0") as raised:
        plan_job(parse_config(content, GANG), probe_rows=4)
    killer.join()
    assert len(killed) == 1 and "\n" not in str(raised.value) and "Traceback" not in str(raised.value)


def test_ranks_are_foretold_without_a_probe(finished: FinishedJob, copied: Path) -> None:
    made = plan_job(tiny_job(finished.inputs, copied, GANG), probe_rows=0)
    work = made.work
    assert made.rates is None and made.plan.seconds == {}
    assert (work.ranks, work.held_bytes) == (2, 4 * work.num_parameters * NUM_EPOCHS * 4)
    assert work.base_bytes > work.largest_bytes > 0


def test_what_is_done_is_not_planned_again(finished: FinishedJob, copied: Path) -> None:
    assert plan_job(tiny_job(finished.inputs, copied), probe_rows=0).work.shard_rows == []
    content = tiny_content(finished.inputs, copied)
    content["targets"].append(third_target(finished.inputs))
    work = plan_job(parse_config(content), probe_rows=0).work
    assert list(work.pair_tokens) == ["gamma"] and work.passes == [["gamma"]]
    assert work.shard_rows == [] and work.warmup_positions == 0


def test_status_puts_what_was_foretold_beside_what_was_measured(finished: FinishedJob, copied: Path) -> None:
    workspace = Workspace.open(str(copied))
    assert "planned" not in "\n".join(status_lines(workspace))
    write_plan(workspace, finished.config.model_dump(mode="json"), {"seconds": {"features": 12.25}})
    lines = list(status_lines(workspace))
    assert any(line.split()[:3] == ["stage", "seconds", "planned"] for line in lines)
    assert any(line.startswith("features") and "12.2" in line.split()[2] for line in lines)
