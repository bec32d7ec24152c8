"""Labelled rows of tasks made into pairs."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from rose_ray.data.preferences import PreferencePair, take_shots
from rose_ray.data.tasks.answers import final_answer, is_same_answer
from rose_ray.data.tasks.pairs import TaskPair, read_task_pairs, sentences
from rose_ray.data.tasks.rows import TaskSpec
from rose_ray.errors import DataError, PairError
from rose_ray.filesystem import expand
from tests.tiny import write_jsonl

CHOICE = TaskSpec("multiple_choice", "letter", "options")
EXACT = TaskSpec("exact_answer", "full", "other_rows", 1)
QUESTION = {"id": "q", "task": "maths", "question": "1 + 1?", "choices": ["1", "2", " 2 ", "3"], "answer": "B"}


def read(path: Path, task: TaskSpec, **settings: Any) -> list[TaskPair]:
    return read_task_pairs(expand([str(path)]), task, target="t", **settings)


def sides(pairs: list[TaskPair]) -> list[tuple[str, str, str]]:
    return [(made.pair.pair_id, made.pair.chosen, made.pair.rejected) for made in pairs]


def spec(base: TaskSpec, **changes: Any) -> TaskSpec:
    return TaskSpec(**{**vars(base), **changes})


def write_csv(path: Path, rows: list[list[str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return path


def test_gold_against_each_other_option(tmp_path: Path) -> None:
    pairs = read(write_jsonl(tmp_path / "m.jsonl", [QUESTION]), CHOICE)
    assert pairs[0].pair.prompt[0].content == "1 + 1?\nA. 1\nB. 2\nC. 2\nD. 3\nAnswer:"
    assert sides(pairs) == [("q/A", "B", "A"), ("q/D", "B", "D")]  # option C says what B says
    assert {made.shot for made in pairs} == {"q"} and {made.pair.subtask for made in pairs} == {"maths"}
    assert pairs[0].pair.raw_prompt == f"\n\nHuman: {pairs[0].pair.prompt[0].content}\n\nAssistant:"


def test_forms_of_an_option(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "m.jsonl", [{**QUESTION, "answer": 3}])
    assert sides(read(file, spec(CHOICE, answer="text")))[0] == ("q/A", "3", "1")
    both = read(file, spec(CHOICE, answer="letter_and_text", rejected_per_row=1, instruction="About {subtask}:"))
    assert sides(both) == [("q/A", "D. 3", "A. 1")]
    assert both[0].pair.prompt[0].content.startswith("About maths:\n\n1 + 1?\n")


def test_released_csv_and_an_archive_of_it_give_the_same_pairs(tmp_path: Path) -> None:
    rows = [["Q, with comma?", "w", "x", "y", "z", "C"], ['She said "no"', "a", "b", "c", "d", "A"]]
    file = write_csv(tmp_path / "mmlu/dev/high_school_maths_dev.csv", rows)
    write_csv(tmp_path / "mmlu/test/high_school_maths_test.csv", rows[:1])
    (tmp_path / "mmlu/LICENSE").write_text("MIT")
    with tarfile.open(tmp_path / "mmlu.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "mmlu", "mmlu")
    pairs = read(file, CHOICE)
    assert sides(pairs)[:3] == [(f"high_school_maths/dev/1/{letter}", "C", letter) for letter in "ABD"]
    assert pairs[3].pair.prompt[0].content.startswith('She said "no"\nA. a\n')
    assert read(tmp_path / "mmlu.tar.gz", spec(CHOICE, splits=("dev",))) == pairs
    with pytest.raises(PairError, match=r"rows of 2 splits.*dev \(.*mmlu\.tar\.gz:mmlu/dev/.*csv row 1\).*task\.split"):
        read(tmp_path / "mmlu.tar.gz", CHOICE)
    with pytest.raises(PairError, match=r"no row of split 'val'; found dev \(.*\), test \(.*\)"):
        read(tmp_path / "mmlu.tar.gz", spec(CHOICE, splits=("val",)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": "E"}, "row 2: no_such_option: the answer key 'E' matches no option; expected a letter from A to D"),
        ({"answer": 4}, "row 2: no_such_option: the answer key 4 matches no option"),
        ({"answer": True}, "row 2: no_such_option"),
        ({"choices": ["1", " ", "3", ""]}, "row 2: empty_option: option B, D of 4 holds no text"),
        ({"choices": ["2"]}, "row 2: one_option: expected two options or more, found 1"),
        ({"choices": "1234"}, "row 2: wrong_task: expected choices as a list of texts, found a string"),
        ({"question": " "}, "row 2: empty_question"),
        ({"choices": ["2", "2", "2 "]}, "row 2: equal_options: every option equals the labelled one"),
    ],
)
def test_rows_that_are_no_multiple_choice(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    file = write_jsonl(tmp_path / "m.jsonl", [QUESTION, {**QUESTION, "id": "r", **change}])
    with pytest.raises(PairError) as caught:
        read(file, CHOICE)
    assert "m.jsonl" in str(caught.value) and message in str(caught.value)
    assert "row 1" not in str(caught.value)


def test_files_of_the_wrong_kind(tmp_path: Path) -> None:
    questions = write_jsonl(tmp_path / "m.jsonl", [QUESTION])
    answers = write_jsonl(tmp_path / "g.jsonl", [{"question": "q", "answer": "#### 1"}])
    with pytest.raises(PairError, match=r"g\.jsonl row 1: wrong_task: a row of kind multiple_choice has .*choices"):
        read(answers, CHOICE)
    with pytest.raises(PairError, match="wrong_task: the record has choices: it is a row of kind multiple_choice"):
        read(questions, EXACT)
    with pytest.raises(PairError, match="expected the key 'document', found"):
        read(questions, TaskSpec("summarization", "full", "lead"))
    (tmp_path / "x.json").write_text('{"canary": "c", "rows": []}')
    with pytest.raises(DataError, match=r"x\.json: expected an array, or an object with a list of examples"):
        read(tmp_path / "x.json", EXACT)
    (tmp_path / "x.txt").write_text("Some text\n")
    with pytest.raises(PairError, match=r"x\.txt row 1: wrong_task: .* found the keys \['text'\]"):
        read(tmp_path / "x.txt", EXACT)
    (tmp_path / "x.txt").write_text("canary\n-----\nSome text\n")
    with pytest.raises(DataError, match=r"x\.txt: expected 'Q: ...' and 'A: ...' behind the line '-----'"):
        read(tmp_path / "x.txt", EXACT)
    (tmp_path / "x.tar.gz").write_bytes(b"no archive")
    with pytest.raises(DataError, match=r"x\.tar\.gz: not a readable archive"):
        read(tmp_path / "x.tar.gz", EXACT)
    (tmp_path / "x_dev.csv").write_text('q,a,"b\n')
    with pytest.raises(DataError, match=r"x_dev\.csv row 1: not CSV"):
        read(tmp_path / "x_dev.csv", CHOICE)
    write_csv(tmp_path / "y_dev.csv", [["question", "A"]])
    with pytest.raises(PairError, match=r"row 1: too_few_columns: expected question, .* found 2 columns"):
        read(tmp_path / "y_dev.csv", CHOICE)


def test_released_examples_and_worked_examples(tmp_path: Path) -> None:
    examples = [
        {"input": "Q1\nOptions:\n(A) x\n(B) y", "target": "(A)"},
        {"input": "Q2\nOptions:\n(A) x\n(B) y\n(C) z", "target": "(C)"},
        {"input": "Q3\nOptions:\n(A) x\n(B) y", "target": "(B)"},
    ]
    (tmp_path / "snarks.json").write_text(json.dumps({"canary": "c", "examples": examples}))
    pairs = read(tmp_path / "snarks.json", EXACT)
    assert [(made.pair.subtask, made.pair.chosen) for made in pairs] == [("snarks", f"({x})") for x in "ACB"]
    # (C) is no option of the first and third question, so their wrong side is the one other option.
    assert (pairs[0].pair.rejected, pairs[2].pair.rejected) == ("(B)", "(A)")
    (tmp_path / "snarks.txt").write_text(
        "canary\n-----\nSay which.\n\nQ: One?\nA: Let's think.\nSo the answer is yes.\n\n"
        "Q: Two?\nA: So the answer is no.\n"
    )
    worked = read(tmp_path / "snarks.txt", EXACT)
    assert sides(worked)[0] == (
        "snarks/fewshot/1/1",
        "Let's think.\nSo the answer is yes.",
        "So the answer is no.",
    )
    assert [made.pair.prompt[0].content for made in worked] == ["Say which.\n\nOne?", "Say which.\n\nTwo?"]
    assert pairs[0].pair.prompt[0].content.startswith("Q1\n")
    (tmp_path / "bare.txt").write_text("canary\n-----\nQ: One?\nA: yes\n\nQ: Two?\nA: no\n")
    assert read(tmp_path / "bare.txt", EXACT)[0].pair.prompt[0].content == "One?"
    assert sides(read(tmp_path / "snarks.txt", spec(EXACT, answer="final")))[1] == ("snarks/fewshot/2/1", "no", "yes")


def test_answers_of_other_rows_are_wrong_seeded_and_of_the_same_subtask(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {
            "id": f"{task}{number}",
            "task": task,
            "question": f"{task} {number}?",
            "answer": f"so <<1+1=2>>\n#### {number % 7}",
        }
        for task in "ab"
        for number in range(30)
    ]
    rows[3]["answer"] = rows[3]["answer"].replace("#### 3", "#### 3.00")
    file = write_jsonl(tmp_path / "g.jsonl", rows)
    pairs = read(file, spec(EXACT, rejected_per_row=2))
    assert len(pairs) == 120
    by_id = {row["id"]: row for row in rows}
    for made in pairs:
        gold = final_answer(by_id[made.shot]["answer"])
        assert not is_same_answer(final_answer(made.pair.rejected), [gold])
        assert "<<" not in made.pair.chosen + made.pair.rejected
    drawn = {final_answer(made.pair.rejected) for made in pairs if made.shot == "a3"}
    assert len(drawn) == 2 and "3.00" not in drawn
    assert pairs == read(file, spec(EXACT, rejected_per_row=2))
    assert pairs != read(file, spec(EXACT, rejected_per_row=2, seed=1))
    assert read(write_jsonl(tmp_path / "h.jsonl", rows[:30]), spec(EXACT, rejected_per_row=2)) == pairs[:60]


def test_a_subtask_of_one_answer_gives_no_pair(tmp_path: Path) -> None:
    rows = [{"task": "x", "input": f"{number}?", "target": "Yes"} for number in range(2)]
    with pytest.raises(PairError, match=r"2 of 2 rows give no pair:\n.*e\.jsonl row 1: no_other_answer: .*'x'.*'Yes'"):
        read(write_jsonl(tmp_path / "e.jsonl", rows), EXACT)


def test_a_passage_stands_above_its_question_and_every_labelled_answer_counts(tmp_path: Path) -> None:
    rows = [
        {"task": "en", "context": "Paris is in France.", "question": "Where?", "answers": ["France", "in Europe"]},
        {"task": "en", "question": "And Rome?", "answers": {"text": ["Europe"], "answer_start": [0]}},
        {"task": "en", "question": "Lima?", "answers": ["Peru"]},
    ]
    pairs = read(write_jsonl(tmp_path / "t.jsonl", rows), EXACT)
    assert pairs[0].pair.prompt[0].content == "Paris is in France.\n\nQuestion: Where?"
    assert (pairs[0].pair.chosen, pairs[0].pair.rejected) == ("France", "Peru")
    for bad in ([], [""], None, [3, None]):
        with pytest.raises(PairError, match=r"u\.jsonl row 1"):
            read(write_jsonl(tmp_path / "u.jsonl", [{"question": "q", "answers": bad}]), EXACT)


def test_wrong_samples_are_checked(tmp_path: Path) -> None:
    rows = [{"id": f"g{number}", "question": f"{number}?", "answer": f"#### {number}"} for number in range(2)]
    file = write_jsonl(tmp_path / "g.jsonl", rows)
    task = spec(EXACT, rejected="samples")
    samples = {"g0": ["It is 0.", "#### 0.0", "#### 7", "#### 8"], "g1": ["The answer is 1."]}
    assert sides(read(file, task, samples=samples)) == [("g0/1", "#### 0", "#### 7")]  # g1 has no wrong sample
    with pytest.raises(PairError, match=r"row 2: no_sample: the samples have no row 'g1'"):
        read(file, task, samples={"g0": ["x"]})


DOCUMENT = "One two three four. Five six! Seven eight nine. Ten eleven?"
SUMMARY = "It counts up. It ends at eleven."


def test_summaries_against_lead_shuffled_and_other(tmp_path: Path) -> None:
    rows = [
        {"id": "d0", "document": DOCUMENT, "summary": SUMMARY},
        {"id": "d1", "document": "Rain fell.\nThen sun.", "summary": "Rain. Sun."},
    ]
    file = write_jsonl(tmp_path / "s.jsonl", rows)
    lead = read(file, TaskSpec("summarization", "full", "lead"))
    # The summary has 7 words: 4 + 2 is nearer to it than 4 + 2 + 3.
    assert sides(lead)[0] == ("d0/lead", SUMMARY, "One two three four. Five six!")
    assert lead[0].pair.prompt[0].content == DOCUMENT
    shuffled = read(file, TaskSpec("summarization", "full", "shuffled"))
    assert sides(shuffled) == [
        ("d0/shuffled", SUMMARY, "It ends at eleven. It counts up."),
        ("d1/shuffled", "Rain. Sun.", "Sun. Rain."),
    ]
    other = read(file, TaskSpec("summarization", "full", "other_rows", 1))
    assert [made.pair.rejected for made in other] == ["Rain. Sun.", SUMMARY]


@pytest.mark.parametrize(
    ("rejected", "summary", "reason"),
    [("shuffled", "One sentence.", "one_sentence"), ("lead", "One two three four", "lead_is_summary")],
)
def test_summaries_without_a_wrong_side(tmp_path: Path, rejected: str, summary: str, reason: str) -> None:
    file = write_jsonl(tmp_path / "s.jsonl", [{"document": DOCUMENT, "summary": summary}])
    with pytest.raises(PairError, match=rf"s\.jsonl row 1: {reason}: .*use rejected"):
        read(file, TaskSpec("summarization", "full", rejected))


def test_sentences() -> None:
    assert sentences("A 3.5 b. C!\n\nD\u3002E") == ["A 3.5 b.", "C!", "D\u3002", "E"]


def test_subtasks_by_name_and_by_field(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "m.jsonl", [{**QUESTION, "level": "easy"}])
    assert {made.pair.subtask for made in read(file, CHOICE, subtask="s")} == {"s"}
    assert {made.pair.subtask for made in read(file, CHOICE, subtask_field="level")} == {"easy"}
    with pytest.raises(PairError, match=r"m\.jsonl row 1 names no subtask at 'lvl'"):
        read(file, CHOICE, subtask_field="lvl")


def test_shots_of_a_task_are_its_rows() -> None:
    pairs = [PreferencePair(f"{row}/{n}", "s", (), "a", "b", "", "a", "b") for row in "xyz" for n in range(3)]
    row_of = {pair.pair_id: pair.pair_id[0] for pair in pairs}
    assert [pair.pair_id for pair in take_shots(pairs, 2, target="t", row_of=row_of)] == [
        f"{row}/{n}" for row in "xy" for n in range(3)
    ]
    with pytest.raises(PairError, match="4 shots asked for, but subtask 's' has 3"):
        take_shots(pairs, 4, target="t", row_of=row_of)


def test_compressed_examples(tmp_path: Path) -> None:
    import gzip

    content = io.StringIO()
    csv.writer(content).writerow(["q", "a", "b", "A"])
    (tmp_path / "maths_test.csv.gz").write_bytes(gzip.compress(content.getvalue().encode()))
    assert sides(read(tmp_path / "maths_test.csv.gz", CHOICE)) == [("maths/test/1/B", "A", "B")]
