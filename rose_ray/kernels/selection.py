"""Which rows to train on, given scores.

Shapes: N pool rows, T subtasks. Everything here is deterministic: higher scores first, ties by row_id
ascending. Results are positions into the arrays passed in, in the order of choice.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rose_ray.errors import ConfigError, DataError, NonFiniteError, ShapeError

Positions = NDArray[np.int64]
Labels = Sequence[Any] | NDArray[Any]


@dataclass(frozen=True)
class Budget:
    """How much to select; exactly one of the three is given.

    Args:
        fraction: Part of the whole pool's rows, in (0, 1].
        count: Rows, at least 1.
        tokens: Tokens, at least 1. Rows are taken in order until the first that does not fit.

    Raises:
        ConfigError: None or several are given, or the value is out of its range.
    """

    fraction: float | None = None
    count: int | None = None
    tokens: int | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        if len(given) != 1:
            raise ConfigError(f"budget has {given or 'nothing'}; expected one of fraction, count, tokens")
        ((name, value),) = given.items()
        if name == "fraction" and not 0 < value <= 1:
            raise ConfigError(f"budget fraction is {value!r}; expected above 0, at most 1")
        if name != "fraction" and value < 1:
            raise ConfigError(f"budget {name} is {value!r}; expected at least 1")


@dataclass(frozen=True)
class SourceRules:
    """Which sources may be selected, and how much of each.

    Args:
        include: Only these sources; empty means all.
        exclude: Not these.
        max_rows: Most rows of a source.
        max_share: Most of the budget that goes to a source, in [0, 1]: of its rows, or of its tokens where
            the budget is in tokens. Rounded down.

    Raises:
        ConfigError: A source is both included and excluded, or a quota is out of its range.
    """

    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    max_rows: Mapping[str, int] = field(default_factory=dict)
    max_share: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        both = sorted(set(self.include) & set(self.exclude))
        if both:
            raise ConfigError(f"sources {both} are both included and excluded; keep one of the two")
        for name, share in self.max_share.items():
            if not 0 <= share <= 1:
                raise ConfigError(f"max_share of source {name!r} is {share!r}; expected a number in [0, 1]")
        for name, rows in self.max_rows.items():
            if rows < 0:
                raise ConfigError(f"max_rows of source {name!r} is {rows!r}; expected 0 or more")

    def named(self) -> list[str]:
        """Every source that the rules mention."""
        return sorted({*self.include, *self.exclude, *self.max_rows, *self.max_share})


NO_RULES = SourceRules()


def budget_count(budget: Budget, num_pool_rows: int) -> int | None:
    """Rows that a budget asks for; None for a token budget, where it depends on the order.

    A fraction is taken of the whole pool, rows ruled out later included, and rounded down, but gives at
    least one row. It counts as the decimal it is written as: 0.29 of 100 rows is 29.
    """
    if budget.fraction is not None:
        return max(1, _part(budget.fraction, num_pool_rows))
    return budget.count


def rank_order(scores_N: NDArray[Any], row_ids: Labels) -> Positions:
    """Positions of the rows, best first: score descending, then row_id ascending.

    Raises:
        ShapeError: Scores and row ids differ in number.
        NonFiniteError: A score is NaN; the message names the rows.
        DataError: A row_id occurs twice, so ties could not be settled.
    """
    return _rank_order(np.asarray(scores_N), _checked_ids(row_ids))


def ranks(scores_N: NDArray[Any], row_ids: Labels) -> Positions:
    """Rank of each row, int64, 1 for the best; no two are equal. Raises as :func:`rank_order`."""
    order_N = rank_order(scores_N, row_ids)
    ranks_N = np.empty(len(order_N), dtype=np.int64)
    ranks_N[order_N] = np.arange(1, len(order_N) + 1)
    return ranks_N


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
        ShapeError, NonFiniteError, DataError: As in :func:`rank_order`.
    """
    ids = _checked_ids(row_ids)
    purse = _Purse.of(len(ids), budget, num_tokens_N, sources, rules)
    order = _rank_order(np.asarray(scores_N), ids)
    order = purse.within_quotas(order[purse.eligible_N[order]])
    spent = np.cumsum(purse.costs_N[order])
    chosen = order[: np.searchsorted(spent, purse.limit, side="right")]
    purse.check(chosen, ran_out=len(chosen) == len(order))
    return chosen


