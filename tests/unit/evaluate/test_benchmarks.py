"""Questions and held-out pairs: what is read, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rose_ray.config.evaluation import HeldOutConfig, TaskConfig
from rose_ray.config.target import PairInput
from rose_ray.data.preferences import PreferencePair, read_pairs
from rose_ray.errors import DataError, PairError
from rose_ray.evaluate.benchmarks import Benchmark, answers_benchmark, held_out_benchmark, read_task
from rose_ray.filesystem import locate
from tests.tiny import make_pair_rows, write_jsonl

CHOICE = {"id": "q", "task": "algebra", "question": "1+1?", "choices": ["3", "2", "4"], "answer": "B"}


def task(tmp_path: Path, rows: list[dict[str, Any]], kind: str = "multiple_choice", **settings: Any) -> Benchmark:
    write_jsonl(tmp_path / "t.jsonl", rows)
    config = TaskConfig(name="t", files=[str(tmp_path / "t.jsonl")], kind=kind, **settings)  # type: ignore[arg-type]
    return read_task(config, 8)


def test_choices(tmp_path: Path) -> None:
    (letters,) = task(tmp_path, [CHOICE]).questions
    assert (
        letters.text == "1+1?\nA. 3\nB. 2\nC. 4\nAnswer:" and letters.options == ("A", "B", "C") and letters.gold == 1
    )
    rows = [{**CHOICE, "id": number, "answer": answer} for number, answer in enumerate(["B", 1, "2"])]
    for question in task(tmp_path, rows, options="texts").questions:
        assert (question.text, question.options, question.gold) == ("1+1?", ("3", "2", "4"), 1)
        assert question.subtask == "algebra"


def test_choices_that_are_letters_or_stand_twice(tmp_path: Path) -> None:
    letters = {**CHOICE, "choices": ["L", "R", "1/C", "C"], "answer": "C"}
    (question,) = task(tmp_path, [letters]).questions
    assert question.gold == 2  # the third, not the one whose text is C
    twice = {**CHOICE, "choices": ["2", "3", "2", "4"], "answer": "C"}
    assert task(tmp_path, [twice]).questions[0].gold == 2
    (question,) = task(tmp_path, [twice], options="texts").questions
    assert question.options == ("2", "3", "4") and question.gold == 0
    with pytest.raises(DataError, match="all choices are equal"):
        task(tmp_path, [{**twice, "choices": ["2", "2", "2"]}], options="texts")


def test_exact_answers(tmp_path: Path) -> None:
    rows = [
        {"id": "a", "input": "not True is", "target": "False"},
        {"id": "b", "question": "Who?", "context": "Ann ran.", "answers": ["Ann", "she"]},
        {"id": "c", "question": "Who?", "answers": {"text": ["Bo"], "answer_start": [0]}},
    ]
    found = {q.item_id: q for q in task(tmp_path, rows, "exact_match").questions}
    assert found["a"].answers == ("False",) and found["c"].answers == ("Bo",)
    assert dict(task(tmp_path, rows, "exact_match").settings)["extract"] == "final"
    assert found["b"].text == "Ann ran.\n\nQuestion: Who?" and found["b"].answers == ("Ann", "she")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": "D"}, r"t.jsonl row 1: no_such_option: the answer key 'D' matches no option"),
        ({"answer": True}, "the answer key True matches no option"),
        ({"answer": 3}, "the answer key 3 matches no option"),
        ({"choices": ["2"]}, "expected two options or more, found 1"),
        ({"choices": ["2", " "]}, "option B of 2 holds no text"),
        ({"choices": "AB"}, "expected choices as a list of texts"),
        ({"question": None}, "has question, choices"),
    ],
)
def test_rows_of_another_kind(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        task(tmp_path, [{**CHOICE, **change}])


def test_a_file_of_the_wrong_kind_says_so_once(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"30 rows do not fit task kind exact_answer(.|\n)*and 10 more"):
        task(tmp_path, [{"id": number, "messages": []} for number in range(30)], "exact_match")
    (tmp_path / "t.jsonl").write_text("{broken\n")
    with pytest.raises(DataError, match="row 1: not_json"):
        read_task(TaskConfig(name="t", files=[str(tmp_path / "t.jsonl")], kind="exact_match"), 8)


def test_a_few_shot_split_is_not_measured_on(tmp_path: Path) -> None:
    rows = [{**CHOICE, "id": split, "split": split} for split in ("dev", "test")]
    with pytest.raises(PairError, match=r"2 splits, first of each: dev \(.*row 1\), test \(.*row 2\)"):
        task(tmp_path, rows)
    assert [q.item_id for q in task(tmp_path, rows, splits=["test"]).questions] == ["test"]
    both = task(tmp_path, rows, splits=["dev", "test"])
    assert len(both.questions) == 2
    with pytest.raises(PairError, match=r"no row of split 'val'; found dev "):
        task(tmp_path, rows, splits=["val"])


@pytest.mark.parametrize("split", ["dev", "train", "auxiliary_train"])
def test_the_only_split_may_be_a_few_shot_one(tmp_path: Path, split: str) -> None:
    rows = [{**CHOICE, "split": split}]
    with pytest.raises(
        DataError, match=rf"row 1 is of split '{split}', which may be few-shot(.|\n)*splits: \[{split}\]"
    ):
        task(tmp_path, rows)
    assert len(task(tmp_path, rows, splits=[split]).questions) == 1


def test_rows_can_be_left_out(tmp_path: Path) -> None:
    rows = [{**CHOICE, "id": str(number)} for number in range(5)]
    whole = task(tmp_path, rows)
    few = task(tmp_path, rows, leave_out=["3", "0"])
    assert few.questions == tuple(q for q in whole.questions if q.item_id not in ("0", "3"))
    with pytest.raises(DataError, match="task t: leave_out: no row has the id 9"):
        task(tmp_path, rows, leave_out=["9", "1"])
    with pytest.raises(DataError, match="leaves none of 5 rows"):
        task(tmp_path, rows, leave_out=[row["id"] for row in rows])


def test_a_context_that_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected context as text, found"):
        task(tmp_path, [{"id": "a", "question": "Who?", "context": 3, "answer": "Ann"}], "exact_match")


def test_released_layouts(tmp_path: Path) -> None:
    (tmp_path / "anatomy_test.csv").write_text("Where is it?,here,there,nowhere,anywhere,C\n")
    (tmp_path / "anatomy_dev.csv").write_text("Where was it?,here,there,nowhere,anywhere,A\n")
    config = TaskConfig(name="mmlu", files=[str(tmp_path / "*.csv")], kind="multiple_choice", splits=["test"])
    (question,) = read_task(config, 8).questions
    assert (question.subtask, question.gold, question.options) == ("anatomy", 2, ("A", "B", "C", "D"))
    (tmp_path / "navigate.json").write_text('{"examples": [{"input": "Back at the start?", "target": "No"}]}')
    config = TaskConfig(name="bbh", files=[str(tmp_path / "navigate.json")], kind="exact_match")
    (question,) = read_task(config, 8).questions
    assert (question.subtask, question.answers) == ("navigate", ("No",))


def test_items_are_chosen_by_their_ids(tmp_path: Path) -> None:
    rows = [{**CHOICE, "id": str(number)} for number in range(9)]
    few = task(tmp_path, rows, max_items=4)
    assert few.questions == task(tmp_path, rows[::-1], max_items=4).questions
    assert few.questions == task(tmp_path, rows).questions[:4]
    with pytest.raises(DataError, match="ids stand twice: q"):
        task(tmp_path, [CHOICE, CHOICE])


def pairs(tmp_path: Path, rows: list[dict[str, Any]]) -> list[PreferencePair]:
    return read_pairs([locate(str(write_jsonl(tmp_path / "p.jsonl", rows)))], target="a")


def held_out(tmp_path: Path, rows: list[dict[str, Any]], **settings: Any) -> Benchmark:
    config = HeldOutConfig(name="h", pairs=[PairInput(files=["-"])], **settings)
    return held_out_benchmark(config, pairs(tmp_path, rows))


def test_held_out_pairs_and_their_prompts(tmp_path: Path) -> None:
    rows = make_pair_rows(6)
    rows.append({**rows[0], "id": "again", "rejected": "Another one."})
    benchmark = held_out(tmp_path, rows)
    assert held_out(tmp_path, rows[::-1]).digest == benchmark.digest != held_out(tmp_path, rows, max_pairs=3).digest
    asked = answers_benchmark(benchmark, 100, 5)
    assert len(asked.pairs) == 6 and len(answers_benchmark(benchmark, 2, 5).pairs) == 2
    assert asked.digest != answers_benchmark(benchmark, 100, 6).digest
