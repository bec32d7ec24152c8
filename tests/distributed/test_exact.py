"""Scores by exact inner products, alone and in one pass with projected features."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from rose_ray.distributed.job import RunResult
from rose_ray.distributed.run import run_job
from rose_ray.kernels.correlation import spearman
from tests.distributed.conftest import FinishedJob
from tests.distributed.reading import made_stages, read_file
from tests.distributed.tiny import third_target, tiny_job

pytestmark = pytest.mark.ray

FLOAT32 = 2e-6
"""Influences of order 1 from float32 directions, projected to a basis of float32 and back: a few roundings (6e-8)
through sums over some 1,500 parameters."""

UNPROJECTED = ["gradients.projection.kind=none", "gradients.stored_dtype=float32"]
OBJECTIVES = ("rose", "rose_simpo", "less", "dpo_weighted")


@pytest.fixture(scope="module")
def unprojected(finished: FinishedJob, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished job's workspace with unprojected features beside its own. Not to be written to."""
    workspace = tmp_path_factory.mktemp("unprojected") / "workspace"
    shutil.copytree(finished.workspace, workspace)
    _run(finished, workspace, UNPROJECTED)
    return workspace


@pytest.fixture
def copied(unprojected: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    workspace = tmp_path / "workspace"
    shutil.copytree(unprojected, workspace)
    return workspace


def _run(finished: FinishedJob, workspace: Path, overrides: Sequence[str]) -> RunResult:
    return run_job(tiny_job(finished.inputs, workspace, overrides))


def _scores(workspace: Path, result: RunResult, target: str) -> dict[str, float]:
    table = read_file(workspace, result.scores[target], "scores.parquet")
    return dict(zip(table["row_id"].to_pylist(), table["score"].to_pylist(), strict=True))


def _agree(workspace: Path, found: RunResult, expected: RunResult, target: str) -> None:
    ours, theirs = _scores(workspace, found, target), _scores(workspace, expected, target)
    assert ours.keys() == theirs.keys() and ours
    np.testing.assert_allclose([ours[key] for key in theirs], list(theirs.values()), rtol=0, atol=FLOAT32)


def test_exact_scores_are_those_of_unprojected_features_under_any_objective(
    finished: FinishedJob, copied: Path
) -> None:
    exact = ["gradients.projection.kind=exact"]
    first = _run(finished, copied, exact)
    assert made_stages(first.stages)[:5] == ["basis alpha", "basis beta", "bank alpha", "bank beta", "features alpha"]
    assert not made_stages(_run(finished, copied, exact).stages)
    for objective in OBJECTIVES:
        setting = [f"targets.0.objective={objective}"]
        found = _run(finished, copied, [*exact, *setting])
        expected = _run(finished, copied, [*UNPROJECTED, *setting])
        if objective != "rose":  # bases hold both sides of every pair: another objective is arithmetic
            assert made_stages(found.stages) == ["score alpha", "select alpha"]
        _agree(copied, found, expected, "alpha")
        _agree(copied, found, expected, "beta")


def test_one_direction_a_subtask_keeps_its_own_objective_s_scores(finished: FinishedJob, copied: Path) -> None:
    reduced = ["gradients.projection.kind=exact", "gradients.exact_basis=subtasks"]
    found = _run(finished, copied, reduced)
    assert found.bases["alpha"].counts["directions"] == 2 and found.bases["beta"].counts["directions"] == 1
    expected = _run(finished, copied, UNPROJECTED)
    for target in ("alpha", "beta"):
        _agree(copied, found, expected, target)
    assert found.bases["alpha"].facts["keeps"] == "subtasks" and found.bases["alpha"].facts["lost"]
    decided = _run(finished, copied, ["gradients.projection.kind=exact", "gradients.exact_basis_gib=1e-6"])
    assert not made_stages(decided.stages) and decided.bases["alpha"].key == found.bases["alpha"].key
    assert any(event.startswith("basis alpha: one direction a subtask, 2 rows, ") for event in decided.events)
    other = _run(finished, copied, [*reduced, "targets.0.objective=less"])
    assert made_stages(other.stages)[:3] == ["basis alpha", "bank alpha", "features alpha"]


def test_one_pass_makes_both_and_a_new_target_is_scored_from_the_features(finished: FinishedJob, copied: Path) -> None:
    both = ["targets.0.exact=true", "gradients.projection.seed=5"]
    found = _run(finished, copied, both)
    receipts = sorted((copied / "features").glob("*/*/manifest.json"))
    assert {"features", "features alpha"} <= set(made_stages(found.stages))
    _agree(copied, found, _run(finished, copied, UNPROJECTED), "alpha")
    content = tiny_job(finished.inputs, copied, both).model_dump(mode="json")
    from rose_ray.config import parse_config

    content["targets"].append(third_target(finished.inputs))
    for target in content["targets"][:2]:
        del target["official_cut"]
    added = run_job(parse_config(content, []))
    assert made_stages(added.stages) == ["bank gamma", "score gamma", "select gamma"]
    assert set(receipts) <= set((copied / "features").glob("*/*/manifest.json"))


def test_stored_forms_keep_the_order(finished: FinishedJob, copied: Path) -> None:
    exact = _scores(copied, _run(finished, copied, UNPROJECTED), "alpha")

    def order(stored_dtype: str) -> float:
        settings = ["gradients.projection.dim=1024", f"gradients.stored_dtype={stored_dtype}"]
        found = _scores(copied, _run(finished, copied, settings), "alpha")
        return spearman(np.array([found[key] for key in exact]), np.array(list(exact.values())))

    # measured: rounding to 8 bits is far below the sketch's own error (0.95 in float32); signs alone about double it
    assert order("int8") > 0.94
    assert order("bit1") > 0.85
