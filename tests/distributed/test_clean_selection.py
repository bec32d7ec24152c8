"""The selecting task with near-duplicates and test text in the pool. Called plainly, without Ray."""

from __future__ import annotations

import json
import time
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from rose_ray.config.selection import SelectionConfig
from rose_ray.data.words import words
from rose_ray.distributed.tasks import SCORES_FILE, select_target
from rose_ray.errors import ConfigError
from rose_ray.filesystem import locate
from rose_ray.schemas import PASSED_OVER, scores_schema
from rose_ray.stages.clean import contamination_sources
from rose_ray.stages.ingest import IngestSettings, PoolFile, ingest_file
from rose_ray.stages.pool import read_pool_entry, settle_pool
from rose_ray.stages.report import selection_lines
from rose_ray.stores.manifest import Manifest, commit_artefact
from rose_ray.stores.workspace import Workspace
from tests.tiny import sentence, write_jsonl

NUM_ROWS = 90
SUBTASKS = ["first", "second"]


def rows(random: Random) -> list[dict[str, Any]]:
    """A third of new rows, a third that only look different from one of these, a third with test text in them."""
    made: list[dict[str, Any]] = []
    for number in range(NUM_ROWS):
        kind = number % 3
        if kind == 0 or len(made) < 3:
            talk = (sentence(random, 8), sentence(random, 6))
        elif kind == 1:
            earlier = made[random.randrange(0, len(made))]
            talk = (earlier["prompt"].upper() + " !", f"{earlier['completion']}.")
        else:
            start = random.randrange(20)
            talk = (f"Say {' '.join(f'secret{n}' for n in range(start, start + 6))} please", sentence(random, 3))
        made.append({"prompt": talk[0], "completion": talk[1], "source": "xyz"[random.randrange(3)], "n": number})
    return made


@pytest.fixture
def pool(tmp_path: Path) -> tuple[Workspace, Manifest]:
    random = Random(5)
    workspace = Workspace.open(str(tmp_path / "workspace"), create=True)
    all_rows = rows(random)
    files = [
        write_jsonl(tmp_path / f"{name}.jsonl", part) for name, part in (("a", all_rows[:50]), ("b", all_rows[40:]))
    ]
    ingested = [ingest_file(workspace, PoolFile(locate(str(file))), IngestSettings(shard_rows=16)) for file in files]
    return workspace, settle_pool(workspace, ingested)


def scores(workspace: Workspace, pool: Manifest) -> Manifest:
    """A score table of random scores over the whole pool."""
    random = np.random.default_rng(1)
    tables = []
    for entry in pool.facts["shards"]:
        part = read_pool_entry(workspace, pool, entry, columns=["row_id", "source"])
        subtask_scores = random.normal(size=(part.num_rows, 2)).astype(np.float32)
        columns: dict[str, Any] = {
            "row_id": part["row_id"],
            "source": part["source"],
            "num_tokens": pa.array(random.integers(1, 50, part.num_rows), pa.int32()),
            "subtask_first": pa.array(subtask_scores[:, 0]),
            "subtask_second": pa.array(subtask_scores[:, 1]),
            "score": pa.array(subtask_scores.max(axis=1)),
            "shard": pa.array([entry["shard"]] * part.num_rows),
        }
        schema = scores_schema(SUBTASKS)
        for field in schema:
            columns.setdefault(field.name, pa.array(np.ones(part.num_rows)).cast(field.type))
        tables.append(pa.table(columns).select(schema.names).cast(schema))
    record = workspace.write_table(f"scores/t/k/{SCORES_FILE}", pa.concat_tables(tables))
    facts = {"target": "t", "subtasks": SUBTASKS, "objective": "rose"}
    return commit_artefact(
        workspace,
        "score",
        {},
        [record],
        {"scored": record.num_rows},
        facts,
        started=time.monotonic(),
        folder="scores/t/k",
    )


