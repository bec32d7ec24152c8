"""What changed between two selections of one target."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rose_ray.kernels.correlation import spearman
from rose_ray.stores.manifest import Manifest, read_manifest
from rose_ray.stores.workspace import Workspace

QUANTILES = (0.05, 0.5, 0.95)


@dataclass(frozen=True)
class Shift:
    """How one column of scores moved, over the rows that both tables hold.

    Attributes:
        num_rows: Rows in both.
        quantiles: 5 %, median and 95 % of new less old.
        spearman: Of old and new; None where either is constant.
    """

    num_rows: int
    quantiles: tuple[float, ...]
    spearman: float | None


@dataclass(frozen=True)
class Drift:
    """From an older selection to a newer one.

    Attributes:
        num_old, num_new, num_common: Selected rows.
        gained, lost: Rows by source.
        num_new_rows: Rows of the newer selection that the older pool did not hold.
        num_gone: Rows of the older selection that the newer pool does not hold.
        mean_tokens_old, mean_tokens_new: Of a selected row.
        shifts: By column: score, and each subtask that both have.
    """

    num_old: int
    num_new: int
    num_common: int
    gained: dict[str, int]
    lost: dict[str, int]
    num_new_rows: int
    num_gone: int
    mean_tokens_old: float
    mean_tokens_new: float
    shifts: dict[str, Shift]

    @property
    def jaccard(self) -> float:
        """Rows in both over rows in either; 1 for the same rows."""
        either = self.num_old + self.num_new - self.num_common
        return self.num_common / either if either else 1.0

    def as_json(self) -> dict[str, Any]:
        """For a file."""
        return {"jaccard": self.jaccard, **asdict(self)}


def drift(workspace: Workspace, old: Manifest, new: Manifest) -> Drift:
    """Compare two selections and the score tables that they were chosen from.

    Args:
        workspace: Holds both.
        old, new: Selections.

    Raises:
        StoreError: A file of either is missing or altered.
    """
    before, after = (_selected(workspace, each) for each in (old, new))
    kept_new, kept_old = _among(after, before), _among(before, after)
    pools = [_row_ids(workspace, each) for each in (old, new)]
    return Drift(
        num_old=before.num_rows,
        num_new=after.num_rows,
        num_common=int(kept_new.sum()),
        gained=_by_source(after, ~kept_new),
        lost=_by_source(before, ~kept_old),
        num_new_rows=after.num_rows - int(_in(after["row_id"], pools[0]).sum()),
        num_gone=before.num_rows - int(_in(before["row_id"], pools[1]).sum()),
        mean_tokens_old=_mean_tokens(before),
        mean_tokens_new=_mean_tokens(after),
        shifts=_shifts(workspace, old, new),
    )


def _selected(workspace: Workspace, selection: Manifest) -> pa.Table:
    record = selection.file("selected.parquet")
    return workspace.read_table(record.path, record, columns=["row_id", "source", "num_tokens"])


def _score_tables(workspace: Workspace, selection: Manifest) -> list[Manifest]:
    return [read_manifest(workspace, folder) for folder in selection.facts["scores"]]


def _row_ids(workspace: Workspace, selection: Manifest) -> pa.ChunkedArray:
    scores = _score_tables(workspace, selection)[0]
    records = [scores.file("scores.parquet"), scores.file("rejected.parquet")]
    tables = [workspace.read_table(record.path, record, columns=["row_id"]) for record in records]
    return pa.concat_tables(tables)["row_id"]


def _in(values: pa.ChunkedArray, known: pa.ChunkedArray) -> np.ndarray:
    found: np.ndarray = pc.is_in(values, value_set=known.combine_chunks()).to_numpy()
    return found.astype(bool)


def _among(rows: pa.Table, others: pa.Table) -> np.ndarray:
    return _in(rows["row_id"], others["row_id"])


def _by_source(rows: pa.Table, chosen: np.ndarray) -> dict[str, int]:
    return dict(Counter(rows.filter(pa.array(chosen))["source"].to_pylist()).most_common())


def _mean_tokens(rows: pa.Table) -> float:
    return float(np.mean(rows["num_tokens"].to_numpy())) if rows.num_rows else 0.0


def _shifts(workspace: Workspace, old: Manifest, new: Manifest) -> dict[str, Shift]:
    """Of the score tables that both were chosen from; a joint set has several, each under its target's name."""
    shifts = {}
    before = {scores.facts["target"]: scores for scores in _score_tables(workspace, old)}
    for after in _score_tables(workspace, new):
        target = after.facts["target"]
        if target in before:
            prefix = f"{target} " if len(new.facts["scores"]) > 1 else ""
            found = _table_shifts(workspace, before[target], after)
            shifts.update({f"{prefix}{column}": shift for column, shift in found.items()})
    return shifts


def _table_shifts(workspace: Workspace, old: Manifest, new: Manifest) -> dict[str, Shift]:
    subtasks = [name for name in new.facts["subtasks"] if name in old.facts["subtasks"]]
    columns = ["score", *(f"subtask_{name}" for name in subtasks)]
    records = [each.file("scores.parquet") for each in (old, new)]
    before, after = (workspace.read_table(record.path, record, columns=["row_id", *columns]) for record in records)
    places = pc.index_in(after["row_id"], value_set=before["row_id"].combine_chunks())
    both = pc.is_valid(places)
    old_rows, new_rows = before.take(pc.drop_null(places)), after.filter(both)
    return {
        column.removeprefix("subtask_") if column != "score" else "score": _shift(
            old_rows[column].to_numpy().astype(np.float64), new_rows[column].to_numpy().astype(np.float64)
        )
        for column in columns
    }


def _shift(old_N: np.ndarray, new_N: np.ndarray) -> Shift:
    if not len(old_N):
        return Shift(0, tuple(0.0 for _ in QUANTILES), None)
    return Shift(len(old_N), tuple(float(q) for q in np.quantile(new_N - old_N, QUANTILES)), spearman(old_N, new_N))
