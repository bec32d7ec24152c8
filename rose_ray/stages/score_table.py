"""A target's score table while it grows: parts lie on disk, what ranks are made from stays in memory.

Some 24 bytes a row are kept in memory, 45 while ranks are made; the table itself waits in a spool.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa

from rose_ray.data.digests import row_id_words
from rose_ray.errors import AccountingError, DataError
from rose_ray.kernels.ranking import ranks
from rose_ray.schemas import FEATURE_REJECTED, scores_schema
from rose_ray.stores.spool import Spool

ROW_GROUP = 1 << 20
"""Rows of a row group: what a reader or writer holds of a table at once."""


class ScoreTable:
    """Rows scored and rejected, in the pool's order. Closing it gives its disk space back.

    Args:
        subtasks: Names, in the order of their columns.
        pairs: Ids of pairs that have columns of their own.

    Attributes:
        schema: ``scores_schema`` of both.
        num_wanted: Rows that were to be scored.
        reasons: Rejected rows by reason.
    """

    def __init__(self, subtasks: Sequence[str], pairs: Sequence[str] = ()) -> None:
        self.schema = scores_schema(subtasks, pairs)
        self.num_wanted = 0
        self.reasons: Counter[str] = Counter()
        self._scored, self._rejected = Spool(self.schema), Spool(FEATURE_REJECTED)
        self._words: list[np.ndarray] = []
        self._scores: list[np.ndarray] = []
        self._ranks_N = np.zeros(0, np.int64)

    def __enter__(self) -> ScoreTable:
        return self

    def __exit__(self, *error: object) -> None:
        self._scored.close()
        self._rejected.close()

    @property
    def num_scored(self) -> int:
        """Rows scored so far."""
        return self._scored.num_rows

    @property
    def num_rejected(self) -> int:
        """Rows rejected so far."""
        return self._rejected.num_rows

    def add(self, scored: pa.Table, rejected: pa.Table, num_wanted: int) -> None:
        """Add a shard's rows, ranks left open.

        Args:
            scored: Schema ``schema``.
            rejected: Schema ``FEATURE_REJECTED``.
            num_wanted: Rows that the shard should have.
        """
        self._scored.append(scored)
        self._rejected.append(rejected)
        self._words.append(row_id_words(scored["row_id"]))
        self._scores.append(scored["score"].to_numpy())
        self.reasons.update(rejected["reason"].to_pylist())
        self.num_wanted += num_wanted

    def settle(self) -> None:
        """Rank the rows, once all are added.

        Raises:
            AccountingError: Rows scored and rejected are not the rows wanted.
            DataError: No row could be scored, or a row stands in it twice.
        """
        if self.num_scored + self.num_rejected != self.num_wanted:
            raise AccountingError(
                f"{self.num_wanted} rows wanted, {self.num_scored} scored, {self.num_rejected} rejected."
            )
        if self.num_scored == 0:
            first = next(self._rejected.read(1), FEATURE_REJECTED.empty_table()).to_pylist()
            raise DataError(f"none of {self.num_wanted} rows could be scored; first reason: {first}")
        words_N2, scores_N = np.concatenate(self._words), np.concatenate(self._scores)
        self._words, self._scores = [], []
        self._ranks_N = ranks(scores_N, words_N2)

    def scored(self) -> Iterator[pa.Table]:
        """Yield the table with its ranks, ``ROW_GROUP`` rows at a time, after `settle`."""
        place, start = self.schema.get_field_index("rank"), 0
        for table in self._scored.read(ROW_GROUP):
            ranks_N = pa.array(self._ranks_N[start : start + table.num_rows])
            yield table.set_column(place, self.schema.field("rank"), ranks_N)
            start += table.num_rows

    def rejected(self) -> Iterator[pa.Table]:
        """Yield the rows that could not be scored, schema ``FEATURE_REJECTED``, ``ROW_GROUP`` at a time."""
        yield from self._rejected.read(ROW_GROUP) if self.num_rejected else [FEATURE_REJECTED.empty_table()]
