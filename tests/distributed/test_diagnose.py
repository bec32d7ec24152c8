"""`doctor`, `shots`, `alignment` and `reward-step` on a finished job."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner, Result

from rose_ray.cli import app
from rose_ray.data.preferences import read_pairs
from rose_ray.filesystem import locate
from rose_ray.stages.diagnose.pool_scores import PoolScores, stored_pool
from rose_ray.stages.diagnose.stored import needed_bank
from rose_ray.stores.workspace import Workspace
from tests.distributed.conftest import FinishedJob
from tests.distributed.reading import digests, read_file
from tests.distributed.tiny import tiny_content
from tests.tiny import make_pair_rows, write_jsonl

pytestmark = pytest.mark.ray

EXACT = ["--set", "gradients.projection.kind=none", "--set", "gradients.stored_dtype=float32"]


@pytest.fixture
def config_file(finished: FinishedJob, copied: Path) -> Path:
    path = copied.parent / "job.yaml"
    path.write_text(yaml.safe_dump(tiny_content(finished.inputs, copied)), encoding="utf-8")
    return path


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def lines_of(*arguments: str) -> list[str]:
    result = invoke(*arguments)
    assert result.exit_code == 0, result.stderr or repr(result.exception)
    return result.stdout.splitlines()


def test_doctor_reads_banks_and_pool_and_writes_nothing_there(config_file: Path, copied: Path) -> None:
    before, file = digests(copied), copied.parent / "found.json"
    lines = lines_of("doctor", str(config_file), "--json", str(file))
    assert lines[0].startswith("target alpha: 6 pairs (first 3, second 3), bank bank/")
    assert any("label_margin" in line for line in lines)
    found = json.loads(file.read_text())["targets"]
    assert [each["target"] for each in found] == ["alpha", "beta"]
    assert digests(copied) == before


def test_strict_turns_what_is_more_than_a_note_into_an_exit_code(config_file: Path) -> None:
    arguments = ["doctor", str(config_file), "--subtask-pairs", "9"]
    assert invoke(*arguments).exit_code == 0
    assert invoke(*arguments, "--strict").exit_code == 1


def test_all_shots_select_what_the_job_selected(config_file: Path, finished: FinishedJob, copied: Path) -> None:
    workspace, target = Workspace.open(str(copied)), finished.config.targets[0]
    pairs = read_pairs([locate(str(finished.inputs / "pairs.jsonl"))], target="alpha", subtask_field="topic")
    bank = needed_bank(workspace, finished.config, target, pairs)
    pool, key = stored_pool(workspace, bank)
    with PoolScores(bank.atoms(), target, pool.counts["unique"]) as scores:
        scores.read(workspace, pool, key, bank.checkpoints)
        whole = scores.scored(np.ones(6, bool))
    table = read_file(finished.workspace, finished.result.scores["alpha"], "scores.parquet")
    ids = [table["row_id"][place].as_py() for place in whole.chosen.tolist()]
    selected = read_file(finished.workspace, finished.result.selections["alpha"], "selected.parquet")
    assert ids == selected["row_id"].to_pylist()
    lines = lines_of("shots", str(config_file), "alpha", "--draws", "3")
    assert lines[0] == f"target alpha: 6 pairs in 2 subtasks, 12 of {table.num_rows} rows selected, objective rose"


def held_out_file(folder: Path) -> str:
    rows = [{**row, "id": f"held-{row['id']}"} for row in make_pair_rows(8, seed=33)]
    return str(write_jsonl(folder / "held.jsonl", rows))


def test_alignment_makes_the_bank_of_held_out_pairs_once(config_file: Path, finished: FinishedJob) -> None:
    arguments = ["alignment", str(config_file), "alpha", "--held-out", held_out_file(config_file.parent)]
    before = digests(config_file.parent / "workspace")
    lines = lines_of(*arguments)
    assert lines[1].split()[0] == "first" and "3 pairs, 4 held out" in lines[1]
    after = digests(config_file.parent / "workspace")
    added = {path.split("/")[0] for path in set(after) - set(before)}
    assert added <= {"bank", "lease", "runs"} and "bank" in added
    assert lines_of(*arguments) == lines
    assert digests(config_file.parent / "workspace") == after
    result = invoke("alignment", str(config_file), "alpha", "--held-out", str(finished.inputs / "pairs.jsonl"))
    assert result.exit_code == 1 and "6 of 6 held-out pairs are among its own" in result.stderr


def test_steps_change_margins_as_exact_features_foretell(config_file: Path, copied: Path) -> None:
    assert invoke("run", str(config_file), *EXACT).exit_code == 0
    before, file = digests(copied), copied.parent / "steps.json"
    lines = lines_of("reward-step", str(config_file), "alpha", "--rows", "6", "--json", str(file), *EXACT)
    assert lines[0].startswith("target alpha, objective rose: 6 rows x 4 pairs")
    report: dict[str, Any] = json.loads(file.read_text())
    assert report["norms_agree"] < 1e-5  # float32 sums in another order
    for checkpoint in report["checkpoints"]:
        assert checkpoint["slope"]["pearson"] > 0.99
        assert checkpoint["own_step"]["linear"]["pearson"] > 0.9
    assert digests(copied) == before


def test_without_features_the_command_to_make_them_is_named(config_file: Path) -> None:
    result = invoke("shots", str(config_file), "beta", "--set", "model.max_tokens=64")
    assert result.exit_code == 1
    assert "was made with other max_tokens: `rose-ray bank CONFIG` makes one" in result.stderr
