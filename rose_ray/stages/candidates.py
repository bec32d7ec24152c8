"""Scored rows that a selection chooses from, read from score tables a column at a time.

Shapes: N scored rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rose_ray.config.selection import SelectionConfig
from rose_ray.data.digests import row_id_words
from rose_ray.errors import AccountingError, ConfigError
from rose_ray.kernels.aggregation import ScoreMode
from rose_ray.kernels.budget import Budget, SourceRules, budget_count
from rose_ray.kernels.purse import Sources
from rose_ray.kernels.selection import Gate, ScoreColumns, choose_rows


class Scores:
    """A score table, of which a few columns of a row group are in memory at a time.

    Args:
        table: The file.
    """

    def __init__(self, table: pq.ParquetFile) -> None:
        self._file = table
        self.num_rows: int = table.metadata.num_rows

    def parts(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Yield the columns of one row group after another."""
        for number in range(self._file.num_row_groups):
            yield self._file.read_row_group(number, columns=list(columns))

    def numbers(self, column: str) -> np.ndarray:
        """Return a column of numbers [N], as stored."""
        kind = self._file.schema_arrow.field(column).type.to_pandas_dtype()
        values_N = np.empty(self.num_rows, dtype=kind)
        start = 0
        for part in self.parts([column]):
            values_N[start : start + part.num_rows] = part[column].to_numpy()
            start += part.num_rows
        return values_N

    def sources(self) -> Sources:
        """Return the rows' sources."""
        names: dict[str, int] = {}
        codes_N = np.empty(self.num_rows, dtype=np.int32)
        start = 0
        for part in self.parts(["source"]):
            coded = part["source"].combine_chunks().dictionary_encode()
            known = np.array([names.setdefault(name, len(names)) for name in coded.dictionary.to_pylist()], np.int32)
            codes_N[start : start + part.num_rows] = known[coded.indices.to_numpy()]
            start += part.num_rows
        return Sources(list(names), codes_N)

    def rows(self, positions: np.ndarray, columns: Sequence[str]) -> pa.Table:
        """Return some rows in the order of their positions, which ascend."""
        start, taken = 0, [self._file.schema_arrow.empty_table().select(list(columns))]
        for number in range(self._file.num_row_groups):
            end = start + self._file.metadata.row_group(number).num_rows
            first, last = np.searchsorted(positions, [start, end])
            if last > first:
                part = self._file.read_row_group(number, columns=list(columns))
                taken.append(part.select(list(columns)).take(pa.array(positions[first:last] - start)))
            start = end
        return pa.concat_tables(taken)

    def has_rows_of(self, other: Scores) -> bool:
        """Whether both hold the same rows in the same order."""
        if self.num_rows != other.num_rows:
            return False
        pairs = zip(_batches(self), _batches(other), strict=False)
        return all(mine.equals(theirs) for mine, theirs in pairs)


def _batches(scores: Scores) -> Iterator[pa.ChunkedArray]:
    for part in scores.parts(["row_id"]):
        yield part["row_id"]


@dataclass(frozen=True)
class Candidates:
    """The scored rows that a selection chooses from.

    Attributes:
        scores: The table that knows everything but other targets' scores.
        score: Reads the score that a row is listed with, [N].
        choices: Read the scores that take turns in a round robin, [N] each, by name.
        pairs: Read those of single pairs, in the same way; empty where the table has none.
        choice_at: Reads such scores of some rows, positions ascending, as a matrix with a column a choice.
        num_pool_rows: Unique rows of the pool, unscored ones included: what a fraction is taken of.
    """

    scores: Scores
    score: Callable[[], np.ndarray]
    choices: dict[str, Callable[[], np.ndarray]]
    choice_at: Callable[[np.ndarray], np.ndarray]
    num_pool_rows: int
    pairs: dict[str, Callable[[], np.ndarray]] = field(default_factory=dict)


