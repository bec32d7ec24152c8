"""`plan` foretells the stages that a run then takes, and leaves nothing behind but the pool and the prediction."""

from __future__ import annotations

from pathlib import Path

import pytest

from rose_ray.config import parse_config
from rose_ray.distributed.plan import plan_job
from rose_ray.stages.report import status_lines
from rose_ray.stores.plans import write_plan
from rose_ray.stores.workspace import Workspace
from tests.distributed.conftest import FinishedJob
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
