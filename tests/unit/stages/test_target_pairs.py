"""A target's pairs from preference files and from labelled rows, and files that are held out."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from rose_ray.config.target import TargetConfig
from rose_ray.data.preferences import Shot
from rose_ray.errors import ConfigError, PairError
from rose_ray.filesystem import expand
from rose_ray.stages.held_out import check_held_out
from rose_ray.stages.target_pairs import read_target_pairs, read_target_shots
from tests.tiny import make_pair_rows, write_jsonl

TASKS = Path(__file__).parents[4] / "shared/data/tasks"
"""Lies beside the checkout, if at all."""
needs_tasks = pytest.mark.skipif(not TASKS.exists(), reason=f"the released task files are not at {TASKS}")
MC = {"kind": "multiple_choice"}
EXACT = {"kind": "exact_answer"}


def target(*pairs: dict[str, Any], **settings: Any) -> TargetConfig:
    return TargetConfig.model_validate({"name": "t", "pairs": list(pairs), **settings})


def questions(path: Path, split: str = "dev") -> Path:
    rows = [
        {
            "id": f"{split}{n}",
            "task": "x",
            "split": split,
            "question": f"{n}?",
            "choices": ["a", "b", "c"],
            "answer": "A",
        }
        for n in range(4)
    ]
    return write_jsonl(path, rows)


def test_shots_are_rows_of_a_task_and_pairs_of_a_file(tmp_path: Path) -> None:
    rows, file = questions(tmp_path / "q.jsonl"), write_jsonl(tmp_path / "p.jsonl", make_pair_rows(6))
    both = target({"files": [str(file)], "subtask": "plain"}, {"files": [str(rows)], "task": MC}, shots=2)
    assert Counter(pair.subtask for pair in read_target_pairs(both)) == {"plain": 2, "x": 4}
    with pytest.raises(PairError, match="5 shots asked for, but subtask 'x' has 4"):
        read_target_pairs(both.model_copy(update={"shots": 5}))


def test_pairs_of_a_row_are_one_shot_and_a_pair_of_a_file_is_its_own(tmp_path: Path) -> None:
    rows, file = questions(tmp_path / "q.jsonl"), write_jsonl(tmp_path / "p.jsonl", make_pair_rows(2))
    entries = {"files": [str(file)], "subtask": "plain"}, {"files": [str(rows)], "task": MC}
    pairs, shots = read_target_shots(target(*entries, shots=2))
    assert pairs == read_target_pairs(target(*entries, shots=2))
    plain = [Shot("plain", False, pair.pair_id) for pair in pairs[:2]]
    assert shots == [*plain, *[Shot("x", True, "dev0")] * 2, *[Shot("x", True, "dev1")] * 2]
    assert read_target_shots(TargetConfig(name="t", method="random")) == ([], [])


def test_samples_are_read_from_their_file(tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "g.jsonl", [{"id": "g", "question": "1 + 1?", "answer": "#### 2"}])
    samples = write_jsonl(
        tmp_path / "s.jsonl", [{"id": "g", "samples": ["#### 2"]}, {"id": "g", "samples": ["#### 3"]}]
    )
    entry = {"files": [str(rows)], "task": {**EXACT, "rejected": "samples", "samples": [str(samples)]}}
    assert [(pair.chosen, pair.rejected) for pair in read_target_pairs(target(entry))] == [("#### 2", "#### 3")]
    for bad in ({"id": "g", "samples": []}, {"id": "g", "samples": [1]}, {"samples": ["x"]}):
        write_jsonl(samples, [bad])
        with pytest.raises(PairError, match=r"s\.jsonl row 1: expected id .text. and samples"):
            read_target_pairs(target(entry))


def test_a_file_of_pairs_is_not_held_out(tmp_path: Path) -> None:
    file = questions(tmp_path / "q.jsonl")
    copy = Path(shutil.copy(file, tmp_path / "copy.jsonl"))
    other = questions(tmp_path / "other.jsonl", "test")
    own = target({"files": [str(file)], "task": {**MC, "split": "dev"}})
    check_held_out(own, expand([str(other)]), key="k")
    check_held_out(own, expand([str(file)]), key="k", splits=["test", "val"])
    with pytest.raises(ConfigError, match=r"pairs come from split 'dev' of .*q\.jsonl, and k names it as held out"):
        check_held_out(own, expand([str(file)]), key="k")
    with pytest.raises(ConfigError, match=r"q\.jsonl, which holds the same bytes as .*copy\.jsonl"):
        check_held_out(own, expand([str(other), str(copy)]), key="k", splits=["test", "dev"])


@needs_tasks
@pytest.mark.parametrize(("split", "num_pairs"), [("dev", 705), ("val", 4010)])
def test_released_mmlu_in_both_layouts(split: str, num_pairs: int) -> None:
    found = []
    for file in ("mmlu.jsonl.gz", "raw/mmlu_csv.tar.gz"):
        pairs = read_target_pairs(target({"files": [str(TASKS / file)], "task": {**MC, "split": split}}))
        found.append(sorted((p.subtask, p.prompt[0].content, p.chosen, p.rejected) for p in pairs))
    assert found[0] == found[1]
    assert len(found[0]) == num_pairs and len({subtask for subtask, *_ in found[0]}) == 47


@needs_tasks
@pytest.mark.parametrize(
    ("file", "settings", "num_pairs", "num_subtasks"),
    [
        ("raw/bbh_raw.tar.gz", {"split": "test"}, 6511, 27),
        ("raw/bbh_raw.tar.gz", {"split": "fewshot"}, 81, 27),
        ("bbh.jsonl.gz", {}, 6511, 27),
        ("gsm8k_fewshot.jsonl.gz", {}, 300, 1),
        ("tydiqa_fewshot.jsonl.gz", {}, 150, 3),
        ("tydiqa_dev.jsonl.gz", {}, 3626, 7),
    ],
)
def test_released_exact_answers(file: str, settings: dict[str, Any], num_pairs: int, num_subtasks: int) -> None:
    pairs = read_target_pairs(target({"files": [str(TASKS / file)], "task": {**EXACT, **settings}}))
    assert len(pairs) == num_pairs and len({pair.subtask for pair in pairs}) == num_subtasks


@needs_tasks
def test_released_worked_examples_stand_below_their_instruction() -> None:
    file = str(TASKS / "raw/bbh_raw.tar.gz")
    pairs = read_target_pairs(target({"files": [file], "task": {**EXACT, "split": "fewshot"}}))
    first = {pair.subtask: pair.prompt[0].content.split("\n\n")[0] for pair in pairs}
    assert first["navigate"].startswith("Given a series of navigation instructions, determine whether")
    assert first["snarks"] == "Determine which of two sentences is sarcastic."
    assert len(set(first.values())) == 23  # sizes of one problem share theirs
