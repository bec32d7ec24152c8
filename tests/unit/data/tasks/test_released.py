"""Files of the released tasks, read as they are."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from rose_ray.data.tasks.rows import TaskRow, TaskSpec, read_task_rows
from rose_ray.filesystem import locate

TASKS = Path(__file__).parents[5] / "shared/data/tasks"
"""Lies beside the checkout, if at all."""
pytestmark = pytest.mark.skipif(not TASKS.exists(), reason=f"the released task files are not at {TASKS}")


def rows(file: str, kind: str, *splits: str) -> list[TaskRow]:
    return read_task_rows([locate(str(TASKS / file))], TaskSpec(kind=kind, splits=splits or None))


def test_mmlu_as_tables_in_an_archive() -> None:
    found = rows("raw/mmlu_csv.tar.gz", "multiple_choice", "dev", "val", "test")
    assert Counter(row.split for row in found) == {"dev": 47 * 5, "val": 1337, "test": 12227}
    assert len({row.subtask for row in found}) == 47 and {len(row.options) for row in found} == {4}
    assert len({(row.subtask, row.split) for row in found}) == 3 * 47


def test_big_bench_hard_as_json_in_an_archive() -> None:
    found = rows("raw/bbh_raw.tar.gz", "exact_answer", "test")
    counts = Counter(row.subtask for row in found)
    assert len(counts) == 27 and len(found) == 6511
    others = {name: count for name, count in counts.items() if count != 250}
    assert others == {"causal_judgement": 187, "penguins_in_a_table": 146, "snarks": 178}


def test_tydiqa_in_every_language() -> None:
    found = rows("tydiqa_dev.jsonl.gz", "exact_answer")
    assert Counter(row.subtask for row in found) == {
        "arabic": 921,
        "bengali": 113,
        "english": 440,
        "indonesian": 565,
        "korean": 276,
        "russian": 812,
        "swahili": 499,
    }
    assert all(row.answers and row.question for row in found)
