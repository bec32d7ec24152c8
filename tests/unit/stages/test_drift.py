"""What changed between two selections, against sets of rows."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from rose_ray.kernels.correlation import spearman
from rose_ray.schemas import FEATURE_REJECTED
from rose_ray.stages.drift import QUANTILES, Overlap, drift, overlap
from rose_ray.stages.drift_lines import short_drift
from rose_ray.stores.manifest import Manifest, commit_artefact
from rose_ray.stores.workspace import Workspace

NUM_ROWS = 60


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace.open(str(tmp_path / "workspace"), create=True)


def row_id(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()[:32]


def commit(
    workspace: Workspace, key: str, numbers: range, chosen: list[int], subtasks: tuple[str, ...], rejected: int
) -> tuple[Manifest, dict[int, float]]:
    """Score rows, but for one that is rejected, and select some; tables have row groups of seven rows and fewer."""
    generator = np.random.default_rng(len(numbers))
    scored = [number for number in numbers if number != rejected]
    scores = dict(zip(scored, generator.normal(size=len(scored)).round(3).tolist(), strict=True))
    table = pa.table(
        {
            "row_id": [row_id(number) for number in scored],
            "score": pa.array(scores.values(), pa.float32()),
            **{f"subtask_{name}": pa.array(generator.normal(size=len(scored)), pa.float32()) for name in subtasks},
        }
    )
    failed = [{"row_id": row_id(rejected), "reason": "too_long", "detail": ""}]
    folder = f"scores/t/{key}"
    files = [
        workspace.write_tables(f"{folder}/scores.parquet", parts_of(table), table.schema),
        workspace.write_table(
            f"{folder}/rejected.parquet",
            pa.Table.from_pylist([each for each in failed if rejected in numbers], schema=FEATURE_REJECTED),
        ),
    ]
    facts = {"target": "t", "subtasks": list(subtasks)}
    commit_artefact(workspace, "score", {"key": key}, files, {}, facts, started=0.0, folder=folder)
    selected = pa.table(
        {
            "row_id": [row_id(number) for number in chosen],
            "source": [source(number) for number in chosen],
            "num_tokens": pa.array([number + 1 for number in chosen], pa.int32()),
        }
    )
    place = f"selections/t/{key}"
    files = [workspace.write_tables(f"{place}/selected.parquet", parts_of(selected), selected.schema)]
    facts = {"scores": [folder]}
    return commit_artefact(workspace, "select", {"key": key}, files, {}, facts, started=0.0, folder=place), scores


def parts_of(table: pa.Table) -> list[pa.Table]:
    return [table.slice(start, 7) for start in range(0, table.num_rows, 7)]


def source(number: int) -> str:
    return "abc"[number % 3]


def test_drift_is_what_sets_say(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    pools = range(0, NUM_ROWS), range(10, NUM_ROWS + 20)
    chosen = [generator.permutation(pool)[:25].tolist() for pool in pools]
    old, old_scores = commit(workspace, "old", pools[0], chosen[0], ("x", "y"), rejected=chosen[1][0])
    new, new_scores = commit(workspace, "new", pools[1], chosen[1], ("y", "z"), rejected=3)
    monkeypatch.delattr(Workspace, "read_table")  # nothing is read whole
    found = drift(workspace, old, new)
    before, after = map(set, chosen)
    assert (found.num_old, found.num_new, found.num_common) == (25, 25, len(before & after))
    assert found.jaccard == len(before & after) / len(before | after)
    assert found.gained == Counter(map(source, after - before)) and found.lost == Counter(map(source, before - after))
    assert list(found.gained.values()) == sorted(found.gained.values(), reverse=True)
    assert found.num_new_rows == len(after - set(pools[0])) > 0
    assert found.num_gone == len(before - set(pools[1])) > 0
    assert found.mean_tokens_old == np.mean([number + 1 for number in before])
    assert found.mean_tokens_new == np.mean([number + 1 for number in after])
    common = sorted(old_scores.keys() & new_scores.keys())
    sides = [
        np.float32([scores[number] for number in common]).astype(np.float64) for scores in (old_scores, new_scores)
    ]
    shift = found.shifts["score"]
    assert found.shifts.keys() == {"score", "y"} and shift.num_rows == len(common)
    assert shift.quantiles == pytest.approx(np.quantile(sides[1] - sides[0], QUANTILES))
    assert shift.spearman == pytest.approx(spearman(*sides))


def test_the_overlap_needs_the_selections_alone(workspace: Workspace) -> None:
    old, _ = commit(workspace, "old", range(20), [1, 2, 3, 4], ("x",), rejected=0)
    new, _ = commit(workspace, "new", range(20), [4, 3, 9], ("x",), rejected=0)
    workspace.delete_folder("scores")
    assert overlap(workspace, old, new) == Overlap(4, 3, 2)
    assert short_drift(overlap(workspace, old, new)) == "2 rows kept, 1 gained, 2 lost, 40.0% of all in both (Jaccard)"


def test_pools_that_share_no_row(workspace: Workspace) -> None:
    old, _ = commit(workspace, "old", range(0, 8), [1, 2], ("x",), rejected=0)
    new, _ = commit(workspace, "new", range(8, 16), [], ("x",), rejected=0)
    found = drift(workspace, old, new)
    assert (found.num_common, found.num_gone, found.num_new_rows, found.mean_tokens_new) == (0, 2, 0, 0.0)
    assert found.shifts["score"].num_rows == 0 and found.shifts["score"].spearman is None
