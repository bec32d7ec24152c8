"""Nothing that steers a selection measures it, whatever form it is asked in; budgets that a pool cannot give."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from rose_ray.config.evaluation import EvaluationConfig
from rose_ray.config.job import JobConfig
from rose_ray.errors import ConfigError, PairError
from rose_ray.evaluate.benchmarks import Benchmark
from rose_ray.evaluate.inputs import check_budgets, checked_benchmarks
from tests.tiny import make_pair_rows, write_jsonl

ROWS = "Where is it?,here,there,nowhere,C\nWhich is true?,one,two,three,A\n"
OTHER_ROWS = "Where was it?,here,there,nowhere,A\nWhich is true?,four,five,six,A\n"
CHOICE = {"kind": "multiple_choice"}


def parsed(tmp_path: Path, targets: list[dict[str, Any]], **evaluation: Any) -> tuple[JobConfig, EvaluationConfig]:
    """A job whose held-out pairs are nobody else's unless they are given."""
    unseen = write_jsonl(tmp_path / "unseen.jsonl", make_pair_rows(3, seed=31))
    block = {"held_out": [{"name": "unseen", "pairs": [{"files": [str(unseen)]}]}], **evaluation}
    config = JobConfig.model_validate(
        {
            "workspace": str(tmp_path / "w"),
            "pool": {"inputs": [{"files": ["-"]}]},
            "model": {"base": "-"},
            "targets": [{"name": f"t{number}", **target} for number, target in enumerate(targets)],
            "evaluation": block,
        }
    )
    assert isinstance(config.evaluation, EvaluationConfig)
    return config, config.evaluation


def read(tmp_path: Path, pairs: list[dict[str, Any]], **evaluation: Any) -> list[Benchmark]:
    return checked_benchmarks(*parsed(tmp_path, [{"pairs": [entry]} for entry in pairs], **evaluation))


def csv(folder: Path, name: str, text: str) -> str:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    return str(folder / name)


def quiz(file: str, **settings: Any) -> dict[str, Any]:
    return {"tasks": [{"name": "quiz", "kind": "multiple_choice", "files": [file], **settings}]}


@pytest.mark.parametrize("options", ["letters", "texts"])
@pytest.mark.parametrize("instruction", [None, "Questions on {subtask}."])
def test_one_file_on_both_sides(tmp_path: Path, options: str, instruction: str | None) -> None:
    own = csv(tmp_path / "a", "anatomy_test.csv", ROWS)
    target = {"files": [own], "task": {**CHOICE, "instruction": instruction}}
    with pytest.raises(ConfigError, match=r"anatomy_test\.csv, and evaluation\.tasks\.0\.files names it as held out"):
        read(tmp_path, [target], **quiz(own, options=options))
    copy = str(shutil.copy(own, tmp_path / "copy.csv"))
    with pytest.raises(ConfigError, match=r"which holds the same bytes as .*copy\.csv"):
        read(tmp_path, [target], **quiz(copy, options=options))


@pytest.mark.parametrize("options", ["letters", "texts"])
@pytest.mark.parametrize("instruction", [None, "Questions on {subtask}."])
def test_one_question_in_two_files(tmp_path: Path, options: str, instruction: str | None) -> None:
    target = {
        "files": [csv(tmp_path / "a", "anatomy_dev.csv", ROWS)],
        "task": {**CHOICE, "instruction": instruction},
    }
    other = quiz(csv(tmp_path / "b", "anatomy_test.csv", OTHER_ROWS), options=options)
    assert [len(each.questions) for each in read(tmp_path, [target], **other)] == [0, 2]
    # The same row, its options in another order and the text broken elsewhere.
    row = "Where  is it?,there,here,nowhere,C\n"
    mixed = csv(tmp_path / "c", "anatomy_test.csv", OTHER_ROWS + row)
    with pytest.raises(PairError, match=r"evaluation quiz: 1 of 3 items .*: anatomy/test/3 \(target t0\)"):
        read(tmp_path, [target], **quiz(mixed, options=options))
    left = read(tmp_path, [target], **quiz(mixed, options=options, leave_out=["anatomy/test/3"]))
    assert len(left[1].questions) == 2


