"""The scores and selections that any draw of a target's pairs would give, from stored features.

Shapes: N scored rows, K atoms, T subtasks.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Self

import numpy as np
import pyarrow as pa

from rose_ray.config.target import TargetConfig
from rose_ray.data.digests import row_id_words
from rose_ray.errors import ConfigError, NonFiniteError, StoreError
from rose_ray.kernels.aggregation import aggregate_scores
from rose_ray.kernels.budget import Budget, SourceRules, budget_count
from rose_ray.kernels.correlation import doubled_ranks, rank_correlation
from rose_ray.kernels.pair_draws import PairAtoms, jaccard
from rose_ray.kernels.purse import Sources
from rose_ray.kernels.selection import ScoreColumns, choose_rows
from rose_ray.stages.diagnose.stored import StoredBank
from rose_ray.stages.score import check_same_space, scorable_rows
from rose_ray.stages.shard_rows import read_shard_rows
from rose_ray.stages.stored_features import row_scales
from rose_ray.stores.manifest import Manifest, find_manifest
from rose_ray.stores.runs import last_stage
from rose_ray.stores.workspace import Workspace

ROW_BLOCK = 1 << 16
"""Rows whose scores are worked out at once."""


@dataclass(frozen=True)
class Scored:
    """Scores of all rows under one draw, and what they select.

    Attributes:
        ranks_N: ``doubled_ranks`` of the scores.
        chosen: Positions of the selected rows.
    """

    ranks_N: np.ndarray
    chosen: np.ndarray

    def agreement(self, other: Scored) -> tuple[float, float]:
        """Jaccard index of the selections, and Spearman's correlation of the scores; nan where they are constant."""
        correlation = rank_correlation(self.ranks_N, other.ranks_N)
        return jaccard(self.chosen, other.chosen), np.nan if correlation is None else correlation


class PoolScores:
    """Influences of all rows on a target's atoms, on this machine's disk, and what draws make of them.

    Memory: some 50 bytes a row, and two shards' features. Disk: 4 K bytes a row, in a temporary file.

    Args:
        atoms: Of the target.
        target: Aggregation and selection.
        num_pool_rows: Unique rows of the pool, of which a fraction is taken.

    Raises:
        ConfigError: The method's scores are no sums over pairs.
    """

    def __init__(self, atoms: PairAtoms, target: TargetConfig, num_pool_rows: int) -> None:
        if target.gist is not None:
            raise ConfigError(
                f"target {target.name}: method gist compares rows inside the span of all pairs, so what fewer pairs "
                "would score is no sum of stored influences. Take a target of method rose or less."
            )
        self.atoms, self.target, self._num_pool_rows = atoms, target, num_pool_rows
        self._file = tempfile.TemporaryFile(prefix="rose-ray-")  # noqa: SIM115 - closed by `close`
        self._ids: list[np.ndarray] = []
        self._tokens: list[np.ndarray] = []
        self._sources: list[pa.ChunkedArray] = []
        self.num_rows = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def read(self, workspace: Workspace, pool: Manifest, features_key: str, checkpoints: tuple[str, ...]) -> None:
        """Work out the influences of all rows of the pool that have features.

        Raises:
            StoreError: A shard has no features.
            NonFiniteError: A row's influence is not finite.
        """
        for shard in read_shard_rows(workspace, pool, features_key, checkpoints):
            rows = scorable_rows(shard)
            scaled = [
                features.times(row_scales(table, features, self.target.normalize))
                for table, features in zip(rows.tables, rows.features, strict=True)
            ]
            influences_NK = self.atoms.influences(scaled).astype(np.float32)
            if not np.isfinite(influences_NK).all():
                raise NonFiniteError(f"shard {shard.shard}: influences are not finite; see `rose-ray score`.")
            self._file.write(np.ascontiguousarray(influences_NK).tobytes())
            self._ids.append(row_id_words(rows.table["row_id"]))
            self._tokens.append(rows.table["num_tokens"].to_numpy())
            self._sources.append(rows.table["source"])
            self.num_rows += len(influences_NK)
        self._file.flush()
        if not self.num_rows:
            raise StoreError(f"no row of pool {pool.key} has features. Run `rose-ray features CONFIG` first.")
        ids_N2, tokens_N = np.concatenate(self._ids), np.concatenate(self._tokens)
        sources = Sources.of([name for part in self._sources for name in part.to_pylist()])
        self._choose = _chooser(self.target, ids_N2, tokens_N, sources, self._num_pool_rows)
        self._ids, self._tokens, self._sources = [], [], []

    def scored(self, drawn_V: np.ndarray, flipped_V: np.ndarray | None = None) -> Scored:
        """Return what a draw of pairs scores and selects.

        Raises:
            NumericsError: As `PairAtoms.columns`.
            ConfigError: The selection asks for more rows than it may choose from.
        """
        flipped_V = np.zeros(self.atoms.num_pairs, bool) if flipped_V is None else flipped_V
        subtasks_NT = self._subtask_scores(self.atoms.columns(drawn_V, flipped_V))
        scores_N = aggregate_scores(subtasks_NT, self.target.aggregation).astype(np.float32)
        turns = self._turns(scores_N, subtasks_NT, drawn_V, flipped_V)
        return Scored(doubled_ranks(scores_N), self._choose(turns))

    def _turns(
        self, scores_N: np.ndarray, subtasks_NT: np.ndarray, drawn_V: np.ndarray, flipped_V: np.ndarray
    ) -> list[_Column]:
        """The columns that the selection's method chooses from, as `rose_ray.stages.candidates` has them."""
        method = self.target.selection.method
        if method == "top_k":
            return [lambda: scores_N]
        if method != "round_robin_pairs":
            return [partial(_column, subtasks_NT, number) for number in range(subtasks_NT.shape[1])]
        signed = self.atoms.signed_atoms(drawn_V, flipped_V)
        return [partial(_column, self._influences(), atom, sign) for atom, sign in signed]

    def _influences(self) -> np.ndarray:
        """Influences [N, K], float32, on the disk."""
        shape = (self.num_rows, self.atoms.num_atoms)
        return np.memmap(self._file, dtype=np.float32, mode="r", shape=shape)

    def _subtask_scores(self, columns_KT: np.ndarray) -> np.ndarray:
        """Subtask scores [N, T], float32 as in a score table."""
        influences_NK = self._influences()
        scores_NT = np.empty((self.num_rows, columns_KT.shape[1]), dtype=np.float32)
        used_K = np.flatnonzero(columns_KT.any(axis=1))
        for start in range(0, self.num_rows, ROW_BLOCK):
            block = slice(start, start + ROW_BLOCK)
            scores_NT[block] = influences_NK[block].astype(np.float64)[:, used_K] @ columns_KT[used_K]
        return scores_NT


