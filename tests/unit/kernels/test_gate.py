"""Rows that a gate passes over, against walking through plain lists one row at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rose_ray.errors import ConfigError
from rose_ray.kernels import selection
from rose_ray.kernels.budget import Budget, SourceRules
from rose_ray.kernels.purse import Sources
from rose_ray.kernels.selection import Gate, ScoreColumns, choose_rows

NUM_ROWS = 80


class Labels(Gate):
    """Refuses marked rows, and rows whose label a chosen row has."""

    def __init__(self, labels: list[int], marked: set[int]) -> None:
        self.labels, self.marked = labels, marked
        self.looked: set[int] = set()
        self.taken: set[int] = set()
        self.refused: set[int] = set()

    def restart(self) -> None:
        self.taken, self.refused = set(), set()

    def knows(self, position: int) -> bool:
        return position in self.looked

    def look(self, positions: Any) -> None:
        assert len(set(positions.tolist())) == len(positions) and not self.looked & set(positions.tolist())
        self.looked |= set(positions.tolist())

    def admits(self, position: int) -> bool:
        assert position in self.looked and position not in self.refused | self.taken
        fine = position not in self.marked and self.labels[position] not in {self.labels[row] for row in self.taken}
        if not fine:
            self.refused.add(position)
        return fine

    def take(self, position: int) -> None:
        self.taken.add(position)

    @property
    def num_refused(self) -> int:
        return len(self.refused)


def slow(
    columns: list[list[float]],
    costs: list[int],
    limit: int,
    sources: list[str],
    rules: SourceRules,
    labels: list[int],
    marked: set[int],
    equal_parts: bool,
) -> tuple[list[int], set[int]]:
    """Let columns take turns; every turn walks its whole order from the start."""
    orders = [sorted(range(NUM_ROWS), key=lambda row: (-column[row], row)) for column in columns]
    taken: list[int] = []
    refused: set[int] = set()
    closed: set[str] = set()

    def goes(row: int) -> bool:
        name = sources[row]
        mine = [other for other in taken if sources[other] == name]
        if row in taken or row in refused or name in closed or name in rules.exclude:
            return False
        if len(mine) >= rules.max_rows.get(name, NUM_ROWS):
            return False
        if row in marked or labels[row] in [labels[other] for other in taken]:
            refused.add(row)
            return False
        spent = sum(costs[other] for other in mine) + costs[row]
        if name in rules.max_share and spent > int(rules.max_share[name] * limit):
            closed.add(name)
            return False
        return True

    size, turn = len(columns), 0
    limits = [limit // size + (1 if t < limit % size else 0) for t in range(size)] if equal_parts else [limit]
    spent = [0] * len(limits)
    while spent != limits:
        pot = turn % size if equal_parts else 0
        turn += 1
        if spent[pot] == limits[pot]:
            continue
        row = next((row for row in orders[(turn - 1) % size] if goes(row)), None)
        if row is None:
            break
        if spent[pot] + costs[row] > limits[pot]:
            limits[pot] = spent[pot]  # its part is closed
            continue
        taken.append(row)
        spent[pot] += costs[row]
    return taken, refused


RULES = [
    SourceRules(),
    SourceRules(exclude=["chat"], max_rows={"code": 3}),
    SourceRules(max_share={"chat": 0.25, "math": 0.5}, max_rows={"math": 4}),
]


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("num_columns", [1, 3])
@pytest.mark.parametrize("unit", ["count", "tokens"])
@pytest.mark.parametrize("equal_parts", [False, True])
def test_against_plain_lists(
    monkeypatch: pytest.MonkeyPatch, rules: SourceRules, num_columns: int, unit: str, equal_parts: bool
) -> None:
    monkeypatch.setattr(selection, "_LEAST_LOOK", 2)  # so that small pools are looked at in many steps
    monkeypatch.setattr(selection, "_MARGIN", 1)
    for seed in range(25):
        random = np.random.default_rng(seed)
        scores = random.integers(-6, 7, (NUM_ROWS, num_columns)) / 4.0
        labels = random.integers(0, 40, NUM_ROWS).tolist()
        marked = set(random.permutation(NUM_ROWS)[:15].tolist())
        tokens = random.integers(1, 30, NUM_ROWS)
        sources = [["code", "chat", "math"][place] for place in random.integers(0, 3, NUM_ROWS)]
        costs = tokens.tolist() if unit == "tokens" else [1] * NUM_ROWS
        limit = int(random.integers(1, 12)) if unit == "count" else int(random.integers(30, 200))
        expected, refused = slow(scores.T.tolist(), costs, limit, sources, rules, labels, marked, equal_parts)
        gate = Labels(labels, marked)
        columns = ScoreColumns(NUM_ROWS, num_columns, lambda t: scores[:, t], lambda positions: positions.tolist())  # noqa: B023
        try:
            chosen = choose_rows(
                columns,
                Budget(**{unit: limit}),  # type: ignore[arg-type]
                num_tokens_N=tokens if unit == "tokens" else None,
                sources=Sources.of(sources),
                rules=rules,
                gate=gate,
                equal_parts=equal_parts,
            )
        except ConfigError:
            assert not expected or sum(costs[row] for row in expected) < limit
            continue
        assert chosen.tolist() == expected
        assert gate.refused == refused and gate.taken == set(expected)


def test_only_rows_in_reach_are_looked_at() -> None:
    num_rows, count = 100_000, 1_000
    scores = np.random.default_rng(0).permutation(num_rows).astype(np.float32)
    order = np.argsort(-scores)
    gate = Labels(list(range(num_rows)), set(order[:2_000:10].tolist()))  # every tenth of the best is refused
    columns = ScoreColumns(num_rows, 1, lambda _: scores, lambda positions: positions.tolist())
    chosen = choose_rows(columns, Budget(count=count), gate=gate)
    best = [row for place, row in enumerate(order.tolist()) if place % 10 or place >= 2_000]
    assert chosen.tolist() == best[:count]
    # 1,111 rows are needed; after the first thousand, rows are looked at 256 at a time or as many as are still missing.
    assert len(gate.looked) <= 1_111 + 256


def test_too_few_rows_left_says_how_many_were_passed_over() -> None:
    scores = np.arange(10.0)
    columns = ScoreColumns(10, 1, lambda _: scores, lambda positions: positions.tolist())
    with pytest.raises(ConfigError, match=r"asks for 8 rows, but only 7 .* after 3 rows were passed over"):
        choose_rows(columns, Budget(count=8), gate=Labels(list(range(10)), {1, 2, 3}))