def round_robin(
    scores_NT: NDArray[Any],
    row_ids: Labels,
    budget: Budget,
    *,
    num_tokens_N: NDArray[Any] | None = None,
    sources: Labels | None = None,
    rules: SourceRules = NO_RULES,
) -> Positions:
    """Let the subtasks take turns, each choosing its best row that is still free.

    Turns go by column. Other arguments, rules and errors are those of :func:`top_k`; so is the return value,
    in order of choice.

    Args:
        scores_NT: One column a subtask.
    """
    ids, scores_NT = _checked_ids(row_ids), np.asarray(scores_NT)
    if scores_NT.ndim != 2 or scores_NT.shape[1] == 0:
        raise ShapeError(f"subtask scores have shape {scores_NT.shape}; expected [N, T], T at least 1")
    purse = _Purse.of(len(ids), budget, num_tokens_N, sources, rules)
    orders = [_rank_order(column_N, ids) for column_N in scores_NT.T]
    orders = [order[purse.eligible_N[order]] for order in orders]
    free_N = np.ones(len(ids), dtype=bool)
    places = [0] * len(orders)
    chosen: list[int] = []
    left, turn, ran_out = purse.limit, 0, False
    while left > 0:
        order, place = orders[turn], places[turn]
        while place < len(order) and not (free_N[order[place]] and purse.source_allows(order[place])):
            place += 1
        ran_out = place == len(order)  # the orders hold the same rows, so all have run out
        if ran_out or purse.costs_N[order[place]] > left:
            break
        position = int(order[place])
        chosen.append(position)
        free_N[position] = False
        purse.book(position)
        left -= int(purse.costs_N[position])
        places[turn] = place + 1
        turn = (turn + 1) % len(orders)
    positions = np.array(chosen, dtype=np.int64)
    purse.check(positions, ran_out)
    return positions


@dataclass(eq=False)
class _Purse:
    """A budget laid out for one pool: what each row costs, and what is left of each source's quota."""

    limit: int
    unit: str
    costs_N: NDArray[np.int64]
    eligible_N: NDArray[np.bool_]
    codes_N: NDArray[np.int64]
    rows_left: dict[int, int]
    costs_left: dict[int, int]

    @classmethod
    def of(
        cls,
        num_rows: int,
        budget: Budget,
        num_tokens_N: NDArray[Any] | None,
        sources: Labels | None,
        rules: SourceRules,
    ) -> _Purse:
        count = budget_count(budget, num_rows)
        if count is None:
            limit, unit, costs_N = int(budget.tokens or 0), "tokens", _checked_tokens(num_tokens_N, num_rows)
        else:
            limit, unit, costs_N = count, "rows", np.ones(num_rows, dtype=np.int64)
        code_of, codes_N = _source_codes(sources, num_rows, rules)
        allowed = {code for name, code in code_of.items() if not rules.include or name in rules.include}
        allowed -= {code_of[name] for name in rules.exclude}
        eligible_N = np.isin(codes_N, list(allowed)) if code_of else np.ones(num_rows, dtype=bool)
        rows_left = {code_of[name]: rows for name, rows in rules.max_rows.items()}
        costs_left = {code_of[name]: _part(share, limit) for name, share in rules.max_share.items()}
        return cls(limit, unit, costs_N, eligible_N, codes_N, rows_left, costs_left)

    def within_quotas(self, order: Positions) -> Positions:
        """The order without the rows that come after their source's quota is used up."""
        keep = np.ones(len(order), dtype=bool)
        for code in {*self.rows_left, *self.costs_left}:
            members = np.flatnonzero(self.codes_N[order] == code)
            if code in self.rows_left:
                keep[members[self.rows_left[code] :]] = False
            if code in self.costs_left:
                spent = np.cumsum(self.costs_N[order[members]])
                keep[members[spent > self.costs_left[code]]] = False
        return order[keep]

    def source_allows(self, position: int) -> bool:
        """Whether the row fits its source's quota; if not, the source is closed for good."""
        code = int(self.codes_N[position])
        if self.rows_left.get(code, 1) <= 0:
            return False
        if code in self.costs_left and self.costs_left[code] < self.costs_N[position]:
            self.rows_left[code] = 0
            return False
        return True

    def book(self, position: int) -> None:
        """Charge a chosen row to its source."""
        code = int(self.codes_N[position])
        if code in self.rows_left:
            self.rows_left[code] -= 1
        if code in self.costs_left:
            self.costs_left[code] -= int(self.costs_N[position])

    def check(self, chosen: Positions, ran_out: bool) -> None:
        """Refuse a selection that the budget does not describe."""
        spent = int(self.costs_N[chosen].sum())
        if ran_out and spent < self.limit:
            raise ConfigError(
                f"the budget asks for {self.limit} {self.unit}, but only {spent} can be selected: the pool "
                f"has {len(self.costs_N)} rows, {int(self.eligible_N.sum())} in allowed sources, and quotas "
                f"leave {len(chosen)}; lower the budget or loosen the source rules"
            )
        if not len(chosen):
            raise ConfigError(f"the budget of {self.limit} {self.unit} is smaller than the best row; raise the budget")