_Column = Callable[[], np.ndarray]


def _column(scores_NU: np.ndarray, number: int, sign: float = 1.0) -> np.ndarray:
    return np.asarray(sign * scores_NU[:, number])


def _chooser(
    target: TargetConfig, ids_N2: np.ndarray, tokens_N: np.ndarray, sources: Sources, num_pool_rows: int
) -> Callable[[list[_Column]], np.ndarray]:
    selection = target.selection
    kind, amount = selection.budget
    rows = budget_count(Budget(fraction=amount), num_pool_rows) if kind == "fraction" else int(amount)
    budget = Budget(tokens=rows) if kind == "tokens" else Budget(count=rows)
    rules = SourceRules(
        include=selection.include_sources or (),
        exclude=selection.exclude_sources,
        max_share=selection.source_quotas,
    )

    def choose(turns: list[_Column]) -> np.ndarray:
        return choose_rows(
            ScoreColumns(len(ids_N2), len(turns), lambda number: turns[number](), ids_N2.__getitem__),
            budget,
            num_tokens_N=tokens_N if kind == "tokens" else None,
            sources=sources if rules.named() else None,
            rules=rules,
            equal_parts=selection.method == "equal_parts",
        )

    return choose


def stored_pool(workspace: Workspace, bank: StoredBank) -> tuple[Manifest, str]:
    """Return the pool of the last run, and the key of the features that a bank may be multiplied with.

    Raises:
        StoreError: One of them is missing.
        SpaceMismatchError: Features and bank live in different spaces.
    """
    exact = bank.manifest.made_from["space"]["projection"].startswith("exact/")
    stages = {name: last_stage(workspace, name) for name in ("ingest", f"features {bank.target.name}", "features")}
    own = stages[f"features {bank.target.name}"]
    features = own if exact and own is not None else stages["features"]
    pool = find_manifest(workspace, stages["ingest"]["folder"]) if stages["ingest"] else None
    if pool is None or features is None:
        raise StoreError(f"no features in {workspace.root.name}. Run `rose-ray features CONFIG` first.")
    key: str = features["key"]
    space = workspace.read_json(f"features/{key}/space.json")["space"]
    check_same_space(space, bank.manifest.facts["space"])
    return pool, key
