"""The commands on a finished job: what they print, and that each works alone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from rose_ray.cli import app
from tests.distributed.conftest import FinishedJob
from tests.distributed.reading import digests, read_file
from tests.distributed.tiny import SUBTASKS, third_target, tiny_content

pytestmark = pytest.mark.ray

PRINTED = 1e-5
"""Influences and scores are printed to five places; each side is off by half a unit of the last."""

PRINTED_WEIGHT = 5e-4
"""Checkpoint weights are printed to three places."""


@pytest.fixture
def config_file(finished: FinishedJob, copied: Path) -> Path:
    path = copied.parent / "job.yaml"
    path.write_text(yaml.safe_dump(tiny_content(finished.inputs, copied)), encoding="utf-8")
    return path


def rose_ray(*arguments: str) -> list[str]:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.stderr or repr(result.exception)
    return result.stdout.splitlines()


STAGE_COMMANDS = {
    "ingest": ["ingest"],
    "warmup": ["ingest", "warmup"],
    "bank": ["ingest", "warmup", "bank alpha", "bank beta"],
    "features": ["ingest", "warmup", "features"],
    "score": ["ingest", "warmup", "bank alpha", "bank beta", "features", "score alpha", "score beta"],
}
STAGE_COMMANDS["select"] = STAGE_COMMANDS["run"] = [*STAGE_COMMANDS["score"], "select alpha", "select beta"]


def test_each_stage_command_goes_as_far_as_it_says(config_file: Path, copied: Path) -> None:
    before = digests(copied)
    for command, stages in STAGE_COMMANDS.items():
        lines = rose_ray(command, str(config_file))
        found = [re.split(r"\s{2,}", line) for line in lines[1 : 1 + len(stages)]]
        assert [columns[0] for columns in found] == stages, command
        assert {columns[2] for columns in found} == {"found"}
    assert digests(copied) == before


def test_commands_make_what_is_missing_and_no_more(config_file: Path, finished: FinishedJob, copied: Path) -> None:
    content = tiny_content(finished.inputs, copied)
    content["targets"].append(third_target(finished.inputs))
    config_file.write_text(yaml.safe_dump(content), encoding="utf-8")
    before = digests(copied)
    lines = rose_ray("bank", str(config_file))
    assert [line.split()[1] for line in lines if " made " in line] == ["gamma"]
    added = set(digests(copied)) - set(before)
    assert {path.split("/")[0] for path in added} == {"bank"}
    lines = rose_ray("run", str(config_file))
    assert [line.split()[:2] for line in lines if " made " in line] == [["score", "gamma"], ["select", "gamma"]]
    after = digests(copied)
    assert {path: digest for path, digest in after.items() if path in before} == before
    assert {path.split("/")[0] for path in set(after) - set(before)} == {"bank", "scores", "selections"}


def test_status(config_file: Path, copied: Path, finished: FinishedJob) -> None:
    lines = rose_ray("status", str(config_file))
    assert lines[0] == f"workspace {copied}" and lines[1].startswith("last run: finished, ")
    assert {"pool: 1 kept", "warmup: 1 kept", "bank: 2 kept", "features: 1 kept"} <= set(lines)
    assert any(line.startswith("warm-up warmup/") and "0 days old; 100.0% of today's pool" in line for line in lines)
    folder = finished.result.selections["alpha"].folder
    assert any(line.startswith("selection alpha: version 1, 12 rows, ") and line.endswith(folder) for line in lines)


def test_explained_influences_add_up_to_the_scores(config_file: Path, finished: FinishedJob) -> None:
    table = read_file(finished.workspace, finished.result.scores["alpha"], "scores.parquet")
    row = table.to_pylist()[5]
    lines = rose_ray("explain", str(config_file), row["row_id"][:12])
    first, second = (number for number, line in enumerate(lines) if line.startswith("target "))
    lines = lines[first:second]
    score, header = (number for number, line in enumerate(lines) if line.startswith(("  score ", "  pair ")))
    assert row["row_id"] in lines[0] and f"rank {row['rank']} of {table.num_rows}" in lines[score]
    printed = (float(line.split()[-1]) for line in lines[score + 1 : header])
    subtasks = dict(zip(SUBTASKS, printed, strict=True))
    weights = [float(word) for word in lines[header + 1].split()[1:]]
    totals: dict[str, float] = {}
    for line in lines[header + 2 :]:
        pair, total, *influences = line.split()
        totals[pair] = float(total)
        weighted = sum(weight * float(value) for weight, value in zip(weights, influences, strict=True))
        assert weighted == pytest.approx(totals[pair], abs=PRINTED + len(weights) * PRINTED_WEIGHT)
    assert len(totals) == 6
    for number, name in enumerate(SUBTASKS):  # topics take turns among the pairs
        values = [totals[f"pair-{pair}"] for pair in range(number, 6, 2)]
        assert sum(values) / len(values) == pytest.approx(subtasks[name], abs=PRINTED)
        assert subtasks[name] == pytest.approx(row[f"subtask_{name}"], abs=PRINTED)
    assert max(subtasks.values()) == float(lines[score].split()[1].rstrip(","))
    assert max(subtasks.values()) == pytest.approx(row["score"], abs=PRINTED)


def test_explain_works_after_a_run_of_one_stage(config_file: Path, finished: FinishedJob) -> None:
    row_id = read_file(finished.workspace, finished.result.scores["alpha"], "scores.parquet")["row_id"][0].as_py()
    before = rose_ray("explain", str(config_file), row_id)
    rose_ray("ingest", str(config_file))
    assert rose_ray("explain", str(config_file), row_id) == before


def test_explain_refuses_another_objective_than_was_run(config_file: Path) -> None:
    result = CliRunner().invoke(app, ["explain", str(config_file), "", "--set", "targets.0.objective=less"])
    message = "target alpha: the last run scored with objective rose, the configuration says less."
    assert result.exit_code == 1 and result.stderr.startswith(f"error: {message}")


@pytest.mark.parametrize(
    ("row_id", "message"), [("", "69 scored and 1 rejected rows begin"), ("zz", "no scored or rejected row begins")]
)
def test_explain_needs_one_row(config_file: Path, row_id: str, message: str) -> None:
    result = CliRunner().invoke(app, ["explain", str(config_file), row_id])
    assert result.exit_code == 1 and result.stderr.startswith("error: ") and message in result.stderr
