"""Random rows, long rows, and rows by numbers that the user brings."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from random import Random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rose_ray.errors import ConfigError, DataError
from rose_ray.methods.seeded import row_uniforms, row_words
from tests.methods import make_method, make_rows, score_parts, split
from tests.tiny import sentence

SOURCES = [*"aaaaaaaaaaaaaaaaaaaa", *"bbbbb", *"cc"]


def some_rows(num_rows: int = len(SOURCES)):
    random = Random(2)
    return make_rows([(f"{sentence(random, 2)} {n}", sentence(random, 1 + n % 7)) for n in range(num_rows)], SOURCES)


def test_uniform_numbers_belong_to_row_and_seed() -> None:
    rows = some_rows()
    found = row_uniforms(rows.row_ids, 0)
    assert ((found > 0) & (found < 1)).all() and len(set(found.tolist())) == len(found)
    assert (row_uniforms(rows.row_ids[::-1], 0)[::-1] == found).all()
    assert (row_uniforms(rows.row_ids, 1) != found).all()
    # Of 20,000 uniform numbers a tenth hold 2,000, with a standard deviation of 42.4: four of them either way.
    counts, _ = np.histogram(row_uniforms([f"{n:032x}" for n in range(20_000)], 3), 10, (0, 1))
    assert counts == pytest.approx([2000] * 10, abs=170)
    assert row_words([], 0).tolist() == []


def test_random_rows_do_not_depend_on_shards() -> None:
    rows = some_rows()
    found = score_parts(make_method("random", seed=4), [rows], [])
    assert (score_parts(make_method("random", seed=4), split(rows, 4), []) == found).all()
    assert found[:, 0].tolist() == row_uniforms(rows.row_ids, 4).tolist()


@pytest.mark.parametrize("size", [1, 4, 27])
def test_balanced_rows_take_turns_by_source(size: int) -> None:
    rows = some_rows()
    scores = score_parts(make_method("random", balance="source", seed=1), split(rows, size), [])[:, 0]
    order = np.argsort(-scores)
    chosen = [SOURCES[place] for place in order]
    assert Counter(chosen[:6]) == {"a": 2, "b": 2, "c": 2}
    assert Counter(chosen[:12]) == {"a": 5, "b": 5, "c": 2} and set(chosen[12:]) == {"a"}
    # The slow form: a row's place in its source, by its random word.
    words = row_words(rows.row_ids, 1)
    for place, source in enumerate(SOURCES):
        before = sum(SOURCES[other] == source and words[other] < words[place] for other in range(len(SOURCES)))
        assert -(before + 1) < scores[place] < -before


@pytest.mark.parametrize(("unit", "expected"), [("answer_tokens", [2, 1]), ("tokens", [3, 4]), ("characters", [9, 8])])
def test_length(unit: str, expected: list[int]) -> None:
    rows = make_rows([("one", "two th"), ("a b cc", "dé")])
    assert score_parts(make_method("length", unit=unit), [rows], [])[:, 0].tolist() == expected


def test_deita_multiplies_turn_by_turn() -> None:
    records = [
        {"scores": {"c": 2, "q": 3.5}},
        {"scores": {"c": [1, 2], "q": [3, 4]}},
        {"scores": {"c": [1, 2], "q": [3]}},
        {"scores": {"c": "2", "q": 3}},
        {"scores": {"c": True, "q": 3}},
        {"scores": 1},
    ]
    rows = make_rows([(f"q {n}", "a") for n in range(len(records))], records=records)
    scored = make_method("deita", complexity_field="scores.c", quality_field="scores.q").score(rows, {}, None)
    assert scored.values[:2, 0].tolist() == [7.0, 11.0]
    assert scored.rejected == {
        2: ("no_scorer_value", "2 turns at scores.c, 1 at scores.q"),
        3: ("no_scorer_value", "the record has no finite number, or list of them, at scores.c"),
        4: ("no_scorer_value", "the record has no finite number, or list of them, at scores.c"),
        5: ("no_scorer_value", "the record has no finite number, or list of them, at scores.c and scores.q"),
    }


def test_deita_from_files(tmp_path: Path) -> None:
    rows = some_rows()
    known = rows.row_ids[:-1]
    table = pa.table(
        {"row_id": known, "complexity": [float(n) for n in range(len(known))], "quality": [2] * len(known)}
    )
    for number, part in enumerate((table.slice(0, 9), table.slice(9))):
        pq.write_table(part, tmp_path / f"{number}.parquet")
    method = make_method("deita", scores_files=[f"{tmp_path}/*.parquet"])
    before = method.content()
    from rose_ray.methods.interface import Target

    state = method.prepare(Target("t", ()), {}, None)
    scored = method.score(rows, state, None)
    assert scored.values[:-1, 0].tolist() == [2.0 * n for n in range(len(known))]
    assert scored.rejected == {len(known): ("no_scorer_value", "its row_id is in none of scores_files")}
    pq.write_table(table, tmp_path / "0.parquet")  # row ids that 1.parquet has as well
    again = make_method("deita", scores_files=[f"{tmp_path}/*.parquet"])
    assert again.content() != before
    with pytest.raises(DataError, match=r"0\.parquet, .*1\.parquet: 17 rows stand twice, first: [0-9a-f]{32}\. Keep"):
        again.prepare(Target("t", ()), {}, None)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"row_id": ["0" * 32]}, "expected Parquet with row_id, complexity and quality"),
        ({"row_id": ["x"], "complexity": [1], "quality": [1]}, "row id 'x': expected 32 hex digits"),
        ({"row_id": ["0" * 32], "complexity": [1.0], "quality": [float("nan")]}, "row 1: expected finite numbers"),
    ],
)
def test_deita_refuses_files_that_are_something_else(tmp_path: Path, columns: dict, message: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / "scores.parquet")
    from rose_ray.methods.interface import Target

    with pytest.raises(DataError, match=message):
        make_method("deita", scores_files=[f"{tmp_path}/scores.parquet"]).prepare(Target("t", ()), {}, None)


def test_deita_is_not_imitated() -> None:
    for options in ({}, {"complexity_field": "c"}):
        with pytest.raises((ConfigError, ValueError), match="none are named: set complexity_field and quality_field"):
            make_method("deita", **options)
