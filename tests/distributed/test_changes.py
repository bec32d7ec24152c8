"""What a change of the configuration computes, and what it leaves alone."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import pytest

from rose_ray.distributed.job import RunResult
from rose_ray.distributed.run import run_job
from tests.distributed.conftest import FinishedJob
from tests.distributed.reading import digests, made_stages
from tests.distributed.tiny import NUM_SHARDS, tiny_job

pytestmark = pytest.mark.ray


def run_changed(finished: FinishedJob, workspace: Path, overrides: Sequence[str]) -> tuple[RunResult, dict[str, str]]:
    """Run with a change; return the result and what the workspace held before, still unchanged."""
    before = digests(workspace)
    result = run_job(tiny_job(finished.inputs, workspace, overrides))
    after = digests(workspace)
    assert {path: digest for path, digest in after.items() if path in before} == before
    return result, {path: digest for path, digest in after.items() if path not in before}


def test_a_changed_objective_computes_scores_and_selection(
    finished: FinishedJob, copied: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="rose_ray")
    result, added = run_changed(finished, copied, ["targets.0.objective=less"])
    assert made_stages(result.stages) == ["score alpha", "select alpha"]
    assert {path.split("/")[0] for path in added} == {"scores", "selections"}
    assert (
        "changed since the last run: targets.0.objective: 'rose' -> 'less'; computes score, select beside what exists"
        in caplog.messages
    )


def test_a_changed_selection_computes_the_selection(finished: FinishedJob, copied: Path) -> None:
    result, added = run_changed(finished, copied, ["targets.1.selection={count: 3}"])
    assert made_stages(result.stages) == ["select beta"]
    assert {path.split("/")[1] for path in added} == {"beta"}
    assert result.selections["beta"].counts["selected"] == 3


def test_a_joint_training_set_computes_only_itself(finished: FinishedJob, copied: Path) -> None:
    result, _ = run_changed(finished, copied, ["training_set={selection: {count: 6, method: round_robin}}"])
    assert made_stages(result.stages) == ["select training_set"]
    assert result.selections["training_set"].counts["selected"] == 6


def test_what_changes_no_result_computes_nothing(
    finished: FinishedJob, copied: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="rose_ray")
    overrides = ["gradients.max_batch_tokens=300", "warmup.workers=2", "ray.actors=2", "model.loader=plain"]
    result, added = run_changed(finished, copied, overrides)
    assert not made_stages(result.stages) and not added
    said = [message for message in caplog.messages if message.endswith("computes nothing again")]
    assert len(said) == len(overrides)


def test_another_adam_mode_computes_features_beside(
    finished: FinishedJob, copied: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="rose_ray")
    result, added = run_changed(finished, copied, ["gradients.adam=v_only"])
    scores = ["score alpha", "score beta"]
    assert made_stages(result.stages) == ["bank alpha", "bank beta", "features", *scores, "select alpha", "select beta"]
    folders = {"/".join(path.split("/")[:2]) for path in added if path.startswith("features/")}
    (features,) = (stage for stage in result.stages if stage.stage == "features")
    assert folders == {features.folder} and len(list((copied / "features").iterdir())) == 2
    assert len(list((copied / features.folder).glob("*/manifest.json"))) == NUM_SHARDS
    assert (
        "changed since the last run: gradients.adam: 'torch' -> 'v_only'; computes bank, features, score, select "
        "beside what exists" in caplog.messages
    )
