"""A whole job whose selections pass over rows too much alike: by states of the base model, and by gradients."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from rose_ray.distributed.job import RunResult
from rose_ray.distributed.run import run_job
from rose_ray.kernels.diversity import unit_vectors
from rose_ray.stages.report import selection_lines
from rose_ray.stages.stored_features import stored_features
from rose_ray.stores.garbage import find_garbage
from rose_ray.stores.manifest import Manifest
from rose_ray.stores.verify import verify
from tests.distributed import tiny
from tests.distributed.conftest import FinishedJob
from tests.distributed.reading import digests, manifests, opened, read_file
from tests.oracles import dot_cosine, greedy_diverse_rows, sign_cosine

pytestmark = [pytest.mark.ray, pytest.mark.slow]

COUNT = 12


Cosine = Callable[[np.ndarray, np.ndarray], float]


def of_signs(row: np.ndarray, other: np.ndarray) -> float:
    """Cosine of features of signs, with the part that all rows share behind them."""
    return sign_cosine(row[:-1], other[:-1], (float(row[-1]), float(other[-1])))


COSINES: dict[str, Cosine] = {"alpha": of_signs, "control": dot_cosine}


def stored(workspace: Path, kind: str, file: str) -> dict[str, np.ndarray]:
    """Vectors of all rows by row id; of values of methods unit ones, and those that are no scores."""
    found: dict[str, np.ndarray] = {}
    for receipt in manifests(workspace, kind):
        if any(record.path.endswith(file) for record in receipt.files) and "rejected" in receipt.counts:
            table = read_file(workspace, receipt, file)
            wide = kind == "shard_scores" and table.schema.field("values").type.list_size == 1
            if not wide:
                rows = stored_features(table).restored() if kind == "features" else unit_vectors(_values(table))[0]
                found.update(zip(table["row_id"].to_pylist(), rows, strict=True))
    return found


def _values(table: pa.Table) -> np.ndarray:
    return np.array(table["values"].to_pylist(), np.float32)


def expected(
    workspace: Path, scores: Manifest, vectors: dict[str, np.ndarray], bound: float, cosine: Cosine
) -> list[str]:
    table = read_file(workspace, scores, "scores.parquet").to_pylist()
    row_ids = [row["row_id"] for row in sorted(table, key=lambda row: (-row["score"], row["row_id"]))]
    kept, _ = greedy_diverse_rows([vectors[row_id] for row_id in row_ids], bound, cosine)
    assert len(kept) >= COUNT
    return [row_ids[place] for place in kept[:COUNT]]


def bound_of(workspace: Path, scores: Manifest, vectors: dict[str, np.ndarray], cosine: Cosine) -> float:
    """A bound that some of the best rows are above."""
    table = read_file(workspace, scores, "scores.parquet").to_pylist()
    best = sorted(table, key=lambda row: (-row["score"], row["row_id"]))[:COUNT]
    cosines = np.sort([cosine(*(vectors[row["row_id"]] for row in pair)) for pair in itertools.combinations(best, 2)])
    return float(np.clip(cosines[-6:-4].mean(), 0.01, 0.9999))


def test_by_gradients_and_by_states(finished: FinishedJob, copied: Path) -> None:
    alpha = tiny.tiny_content(finished.inputs, "ws")["targets"][0]

    def job(by_gradients: float, by_states: float) -> RunResult:
        gradients = {"count": COUNT, "diversity": {"max_cosine": by_gradients, "vectors": "gradients"}}
        states = {"count": COUNT, "diversity": {"max_cosine": by_states}}
        targets = [{**alpha, "selection": gradients}, {"name": "control", "method": "random", "selection": states}]
        return run_job(tiny.tiny_job(finished.inputs, copied, [f"targets={targets}"]))

    first = job(0.9999, 0.9999)
    assert first.warmup is not None
    last = f"{first.warmup.facts['checkpoints'][-1]['name']}.parquet"
    vectors = {"alpha": stored(copied, "features", last), "control": stored(copied, "shard_scores", "scores.parquet")}
    assert len(vectors["control"]) == tiny.NUM_UNIQUE - 1
    assert "method states rds" in [stage.stage for stage in first.stages]
    bounds = {name: bound_of(copied, first.scores[name], vectors[name], COSINES[name]) for name in vectors}
    result = job(bounds["alpha"], bounds["control"])
    assert {stage.stage for stage in result.stages if not stage.reused} == {"select alpha", "select control"}
    for name, selection in result.selections.items():
        chosen = read_file(copied, selection, "selected.parquet")["row_id"].to_pylist()
        assert chosen == expected(copied, result.scores[name], vectors[name], bounds[name], COSINES[name])
        over = read_file(copied, selection, "passed_over.parquet")
        assert over.num_rows == selection.counts["too_similar"] > 0 and selection.counts["without_vector"] == 0
        assert set(over["match"].to_pylist()) <= set(chosen)
        counts = selection.counts
        assert counts["scored"] == counts["selectable"] + counts["too_similar"] + counts["without_vector"]
        assert f"passed over: {counts['too_similar']} too similar, 0 without a vector; " in "\n".join(
            selection_lines(name, selection)
        )
    workspace = opened(copied)
    assert verify(workspace).is_clean
    garbage = {each.kind for each in find_garbage(workspace, 1) if not each.unfinished}
    assert not garbage & {"states", "shard_scores", "lengths", "features"}
    before = digests(copied)
    again = job(bounds["alpha"], bounds["control"])
    assert all(stage.reused for stage in again.stages) and digests(copied) == before
