"""Gates of a selection, together: which rows they passed over, why, and how many.

A row is selected only if every gate lets it through. Gates are asked in order; the first that refuses gives
the reason.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from rose_ray.errors import AccountingError
from rose_ray.kernels.ranking import Positions
from rose_ray.kernels.selection import Gate
from rose_ray.schemas import PASSED_OVER
from rose_ray.stages.candidates import Candidates


@dataclass(frozen=True)
class Refused:
    """Why a row was passed over.

    Attributes:
        reason: Short stable identifier, one of the gate's.
        match: Position of the selected row that it resembles, or the name of what it holds; empty where neither.
    """

    reason: str
    match: str | int


class TellingGate(Gate):
    """A gate that remembers whom it refused.

    Attributes:
        counted: Its reasons, each with the name of its count.
        refused: Rows passed over since the last restart.
    """

    counted: ClassVar[Mapping[str, str]]
    refused: dict[int, Refused]

    @property
    def num_refused(self) -> int:
        """Rows passed over since the last restart."""
        return len(self.refused)

    @property
    @abstractmethod
    def num_known(self) -> int:
        """Rows that were looked at."""

    def drop(self, position: int) -> None:
        """Learn that another gate refused a row, so that nothing of it need be kept."""
        return


class JoinedGate(Gate):
    """Several gates in a row.

    Args:
        gates: In the order in which they are asked, at least one.
    """

    def __init__(self, gates: Sequence[TellingGate]) -> None:
        self._gates = list(gates)

    def restart(self) -> None:
        """See `Gate`."""
        for gate in self._gates:
            gate.restart()

    def knows(self, position: int) -> bool:
        """Whether every gate has looked at the row."""
        return all(gate.knows(position) for gate in self._gates)

    def look(self, positions: Positions) -> None:
        """Let each gate look at the rows that it does not know."""
        for gate in self._gates:
            unknown = [position for position in positions.tolist() if not gate.knows(position)]
            if unknown:
                gate.look(np.array(unknown, dtype=np.int64))

    def admits(self, position: int) -> bool:
        """Whether all let the row through."""
        if all(gate.admits(position) for gate in self._gates):
            return True
        for gate in self._gates:
            gate.drop(position)
        return False

    def take(self, position: int) -> None:
        """See `Gate`."""
        for gate in self._gates:
            gate.take(position)

    @property
    def num_refused(self) -> int:
        """Rows passed over since the last restart."""
        return sum(gate.num_refused for gate in self._gates)

    @property
    def num_known(self) -> int:
        """Rows that were looked at."""
        return max(gate.num_known for gate in self._gates)

    @property
    def refused(self) -> dict[int, Refused]:
        """Rows passed over since the last restart."""
        return {position: why for gate in self._gates for position, why in gate.refused.items()}

    @property
    def counted(self) -> dict[str, str]:
        """All reasons, each with the name of its count."""
        return {reason: name for gate in self._gates for reason, name in gate.counted.items()}


def passed_over(candidates: Candidates, gate: JoinedGate, chosen: Positions) -> tuple[pa.Table, dict[str, Any]]:
    """Return the rows that a gate refused, schema ``PASSED_OVER``, and their counts.

    Args:
        candidates: What was chosen from.
        gate: After choosing.
        chosen: Positions of the selected rows.

    Returns:
        The rows by source and score, and: ``scored``, ``selectable``, a count for every reason that the gates know (the
        first is the sum of the others), ``looked_at`` (rows whose text or vector was read), ``sources`` (counts by
        source).

    Raises:
        AccountingError: A row was both selected and passed over.
    """
    refused_at = gate.refused
    positions = np.array(sorted(refused_at), dtype=np.int64)
    if np.isin(positions, chosen).any():
        raise AccountingError("a row was selected and passed over. This is a bug; please report it.")
    kept = sorted({each.match for each in refused_at.values() if isinstance(each.match, int)})
    kept_ids = candidates.scores.rows(np.array(kept, dtype=np.int64), ["row_id"])["row_id"].to_pylist()
    id_of = dict(zip(kept, kept_ids, strict=True))
    refused = [refused_at[position] for position in positions.tolist()]
    rows = candidates.scores.rows(positions, ["row_id", "source"])
    columns = {
        "score": candidates.score()[positions],
        "reason": [each.reason for each in refused],
        "match": [id_of[each.match] if isinstance(each.match, int) else each.match for each in refused],
    }
    for name, column in columns.items():
        rows = rows.append_column(name, pa.array(column, PASSED_OVER.field(name).type))
    table = rows.select(PASSED_OVER.names).cast(PASSED_OVER)
    table = table.sort_by([("source", "ascending"), ("score", "descending"), ("row_id", "ascending")])
    return table, _counts(candidates.scores.num_rows, table, gate)


def _counts(num_scored: int, table: pa.Table, gate: JoinedGate) -> dict[str, Any]:
    by_source: dict[str, dict[str, int]] = {}
    totals: Counter[str] = Counter()
    for source, reason in zip(table["source"].to_pylist(), table["reason"].to_pylist(), strict=True):
        own = by_source.setdefault(source, dict.fromkeys(gate.counted.values(), 0))
        own[gate.counted[reason]] += 1
        totals[gate.counted[reason]] += 1
    return {
        "scored": num_scored,
        "selectable": num_scored - table.num_rows,
        "looked_at": gate.num_known,
        **{name: totals[name] for name in gate.counted.values()},
        "sources": by_source,
    }
