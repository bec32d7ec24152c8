"""A budget laid out for one pool: what each row costs, and what is left of each source's quota.

Shapes: N rows.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rose_ray.errors import ConfigError, DataError, ShapeError
from rose_ray.kernels.budget import Budget, SourceRules, budget_count, part_of
from rose_ray.kernels.ranking import Labels, Positions


@dataclass(frozen=True, eq=False)
class Sources:
    """Sources of rows.

    Attributes:
        names: Of the sources, all different.
        codes_N: Each row's, as a place in ``names``.
    """

    names: list[str]
    codes_N: NDArray[np.integer[Any]]

    @classmethod
    def of(cls, labels: Labels) -> Sources:
        """Code a name a row."""
        code_of: dict[str, int] = {}
        names = labels.tolist() if isinstance(labels, np.ndarray) else labels
        codes_N = np.array([code_of.setdefault(name, len(code_of)) for name in names], dtype=np.int64)
        return cls(list(code_of), codes_N)


@dataclass(eq=False)
class Purse:
    """What may still be spent.

    Attributes:
        limit: Of the budget.
        unit: ``rows`` or ``tokens``.
        costs_N: In that unit.
        eligible_N: Whether the row's source may be chosen from.
        codes_N: The row's source.
        rows_left, costs_left: By source, where it has a quota.
    """

    limit: int
    unit: str
    costs_N: NDArray[np.integer[Any]]
    eligible_N: NDArray[np.bool_]
    codes_N: NDArray[np.integer[Any]]
    rows_left: dict[int, int]
    costs_left: dict[int, int]

    @classmethod
    def of(
        cls,
        num_rows: int,
        budget: Budget,
        num_tokens_N: NDArray[Any] | None,
        sources: Sources | None,
        rules: SourceRules,
    ) -> Purse:
        """Lay a budget out.

        Raises:
            ConfigError: A source of the rules is unknown, or an argument needed is missing.
            ShapeError, DataError: Sources or tokens do not fit the rows.
        """
        count = budget_count(budget, num_rows)
        if count is None:
            limit, unit, costs_N = int(budget.tokens or 0), "tokens", _checked_tokens(num_tokens_N, num_rows)
        else:
            limit, unit, costs_N = count, "rows", np.broadcast_to(np.int64(1), num_rows)
        code_of, codes_N = _source_codes(sources, num_rows, rules)
        allowed = [name not in rules.exclude and (not rules.include or name in rules.include) for name in code_of]
        eligible_N = np.array(allowed, dtype=bool)[codes_N] if code_of else np.ones(num_rows, dtype=bool)
        rows_left = {code_of[name]: rows for name, rows in rules.max_rows.items()}
        costs_left = {code_of[name]: part_of(share, limit) for name, share in rules.max_share.items()}
        return cls(limit, unit, costs_N, eligible_N, codes_N, rows_left, costs_left)

    def at(self, positions: Positions) -> Purse:
        """The same purse for some of the rows, to spend from."""
        return replace(
            self,
            costs_N=self.costs_N[positions],
            eligible_N=self.eligible_N[positions],
            codes_N=self.codes_N[positions],
            rows_left=dict(self.rows_left),
            costs_left=dict(self.costs_left),
        )

    def num_rows(self) -> int:
        """About how many rows the budget buys."""
        if self.unit == "rows" or not len(self.costs_N):
            return self.limit
        return int(self.limit / self.costs_N.mean()) + 1

    def most_rows(self) -> Iterator[tuple[Positions, int]]:
        """Yield the rows of every source with a quota, and the most that can be chosen of them."""
        for code in {*self.rows_left, *self.costs_left}:
            members = np.flatnonzero(self.eligible_N & (self.codes_N == code))
            most = self.rows_left.get(code, len(members))
            if code in self.costs_left and len(members):
                most = min(most, self.costs_left[code] // int(self.costs_N[members].min()))
            yield members, most

    def within_quotas(self, order: Positions) -> Positions:
        """The order without the rows that come after their source's quota is used up."""
        keep = np.ones(len(order), dtype=bool)
        for code in {*self.rows_left, *self.costs_left}:
            members = np.flatnonzero(self.codes_N[order] == code)
            if code in self.rows_left:
                keep[members[self.rows_left[code] :]] = False
            if code in self.costs_left:
                spent = np.cumsum(self.costs_N[order[members]], dtype=np.int64)
                keep[members[spent > self.costs_left[code]]] = False
        return order[keep]

    def is_closed(self, position: int) -> bool:
        """Whether the row's source gives no more rows."""
        return self.rows_left.get(int(self.codes_N[position]), 1) <= 0

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

    def check(self, chosen: Positions, ran_out: bool, num_refused: int = 0) -> None:
        """Refuse a selection that the budget does not describe.

        Args:
            chosen: Rows.
            ran_out: Whether there were no more.
            num_refused: Rows that a gate passed over.

        Raises:
            ConfigError: The budget asks for more than there is, or for less than a row.
        """
        spent = int(self.costs_N[chosen].sum())
        if ran_out and spent < self.limit:
            refused = f" after {num_refused} rows were passed over" if num_refused else ""
            raise ConfigError(
                f"the budget asks for {self.limit} {self.unit}, but only {spent} can be selected: the pool "
                f"has {len(self.costs_N)} rows, {int(self.eligible_N.sum())} in allowed sources, and quotas "
                f"leave {len(chosen)}{refused}; lower the budget or loosen the source rules"
            )
        if not len(chosen):
            raise ConfigError(f"the budget of {self.limit} {self.unit} is smaller than the best row; raise the budget")


def _checked_tokens(num_tokens_N: NDArray[Any] | None, num_rows: int) -> NDArray[np.integer[Any]]:
    if num_tokens_N is None:
        raise ConfigError("a token budget needs the number of tokens of each row, and there is none")
    tokens_N = np.asarray(num_tokens_N)
    if tokens_N.shape != (num_rows,):
        raise ShapeError(f"num_tokens has shape {tokens_N.shape} for {num_rows} rows; expected one each")
    if not np.issubdtype(tokens_N.dtype, np.integer) or (tokens_N < 1).any():
        raise DataError("num_tokens holds values that are no integers above 0; expected a token count a row")
    return tokens_N


def _source_codes(
    sources: Sources | None, num_rows: int, rules: SourceRules
) -> tuple[dict[str, int], NDArray[np.integer[Any]]]:
    """The number of every source, and each row's."""
    if sources is None:
        if rules.named():
            raise ConfigError("source rules are set, but the rows' sources are not known; pass them")
        return {}, np.broadcast_to(np.int64(0), num_rows)
    if len(sources.codes_N) != num_rows:
        raise ShapeError(f"{len(sources.codes_N)} sources for {num_rows} rows; expected one each")
    code_of = {name: code for code, name in enumerate(sources.names)}
    for name in rules.named():
        if name not in code_of:
            near = difflib.get_close_matches(name, list(code_of), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; the pool has {sorted(code_of)[:20]}"
            raise ConfigError(f"source {name!r} of the source rules is not in the pool{hint}")
    return code_of, sources.codes_N
