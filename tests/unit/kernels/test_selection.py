"""Selection against sorting and walking through plain lists."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from rose_ray.errors import ConfigError, DataError, NonFiniteError, ShapeError
from rose_ray.kernels import ranking, selection
from rose_ray.kernels.budget import Budget, SourceRules, budget_count
from rose_ray.kernels.ranking import rank_order, ranks
from rose_ray.kernels.selection import ScoreColumns, choose_rows, round_robin, top_k

NUM_ROWS = 60
Floats = np.ndarray[Any, np.dtype[np.float64]]
Choose = Callable[..., Any]


def _pool(seed: int, num_subtasks: int = 3) -> tuple[Floats, list[str], list[int], list[str]]:
    """Scores with many ties, ids in no order, token counts and sources."""
    random = np.random.default_rng(seed)
    scores = random.integers(-4, 5, (NUM_ROWS, num_subtasks)) / 4.0
    ids = [f"{number:04x}" for number in random.permutation(5000)[:NUM_ROWS]]
    tokens = random.integers(1, 30, NUM_ROWS).tolist()
    sources = [["code", "chat", "math"][place] for place in random.integers(0, 3, NUM_ROWS)]
    return scores, ids, tokens, sources


def _slow_order(scores: list[float], ids: list[str]) -> list[int]:
    return sorted(range(len(ids)), key=lambda row: (-scores[row], ids[row]))


class SlowQuota:
    """Counts what each source has given; a source that once overshoots is closed."""

    def __init__(self, limit: int, costs: list[int], sources: list[str], rules: SourceRules) -> None:
        self.limit, self.costs, self.sources, self.rules = limit, costs, sources, rules
        self.closed: set[str] = set()
        self.taken: list[int] = []

    def allows(self, row: int) -> bool:
        name = self.sources[row]
        mine = [other for other in self.taken if self.sources[other] == name]
        if (self.rules.include and name not in self.rules.include) or name in self.rules.exclude:
            return False
        if len(mine) + 1 > self.rules.max_rows.get(name, len(self.sources)):
            return False
        spent = sum(self.costs[other] for other in mine) + self.costs[row]
        if name in self.rules.max_share and spent > self.rules.max_share[name] * self.limit:
            self.closed.add(name)
        return name not in self.closed

    def fits(self, row: int) -> bool:
        return sum(self.costs[other] for other in self.taken) + self.costs[row] <= self.limit


def _slow_round_robin(columns: list[list[float]], ids: list[str], quota: SlowQuota) -> list[int]:
    orders = [_slow_order(column, ids) for column in columns]
    turn = 0
    while len(quota.taken) < len(ids):
        row = next((r for r in orders[turn % len(orders)] if r not in quota.taken and quota.allows(r)), None)
        if row is None or not quota.fits(row):
            break
        quota.taken.append(row)
        turn += 1
    return quota.taken


def _slow_equal_parts(columns: list[list[float]], ids: list[str], quota: SlowQuota) -> list[int]:
    """Turns as above, but a subtask whose next row would pass its own part of the budget is out."""
    orders, size = [_slow_order(column, ids) for column in columns], len(columns)
    parts = [quota.limit // size + (1 if t < quota.limit % size else 0) for t in range(size)]
    spent, out = [0] * size, {t for t in range(size) if parts[t] == 0}
    turn = 0
    while len(out) < size:
        t = turn % size
        turn += 1
        if t in out:
            continue
        row = next((r for r in orders[t] if r not in quota.taken and quota.allows(r)), None)
        if row is None:
            break
        if spent[t] + quota.costs[row] > parts[t]:
            out.add(t)
            continue
        quota.taken.append(row)
        spent[t] += quota.costs[row]
        if spent[t] == parts[t]:
            out.add(t)
    return quota.taken


RULES = [
    SourceRules(),
    SourceRules(include=["code", "math"]),
    SourceRules(exclude=["chat"], max_rows={"code": 3}),
    SourceRules(max_share={"chat": 0.25, "math": 0.5}, max_rows={"math": 4}),
    SourceRules(max_rows={"chat": 0}, max_share={"code": 0.0}),
]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize(
    "budget", [Budget(count=1), Budget(count=7), Budget(tokens=30), Budget(tokens=90), Budget(fraction=0.07)]
)
def test_both_ways_of_choosing_equal_a_slow_walk(seed: int, rules: SourceRules, budget: Budget) -> None:
    scores, ids, tokens, sources = _pool(seed)
    limit = budget.tokens or budget_count(budget, NUM_ROWS)
    assert limit is not None
    costs = tokens if budget.tokens else [1] * NUM_ROWS
    ways: list[tuple[list[list[float]], Choose, Floats]] = [
        ([scores[:, 0].tolist()], top_k, scores[:, 0]),
        (scores.T.tolist(), round_robin, scores),
    ]
    for columns, choose, given in ways:
        expected = _slow_round_robin(columns, ids, SlowQuota(limit, costs, sources, rules))
        chosen = choose(given, ids, budget, num_tokens_N=np.array(tokens), sources=sources, rules=rules)
        assert chosen.dtype == np.int64 and chosen.tolist() == expected
    expected = _slow_equal_parts(scores.T.tolist(), ids, SlowQuota(limit, costs, sources, rules))
    if not expected:  # every subtask's part is smaller than its best row
        return
    chosen = round_robin(
        scores, ids, budget, num_tokens_N=np.array(tokens), sources=sources, rules=rules, equal_parts=True
    )
    assert chosen.tolist() == expected


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("budget", [Budget(count=7), Budget(count=16), Budget(tokens=90), Budget(tokens=170)])
def test_shortlists_that_are_too_short_are_made_longer(
    monkeypatch: pytest.MonkeyPatch, seed: int, rules: SourceRules, budget: Budget
) -> None:
    monkeypatch.setattr(selection, "_first_depth", lambda num_rows, num_columns: 1)
    test_both_ways_of_choosing_equal_a_slow_walk(100 + seed, rules, budget)


def test_only_a_part_of_the_rows_is_looked_up() -> None:
    scores, looked_up = np.random.default_rng(0).normal(size=(20_000, 3)).astype(np.float32), []

    def ids(positions: Any) -> Any:
        looked_up.append(len(positions))
        return _words(positions)

    columns = ScoreColumns(len(scores), 3, lambda number: scores[:, number], ids)
    chosen = choose_rows(columns, Budget(count=300))
    assert chosen.tolist() == round_robin(scores, _words(np.arange(len(scores))), Budget(count=300)).tolist()
    assert max(looked_up) < 1000


def _words(numbers: Any) -> Any:
    """Ids of 128 bits that are in no order and share their first half word."""
    return np.stack([np.full(len(numbers), 7), np.asarray(numbers) * 48271 % 2147483647], axis=1).astype(np.uint64)


@pytest.mark.parametrize("block", [1, 7, 1 << 20])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_ids_as_words_order_as_their_digits_do(monkeypatch: pytest.MonkeyPatch, dtype: Any, block: int) -> None:
    monkeypatch.setattr(ranking, "_ROW_BLOCK", block)
    random = np.random.default_rng(1)
    scores = np.append(random.integers(-3, 4, 498) / 2, [-np.inf, np.inf]).astype(dtype)
    scores[::7] *= -0.0
    words = random.integers(0, 3, (500, 2), dtype=np.uint64) << np.uint64(40)
    words[:, 1] += random.permutation(500).astype(np.uint64)
    ids = [f"{high:016x}{low:016x}" for high, low in words.tolist()]
    assert rank_order(scores, words).tolist() == _slow_order(scores.tolist(), ids)
    with pytest.raises(DataError, match=f"row_id '{ids[3]}' occurs 2 times"):
        rank_order(scores, np.concatenate([words[:499], words[3:4]]))
    scores[5] = np.nan
    with pytest.raises(NonFiniteError, match=f"first: {ids[5]};"):
        rank_order(scores, words)


@pytest.mark.parametrize("seed", range(3))
def test_order_and_ranks(seed: int) -> None:
    scores, ids, _, _ = _pool(seed)
    expected = _slow_order(scores[:, 0].tolist(), ids)
    assert rank_order(scores[:, 0], ids).tolist() == expected
    assert [expected.index(row) + 1 for row in range(NUM_ROWS)] == ranks(scores[:, 0], ids).tolist()


def test_all_rows_equal_go_by_row_id() -> None:
    ids = ["b", "a", "é", "Z", "aa"]
    assert [ids[row] for row in rank_order(np.zeros(5), ids)] == sorted(ids)
    assert rank_order(np.array([0.0, -0.0, 0.0]), ["c", "b", "a"]).tolist() == [2, 1, 0]


def test_pool_order_does_not_matter() -> None:
    scores, ids, tokens, sources = _pool(11)
    rules = SourceRules(max_share={"chat": 0.3})
    shuffle = np.random.default_rng(0).permutation(NUM_ROWS)
    for budget in (Budget(count=10), Budget(tokens=120)):
        one = round_robin(scores, ids, budget, num_tokens_N=np.array(tokens), sources=sources, rules=rules)
        two = round_robin(
            scores[shuffle],
            [ids[row] for row in shuffle],
            budget,
            num_tokens_N=np.array(tokens)[shuffle],
            sources=[sources[row] for row in shuffle],
            rules=rules,
        )
        assert [ids[row] for row in one] == [ids[shuffle[row]] for row in two]


def test_arrays_and_lists_are_the_same() -> None:
    scores, ids, _, sources = _pool(5)
    rules = SourceRules(exclude=["math"])
    expected = top_k(scores[:, 0], ids, Budget(count=9), sources=sources, rules=rules)
    for kind in (object, np.str_):
        ours = top_k(
            scores[:, 0].astype(np.float32),
            np.array(ids, dtype=kind),
            Budget(count=9),
            sources=np.array(sources, dtype=kind),
            rules=rules,
        )
        assert np.array_equal(ours, expected)


def test_equal_parts_of_a_token_budget_by_hand() -> None:
    #                  a    b    c    d    e
    scores = np.array([[5.0, 4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0, 5.0]]).T
    tokens = np.array([6, 5, 1, 2, 1])
    ids = ["a", "b", "c", "d", "e"]

    def chosen(limit: int, equal_parts: bool) -> list[int]:
        budget = Budget(tokens=limit)
        return round_robin(scores, ids, budget, num_tokens_N=tokens, equal_parts=equal_parts).tolist()

    assert chosen(12, False) == [0, 4, 1]  # 6 + 1 + 5 tokens: the first column spends 11 of 12
    assert chosen(12, True) == [0, 4, 3, 2]  # 6 for a; e, d and c for the second column, whose b no longer fits


def test_equal_parts_of_a_budget_of_rows_are_turns() -> None:
    for seed in range(5):
        scores, ids, _, _ = _pool(seed)
        for count in (1, 2, 3, 10, 11):
            turns = round_robin(scores, ids, Budget(count=count))
            assert round_robin(scores, ids, Budget(count=count), equal_parts=True).tolist() == turns.tolist()


def test_one_subtask_takes_turns_with_itself() -> None:
    scores, ids, _, _ = _pool(6)
    chosen = round_robin(scores[:, :1], ids, Budget(count=20))
    assert np.array_equal(chosen, top_k(scores[:, 0], ids, Budget(count=20)))


def test_fractions_are_read_as_decimals_and_rounded_down() -> None:
    cases = [
        (0.29, 100, 29),
        (0.05, 43192, 2159),
        (0.05, 19, 1),
        (0.001, 10, 1),
        (1.0, 7, 7),
        (1e-7, 10**7, 1),
    ]
    for fraction, rows, expected in cases:
        assert budget_count(Budget(fraction=fraction), rows) == expected
    assert budget_count(Budget(count=12), 5) == 12
    assert budget_count(Budget(tokens=12), 5) is None


def test_fraction_is_of_the_whole_pool() -> None:
    scores, ids, _, sources = _pool(7)
    chosen = top_k(scores[:, 0], ids, Budget(fraction=0.1), sources=sources, rules=SourceRules(include=["code"]))
    assert len(chosen) == NUM_ROWS // 10 and {sources[row] for row in chosen} == {"code"}


def test_a_token_budget_stops_at_the_first_row_that_does_not_fit() -> None:
    scores = np.array([4.0, 3.0, 2.0, 1.0])
    tokens = np.array([5, 4, 9, 1])
    ids = ["a", "b", "c", "d"]
    assert top_k(scores, ids, Budget(tokens=10), num_tokens_N=tokens).tolist() == [0, 1]
    assert top_k(scores, ids, Budget(tokens=18), num_tokens_N=tokens).tolist() == [0, 1, 2]
    assert top_k(scores, ids, Budget(tokens=19), num_tokens_N=tokens).tolist() == [0, 1, 2, 3]


def _round_robin(scores: Floats, ids: list[str], budget: Budget, **more: Any) -> Any:
    return round_robin(np.stack([scores, -scores], axis=1), ids, budget, **more)


@pytest.mark.parametrize("choose", [top_k, _round_robin])
def test_budgets_beyond_the_pool_are_refused_with_the_numbers(choose: Choose) -> None:
    scores, ids, sources = np.array([1.0, 2.0, 3.0]), ["a", "b", "c"], ["x", "x", "y"]
    tokens = np.array([5, 5, 5])
    with pytest.raises(ConfigError, match=r"asks for 4 rows, but only 3 .* has 3 rows"):
        choose(scores, ids, Budget(count=4))
    with pytest.raises(ConfigError, match=r"asks for 3 rows, but only 2 .* 2 in allowed sources"):
        choose(scores, ids, Budget(count=3), sources=sources, rules=SourceRules(exclude=["y"]))
    with pytest.raises(ConfigError, match=r"asks for 3 rows, but only 2 .* quotas leave 2"):
        choose(scores, ids, Budget(count=3), sources=sources, rules=SourceRules(max_rows={"x": 1}))
    with pytest.raises(ConfigError, match="asks for 16 tokens, but only 15"):
        choose(scores, ids, Budget(tokens=16), num_tokens_N=tokens)
    with pytest.raises(ConfigError, match="4 tokens is smaller than the best row"):
        choose(scores, ids, Budget(tokens=4), num_tokens_N=tokens)
    with pytest.raises(ConfigError, match="but only 0"):
        choose(np.zeros(0), [], Budget(fraction=0.5))
    assert len(choose(scores, ids, Budget(count=3))) == 3


@pytest.mark.parametrize("choose", [top_k, _round_robin])
def test_input_is_checked(choose: Choose) -> None:
    scores, ids, sources = np.array([1.0, 2.0, 3.0]), ["a", "b", "c"], ["chat", "chat", "code"]
    budget = Budget(count=1)
    with pytest.raises(NonFiniteError, match="1 rows have NaN as their score, first: b"):
        choose(np.array([1.0, np.nan, 3.0]), ids, budget)
    with pytest.raises(DataError, match="'a' occurs 2 times"):
        choose(scores, ["a", "b", "a"], budget)
    with pytest.raises(ShapeError, match="2 row ids"):
        choose(scores, ["a", "b"], budget)
    with pytest.raises(ConfigError, match="did you mean 'chat'"):
        choose(scores, ids, budget, sources=sources, rules=SourceRules(exclude=["chatt"]))
    with pytest.raises(ConfigError, match="the pool has"):
        choose(scores, ids, budget, sources=sources, rules=SourceRules(max_share={"qqq": 0.5}))
    with pytest.raises(ConfigError, match="sources are not known"):
        choose(scores, ids, budget, rules=SourceRules(include=["chat"]))
    with pytest.raises(ShapeError, match="2 sources for 3 rows"):
        choose(scores, ids, budget, sources=sources[:2])
    with pytest.raises(ConfigError, match="needs the number of tokens"):
        choose(scores, ids, Budget(tokens=5))
    with pytest.raises(ShapeError, match="num_tokens has shape"):
        choose(scores, ids, Budget(tokens=5), num_tokens_N=np.array([1, 2]))
    with pytest.raises(DataError, match="no integers above 0"):
        choose(scores, ids, Budget(tokens=5), num_tokens_N=np.array([1, 0, 2]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Budget(), "nothing"),
        (lambda: Budget(fraction=0.1, count=3), "expected one of"),
        (lambda: Budget(fraction=0.0), "fraction is 0.0"),
        (lambda: Budget(fraction=1.5), "fraction is 1.5"),
        (lambda: Budget(count=0), "count is 0"),
        (lambda: Budget(tokens=-5), "tokens is -5"),
        (lambda: SourceRules(include=["a"], exclude=["a"]), "both included and excluded"),
        (lambda: SourceRules(max_share={"a": 1.2}), "max_share of source 'a'"),
        (lambda: SourceRules(max_rows={"a": -1}), "max_rows of source 'a'"),
    ],
)
def test_settings_are_checked(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_round_robin_needs_a_column() -> None:
    with pytest.raises(ShapeError, match="T at least 1"):
        round_robin(np.zeros((3, 0)), ["a", "b", "c"], Budget(count=1))