def slow(
    workspace: Workspace, pool: Manifest, table: pa.Table, count: int, sources: list[str]
) -> tuple[list[str], set[str]]:
    """Walk through all rows in order of score, with the texts of the whole pool at hand."""
    text_of: dict[str, tuple[str, str]] = {}
    for entry in pool.facts["shards"]:
        for row in read_pool_entry(workspace, pool, entry).to_pylist():
            record = json.loads(row["record"])
            text_of[row["row_id"]] = (record["prompt"], record["completion"])
    kept: list[str] = []
    refused: set[str] = set()
    for row in sorted(table.to_pylist(), key=lambda row: (-row["score"], row["row_id"])):
        if len(kept) == count:
            break
        if row["source"] not in sources:
            continue
        prompt, answer = text_of[row["row_id"]]
        tokens = words(f"{prompt} {answer}")
        contaminated = any(
            words(prompt)[i : i + 5] == [f"secret{n}" for n in range(j, j + 5)]
            for i in range(len(words(prompt)))
            for j in range(26)
        )
        if contaminated or any(tokens == words(" ".join(text_of[other])) for other in kept):
            refused.add(row["row_id"])
        else:
            kept.append(row["row_id"])
    return kept, refused


@pytest.mark.parametrize(("count", "sources"), [(5, ["x", "y", "z"]), (20, ["x", "y", "z"]), (12, ["x", "z"])])
def test_against_the_whole_pool_in_memory(
    tmp_path: Path, pool: tuple[Workspace, Manifest], count: int, sources: list[str]
) -> None:
    workspace, settled = pool
    scored = scores(workspace, settled)
    test = tmp_path / "test.txt"
    test.write_text(" ".join(f"secret{n}" for n in range(30)) + "\n")
    selection = SelectionConfig.model_validate(
        {
            "count": count,
            "include_sources": sources,
            "near_duplicates": {"method": "exact"},
            "decontaminate": {"files": [str(test)], "words": 5},
        }
    )
    found = contamination_sources(selection, [])
    made = select_target(workspace, settled, [scored], "t", selection, {}, "selections/t/k", found)
    table = workspace.read_table(f"scores/t/k/{SCORES_FILE}")
    kept, refused = slow(workspace, settled, table, count, sources)
    with workspace.root.filesystem.open_input_file(workspace.location("selections/t/k/selected.jsonl").path) as file:
        lines = file.read().decode().splitlines()
    assert [json.loads(line)["rose_ray"]["row_id"] for line in lines] == kept
    over = workspace.read_table("selections/t/k/passed_over.parquet", made.files[2])
    assert over.schema.equals(PASSED_OVER, check_metadata=True)
    assert set(over["row_id"].to_pylist()) == refused and over.num_rows == len(refused)
    assert made.counts["scored"] == sum(made.counts[n] for n in ("selectable", "near_duplicates", "contaminated"))
    assert made.counts["scored"] - made.counts["selectable"] == len(refused)
    summary = workspace.read_json("selections/t/k/summary.json")
    by_source = summary["cleaning"]["sources"]
    assert sum(own["near_duplicates"] for own in by_source.values()) == made.counts["near_duplicates"]
    assert {row["match"] for row in over.to_pylist() if row["reason"] == "contaminated"} <= {f"{test} row 1"}
    text = "\n".join(selection_lines("t", made))
    assert f"passed over: {made.counts['near_duplicates']} near-duplicates, " in text and "passed_over.parquet" in text


def test_a_budget_that_clean_rows_cannot_fill(tmp_path: Path, pool: tuple[Workspace, Manifest]) -> None:
    workspace, settled = pool
    selection = SelectionConfig.model_validate({"count": 80, "near_duplicates": {"method": "exact"}})
    with pytest.raises(ConfigError, match=r"asks for 80 rows, but only \d+ can .* after \d+ rows were passed over"):
        select_target(workspace, settled, [scores(workspace, settled)], "t", selection, {}, "selections/t/k")
