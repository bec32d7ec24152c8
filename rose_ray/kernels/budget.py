"""How much to select, and of which sources."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal

from rose_ray.errors import ConfigError


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
        return max(1, part_of(budget.fraction, num_pool_rows))
    return budget.count


def part_of(fraction: float, whole: int) -> int:
    """Fraction of a whole, rounded down. Decimal, since in binary 0.29 * 100 is below 29."""
    return int(Decimal(str(fraction)) * whole)