def _rank_order(scores_N: NDArray[Any], ids: list[Any]) -> Positions:
    if scores_N.shape != (len(ids),):
        raise ShapeError(f"scores have shape {scores_N.shape} for {len(ids)} row ids; expected one each")
    scores_N = scores_N.astype(np.float64)
    bad = np.flatnonzero(np.isnan(scores_N))
    if bad.size:
        named = ", ".join(str(ids[position]) for position in bad[:10])
        raise NonFiniteError(f"{bad.size} rows have NaN as their score, first: {named}; score them again")
    order_N = np.argsort(-scores_N, kind="stable").astype(np.int64)
    same = scores_N[order_N][1:] == scores_N[order_N][:-1]
    if same.any():
        _settle_ties(order_N, same, ids)
    return order_N


def _settle_ties(order_N: Positions, same: NDArray[np.bool_], ids: list[Any]) -> None:
    """Sort runs of equal scores by row_id, in place. Only tied ids are compared: that is what costs time."""
    tied_N = np.append(same, False) | np.append(False, same)
    places = np.flatnonzero(tied_N)
    group_N = np.append(0, np.cumsum(~same))
    tied_ids = [ids[position] for position in order_N[places].tolist()]
    by_id = sorted(range(len(tied_ids)), key=tied_ids.__getitem__)
    id_rank = np.empty(len(places), dtype=np.int64)
    id_rank[by_id] = np.arange(len(places))
    order_N[places] = order_N[places][np.lexsort((id_rank, group_N[places]))]


def _checked_ids(row_ids: Labels) -> list[Any]:
    ids = row_ids.tolist() if isinstance(row_ids, np.ndarray) else list(row_ids)
    if len(set(ids)) != len(ids):
        ((twice, times),) = Counter(ids).most_common(1)
        raise DataError(f"row_id {twice!r} occurs {times} times; expected every row once in the score table")
    return ids


def _checked_tokens(num_tokens_N: NDArray[Any] | None, num_rows: int) -> NDArray[np.int64]:
    if num_tokens_N is None:
        raise ConfigError("a token budget needs the number of tokens of each row, and there is none")
    tokens_N = np.asarray(num_tokens_N)
    if tokens_N.shape != (num_rows,):
        raise ShapeError(f"num_tokens has shape {tokens_N.shape} for {num_rows} rows; expected one each")
    if not np.issubdtype(tokens_N.dtype, np.integer) or (tokens_N < 1).any():
        raise DataError("num_tokens holds values that are no integers above 0; expected a token count a row")
    return tokens_N.astype(np.int64)


def _source_codes(
    sources: Labels | None, num_rows: int, rules: SourceRules
) -> tuple[dict[str, int], NDArray[np.int64]]:
    """A number for every source, and each row's."""
    if sources is None:
        if rules.named():
            raise ConfigError("source rules are set, but the rows' sources are not known; pass them")
        return {}, np.zeros(num_rows, dtype=np.int64)
    if len(sources) != num_rows:
        raise ShapeError(f"{len(sources)} sources for {num_rows} rows; expected one each")
    code_of: dict[str, int] = {}
    names = sources.tolist() if isinstance(sources, np.ndarray) else sources
    codes_N = np.array([code_of.setdefault(name, len(code_of)) for name in names], dtype=np.int64)
    for name in rules.named():
        if name not in code_of:
            near = difflib.get_close_matches(name, list(code_of), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; the pool has {sorted(code_of)[:20]}"
            raise ConfigError(f"source {name!r} of the source rules is not in the pool{hint}")
    return code_of, codes_N


def _part(fraction: float, whole: int) -> int:
    """Fraction of a whole, rounded down. Decimal, since in binary 0.29 * 100 is below 29."""
    return int(Decimal(str(fraction)) * whole)