def test_one_question_with_an_answer_instead_of_options(tmp_path: Path) -> None:
    gold = [
        {"id": "g", "question": "Where is it?", "answer": "nowhere"},
        {"id": "h", "question": "Who?", "answer": "I"},
    ]
    answers = str(write_jsonl(tmp_path / "g.jsonl", gold))
    instructed = {"kind": "exact_answer", "instruction": "Be brief."}
    target = {"files": [answers], "task": instructed}
    exact = {"name": "quiz", "kind": "exact_match", "files": [str(write_jsonl(tmp_path / "e.jsonl", [gold[0]]))]}
    with pytest.raises(PairError, match=r"evaluation quiz: 1 of 1 items .*: g \(target t0\)"):
        read(tmp_path, [target], tasks=[exact])
    with pytest.raises(PairError, match=r"evaluation quiz: 1 of 2 items .*: anatomy/1 \(target t0\)"):
        read(tmp_path, [target], **quiz(csv(tmp_path / "a", "anatomy.csv", ROWS)))


def test_pairs_of_a_target(tmp_path: Path) -> None:
    rows = make_pair_rows(4)
    target = {"files": [str(write_jsonl(tmp_path / "p.jsonl", rows[:2]))]}

    def held_out(*some: dict[str, Any]) -> dict[str, Any]:
        return {"held_out": [{"name": "h", "pairs": [{"files": [str(write_jsonl(tmp_path / "h.jsonl", some))]}]}]}

    read(tmp_path, [target], **held_out(*rows[2:]))
    with pytest.raises(PairError, match=r"evaluation h: 1 of 3 items ask .*pair-1 \(target t0\)"):
        read(tmp_path, [target], **held_out(*rows[1:]))
    with pytest.raises(ConfigError, match=r"evaluation\.held_out\.0\.pairs\.0\.files names it"):
        read(tmp_path, [target], **held_out(*rows[:2]))
    asked = {"question": rows[0]["prompt"], "choices": ["yes", "no"], "answer": "A"}
    for options in ("letters", "texts"):
        file = str(write_jsonl(tmp_path / "q.jsonl", [asked]))
        with pytest.raises(PairError, match="evaluation quiz: 1 of 1 items"):
            read(tmp_path, [target], **quiz(file, options=options))


def test_held_out_pairs_made_from_rows(tmp_path: Path) -> None:
    target = {
        "files": [csv(tmp_path / "a", "anatomy_dev.csv", ROWS)],
        "task": {**CHOICE, "instruction": "Choose."},
    }
    file = csv(tmp_path / "b", "anatomy_test.csv", ROWS.splitlines(keepends=True)[0])
    with pytest.raises(PairError, match=r"evaluation h: 2 of 2 items .*anatomy/test/1/A \(target t0\)"):
        read(tmp_path, [target], held_out=[{"name": "h", "pairs": [{"files": [file], "task": CHOICE}]}])


def test_splits_of_one_file_are_apart(tmp_path: Path) -> None:
    rows = [
        {"id": f"{split}{n}", "split": split, "question": f"{split} {n}?", "choices": ["a", "b"], "answer": "A"}
        for split in ("dev", "val", "test")
        for n in range(2)
    ]
    file = str(write_jsonl(tmp_path / "q.jsonl", rows))
    target = {"files": [file], "task": {**CHOICE, "split": "dev"}}
    assert len(read(tmp_path, [target], **quiz(file, splits=["val", "test"]))[1].questions) == 4
    with pytest.raises(ConfigError, match="pairs come from split 'dev' of"):
        read(tmp_path, [target], **quiz(file, splits=["dev", "test"]))


def test_budgets_above_the_pool(tmp_path: Path) -> None:
    pairs = [{"files": ["-"]}]
    targets = [{"pairs": pairs}, {"pairs": pairs, "selection": {"exclude_sources": ["math"]}}]
    sources = {"math": 6, "chat": 4}

    def check(**evaluation: Any) -> None:
        check_budgets(*parsed(tmp_path, targets, **evaluation), sources)

    check(budgets=[0.4, 1.0], counts=[4])
    with pytest.raises(ConfigError, match=r"evaluation\.counts: 11, 12 are above the 10 unique rows"):
        check(counts=[3, 11, 12])
    with pytest.raises(ConfigError, match=r"evaluation budget \(t1\)\.count: 5 rows asked for, but at most 4"):
        check(budgets=[0.5])
    check(budgets=[0.5], arms=["t0"])