def target_candidates(
    scores: Scores, subtasks: Sequence[str], num_pool_rows: int, pairs: Sequence[str] = ()
) -> Candidates:
    """Return the rows of one target's score table; its subtasks, or its pairs, take turns in a round robin."""
    columns = [f"subtask_{name}" for name in subtasks]
    return Candidates(
        scores,
        lambda: scores.numbers("score"),
        {name: _reader(scores, column) for name, column in zip(subtasks, columns, strict=True)},
        lambda positions: _matrix(scores.rows(positions, columns)),
        num_pool_rows,
        {pair: _reader(scores, f"pair_{pair}") for pair in pairs},
    )


def joint_candidates(targets: Mapping[str, Scores], num_pool_rows: int, aggregation: ScoreMode = "max") -> Candidates:
    """Return the rows of several targets' score tables; the targets take turns.

    Args:
        targets: Score tables by name.
        num_pool_rows: Unique rows of the pool.
        aggregation: Whether a row's score is its best one or the mean over the targets.

    Raises:
        AccountingError: The tables hold different rows.
    """
    tables = list(targets.values())
    for name, table in targets.items():
        if table is not tables[0] and not table.has_rows_of(tables[0]):
            raise AccountingError(
                f"the score table of {name} holds other rows than that of {next(iter(targets))}. A method that "
                "rejects rows of its own, such as ifd or deita, cannot share a training set."
            )

    def best() -> np.ndarray:
        best_N = tables[0].numbers("score")
        for table in tables[1:]:
            np.maximum(best_N, table.numbers("score"), out=best_N)
        return best_N

    def mean() -> np.ndarray:
        total_N = np.zeros(tables[0].num_rows)
        for table in tables:
            total_N += table.numbers("score")
        return (total_N / len(tables)).astype(np.float32)

    return Candidates(
        tables[0],
        best if aggregation == "max" else mean,
        {name: _reader(table, "score") for name, table in targets.items()},
        lambda positions: np.hstack([_matrix(table.rows(positions, ["score"])) for table in tables]),
        num_pool_rows,
    )


def choose(candidates: Candidates, selection: SelectionConfig, gate: Gate | None = None) -> np.ndarray:
    """Return the positions of the selected rows in order of choice.

    Args:
        candidates: What is chosen from.
        selection: How much, and how.
        gate: Passes rows over; None for none.

    Raises:
        ConfigError: A source is unknown, or the budget exceeds what may be chosen from.
    """
    kind, amount = selection.budget
    budget = Budget(tokens=int(amount)) if kind == "tokens" else Budget(count=_num_rows(kind, amount, candidates))
    rules = SourceRules(
        include=selection.include_sources or (),
        exclude=selection.exclude_sources,
        max_share=selection.source_quotas,
    )
    columns = _columns(candidates, selection)
    return choose_rows(
        ScoreColumns(
            candidates.scores.num_rows,
            len(columns),
            lambda number: columns[number](),
            lambda positions: row_id_words(candidates.scores.rows(positions, ["row_id"])["row_id"]),
        ),
        budget,
        num_tokens_N=candidates.scores.numbers("num_tokens") if kind == "tokens" else None,
        sources=candidates.scores.sources() if rules.named() else None,
        rules=rules,
        equal_parts=selection.method == "equal_parts",
        gate=gate,
    )


def _columns(candidates: Candidates, selection: SelectionConfig) -> list[Callable[[], np.ndarray]]:
    if selection.method == "top_k":
        return [candidates.score]
    if selection.method != "round_robin_pairs":
        return list(candidates.choices.values())
    if not candidates.pairs:
        raise ConfigError(
            "selection.method: round_robin_pairs needs the scores of single pairs, which this score table lacks. "
            "Choose round_robin, or a method that scores pairs."
        )
    return list(candidates.pairs.values())


def _reader(scores: Scores, column: str) -> Callable[[], np.ndarray]:
    return lambda: scores.numbers(column)


def _matrix(table: pa.Table) -> np.ndarray:
    return np.stack([column.to_numpy() for column in table.columns], axis=1)


def _num_rows(kind: str, amount: float, candidates: Candidates) -> int:
    if kind == "count":
        return int(amount)
    count = budget_count(Budget(fraction=amount), candidates.num_pool_rows)
    assert count is not None
    return count
