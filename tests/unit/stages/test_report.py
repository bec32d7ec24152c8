"""What `explain` says of a row, target by target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from rose_ray.config.target import TargetConfig
from rose_ray.errors import DataError
from rose_ray.schemas import FEATURE_REJECTED, scores_schema
from rose_ray.stages.pool import read_pool_entry
from rose_ray.stages.report import explain_lines
from rose_ray.stores.manifest import Manifest, commit_artefact
from tests.unit.stages.diagnose.stored_job import CHECKPOINTS, RATES, SPACE, StoredJob, pair_record, stored_job


def two_targets(folder: Path) -> tuple[StoredJob, Manifest, list[str]]:
    """A job of targets scored by length and by rds_plus, its pool, and the pool's row ids."""
    job = stored_job(folder, [pair_record(0)])
    pairs = job.config.targets[0].pairs
    targets = [TargetConfig(name="a", method="length"), TargetConfig(name="b", method="rds_plus", pairs=pairs)]
    job.config = job.config.model_copy(update={"targets": targets})
    pool = job.add_pool([{"prompt": f"q{n}", "completion": f"a{n}"} for n in range(3)])
    (entry,) = pool.facts["shards"]
    return job, pool, read_pool_entry(job.workspace, pool, entry, columns=["row_id"])["row_id"].to_pylist()


def add_scores(
    job: StoredJob,
    pool: Manifest,
    name: str,
    scored: Sequence[str],
    rejected: Sequence[str],
    pairs: Mapping[str, float],
) -> None:
    target = next(each for each in job.config.targets if each.name == name)
    rows = [
        {
            "row_id": row_id,
            "source": "s",
            "num_tokens": 5,
            "num_labelled_tokens": 3,
            f"subtask_{name}": 0.5,
            **{f"pair_{pair}": value for pair, value in pairs.items()},
            "score": 0.5,
            "rank": place,
            "shard": pool.facts["shards"][0]["shard"],
        }
        for place, row_id in enumerate(scored, start=1)
    ]
    reasons = [{"row_id": row_id, "reason": "too_odd", "detail": "an odd row."} for row_id in rejected]
    folder = f"scores/{name}"
    files = [
        job.workspace.write_table(
            f"{folder}/scores.parquet", pa.Table.from_pylist(rows, schema=scores_schema([name], list(pairs)))
        ),
        job.workspace.write_table(f"{folder}/rejected.parquet", pa.Table.from_pylist(reasons, schema=FEATURE_REJECTED)),
    ]
    facts: dict[str, Any] = {"target": name, "subtasks": [name], "pool": {"folder": pool.folder}}
    facts |= {"method": target.method, "method_options": target.method_options}
    made_from = {"t": name, "aggregation": target.aggregation}
    counts = {"scored": len(scored)}
    manifest = commit_artefact(job.workspace, "scores", made_from, files, counts, facts, started=0.0, folder=folder)
    job._note(f"score {name}", manifest)


def test_a_row_that_one_target_rejected_is_explained_for_the_others(tmp_path: Path) -> None:
    job, pool, ids = two_targets(tmp_path)
    add_scores(job, pool, "a", ids[1:], ids[:1], {})
    add_scores(job, pool, "b", ids, [], {"p0": -0.25})
    job.finish()
    lines = list(explain_lines(job.workspace, job.config, ids[0]))
    assert lines[0] == f"target a: row {ids[0]} was rejected: too_odd: an odd row."
    assert lines[1] == f"target b: row {ids[0]} of source s, 5 tokens"
    assert lines[-2:] == ["  scored by rds_plus", "  pair p0: -0.25000"]
    lines = list(explain_lines(job.workspace, job.config, ids[1]))
    assert "  scored by length, which keeps no influence of single pairs" in lines


def test_a_row_is_named_so_that_it_is_one(tmp_path: Path) -> None:
    job, pool, ids = two_targets(tmp_path)
    add_scores(job, pool, "a", ids[1:], ids[:1], {})
    job.finish()
    with pytest.raises(DataError, match="2 scored and 1 rejected rows begin with ''"):
        list(explain_lines(job.workspace, job.config, ""))
    with pytest.raises(DataError, match="no scored or rejected row begins with 'zz'"):
        list(explain_lines(job.workspace, job.config, "zz"))


def test_a_basis_of_subtasks_explains_subtasks(tmp_path: Path) -> None:
    job = stored_job(tmp_path, [pair_record(n) for n in range(2)], normalize="none", exact=True)
    basis = commit_artefact(job.workspace, "basis", {"objective": ["rose", "none", 0.1]}, [], {}, {}, started=0.0)
    space = {**SPACE, "projection": f"exact/v1/basis={basis.key}"}
    rejected_VD = np.array([[3.0], [-1.0]])  # beside chosen sides of length 0: their mean is 1, at both checkpoints
    bank = job.add_bank(np.zeros((2, 2, 1)), np.stack([rejected_VD] * 2), tokens=[(1, 1)] * 2, space=space)
    pool = job.add_pool([{"prompt": "q", "completion": "a"}])
    job.add_features(pool, np.array([[[0.5]], [[1.0]]]))
    (entry,) = pool.facts["shards"]
    row = {"source": "s", "num_tokens": 5, "num_labelled_tokens": 3, "subtask_s": 0.625, "score": 0.625, "rank": 1}
    row |= {"row_id": read_pool_entry(job.workspace, pool, entry, columns=["row_id"])["row_id"][0].as_py()}
    row |= {"shard": entry["shard"]}
    files = [
        job.workspace.write_table("scores/t/scores.parquet", pa.Table.from_pylist([row], schema=scores_schema(["s"]))),
        job.workspace.write_table("scores/t/rejected.parquet", FEATURE_REJECTED.empty_table()),
    ]
    features = {"key": "f" * 16, "checkpoints": list(CHECKPOINTS), "mean_learning_rates": list(RATES)}
    facts = {"target": "t", "subtasks": ["s"], "pool": {"folder": pool.folder}, "bank": {"folder": bank.folder}}
    made_from = {"objective": "rose", "normalize": "none", "aggregation": "max"}
    counts = {"scored": 1}
    facts |= {"features": features}
    scores = commit_artefact(job.workspace, "score", made_from, files, counts, facts, started=0.0, folder="scores/t")
    job._note("score t", scores)
    job.finish()
    lines = list(explain_lines(job.workspace, job.config, row["row_id"]))
    header = lines.index("  the basis holds one direction a subtask, so single pairs have no influence")
    assert [line.split() for line in lines[header + 1 :]] == [
        ["subtask", "influence", "at", "checkpoint", "1", "2"],
        ["weight", "0.750", "0.250"],
        ["s", "+0.62500", "+0.50000", "+1.00000"],
    ]
