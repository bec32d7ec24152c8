"""Which rows an evaluation draws from."""

from __future__ import annotations

import time
from pathlib import Path

import pyarrow as pa

from rose_ray.distributed.evaluate import scored_rows
from rose_ray.stores.manifest import Manifest, commit_artefact
from rose_ray.stores.workspace import Workspace


def scores_of(workspace: Workspace, arm: str, row_ids: list[str]) -> Manifest:
    folder, started = f"scores/{arm}/k", time.monotonic()
    record = workspace.write_table(f"{folder}/scores.parquet", pa.table({"row_id": row_ids}))
    return commit_artefact(workspace, "score", {"arm": arm}, [record], {}, {}, started=started, folder=folder)


def test_what_one_arm_rejects_is_left_to_the_others(tmp_path: Path) -> None:
    workspace = Workspace.open(str(tmp_path), create=True)
    rows = {"rose": ["d", "a", "b", "c"], "ifd": ["c", "a"], "rds": ["a", "b", "c", "d"], "short": ["e"]}
    few = {arm: scores_of(workspace, arm, rows[arm]) for arm in ("rose", "ifd", "rds")}
    scored, population = scored_rows(workspace, few)
    assert population == ["a", "b", "c", "d"]
    assert scored == {"rose": population, "ifd": ["a", "c"], "rds": population}
    assert scored["rose"] is population and scored["rds"] is population
    scored, population = scored_rows(workspace, {**few, "short": scores_of(workspace, "short", rows["short"])})
    assert population == ["a", "b", "c", "d", "e"] and scored["rose"] == ["a", "b", "c", "d"]
