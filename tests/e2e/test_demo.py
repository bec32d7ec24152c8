"""The demo as a user runs it: one command, its output, and what it left behind."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rose_ray.demo.families import OPPOSED_FAMILY, REWARDED_FAMILY
from rose_ray.demo.make import MALFORMED_LINES, NUM_DUPLICATES, ROWS_PER_FAMILY, SWAPPED_TARGET, TARGET
from rose_ray.stages.pool import ROW_COUNTS

ROOT = Path(__file__).parents[2]

MIN_ENRICHMENT = 3.0
"""Share of the rewarded family in the selection over its share in the pool; 6 would be all of the selection."""

MAX_ENRICHMENT_SWAPPED = 0.5
"""The same with the pairs swapped; 1 would be chance."""

NUM_FAMILIES = 6
NUM_DRAWS = 2
SECONDS = 540


def rose_ray(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "rose_ray", *arguments]
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=SECONDS
    )


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def summary_of(workspace: Path, target: str) -> dict[str, Any]:
    folder = read_json(workspace / "selections" / target / "latest.json")["folder"]
    summary: dict[str, Any] = read_json(workspace / folder / "summary.json")
    return summary


def files_of(workspace: Path) -> dict[str, int]:
    """Size of every file but the records of runs and leases."""
    paths = (path for path in workspace.rglob("*") if path.is_file())
    sizes = {str(path.relative_to(workspace)): path.stat().st_size for path in paths}
    return {name: size for name, size in sizes.items() if not name.startswith(("runs/", "lease/"))}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder of a finished demo, and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    done = rose_ray("demo", "demo-run", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "demo-run", done.stdout


@pytest.mark.ray
@pytest.mark.slow
def test_demo_finds_the_known_answer(demo: tuple[Path, str]) -> None:
    folder, printed = demo
    asked, swapped = (summary_of(folder / "workspace", target)["sources"] for target in (TARGET, SWAPPED_TARGET))
    pool_share = asked[REWARDED_FAMILY]["pool_share"]
    assert pool_share == pytest.approx(1 / NUM_FAMILIES)
    assert asked[REWARDED_FAMILY]["selected_share"] >= MIN_ENRICHMENT * pool_share
    assert swapped[REWARDED_FAMILY]["selected_share"] <= MAX_ENRICHMENT_SWAPPED * pool_share
    assert swapped[OPPOSED_FAMILY]["selected_share"] >= MIN_ENRICHMENT * pool_share
    assert f"reward the family {REWARDED_FAMILY!r}" in printed


@pytest.mark.ray
@pytest.mark.slow
def test_training_on_the_selection_gains_more_than_on_random_rows(demo: tuple[Path, str]) -> None:
    _, printed = demo
    selection = [float(value) for value in re.findall(r"^\s+selection\s+([+-][\d.]+) ", printed, re.MULTILINE)]
    draws = [float(value) for value in re.findall(r"^\s+random draw \d+\s+([+-][\d.]+) ", printed, re.MULTILINE)]
    assert len(selection) == 1 and len(draws) == NUM_DRAWS, printed
    assert selection[0] > max(draws)


@pytest.mark.ray
@pytest.mark.slow
def test_every_row_of_the_demo_is_accounted_for(demo: tuple[Path, str]) -> None:
    folder, _ = demo
    run = read_json(folder / "workspace" / "runs" / "run-00001.json")
    counts = {stage["stage"]: stage["counts"] for stage in run["stages"]}
    num_unique = NUM_FAMILIES * ROWS_PER_FAMILY
    read, *parts = (counts["ingest"][name] for name in ROW_COUNTS)
    assert parts == [num_unique, NUM_DUPLICATES, len(MALFORMED_LINES), 0]
    assert read == sum(parts)
    assert counts["features"].items() >= {"rows": num_unique, "scored": num_unique, "rejected": 0}.items()
    assert counts[f"score {TARGET}"].items() >= {"unique": num_unique, "scored": num_unique, "rejected": 0}.items()


@pytest.mark.ray
@pytest.mark.slow
def test_second_run_finds_everything(demo: tuple[Path, str]) -> None:
    folder, _ = demo
    workspace = folder / "workspace"
    before = files_of(workspace)
    done = rose_ray("run", str(folder / "demo.yaml"), cwd=folder)
    assert done.returncode == 0, done.stderr
    run = read_json(workspace / "runs" / "run-00002.json")
    assert run["outcome"] == "finished"
    assert [stage["stage"] for stage in run["stages"] if not stage["reused"]] == []
    assert files_of(workspace) == before
