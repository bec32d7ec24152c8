"""What changed between two selections of one target.

Tables are read a row group at a time; of their rows ids and numbers are kept, some 60 bytes a row of the pool.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from rose_ray.data.digests import DigestIndex, Places, Words, digest_words, row_id_words
from rose_ray.kernels.correlation import spearman
from rose_ray.stages.candidates import Scores
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
class Overlap:
    """Of two selections.

    Attributes:
        num_old, num_new, num_common: Selected rows.
    """

    num_old: int
    num_new: int
    num_common: int

    @property
    def jaccard(self) -> float:
        """Rows in both over rows in either; 1 for the same rows."""
        either = self.num_old + self.num_new - self.num_common
        return self.num_common / either if either else 1.0


@dataclass(frozen=True)
class Drift(Overlap):
    """From an older selection to a newer one.

    Attributes:
        gained, lost: Rows by source.
        num_new_rows: Rows of the newer selection that the older pool did not hold.
        num_gone: Rows of the older selection that the newer pool does not hold.
        mean_tokens_old, mean_tokens_new: Of a selected row.
        shifts: By column: score, and each subtask that both have.
    """

    gained: dict[str, int]
    lost: dict[str, int]
    num_new_rows: int
    num_gone: int
    mean_tokens_old: float
    mean_tokens_new: float
    shifts: dict[str, Shift]

    def as_json(self) -> dict[str, Any]:
        """For a file."""
        return {"jaccard": self.jaccard, **asdict(self)}


def overlap(workspace: Workspace, old: Manifest, new: Manifest) -> Overlap:
    """Count the rows that two selections share, from the selections alone.

    Args:
        workspace: Holds both.
        old, new: Selections.

    Raises:
        StoreError: A file of either is missing or altered.
    """
    before, after = (_ids(_open(workspace, each, "selected.parquet")) for each in (old, new))
    num_common = int((DigestIndex(before).places(after) >= 0).sum())
    return Overlap(len(before), len(after), num_common)


def drift(workspace: Workspace, old: Manifest, new: Manifest) -> Drift:
    """Compare two selections and the score tables that they were chosen from.

    Args:
        workspace: Holds both.
        old, new: Selections.

    Raises:
        StoreError: A file of either is missing or altered.
    """
    before, after = (_open(workspace, each, "selected.parquet") for each in (old, new))
    ids_before, ids_after = _ids(before), _ids(after)
    kept_old = DigestIndex(ids_after).places(ids_before) >= 0
    kept_new = DigestIndex(ids_before).places(ids_after) >= 0
    return Drift(
        num_old=before.num_rows,
        num_new=after.num_rows,
        num_common=int(kept_new.sum()),
        gained=_by_source(after, ~kept_new),
        lost=_by_source(before, ~kept_old),
        num_new_rows=_num_outside(workspace, ids_after, old),
        num_gone=_num_outside(workspace, ids_before, new),
        mean_tokens_old=_mean_tokens(before),
        mean_tokens_new=_mean_tokens(after),
        shifts=_shifts(workspace, old, new),
    )


def _open(workspace: Workspace, manifest: Manifest, name: str) -> Scores:
    record = manifest.file(name)
    return Scores(workspace.open_table(record.path, record))


def _id_parts(table: Scores) -> Iterator[Words]:
    for part in table.parts(["row_id"]):
        yield row_id_words(part["row_id"])


def _ids(table: Scores) -> Words:
    return np.concatenate([digest_words([]), *_id_parts(table)])


def _score_tables(workspace: Workspace, selection: Manifest) -> list[Manifest]:
    return [read_manifest(workspace, folder) for folder in selection.facts["scores"]]


def _num_outside(workspace: Workspace, ids_S2: Words, selection: Manifest) -> int:
    """Return how many of some rows were neither scored nor rejected for a selection."""
    scores, index = _score_tables(workspace, selection)[0], DigestIndex(ids_S2)
    seen = np.zeros(len(ids_S2), dtype=bool)
    for name in ("scores.parquet", "rejected.parquet"):
        for part in _id_parts(_open(workspace, scores, name)):
            places = index.places(part)
            seen[places[places >= 0]] = True
    return int((~seen).sum())


def _by_source(rows: Scores, chosen: np.ndarray) -> dict[str, int]:
    sources = rows.sources()
    counts = np.bincount(sources.codes_N[chosen], minlength=len(sources.names)).tolist()
    return dict(Counter({name: n for name, n in zip(sources.names, counts, strict=True) if n}).most_common())


def _mean_tokens(rows: Scores) -> float:
    return float(np.mean(rows.numbers("num_tokens"))) if rows.num_rows else 0.0


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
    before, after = (_open(workspace, each, "scores.parquet") for each in (old, new))
    old_places, new_places = _common(before, after)
    return {
        name: _shift(before.numbers(column)[old_places], after.numbers(column)[new_places])
        for name, column in [("score", "score"), *((name, f"subtask_{name}") for name in subtasks)]
    }


def _common(before: Scores, after: Scores) -> tuple[Places, Places]:
    """Return where the rows that both hold are in either."""
    index = DigestIndex(_ids(before))
    places_N = np.concatenate([np.zeros(0, np.int64), *(index.places(part) for part in _id_parts(after))])
    both = np.flatnonzero(places_N >= 0)
    return places_N[both], both


def _shift(old_N: np.ndarray, new_N: np.ndarray) -> Shift:
    if not len(old_N):
        return Shift(0, tuple(0.0 for _ in QUANTILES), None)
    old_N, new_N = old_N.astype(np.float64), new_N.astype(np.float64)
    return Shift(len(old_N), tuple(float(q) for q in np.quantile(new_N - old_N, QUANTILES)), spearman(old_N, new_N))
