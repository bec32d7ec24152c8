"""Few-shot examples are measured on by no task and by no held-out pairs, whatever they are packed in."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any

import pytest

from rose_ray.errors import DataError
from rose_ray.evaluate.few_shot import check_file_is_a_test
from tests.tiny import make_pair_rows, write_jsonl
from tests.unit.evaluate.test_inputs import read

CHOICES = "Where is it?,here,there,nowhere,C\n"
WORKED = "canary\n-----\nSay yes or no.\n\nQ: Is it?\nA: So the answer is no.\n\nQ: Was it?\nA: So the answer is yes.\n"


@pytest.mark.parametrize(
    "file",
    [
        "data/gsm8k_fewshot.jsonl.gz",
        "data/gsm8k-few-shot.jsonl",
        "Few_Shot_pairs.json",
        "mmlu/dev/anatomy_dev.csv",
        "mmlu.tar.gz:mmlu/dev/anatomy_dev.csv",
        "fewshot.tar.gz:mmlu/test/anatomy_test.csv",
        "bbh.tar.gz:cot-prompts/navigate.txt",
        "bbh/cot-prompts/navigate.jsonl",
    ],
)
def test_files_that_say_so(file: str) -> None:
    with pytest.raises(DataError, match=r"evaluation quiz: .* holds few-shot examples \("):
        check_file_is_a_test(file, "evaluation quiz")


@pytest.mark.parametrize(
    "file",
    [
        "data/gsm8k_test.jsonl.gz",
        "tydiqa_dev.jsonl.gz",
        "fewshot-project/data/quiz.jsonl",
        "/home/dev/anatomy_test.csv",
        "mmlu.tar.gz:mmlu/test/anatomy_test.csv",
        "s3://few-shot-bucket/bbh.tar.gz:bbh/navigate.json",
    ],
)
def test_files_that_do_not(file: str) -> None:
    check_file_is_a_test(file, "evaluation quiz")


def packed(tmp_path: Path, name: str, text: str) -> str:
    """A file alone in an archive."""
    path = tmp_path / "own" / name
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with tarfile.open(tmp_path / "set.tar.gz", "w:gz") as archive:
        archive.add(path, arcname=name)
    return str(tmp_path / "set.tar.gz")


def measured(tmp_path: Path, file: str, kind: str, split: str | None, *, is_task: bool) -> None:
    """Look at rows as a task, or as held-out pairs that are made from them."""
    target = {"files": [str(write_jsonl(tmp_path / "p.jsonl", make_pair_rows(3)))]}
    if is_task:
        own = {"multiple_choice": "multiple_choice", "exact_answer": "exact_match"}[kind]
        splits: dict[str, Any] = {} if split is None else {"splits": [split]}
        read(tmp_path, [target], tasks=[{"name": "quiz", "kind": own, "files": [file], **splits}])
    else:
        task = {"kind": kind} if split is None else {"kind": kind, "split": split}
        read(tmp_path, [target], held_out=[{"name": "quiz", "pairs": [{"files": [file], "task": task}]}])


@pytest.mark.parametrize("is_task", [True, False], ids=["task", "held out"])
@pytest.mark.parametrize("is_named", [True, False], ids=["named", "unnamed"])
@pytest.mark.parametrize(
    ("name", "text", "kind", "split"),
    [
        ("mmlu/dev/anatomy_dev.csv", CHOICES, "multiple_choice", "dev"),
        ("cot-prompts/navigate.txt", WORKED, "exact_answer", "fewshot"),
        ("elsewhere/navigate.txt", WORKED, "exact_answer", "fewshot"),
    ],
)
def test_released_examples(
    tmp_path: Path, name: str, text: str, kind: str, split: str, is_named: bool, is_task: bool
) -> None:
    file = packed(tmp_path, name, text)
    with pytest.raises(DataError, match=rf"evaluation (task )?quiz: .*{name}.* few-shot example"):
        measured(tmp_path, file, kind, split if is_named else None, is_task=is_task)


@pytest.mark.parametrize("is_task", [True, False], ids=["task", "held out"])
def test_a_file_without_splits(tmp_path: Path, is_task: bool) -> None:
    rows = [{"id": str(n), "question": f"{n} + 0?", "answer": f"It is {n}. #### {n}"} for n in range(3)]
    test = str(write_jsonl(tmp_path / "gsm8k_test.jsonl", rows))
    measured(tmp_path, test, "exact_answer", None, is_task=is_task)
    few = str(write_jsonl(tmp_path / "gsm8k_fewshot.jsonl", rows))
    with pytest.raises(DataError, match=r"gsm8k_fewshot\.jsonl holds few-shot examples"):
        measured(tmp_path, few, "exact_answer", None, is_task=is_task)


@pytest.mark.parametrize(("is_task", "setting"), [(True, r"splits: \[dev\]"), (False, "task.split: dev")])
def test_a_test_set_that_is_called_dev(tmp_path: Path, is_task: bool, setting: str) -> None:
    rows = [{"id": str(n), "split": "dev", "question": f"Who is {n}?", "answer": f"Ann {n}"} for n in range(3)]
    file = str(write_jsonl(tmp_path / "tydiqa_dev.jsonl", rows))
    with pytest.raises(DataError, match=rf"row 1 is of split 'dev', which may be few-shot .*`{setting}`"):
        measured(tmp_path, file, "exact_answer", None, is_task=is_task)
    measured(tmp_path, file, "exact_answer", "dev", is_task=is_task)


def test_preference_pairs(tmp_path: Path) -> None:
    target = {"files": [str(write_jsonl(tmp_path / "p.jsonl", make_pair_rows(3)))]}
    few = str(write_jsonl(tmp_path / "se_fewshot.jsonl", make_pair_rows(3, seed=31)))
    with pytest.raises(DataError, match=r"evaluation h: .*se_fewshot\.jsonl holds few-shot examples"):
        read(tmp_path, [target], held_out=[{"name": "h", "pairs": [{"files": [few]}]}])
