"""Selections without near-duplicates and test text, against walking through all rows in order."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rose_ray.config.job import JobConfig
from rose_ray.config.selection import SelectionConfig
from rose_ray.data.conversation import Conversation, Message, canonical_json
from rose_ray.data.preferences import PreferencePair
from rose_ray.errors import AccountingError, ConfigError, DataError
from rose_ray.schemas import PASSED_OVER, scores_schema
from rose_ray.stages.candidates import Candidates, Scores, choose, target_candidates
from rose_ray.stages.clean import (
    CleanGate,
    ContaminationSources,
    check_test_text,
    clean_gate,
    contamination_sources,
)
from rose_ray.stages.gates import JoinedGate, passed_over
from tests.tiny import digest, make_pair_rows, write_jsonl

LONG = "How many roads must a man walk down before you call him one of us"
ROWS = [  # row_id, source, score, prompt, answer
    ("a", "x", 0.9, "Name a river.", "The Rhine"),
    ("b", "y", 0.8, "name a RIVER", "the rhine!"),  # near-duplicate of a
    ("c", "x", 0.7, LONG, "Many"),  # contaminated
    ("d", "y", 0.6, LONG.upper(), "many"),  # contaminated, and like c
    ("e", "x", 0.5, "Name a hill.", "Drachenfels"),
    ("f", "y", 0.4, "What is two?", "2"),  # contaminated by a short prompt
    ("g", "x", 0.3, "Name a hill!", "drachenfels"),  # near-duplicate of e
    ("h", "y", 0.2, "Name a tree.", "Oak"),
]
SETTINGS = {"near_duplicates": {"method": "exact"}, "decontaminate": {}}
PAIR = PreferencePair("p", "s", (Message("user", f"Say: {LONG}"),), "good", "bad", "", "good", "bad")


def candidates() -> Candidates:
    table = pa.Table.from_pylist(
        [
            {
                **{field.name: 1 for field in scores_schema(["s"])},
                "row_id": digest(row_id),
                "source": source,
                "subtask_s": score,
                "score": score,
                "shard": "s",
            }
            for row_id, source, score, *_ in ROWS
        ],
        schema=scores_schema(["s"]),
    )
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=3)
    return target_candidates(Scores(pq.ParquetFile(pa.BufferReader(sink.getvalue()))), ["s"], len(ROWS))


def read(positions: np.ndarray) -> list[tuple[int, str]]:
    assert (np.diff(positions) > 0).all()
    talks = [(Message("user", row[3]), Message("assistant", row[4])) for row in ROWS]
    return [(place, canonical_json(Conversation(talks[place]))) for place in positions.tolist()]


def selected(tmp_path: Path, **settings: Any) -> tuple[str, CleanGate | None, np.ndarray]:
    file = write_jsonl(tmp_path / "test.jsonl", [{"question": "What is two?", "answer": "2"}])
    if settings.get("decontaminate") is not None:
        settings["decontaminate"] = {"files": [str(file)], **settings["decontaminate"]}
    selection = SelectionConfig.model_validate(settings)
    gate = clean_gate(selection, contamination_sources(selection, [PAIR]), read)
    chosen = choose(candidates(), selection, gate)
    return "".join(ROWS[place][0] for place in chosen.tolist()), gate, chosen


def test_the_budget_is_filled_from_the_next_best(tmp_path: Path) -> None:
    assert selected(tmp_path, count=3)[0] == "abc"
    assert selected(tmp_path, count=3, **SETTINGS)[0] == "aeh"
    assert selected(tmp_path, count=4, near_duplicates={"method": "exact"})[0] == "acef"
    assert selected(tmp_path, count=4, decontaminate={})[0] == "abeg"
    assert selected(tmp_path, count=4, decontaminate={"target_pairs": False})[0] == "abcd"
    assert selected(tmp_path, fraction=0.25, **SETTINGS)[0] == "ae"  # a quarter of the whole pool
    assert selected(tmp_path, count=2, source_quotas={"x": 0.5}, **SETTINGS)[0] == "ah"
    with pytest.raises(ConfigError, match=r"asks for 4 rows, but only 3 .* after 5 rows were passed over"):
        selected(tmp_path, count=4, **SETTINGS)


def test_minhash_passes_over_rows_that_differ_a_little(tmp_path: Path) -> None:
    assert selected(tmp_path, count=3, near_duplicates={"shingle_words": 1, "threshold": 0.9})[0] == "ace"
    assert selected(tmp_path, count=2, near_duplicates={"shingle_words": 1, "threshold": 0.2})[0] == "ac"


def test_every_row_is_accounted_for_and_named(tmp_path: Path) -> None:
    _, gate, chosen = selected(tmp_path, count=3, **SETTINGS)
    assert gate is not None
    table, counts = passed_over(candidates(), JoinedGate([gate]), chosen)
    assert table.schema.equals(PASSED_OVER, check_metadata=True)
    rows = [(row["row_id"][:2], row["source"], row["reason"], row["match"]) for row in table.to_pylist()]
    short = f"{tmp_path / 'test.jsonl'} row 1"
    name = {letter: digest(letter)[:2] for letter in "bcdfg"}
    assert rows == [
        (name["c"], "x", "contaminated", "pair p"),
        (name["g"], "x", "near_duplicate", digest("e")),
        (name["b"], "y", "near_duplicate", digest("a")),
        (name["d"], "y", "contaminated", "pair p"),
        (name["f"], "y", "contaminated", short),
    ]
    assert counts == {
        "scored": 8,
        "selectable": 3,
        "looked_at": 8,
        "near_duplicates": 2,
        "contaminated": 3,
        "sources": {"x": {"near_duplicates": 1, "contaminated": 1}, "y": {"near_duplicates": 1, "contaminated": 2}},
    }
    assert counts["scored"] == counts["selectable"] + counts["near_duplicates"] + counts["contaminated"]
    json.dumps(counts)
    with pytest.raises(AccountingError, match="a row was selected and passed over"):
        passed_over(candidates(), JoinedGate([gate]), np.array([0, 1]))


def test_a_selection_that_cleans_nothing_has_no_gate_and_its_old_key(tmp_path: Path) -> None:
    plain = SelectionConfig(count=3)
    assert clean_gate(plain, contamination_sources(plain, [PAIR]), read) is None
    assert not {"near_duplicates", "decontaminate", "diversity"} & set(plain.identity())
    assert "near_duplicates" in SelectionConfig.model_validate({"near_duplicates": {}}).identity()


def test_test_text_has_an_identity_of_its_content(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "t.jsonl", [{"text": "a"}])
    selection = SelectionConfig.model_validate({"decontaminate": {"files": [str(file)]}})
    found = contamination_sources(selection, [PAIR])
    assert isinstance(found, ContaminationSources) and found.pairs == [PAIR]
    before = found.identity()
    assert contamination_sources(selection, []).identity() != before  # type: ignore[union-attr]
    write_jsonl(file, [{"text": "b"}])
    assert found.identity() != before


def job(tmp_path: Path, **decontaminate: Any) -> JobConfig:
    pairs = write_jsonl(tmp_path / "pairs.jsonl", make_pair_rows(4))
    write_jsonl(tmp_path / "other.jsonl", make_pair_rows(3, seed=9))
    target = {"name": "t", "pairs": [{"files": [str(pairs)]}]}
    return JobConfig.model_validate(
        {
            "workspace": "w",
            "model": {"base": "b"},
            "pool": {"inputs": [{"files": ["p"]}]},
            "targets": [{**target, "selection": {"decontaminate": decontaminate}}],
        }
    )


def test_pairs_are_no_test_text_by_a_file(tmp_path: Path) -> None:
    check_test_text(job(tmp_path))
    check_test_text(job(tmp_path, files=[str(tmp_path / "other.jsonl")]))
    with pytest.raises(
        ConfigError, match=r"pairs come from .*pairs\.jsonl, and targets\.0\.selection\.decontaminate\.files names it"
    ):
        check_test_text(job(tmp_path, files=[str(tmp_path / "*.jsonl")]))
    with pytest.raises(DataError, match="expected a file"):
        check_test_text(job(tmp_path, files=[str(tmp_path / "missing.jsonl")]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"near_duplicates": {"method": "exact", "threshold": 0.5}}, "threshold has no meaning with method: exact"),
        ({"near_duplicates": {"threshold": 1.0}}, "less than 1"),
        ({"decontaminate": {"target_pairs": False}}, "there is no test text to compare with"),
        ({"decontaminate": {"split": "test"}}, "fields and split are about files"),
    ],
)
def test_settings_that_contradict(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SelectionConfig.model_validate(settings)
