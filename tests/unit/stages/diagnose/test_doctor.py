"""What `doctor` finds, each case small enough to see the answer."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from rose_ray.cli import app
from rose_ray.config import parse_config
from rose_ray.config.target import TargetConfig
from rose_ray.data.contamination import KnownTestText
from rose_ray.errors import ConfigError, DataError, PairError
from rose_ray.filesystem import expand, locate
from rose_ray.stages.diagnose.configured_tests import configured_tests
from rose_ray.stages.diagnose.doctor import examine
from rose_ray.stages.diagnose.findings import Finding, TargetReport, report_lines
from rose_ray.stages.diagnose.overlap import read_evaluation_texts
from rose_ray.stages.diagnose.pair_texts import TextLimits
from rose_ray.stages.diagnose.stored import needed_bank
from tests.tiny import write_jsonl
from tests.unit.stages.diagnose.stored_job import SPACE, StoredJob, pair_record, stored_job

LIMITS = TextLimits(subtask_pairs=1)
PASSAGE = "one two three four five six seven eight nine ten eleven twelve thirteen"


def report_of(
    job: StoredJob, tests: KnownTestText | None = None, limits: TextLimits = LIMITS, *, workspace: bool = True
) -> TargetReport:
    job.finish()
    (report,) = examine(job.workspace if workspace else None, job.config, {"t": job.pairs}, tests, limits)
    return report


def findings_of(folder: Path, records: Sequence[Mapping[str, Any]], **how: Any) -> dict[str, Finding]:
    report = report_of(stored_job(folder, records, checked=False), **how)
    assert len({finding.check for finding in report.findings}) == len(report.findings)
    return {finding.check: finding for finding in report.findings}


def test_sides_that_say_nothing(tmp_path: Path) -> None:
    found = findings_of(
        tmp_path,
        [
            pair_record(0),
            pair_record(1, chosen=" ", rejected="No."),
            pair_record(2, chosen="Yes. ", rejected="Yes."),
            pair_record(3, chosen="Yes: it is", rejected="yes, IT is!"),
            pair_record(4, chosen="a b c d e f g h i j", rejected="a b c d e f g h i k"),
            pair_record(5, chosen="a b c d e f g h", rejected="a b c d e f g x"),  # 14 of 16
        ],
    )
    assert found["empty_side"].ids == ("p1",) and found["empty_side"].severity == "error"
    assert found["identical_sides"].ids == ("p2",) and found["identical_sides"].severity == "error"
    assert found["same_words"].ids == ("p3",)
    assert found["near_identical_sides"].ids == ("p4",)
    assert found["near_identical_sides"].numbers == {"similarity": {"p4": pytest.approx(0.9)}}


def test_pairs_that_stand_more_than_once(tmp_path: Path) -> None:
    first = pair_record(0)
    found = findings_of(
        tmp_path,
        [
            first,
            {**first, "id": "again"},
            {**first, "id": "turned", "chosen": first["rejected"], "rejected": first["chosen"]},
            {**first, "id": "other answers", "chosen": "Blue.", "rejected": "Green."},
            pair_record(1),
            pair_record(1, prompt="Another question under the same id?"),
        ],
    )
    assert found["repeated_ids"].ids == ("p1",) and found["repeated_ids"].severity == "error"
    assert found["duplicate_pairs"].numbers["groups"] == [["p0", "again"]]
    assert found["contradicting_pairs"].severity == "error"
    assert set(found["contradicting_pairs"].ids) == {"p0", "again", "turned"}
    assert found["repeated_prompts"].severity == "note"
    assert set(found["repeated_prompts"].ids) == {"p0", "again", "turned", "other answers"}


def test_small_subtasks_are_named_smallest_first(tmp_path: Path) -> None:
    records = [pair_record(number, subtask) for number, subtask in enumerate("aabccc")]
    found = findings_of(tmp_path, records, limits=TextLimits(subtask_pairs=3))
    assert found["small_subtask"].ids == ("b", "a")
    assert "2 of 3 subtasks have fewer than 3 pairs" in found["small_subtask"].message


def test_lengths_warn_where_one_side_is_longer_more_often_than_chance(tmp_path: Path) -> None:
    longer = [pair_record(n, chosen="x" * 12, rejected="y" * 10) for n in range(6)]
    found = findings_of(tmp_path, longer)["lengths"]  # six of six: p = 0.03
    assert found.severity == "warning" and found.numbers["chosen_longer"] == 6 and found.ids == ()
    assert "median ratio of chosen to rejected 1.20" in found.message
    few = findings_of(tmp_path, longer[:5])["lengths"]  # five of five: p = 0.06
    assert few.severity == "note"


def test_lengths_warn_where_the_sides_differ_much(tmp_path: Path) -> None:
    records = [
        pair_record(0, chosen="x" * 30, rejected="y" * 10),
        pair_record(1, chosen="x" * 10, rejected="y" * 20),
        pair_record(2, chosen="x" * 10, rejected="y" * 11),
    ]
    found = findings_of(tmp_path, records)["lengths"]
    assert found.severity == "warning" and found.ids == ("p0", "p1")
    assert "of the longer to the shorter one 2.00 (characters)" in found.message


def test_healthy_pairs_leave_notes_alone(tmp_path: Path) -> None:
    report = report_of(stored_job(tmp_path, [pair_record(n) for n in range(4)]))
    assert report.is_healthy and [finding.check for finding in report.findings] == ["lengths"]


def test_overlap_with_test_texts_names_their_rows(tmp_path: Path) -> None:
    job = stored_job(
        tmp_path,
        [
            pair_record(0, chosen=f"Listen: {PASSAGE.upper()}!"),
            pair_record(1, prompt="What is it?"),
            pair_record(2, chosen="What is it?"),  # short, and no prompt
            pair_record(3),
        ],
    )
    file = write_jsonl(
        tmp_path / "test.jsonl",
        [{"question": "What IS it", "id": "No idea"}, {"question": "?", "answer": f"so {PASSAGE} on"}],
    )
    tests = read_evaluation_texts([locate(str(file))])
    (found,) = (each for each in report_of(job, tests).findings if each.check == "test_overlap")
    assert found.numbers["test_rows"] == {"p0": [f"{file} row 2"], "p1": [f"{file} row 1"]}
    assert tests.num_words == 13


def test_test_files_are_those_that_decontamination_reads(tmp_path: Path) -> None:
    job = stored_job(tmp_path, [pair_record(0, prompt="In a table?"), pair_record(1, prompt="Examples?")])
    (tmp_path / "anatomy_test.csv").write_text("In a table?,yes,no,A\n")
    (tmp_path / "bbh.json").write_text(json.dumps({"examples": [{"input": "Examples?", "target": "(A)"}]}))
    with tarfile.open(tmp_path / "both.tar.gz", "w:gz") as archive:
        for name in ("anatomy_test.csv", "bbh.json"):
            archive.add(tmp_path / name, name)
    plain = read_evaluation_texts(expand([str(tmp_path / "anatomy_test.csv"), str(tmp_path / "bbh.json")]))
    for tests in (plain, read_evaluation_texts(expand([str(tmp_path / "both.tar.gz")]))):
        (found,) = (each for each in report_of(job, tests).findings if each.check == "test_overlap")
        assert found.ids == ("p0", "p1")


def test_fields_and_split_say_what_of_test_files_counts(tmp_path: Path) -> None:
    job = stored_job(tmp_path, [pair_record(0, prompt="Developed?"), pair_record(1, prompt="Tested?")])
    rows = [{"split": "dev", "body": "developed"}, {"split": "test", "body": "tested"}]
    file = locate(str(write_jsonl(tmp_path / "test.jsonl", rows)))
    tests = read_evaluation_texts([file], fields=["body"], split="test")
    (found,) = (each for each in report_of(job, tests).findings if each.check == "test_overlap")
    assert found.ids == ("p1",)
    with pytest.raises(
        DataError, match=r"Name the keys that hold it \(`decontaminate.fields`; `doctor --test-field`\)"
    ):
        read_evaluation_texts([file])


def test_a_broken_row_of_a_test_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "test.jsonl"
    file.write_text('{"question": "a"}\nno json\n')
    with pytest.raises(DataError, match=r"test.jsonl row 2: not_json"):
        read_evaluation_texts([locate(str(file))])


def test_what_of_no_test_file_counts_is_refused(tmp_path: Path) -> None:
    job = stored_job(tmp_path, [pair_record(0)])
    (tmp_path / "job.yaml").write_text(job.config.model_dump_json(exclude_unset=True))
    result = CliRunner().invoke(app, ["doctor", str(tmp_path / "job.yaml"), "--test-split", "test"])
    assert result.exit_code == 1 and "--test-field and --test-split say what of the files of --test" in result.stderr


def test_overlap_of_the_pool_is_counted_by_source(tmp_path: Path) -> None:
    job = stored_job(tmp_path, [pair_record(0, chosen=f"{PASSAGE} and on"), pair_record(1, prompt="What is it?")])

    def row(prompt: str, answer: str, source: str) -> dict[str, str]:
        return {"prompt": prompt, "completion": answer, "source": source}

    job.add_pool(
        [
            row("Count.", f"So: {PASSAGE}.", "a"),
            row("What is it?", "A tree.", "a"),
            row("Say.", "What is it?", "b"),
            row("Tested?", "It is.", "b"),
        ]
    )
    file = write_jsonl(tmp_path / "test.jsonl", [{"prompt": "tested"}])
    found = {each.check: each for each in report_of(job, read_evaluation_texts([locate(str(file))])).findings}
    assert found["pool_pair_overlap"].numbers["sources"] == {"a": 2}
    assert sorted(found["pool_pair_overlap"].numbers["owners"].values()) == [["p0"], ["p1"]]
    assert "2 of 4 rows of the pool share 13 words in a row with the pairs (a 2)" in found["pool_pair_overlap"].message
    assert found["pool_test_overlap"].numbers["sources"] == {"b": 1}
    assert found["pool_test_overlap"].severity == "warning"


def with_bank(folder: Path, chosen: Sequence[Sequence[float]], rejected: Sequence[Sequence[float]], **how: Any) -> Any:
    job = stored_job(folder, [pair_record(n) for n in range(len(chosen))], **how.pop("target", {}))
    how.setdefault("tokens", [(4, 4)] * len(chosen))
    job.add_bank(*(np.array([side, side], dtype=np.float64) for side in (chosen, rejected)), **how)
    report = report_of(job)
    assert report.bank is not None
    return {finding.check: finding for finding in report.findings}, report


def test_pairs_that_point_away_from_the_rest_come_worst_first(tmp_path: Path) -> None:
    # directions after normalising: (1, 0), (1, 0), (0.6, 0.8), (-1, 0), (-0.8, -0.6)
    rejected = [[2, 0], [1, 0], [3, 4], [-1, 0], [-8, -6]]
    found, _ = with_bank(tmp_path, [[0, 0.0]] * 5, rejected, target={"objective": "rose"})
    cosines = found["conflicting_pairs"].numbers["cosine_with_rest"]
    rest = {"p0": (-0.2, 0.2), "p2": (0.2, -0.6), "p3": (1.8, 0.2), "p4": (1.6, 0.8)}
    assert cosines["p0"] == cosines["p1"] == pytest.approx(-(0.5**0.5))
    assert cosines["p3"] == pytest.approx(-1.8 / np.hypot(*rest["p3"]))
    assert cosines["p4"] == pytest.approx((-0.8 * 1.6 - 0.6 * 0.8) / np.hypot(*rest["p4"]))
    assert cosines["p2"] == pytest.approx((0.6 * 0.2 - 0.8 * 0.6) / np.hypot(*rest["p2"]))
    assert found["conflicting_pairs"].ids == tuple(sorted(cosines, key=cosines.__getitem__))


def test_the_longer_side_is_the_one_with_more_tokens(tmp_path: Path) -> None:
    # orthogonal sides of lengths 3 and 1: 9 of 10 parts; the longer one is the chosen, the rejected, neither
    chosen, rejected = [[3, 0], [1, 0], [3, 0]], [[0, 1], [0, 3], [0, 1]]
    found, _ = with_bank(tmp_path, chosen, rejected, tokens=[(9, 2), (2, 9), (4, 4)])
    finding = found["longer_side"]
    assert finding.severity == "warning" and set(finding.ids) == {"p0", "p1"}
    assert finding.numbers["median_share_of_longer_side"] == pytest.approx(0.9)
    assert "makes 90% of the direction's squared length in the median pair, and has 75%" in finding.message
    assert finding.numbers["norm_w"] == pytest.approx({"p0": 3.0, "p1": 1.0, "p2": 3.0})
    assert found["lengths"].severity == "warning" and "(tokens)" in found["lengths"].message


def test_balanced_sides_leave_a_note(tmp_path: Path) -> None:
    target = {"objective": "rose_balanced"}
    found, _ = with_bank(tmp_path, [[3, 0], [1, 0]], [[0, 1], [0, 3]], tokens=[(9, 2), (2, 9)], target=target)
    assert found["longer_side"].severity == "note"
    assert found["longer_side"].numbers["median_share_of_longer_side"] == pytest.approx(0.5)
    assert found["longer_side"].ids == ()
    sides = [[1, 0], [3, 0], [1, 0]], [[0, 1], [0, 1], [0, 1]]
    (tmp_path / "one").mkdir()
    found, _ = with_bank(tmp_path / "one", *sides, tokens=[(9, 2), (9, 2), (2, 9)])
    assert found["longer_side"].severity == "note" and found["longer_side"].ids == ("p1",)
    assert found["longer_side"].advice.endswith("both sides make the direction, except for the pairs named.")


def test_margins_under_the_base_model(tmp_path: Path) -> None:
    tokens = [(2, 4), (4, 2), (5, 5), (1, 1), (1, 1), (2, 2)]
    # margins a token: 0.1, 0.2, 0.0, 0.1, 0.2, -8.0
    reference = [(-1.8, -4.0), (-3.2, -2.0), (-5.0, -5.0), (-0.9, -1.0), (-0.8, -1.0), (-18.0, -2.0)]
    sides = [[1, 0.0]] * 6, [[0, 1.0]] * 6
    found, _ = with_bank(tmp_path, *sides, tokens=tokens, reference=reference)
    margin = found["label_margin"]
    assert margin.severity == "note"
    assert margin.ids == ("p5", "p1")  # margins of -16 and -1.2 nats, the others 0 or above
    assert margin.numbers["margin_per_token"]["p0"] == pytest.approx(0.1)
    assert margin.numbers["margin"]["p1"] == pytest.approx(-1.2)
    assert "likelier in 3 of 6 pairs, token by token in 4;" in margin.message
    # deviations from the median 0.1: 0, 0.1, -0.1, 0, 0.1, -8.1; their median size 0.1
    assert found["unlikely_label"].ids == ("p5",)
    assert found["unlikely_label"].numbers["z"] == {"p5": pytest.approx(-0.6745 * 81)}


def test_a_bank_of_other_pairs_is_not_read(tmp_path: Path) -> None:
    job = stored_job(tmp_path, [pair_record(n) for n in range(3)])
    job.add_bank(*np.ones((2, 2, 3, 2)), tokens=[(4, 4)] * 3)
    job.pairs = job.pairs[:2]
    report = report_of(job)
    assert report.bank is None
    assert any("was made with other pairs: `rose-ray bank CONFIG` makes one" in line for line in report.untold)


def test_a_basis_of_subtasks_cannot_tell_of_conflicts(tmp_path: Path) -> None:
    space = {**SPACE, "projection": "exact/v1/basis=0123"}
    sides = [[0, 0.0]] * 2, [[1, 0.0], [-2, 0]]
    found, report = with_bank(tmp_path, *sides, space=space)
    assert "conflicting_pairs" not in found
    assert any(line.startswith("conflicting_pairs: the exact basis holds one direction") for line in report.untold)


def test_what_cannot_be_told_without_a_workspace_is_said(tmp_path: Path) -> None:
    report = report_of(stored_job(tmp_path, [pair_record(n) for n in range(3)]), workspace=False)
    lines = list(report_lines(report))
    assert lines[0] == "target t: 3 pairs (s 3), bank none"
    assert sum(line.startswith("  not told: ") for line in lines) == 3
    assert any("`rose-ray bank CONFIG`" in line for line in lines) and any("--test" in line for line in lines)


def test_a_target_without_pairs_is_healthy(tmp_path: Path) -> None:
    job = stored_job(tmp_path, [pair_record(0)])
    job.pairs = []
    job.config = job.config.model_copy(update={"targets": [TargetConfig(name="t", method="random")]})
    report = report_of(job)
    assert report.is_healthy and not report.findings
    lines = list(report_lines(report))
    assert lines[:2] == [
        "target t: 0 pairs, bank none",
        "  not told: anything about pairs: method random was given none",
    ]
    assert not any("rose-ray bank" in line for line in lines)


def test_test_texts_in_the_pool_are_found_without_pairs(tmp_path: Path) -> None:
    job = stored_job(tmp_path, [pair_record(0)])
    job.pairs = []
    job.config = job.config.model_copy(update={"targets": [TargetConfig(name="t", method="random")]})
    job.add_pool([{"prompt": "Tested?", "completion": "It is."}, {"prompt": "Not?", "completion": "No."}])
    file = write_jsonl(tmp_path / "test.jsonl", [{"prompt": "tested"}])
    found = report_of(job, read_evaluation_texts([locate(str(file))])).findings
    assert [each.check for each in found] == ["pool_test_overlap"]


def test_pair_inputs_that_give_no_pair_are_an_error(tmp_path: Path) -> None:
    job = stored_job(tmp_path, [pair_record(0)])
    job.pairs = []
    assert [each.check for each in report_of(job).findings] == ["no_pairs"]


def test_no_bank_is_advised_where_none_is_ever_made(tmp_path: Path) -> None:
    job = stored_job(tmp_path, [pair_record(0), pair_record(1)], method="bm25")
    report = report_of(job)
    assert any(line.endswith("label margins: method bm25 takes no gradients: no bank") for line in report.untold)
    with pytest.raises(ConfigError, match="target t: method bm25 takes no gradients, so it has no bank"):
        needed_bank(job.workspace, job.config, job.config.targets[0], job.pairs)


def test_pairs_that_cannot_be_read_are_a_finding(tmp_path: Path) -> None:
    job = stored_job(tmp_path, [pair_record(0)])
    (report,) = examine(None, job.config, {"t": PairError("pairs.jsonl: row 3: not_json")}, None, LIMITS)
    assert [finding.check for finding in report.findings] == ["unreadable"] and not report.is_healthy


def test_test_texts_that_the_configuration_names_are_looked_for(tmp_path: Path) -> None:
    job = stored_job(tmp_path, [pair_record(0, prompt=PASSAGE), pair_record(1)])
    assert configured_tests(job.config).known is None
    assert any("test texts: the configuration names none" in line for line in report_of(job).untold)
    kept_out = write_jsonl(tmp_path / "kept_out.jsonl", [{"body": f"Oh, {PASSAGE}", "split": "test"}])
    held_out = write_jsonl(tmp_path / "held_out.jsonl", [pair_record(7, prompt="Held out?"), pair_record(8)])
    write_jsonl(tmp_path / "one.jsonl", [{"question": "One?", "answer": "1", "split": "dev"}])
    write_jsonl(tmp_path / "two.jsonl", [{"question": "Two?", "answer": "2", "split": "test"}])
    clean = {"decontaminate": {"files": [str(kept_out)], "fields": ["body"], "split": "test"}}
    content = job.config.model_dump(mode="json")
    content["targets"] = [{**content["targets"][0], "selection": clean}]
    content["training_set"] = {"selection": clean}
    content["evaluation"] = {
        "held_out": [{"name": "h", "pairs": [{"files": [str(held_out)]}, {"files": [str(tmp_path / "absent.jsonl")]}]}],
        "tasks": [
            {
                "name": "numbers",
                "kind": "exact_match",
                "files": [str(tmp_path / "one.jsonl"), str(tmp_path / "two.jsonl")],
                "splits": ["test"],
            }
        ],
    }
    job.config = parse_config(content)
    found = configured_tests(job.config)
    assert found.counts == {
        "targets.0.selection.decontaminate.files": 1,  # the training set's are the same
        "evaluation.held_out.0.pairs.0": 2,
        "evaluation.tasks.0": 1,
    }
    first, second = found.lines()
    assert "pairs.0 2, evaluation.tasks.0 1; --test looks for others instead" in first
    assert second.startswith("not told: overlap with evaluation.held_out.0.pairs.1: ") and "absent.jsonl" in second
    job.add_pool([{"prompt": text, "completion": "It is."} for text in ("held out", "two", "one")])
    told = {each.check: each for each in report_of(job, found.known).findings}
    assert told["test_overlap"].ids == ("p0",)
    owners = told["pool_test_overlap"].numbers["owners"].values()
    assert {owner for each in owners for owner in each} == {"pair p7", f"{tmp_path / 'two.jsonl'} row 1"}
