"""From items to the table: averages, intervals, missing seeds, knees, curves."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any
from xml.etree import ElementTree

import pytest

from rose_ray.config.evaluation import EvaluationConfig, HeldOutConfig, TaskConfig
from rose_ray.config.judge import JudgeConfig
from rose_ray.config.target import PairInput
from rose_ray.errors import AccountingError
from rose_ray.evaluate.curves import curves_svg
from rose_ray.evaluate.index import Entry, Index
from rose_ray.evaluate.report import budget_lines, judge_lines
from rose_ray.evaluate.results import Number, table_numbers
from rose_ray.evaluate.table import table_csv, table_json, table_lines

CONFIG = EvaluationConfig(
    held_out=[HeldOutConfig(name="h", pairs=[PairInput(files=["-"])], dpo_beta=1.0)],
    tasks=[TaskConfig(name="q", files=["-"], kind="multiple_choice")],
    judges=[JudgeConfig(name="j", kind="rouge_l"), JudgeConfig(name="k", kind="rouge_l")],
    intervals={"resamples": 40},  # type: ignore[arg-type]
)
ROUNDING = 1e-12


def pair(item_id: str, gain: float) -> dict[str, Any]:
    return {
        "item_id": item_id,
        "logp_chosen": -4.0 + gain,
        "logp_rejected": -4.0,
        "tokens_chosen": 2,
        "tokens_rejected": 2,
    }


def verdict(item_id: str, ours_first: str | None, ours_second: str | None, score: float | None) -> dict[str, Any]:
    places = {"ours_first": ours_first, "ours_second": ours_second}
    return {"item_id": item_id, **places, "score": score, "length_difference": 0}


ITEMS: dict[str, Sequence[Mapping[str, Any]]] = {
    "ref": [pair("a", 0.0), pair("b", 0.0)],
    "one": [pair("a", 1.0), pair("b", -2.0)],
    "two": [pair("a", 3.0), pair("b", 2.0)],
    "quiz": [{"item_id": "x", "logps": [-1.0, -2.0], "gold": 0}, {"item_id": "y", "logps": [-1.0, -2.0], "gold": 1}],
    "won": [verdict("a", "first", "second", 1.0), verdict("b", "first", "first", 0.5)],
    "odd": [verdict("a", "first", "second", 1.0), verdict("b", None, "first", None)],
}


def entry(arm: str, budget: float | None, seed: int | None, pairs: str | None, **more: Any) -> Entry:
    measures = {"pairs/h": pairs, "multiple_choice/q": "quiz"} if pairs else {}
    return Entry(arm, budget, 10, seed, f"{arm}-{budget}-{seed}", measures, **more)


def numbers_of(entries: list[Entry], seeds: list[int]) -> dict[tuple[str, float | None, str], Number]:
    index = Index(entries, {"pairs/h": "ref", "multiple_choice/q": "quiz"}, seeds, 100)
    found = table_numbers(index, CONFIG, ITEMS.__getitem__)  # type: ignore[arg-type]
    return {(number.arm, number.budget, f"{number.benchmark} {number.measure}"): number for number in found}


def test_numbers_by_hand() -> None:
    entries = [
        entry("zero_shot", None, None, "ref"),
        entry("rose", 0.1, 0, "one"),
        entry("rose", 0.1, 1, "two"),
    ]
    found = numbers_of(entries, [0, 1])
    margin = found["rose", 0.1, "h margin"]
    assert margin.estimate is not None and margin.estimate.value == 1.0  # (1 - 2 + 3 + 2) / 4
    assert margin.estimate.low is not None and margin.estimate.low < 1.0 < (margin.estimate.high or 0)
    assert (margin.seeds, margin.missing, margin.num_items) == ([0, 1], [], 2)
    assert value(found["rose", 0.1, "h accuracy"]) == 0.75
    # chosen log-probabilities -3, -6, -1, -2, two tokens each
    assert value(found["rose", 0.1, "h ce_chosen"]) == 1.5
    assert value(found["rose", 0.1, "q choice_accuracy"]) == 0.5
    assert value(found["zero_shot", None, "h accuracy"]) == 0.5
    assert value(found["zero_shot", None, "h dpo_loss"]) == pytest.approx(math.log(2), abs=ROUNDING)


def value(number: Number) -> float:
    assert number.estimate is not None
    return number.estimate.value


def test_a_missing_seed_is_said_and_not_averaged_over() -> None:
    entries = [entry("rose", 0.1, 0, "one"), entry("rose", 0.1, 1, None, failure="diverged")]
    found = numbers_of(entries, [0, 1, 2])
    margin = found["rose", 0.1, "h margin"]
    assert margin.estimate is None and margin.seeds == [0] and margin.missing == [1, 2]
    text = "\n".join(table_lines(list(found.values()), 0.95))
    assert "rose at 10 %: 1 of 3 seeds measured, without a number until all are: lacks 1, 2" in text
    assert "missing" in text
    (line,) = [r for r in csv.DictReader(io.StringIO(table_csv(list(found.values())))) if r["measure"] == "margin"]
    assert (line["value"], line["seeds"], line["missing_seeds"]) == ("", "0", "1 2")


def test_win_rates() -> None:
    won, odd = {"j/h": "won"}, {"j/h": "odd"}
    found = numbers_of([entry("rose", 0.1, 0, "one", verdicts=won), entry("rose", 0.1, 1, "two", verdicts=odd)], [0, 1])
    rate = found["rose", 0.1, "h/j win_rate"]
    # item b has no verdict at one seed, so it counts at neither
    assert value(rate) == 1.0 and rate.num_items == 1 and rate.num_unusable == 1
    assert value(found["rose", 0.1, "h/j length_controlled_win_rate"]) == 1.0
    assert "1 comparisons without a verdict" in "\n".join(table_lines(list(found.values()), 0.95))
    lacking = numbers_of([entry("rose", 0.1, 0, "one", verdicts=won), entry("rose", 0.1, 1, "two")], [0, 1])
    assert lacking["rose", 0.1, "h/j win_rate"].missing == [1]


def test_seeds_measured_on_other_items_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ITEMS, "other", [pair("a", 0.0), pair("c", 0.0)])  # type: ignore[arg-type]
    with pytest.raises(AccountingError, match=r"rose at 0\.1"):
        numbers_of([entry("rose", 0.1, 0, "one"), entry("rose", 0.1, 1, "other")], [0, 1])


def curve(monkeypatch: pytest.MonkeyPatch, gains: list[float]) -> list[Number]:
    entries = [entry("zero_shot", None, None, "ref")]
    for budget, gain in zip([0.001, 0.01, 0.1, 1.0], gains, strict=True):
        monkeypatch.setitem(ITEMS, f"g{budget}", [pair("a", gain), pair("b", gain)])  # type: ignore[arg-type]
        entries.append(entry("rose", budget, 0, f"g{budget}"))
    return list(numbers_of(entries, [0]).values())


def test_knees_and_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = curve(monkeypatch, [0.0, 8.0, 9.0, 10.0])
    assert [n.budget for n in numbers if n.is_knee and n.measure == "margin"] == [0.01]
    svg = curves_svg(numbers, "h", "margin")
    root = ElementTree.fromstring(svg)
    name = "{http://www.w3.org/2000/svg}"
    (line,) = root.findall(f"{name}polyline")
    points = [tuple(map(float, point.split(","))) for point in line.attrib["points"].split()]
    assert [round(x) for x, _ in points] == [70, 237, 403, 570]  # equal steps of the logarithm
    assert all(high > low for (_, high), (_, low) in pairwise(points))
    (knee,) = [c for c in root.findall(f"{name}circle") if c.attrib.get("class") == "knee"]
    assert float(knee.attrib["cx"]) == points[1][0]
    assert "rose" in svg and "zero_shot" in svg and "10 %" in svg
    assert curves_svg(numbers[:6], "h", "margin") == ""
    assert "8.000 [8.000, 8.000]*" in "\n".join(table_lines(numbers, 0.95))
    assert [r["knee"] for r in json.loads(table_json(numbers)) if r["measure"] == "margin"] == [0, 0, 1, 0, 0]


def test_one_seed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "\n".join(table_lines(curve(monkeypatch, [0.0, 8.0, 9.0, 10.0]), 0.95))
    assert "rose at 1 %: one seed, so its intervals are over items alone" in text


def test_a_budget_above_what_an_arm_scored_is_said() -> None:
    rows = [
        entry("rose", 0.5, 0, "one", budget_rows=10),
        *(entry("ifd", 0.5, seed, "one", budget_rows=1500) for seed in (0, 1)),
        entry("random", 0.5, 0, "one"),
    ]
    assert list(budget_lines(Index(rows, {}, [0, 1], 3000))) == [
        "ifd at 50 %: 10 rows, all that it scored; 1,500 were asked for. The other rows of the pool were rejected for "
        "it."
    ]


def test_agreement_of_judges() -> None:
    index = Index([entry("rose", 0.1, 0, "one", verdicts={"j/h": "won", "k/h": "odd"})], {}, [0], 100)
    lines = list(judge_lines(index, CONFIG, ITEMS.__getitem__))  # type: ignore[arg-type]
    assert lines[0] == "judge j: 2 comparisons, 0 without a verdict; 50.0% follow the order shown"
    assert lines[1].startswith("judge k: 2 comparisons, 1 without a verdict")
    assert lines[2] == "judges j and k: Cohen's kappa undefined: both always say the same over 1 comparisons"
