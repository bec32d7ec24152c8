"""Which rows to train on, given scores.

Shapes: N pool rows, T subtasks. Everything here is deterministic: higher scores first, ties by row_id
ascending. Results are positions into the arrays passed in, in the order of choice.

Only rows that the budget can reach are sorted: of every column the best, as many as the budget may buy. Where that was
too few, for other columns took them or quotas passed them over, it is done again with more.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rose_ray.errors import ShapeError
from rose_ray.kernels.budget import NO_RULES, Budget, SourceRules
from rose_ray.kernels.purse import Purse, Sources
from rose_ray.kernels.ranking import Labels, Positions, check_distinct, id_words, raise_nan, rank_order

_DEEPER = 4
_LEAST_LOOK = 256
_MARGIN = 16
_NUM_NAMED = 10


@dataclass(frozen=True)
class ScoreColumns:
    """Scored rows, of which one column at a time and the ids of a few are in memory.

    Attributes:
        num_rows: N.
        num_columns: T, at least 1.
        column: Scores of all rows by number of the column, [N]; higher is better.
        ids: Ids of the rows at some positions, all different.
    """

    num_rows: int
    num_columns: int
    column: Callable[[int], NDArray[Any]]
    ids: Callable[[Positions], Labels]


class Gate(ABC):
    """Rows are let through or passed over for what they hold, in the order of choice.

    What a row holds may be far away, so rows are looked at in groups before they are asked about. Only rows that are
    next in some column's order are: about as many as the budget still buys.
    """

    @abstractmethod
    def restart(self) -> None:
        """Forget what was taken and refused; choosing begins again."""

    @abstractmethod
    def knows(self, position: int) -> bool:
        """Whether the row was looked at."""

    @abstractmethod
    def look(self, positions: Positions) -> None:
        """Look at rows, all different and unknown."""

    @abstractmethod
    def admits(self, position: int) -> bool:
        """Whether a known row may be chosen; one that may not is asked about once."""

    @abstractmethod
    def take(self, position: int) -> None:
        """Learn that a row was chosen."""

    @property
    @abstractmethod
    def num_refused(self) -> int:
        """Rows passed over since the last restart."""


def top_k(
    scores_N: NDArray[Any],
    row_ids: Labels,
    budget: Budget,
    *,
    num_tokens_N: NDArray[Any] | None = None,
    sources: Labels | None = None,
    rules: SourceRules = NO_RULES,
) -> Positions:
    """Select the best rows.

    Args:
        scores_N: Higher is better.
        row_ids: One a row, all different; settle ties.
        budget: How much to select.
        num_tokens_N: Tokens of each row, at least 1; needed by a token budget.
        sources: Source of each row; needed by rules.
        rules: A source whose next row would pass its quota gives no more rows.

    Returns:
        Positions of the selected rows, best first, int64.

    Raises:
        ConfigError: The rules and the pool hold fewer rows or tokens than the budget asks for, the budget is
            smaller than the best row, a source of the rules is unknown, or an argument needed is missing.
        ShapeError, NonFiniteError, DataError: As in :func:`rose_ray.kernels.ranking.rank_order`.
    """
    scores_N1 = np.asarray(scores_N)[:, None]
    return round_robin(scores_N1, row_ids, budget, num_tokens_N=num_tokens_N, sources=sources, rules=rules)


def round_robin(
    scores_NT: NDArray[Any],
    row_ids: Labels,
    budget: Budget,
    *,
    num_tokens_N: NDArray[Any] | None = None,
    sources: Labels | None = None,
    rules: SourceRules = NO_RULES,
    equal_parts: bool = False,
) -> Positions:
    """Let the subtasks take turns, each choosing its best row that is still free.

    Turns go by column. Other arguments, rules and errors are those of :func:`top_k`; so is the return value,
    in order of choice.

    Args:
        scores_NT: One column a subtask.
        equal_parts: Give each column an equal part of the budget, the first ones what is left over: it stops at the
            first row that does not fit its part, and the others go on. With a budget of rows this changes nothing,
            with one of tokens a subtask of long rows gets no more than the others.
    """
    scores_NT = np.asarray(scores_NT)
    if scores_NT.ndim != 2 or scores_NT.shape[1] == 0:
        raise ShapeError(f"subtask scores have shape {scores_NT.shape}; expected [N, T], T at least 1")
    check_distinct(row_ids)
    ids_NW = id_words(row_ids)
    columns = ScoreColumns(
        len(ids_NW), scores_NT.shape[1], lambda t: scores_NT[:, t], lambda positions: _at(row_ids, positions)
    )
    coded = None if sources is None else Sources.of(sources)
    return choose_rows(columns, budget, num_tokens_N=num_tokens_N, sources=coded, rules=rules, equal_parts=equal_parts)


def choose_rows(
    scores: ScoreColumns,
    budget: Budget,
    *,
    num_tokens_N: NDArray[Any] | None = None,
    sources: Sources | None = None,
    rules: SourceRules = NO_RULES,
    equal_parts: bool = False,
    gate: Gate | None = None,
) -> Positions:
    """Select as :func:`top_k` does from one column, as :func:`round_robin` from several, in little memory.

    Some ten bytes a row, sources and tokens not counted, and about 40 for every row selected and column. With a
    ``gate``, rows that it refuses are passed over as if they were not there, and the next best take their places.
    """
    purse = Purse.of(scores.num_rows, budget, num_tokens_N, sources, rules)
    depth = _first_depth(purse.num_rows(), scores.num_columns)
    depth += 0 if gate is None else depth // 8 + _MARGIN
    while True:
        lists = [_shortlist(scores, column, purse, depth, gate is not None) for column in range(scores.num_columns)]
        chosen, ran_out = _choose(scores, lists, purse, gate, equal_parts)
        if not ran_out or all(each.is_whole for each in lists):
            purse.check(chosen, ran_out, 0 if gate is None else gate.num_refused)
            return chosen
        depth *= _DEEPER


@dataclass(frozen=True, eq=False)
class _Shortlist:
    """The best rows of a column: all rows that may be chosen where ``is_whole``."""

    positions: Positions
    scores: NDArray[Any]
    is_whole: bool


def _first_depth(num_rows: int, num_columns: int) -> int:
    return num_rows if num_columns == 1 else 2 * num_rows // num_columns + _MARGIN


def _shortlist(scores: ScoreColumns, column: int, purse: Purse, depth: int, has_gate: bool) -> _Shortlist:
    values_N = scores.column(column)
    if values_N.shape != (scores.num_rows,):
        raise ShapeError(f"scores have shape {values_N.shape} for {scores.num_rows} row ids; expected one each")
    bad = np.flatnonzero(np.isnan(values_N))
    if bad.size:
        raise_nan(bad.size, scores.ids(bad[:_NUM_NAMED]))
    open_N = purse.eligible_N.copy()
    # Behind a gate any number of a source's rows may be passed over before its quota is used up.
    for members, most in () if has_gate else purse.most_rows():
        # Whatever comes first, no more than `most` of a source are chosen: further down nothing of it is needed.
        open_N[members] = values_N[members] >= _nth_best(values_N[members], most)
    num_open = int(np.count_nonzero(open_N))
    if num_open > depth:
        open_N &= values_N >= _nth_best(values_N[open_N], depth)
    positions = np.flatnonzero(open_N)
    return _Shortlist(positions, values_N[positions], len(positions) == num_open)


def _nth_best(values_N: NDArray[Any], n: int) -> Any:
    """The ``n``-th highest value; infinity for none, minus infinity where there are fewer."""
    if n < 1:
        return np.inf
    return np.partition(values_N, len(values_N) - n)[len(values_N) - n] if n <= len(values_N) else -np.inf


def _choose(
    scores: ScoreColumns, lists: Sequence[_Shortlist], purse: Purse, gate: Gate | None, equal_parts: bool
) -> tuple[Positions, bool]:
    """Choose from shortlists; also whether rows ran out before the budget did."""
    positions = lists[0].positions if len(lists) == 1 else np.unique(np.concatenate([each.positions for each in lists]))
    ids_MW = id_words(scores.ids(positions))
    orders = []
    for each in lists:
        places = np.searchsorted(positions, each.positions)
        orders.append(places[rank_order(each.scores, ids_MW[places])])
    own = purse.at(positions)
    if gate is not None:
        chosen, ran_out = _turns(orders, own, equal_parts, _Doorway(gate, positions, own, len(orders)))
    else:
        chosen, ran_out = _best(orders[0], own) if len(orders) == 1 else _turns(orders, own, equal_parts)
    return positions[chosen], ran_out


class _Doorway:
    """A gate for rows that go by their places among those that are left."""

    def __init__(self, gate: Gate, positions: Positions, purse: Purse, num_columns: int) -> None:
        gate.restart()
        self._gate, self._positions, self._num_columns = gate, positions, num_columns
        self._mean_cost = max(1.0, float(purse.costs_N.mean())) if len(purse.costs_N) else 1.0

    def admits(self, order: Positions, place: int, free: bytearray, left: int) -> bool:
        """Whether the row at a place of an order is let through; rows behind it are looked at with it."""
        position = int(self._positions[order[place]])
        if not self._gate.knows(position):
            ahead = max(_LEAST_LOOK, int(left / self._mean_cost) // self._num_columns + 1)
            rows = order[place : place + ahead]
            wanted = [int(self._positions[row]) for row in rows.tolist() if free[row]]
            self._gate.look(np.array([each for each in wanted if not self._gate.knows(each)], dtype=np.int64))
        return self._gate.admits(position)

    def take(self, row: int) -> None:
        """Learn that a row was chosen."""
        self._gate.take(int(self._positions[row]))


def _best(order: Positions, purse: Purse) -> tuple[Positions, bool]:
    order = purse.within_quotas(order)
    spent = np.cumsum(purse.costs_N[order], dtype=np.int64)
    chosen = order[: np.searchsorted(spent, purse.limit, side="right")]
    return chosen, len(chosen) == len(order)


def _turns(
    orders: Sequence[Positions], purse: Purse, equal_parts: bool, doorway: _Doorway | None = None
) -> tuple[Positions, bool]:
    views = [order.data for order in orders]  # a view's numbers are Python's own: faster to take
    costs, has_quotas = np.ascontiguousarray(purse.costs_N).data, bool(purse.rows_left or purse.costs_left)
    free = bytearray(b"\1") * len(purse.costs_N)
    places = [0] * len(views)
    chosen = array("q")
    # Columns spend from one pot, or each from its own; whoever shares an empty pot is out.
    pot_of = list(range(len(views))) if equal_parts else [0] * len(views)
    pots = _parts(purse.limit, len(views)) if equal_parts else [purse.limit]
    buyers = [column for column, pot in enumerate(pot_of) if pots[pot] > 0]
    turn = 0

    def passes(column: int, place: int, gate: _Doorway) -> bool:
        row = views[column][place]
        if not free[row] or (has_quotas and purse.is_closed(row)):
            return False
        if not gate.admits(orders[column], place, free, pots[pot_of[column]]):
            free[row] = 0
            return False
        return not has_quotas or purse.source_allows(row)

    while buyers:
        column = buyers[turn % len(buyers)]
        order, place, pot = views[column], places[column], pot_of[column]
        if doorway is None:
            while place < len(order) and not (
                free[order[place]] and (not has_quotas or purse.source_allows(order[place]))
            ):
                place += 1
        else:
            while place < len(order) and not passes(column, place, doorway):
                place += 1
        places[column] = place
        if place == len(order):  # whole orders hold the same rows, so all have run out
            return np.array(chosen, dtype=np.int64), True
        position = order[place]
        fits = costs[position] <= pots[pot]
        if fits:
            chosen.append(position)
            free[position] = 0
            purse.book(position)
            if doorway is not None:
                doorway.take(position)
            pots[pot] -= costs[position]
        if fits and pots[pot]:
            turn = (turn + 1) % len(buyers)
        else:
            turn %= len(buyers)
            buyers = [other for other in buyers if pot_of[other] != pot]
    return np.array(chosen, dtype=np.int64), False


def _parts(whole: int, num_parts: int) -> list[int]:
    return [whole // num_parts + (part < whole % num_parts) for part in range(num_parts)]


def _at(labels: Labels, positions: Positions) -> Labels:
    return labels[positions] if isinstance(labels, np.ndarray) else [labels[place] for place in positions.tolist()]
