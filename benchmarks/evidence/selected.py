"""What each target selected, at every budget."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from benchmarks.evidence.pairs import CONTROL_SOURCE
from rose_ray.distributed.tasks import SCORES_FILE, SELECTED_FILE
from rose_ray.errors import StoreError
from rose_ray.evaluate.index import Index
from rose_ray.kernels.correlation import spearman
from rose_ray.stores.history import latest_version
from rose_ray.stores.manifest import Manifest, read_manifest
from rose_ray.stores.workspace import Workspace

_COLUMNS = ["row_id", "source", "num_labelled_tokens", "score"]


def selected_rows(workspace: Workspace, index: Index, task: str) -> list[dict[str, Any]]:
    """Return a row for every budget of every target of a task, behind one for all that was scored.

    ``recall`` is the share of the control's source that was selected, of its rows in the sampled pool; a random
    selection has the budget's. ``precision`` is that source's share of the selection. ``score by length`` is Spearman's
    correlation of the scores of all rows with the lengths of their answers.

    Args:
        workspace: Of the run.
        index: Of the task's evaluation.
        task: Prefix of its targets.

    Raises:
        StoreError: A selection is missing or altered.
    """
    sizes = {
        (entry.arm, entry.budget): entry.num_rows
        for entry in index.entries
        if entry.arm.startswith(f"{task}-") and entry.budget is not None
    }
    chosen = {(arm, budget): _selection(workspace, arm, size) for (arm, budget), size in sizes.items()}
    rows: list[dict[str, Any]] = []
    for (arm, budget), (pool, table) in chosen.items():
        if not rows:
            scored = _scored(workspace, _scores(workspace, arm))
            rows.append(_row(f"all that {arm} scored", None, scored, pool, None))
        rose = chosen.get((f"{task}-rose", budget))
        row = _row(arm, budget, table, pool, None if rose is None else rose[1])
        rows.append(row | {"score by length": _by_length(_scored(workspace, _scores(workspace, arm)))})
    return rows


def _by_length(scored: pa.Table) -> float | None:
    score_N, length_N = (scored[name].to_numpy() for name in ("score", "num_labelled_tokens"))
    return spearman(score_N.astype(np.float64), length_N.astype(np.float64))


def _row(name: str, budget: float | None, table: pa.Table, pool: Manifest, rose: pa.Table | None) -> dict[str, Any]:
    sources = Counter(table["source"].to_pylist())
    in_pool = pool.facts["sources"].get(CONTROL_SOURCE, 0)
    own = set(table["row_id"].to_pylist())
    other = set() if rose is None else set(rose["row_id"].to_pylist())
    return {
        "target": name,
        "budget": budget,
        "rows": table.num_rows,
        "answer tokens, median": float(np.median(table["num_labelled_tokens"].to_numpy())),
        "answer tokens": int(table["num_labelled_tokens"].to_numpy().sum()),
        f"recall of {CONTROL_SOURCE}": sources[CONTROL_SOURCE] / in_pool if in_pool else None,
        f"precision of {CONTROL_SOURCE}": sources[CONTROL_SOURCE] / table.num_rows,
        "Jaccard with rose": len(own & other) / len(own | other) if other else None,
        "score by length": None,
        "most from": ", ".join(f"{source} {count / table.num_rows:.0%}" for source, count in sources.most_common(3)),
    }


def _selection(workspace: Workspace, arm: str, size: int) -> tuple[Manifest, pa.Table]:
    """The pool, and the selection of that size from the scores that the latest run found."""
    scores = _scores(workspace, arm)
    pool = read_manifest(workspace, scores.facts["pool"]["folder"])
    scored = _scored(workspace, scores)
    for folder in workspace.list_subfolders(f"evaluation/selections/{arm}"):
        manifest = read_manifest(workspace, folder)
        if manifest.facts["scores"] == [scores.folder] and manifest.counts["selected"] == size:
            record = manifest.file(SELECTED_FILE)
            chosen = workspace.read_table(record.path, record, columns=["row_id"])["row_id"]
            return pool, scored.filter(pc.is_in(scored["row_id"], value_set=chosen))
    if scored.num_rows != size:
        raise StoreError(f"evaluation/selections/{arm}: no selection of {size} rows. Run the command again.")
    return pool, scored  # the whole pool needs no selection


def _scores(workspace: Workspace, arm: str) -> Manifest:
    latest = latest_version(workspace, arm)
    if latest is None:
        raise StoreError(f"selections/{arm}: nothing was selected. Run the command again.")
    return read_manifest(workspace, read_manifest(workspace, latest.folder).facts["scores"][0])


def _scored(workspace: Workspace, scores: Manifest) -> pa.Table:
    record = scores.file(SCORES_FILE)
    return workspace.read_table(record.path, record, columns=_COLUMNS)
