"""Score tables to a training set: which rows, in which form, and what a person is told."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rose_ray.config.selection import SelectionConfig
from rose_ray.errors import AccountingError, ConfigError
from rose_ray.schemas import SELECTED, scores_schema
from rose_ray.stages.candidates import Candidates, Scores, choose, joint_candidates, target_candidates
from rose_ray.stages.select import chosen_rows, selection_summary, shards_of, training_jsonl, with_records
from tests.tiny import digest

ROWS = [  # row_id, source, tokens, first, second
    ("a", "x", 10, 0.9, 0.0),
    ("b", "x", 20, 0.8, 0.1),
    ("c", "y", 30, 0.1, 0.7),
    ("d", "y", 40, 0.2, 0.6),
    ("e", "z", 50, -0.1, -0.2),
]


def _scores(rows: list[tuple[Any, ...]] = ROWS, factor: float = 1.0) -> pa.Table:
    return pa.Table.from_pylist(
        [
            {
                "row_id": digest(row_id),
                "source": source,
                "num_tokens": tokens,
                "num_labelled_tokens": tokens // 2,
                "gradient_norm": 1.0,
                "momentum_share": 0.5,
                "subtask_first": factor * first,
                "subtask_second": factor * second,
                "score": factor * max(first, second),
                "rank": 0,
                "shard": "s",
            }
            for row_id, source, tokens, first, second in rows
        ],
        schema=scores_schema(["first", "second"]),
    )


def _opened(table: pa.Table, row_group_size: int = 2) -> Scores:
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=row_group_size)
    return Scores(pq.ParquetFile(pa.BufferReader(sink.getvalue())))


def _candidates(num_pool_rows: int = 5) -> Candidates:
    return target_candidates(_opened(_scores()), ["first", "second"], num_pool_rows)


def _chosen(candidates: Candidates | None = None, **settings: Any) -> list[str]:
    return [ROWS[i][0] for i in choose(candidates or _candidates(), SelectionConfig(**settings))]


def _rows(candidates: Candidates, positions: list[int], **records: str) -> pa.Table:
    texts = [records.get(row[0], json.dumps({"id": row[0]})) for row in ROWS]
    shard = pa.table({"row_id": [digest(row[0]) for row in ROWS], "conversation": ["{}"] * len(ROWS), "record": texts})
    chosen = chosen_rows(candidates, np.array(positions))
    parts = [with_records(rows, shard) for _, rows in shards_of(chosen)]
    return pa.concat_tables(parts).sort_by("place")


def _selected(**records: str) -> pa.Table:
    return _rows(_candidates(), [2, 0], **records)


def test_top_k_takes_the_best_scores() -> None:
    assert _chosen(count=3) == ["a", "b", "c"]
    assert _chosen(fraction=0.4) == ["a", "b"]


def test_a_fraction_is_taken_of_the_whole_pool() -> None:
    assert len(_chosen(_candidates(num_pool_rows=10), fraction=0.4)) == 4
    assert len(_chosen(_candidates(num_pool_rows=60))) == 3  # 5 % where nothing is set


def test_a_token_budget_ends_at_the_first_row_that_does_not_fit() -> None:
    assert _chosen(tokens=35) == ["a", "b"]
    assert _chosen(tokens=60) == ["a", "b", "c"]


def test_subtasks_take_turns() -> None:
    assert _chosen(count=4, method="round_robin") == ["a", "c", "b", "d"]


def test_subtasks_spend_equal_parts() -> None:
    assert _chosen(count=3, method="equal_parts") == ["a", "c", "b"]
    assert _chosen(tokens=60, method="equal_parts") == ["a", "c", "b"]  # 10 + 20 tokens, and 30
    assert _chosen(tokens=80, method="round_robin") == ["a", "c", "b"]  # d would make 100
    assert _chosen(tokens=80, method="equal_parts") == ["a", "c", "b"]


def test_pairs_take_turns() -> None:
    table = _scores()
    place = table.schema.get_field_index("score")
    for number, values in enumerate(([0.0, 0.1, 0.2, 0.3, 0.4], [0.9, 0.8, 0.1, 0.2, -0.1], [0.0, 0.0, 0.0, 0.5, 1.0])):
        column = pa.array(values, pa.float32())
        table = table.add_column(place + number, pa.field(f"pair_p{number}", pa.float32(), nullable=False), column)
    candidates = target_candidates(_opened(table), ["first", "second"], 5, ["p0", "p1", "p2"])
    assert _chosen(candidates, count=4, method="round_robin_pairs") == ["e", "a", "d", "c"]
    assert _rows(candidates, [4, 0])["best_for"].to_pylist() == ["first", "first"]
    with pytest.raises(ConfigError, match="needs the scores of single pairs, which this score table lacks"):
        _chosen(count=4, method="round_robin_pairs")


def test_sources_in_out_and_quotas() -> None:
    assert _chosen(count=2, include_sources=["y"]) == ["c", "d"]
    assert _chosen(count=2, exclude_sources=["x"]) == ["c", "d"]
    assert _chosen(count=4, source_quotas={"x": 0.25}) == ["a", "c", "d", "e"]
    with pytest.raises(ConfigError, match="source 'xx' of the source rules is not in the pool; did you mean 'x'"):
        _chosen(count=1, exclude_sources=["xx"])


def test_more_than_there_is_is_refused() -> None:
    with pytest.raises(ConfigError):
        _chosen(count=6)


def test_a_joint_set_lets_targets_take_turns_and_lists_the_best_score() -> None:
    other = _scores([(i, s, t, second, first) for i, s, t, first, second in ROWS], factor=0.5)
    reversed_scores = other.set_column(
        other.schema.get_field_index("score"),
        other.schema.field("score"),
        pa.array([0.0, 0.1, 0.2, 0.3, 1.0], pa.float32()),
    )
    candidates = joint_candidates({"hh": _opened(_scores()), "se": _opened(reversed_scores)}, 5)
    assert list(candidates.choices) == ["hh", "se"]
    assert candidates.score() == pytest.approx([0.9, 0.8, 0.7, 0.6, 1.0])
    assert _chosen(candidates, count=4, method="round_robin") == ["a", "e", "b", "d"]
    mean = joint_candidates({"hh": _opened(_scores()), "se": _opened(reversed_scores)}, 5, "mean")
    assert mean.score() == pytest.approx([0.45, 0.45, 0.45, 0.45, 0.45]) and mean.score().dtype == np.float32
    table = _rows(candidates, [0, 4])
    assert table["best_for"].to_pylist() == ["hh", "se"]


@pytest.mark.parametrize("rows", [_scores(ROWS[:4]), _scores([*ROWS[:3], *reversed(ROWS[3:])])])
def test_a_joint_set_of_tables_with_other_rows_is_refused(rows: pa.Table) -> None:
    with pytest.raises(AccountingError, match="the score table of se holds other rows than that of hh"):
        joint_candidates({"hh": _opened(_scores()), "se": _opened(rows)}, 5)


def test_selected_rows_keep_the_order_of_choice() -> None:
    table = _selected()
    assert table.schema.equals(SELECTED, check_metadata=True)
    rows = table.to_pylist()
    assert [(row["place"], row["row_id"], row["best_for"], row["num_tokens"]) for row in rows] == [
        (1, digest("c"), "second", 30),
        (2, digest("a"), "first", 10),
    ]
    assert rows[1]["score"] == pytest.approx(0.9)


def test_a_shard_without_a_selected_row_stops_the_run() -> None:
    ((_, rows),) = shards_of(chosen_rows(_candidates(), np.array([0, 1])))
    with pytest.raises(AccountingError, match="shard s: 1 of 2 selected rows are not in it"):
        with_records(rows, pa.table({"row_id": [digest("a")], "conversation": ["{}"], "record": ["{}"]}))


def test_rows_come_shard_by_shard() -> None:
    table = _scores()
    place = table.schema.get_field_index("shard")
    table = table.set_column(place, table.schema.field("shard"), pa.array(["s0", "s0", "s1", "s3", "s3"]))
    candidates = target_candidates(_opened(table), ["first", "second"], 5)
    parts = [
        (shard, rows["place"].to_pylist()) for shard, rows in shards_of(chosen_rows(candidates, np.array([4, 0, 3])))
    ]
    assert parts == [("s0", [2]), ("s3", [3, 1])]


def test_records_keep_their_text_and_gain_one_key() -> None:
    text = '{"id": 12345678901234567890, "x": 1.10, "y": "é\\u00e9"}'
    lines = training_jsonl(_selected(c=text)).decode().splitlines()
    assert lines[0].startswith(text[:-1] + f', "rose_ray": {{"row_id": "{digest("c")}", ')
    added = json.loads(lines[0])["rose_ray"]
    assert added == {"row_id": digest("c"), "score": pytest.approx(0.7), "place": 1, "source": "y"}


def test_a_record_over_several_lines_becomes_one() -> None:
    lines = training_jsonl(_selected(c='{\n  "text": "a\\nb  c",\n  "n": [1,\n 2]\n}\n', a="{ }")).decode().splitlines()
    assert len(lines) == 2
    assert json.loads(lines[0])["text"] == "a\nb  c" and json.loads(lines[0])["n"] == [1, 2]
    assert list(json.loads(lines[1])) == ["rose_ray"]


def test_a_key_of_an_earlier_selection_gives_way() -> None:
    once = training_jsonl(_selected(c='{"id": 1.10}')).decode().splitlines()[0]
    again = training_jsonl(_selected(c=once, a='{"rose_ray": [1, {"a": "}"}], "x": 2}')).decode().splitlines()
    assert again[0] == once
    assert again[1].startswith(f'{{ "x": 2, "rose_ray": {{"row_id": "{digest("a")}", ')


@pytest.mark.parametrize(
    ("objectives", "harm"),
    [
        ({"less"}, "to first order they do not lower the loss of the chosen answers. Select less."),
        ({"rose_simpo", "rose"}, "to first order they lower the reward margin or leave it. Select less."),
        ({"less", "rose"}, "they lower the reward margin or leave it, or do not lower the loss of the chosen answers."),
    ],
)
def test_the_warning_speaks_of_what_the_score_is_about(objectives: set[str], harm: str) -> None:
    (warning,) = selection_summary(_candidates(), {}, np.array([0, 4]), objectives=objectives)["warnings"]
    assert harm in warning


def test_the_summary_gives_shares_correlations_and_warnings() -> None:
    candidates = _candidates()
    columns = {"num_tokens": lambda: candidates.scores.numbers("num_tokens"), "constant": lambda: np.ones(5)}
    summary = selection_summary(candidates, columns, np.array([0, 1, 4]))
    assert (summary["num_selected"], summary["num_scored"], summary["num_tokens"]) == (3, 5, 80)
    assert summary["sources"]["x"] == {
        "pool": 2,
        "pool_share": 0.4,
        "selected": 2,
        "selected_share": pytest.approx(2 / 3),
    }
    assert summary["sources"]["y"]["selected"] == 0
    assert summary["score"] == {
        "highest": pytest.approx(0.9),
        "lowest": pytest.approx(-0.1),
        "mean": pytest.approx(1.6 / 3),
    }
    assert summary["spearman_of_score"] == {"num_tokens": pytest.approx(-1.0), "constant": None}
    assert summary["warnings"] == [
        "1 of 3 selected rows have scores that are not positive: to first order they lower the reward margin or leave "
        "it. Select less."
    ]
    assert selection_summary(candidates, {}, np.array([0, 1]))["warnings"] == []
    assert selection_summary(candidates, {}, np.array([0, 4]), objectives=())["warnings"] == []
    json.dumps(summary)
