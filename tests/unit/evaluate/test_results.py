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

import numpy as np
import pytest

from rose_ray.config.cleaning import Decontaminate, NearDuplicates
from rose_ray.config.evaluation import EvaluationConfig, HeldOutConfig, TaskConfig
from rose_ray.config.judge import JudgeConfig
from rose_ray.config.selection import SelectionConfig
from rose_ray.config.target import PairInput, TargetConfig
from rose_ray.errors import AccountingError
from rose_ray.evaluate.curves import curves_svg
from rose_ray.evaluate.index import Entry, Index
from rose_ray.evaluate.report import budget_lines, judge_lines, rule_lines
from rose_ray.evaluate.results import Number, resampling_of, table_numbers
from rose_ray.evaluate.table import table_csv, table_json, table_lines
from rose_ray.kernels.bootstrap import Estimate, mean_estimate

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
    "three": [pair("a", 1.0), pair("b", 2.0), pair("c", 6.0)],
    "other_three": [pair("a", 0.0), pair("b", -1.0), pair("c", -3.0)],
    "other_quiz": [{"item_id": "x", "logps": [-1.0, -2.0], "gold": 0}],
    "gone": [pair("a", 1.0), pair("gone", 0.0)],
    "ref_gone": [pair("a", 0.0), pair("gone", 0.0)],
    "ref_three": [pair("a", 0.0), pair("b", 0.0), pair("c", 0.0)],
    "won": [verdict("a", "first", "second", 1.0), verdict("b", "first", "first", 0.5)],
    "odd": [verdict("a", "first", "second", 1.0), verdict("b", None, "first", None)],
}


PROMPTS = {"h": {"a": "Why?", "b": "Who?", "c": "Who?"}}


def entry(arm: str, budget: float | None, seed: int | None, pairs: str | None, **more: Any) -> Entry:
    measures = {"pairs/h": pairs, "multiple_choice/q": "quiz"} if pairs else {}
    return Entry(arm, budget, 10, seed, f"{arm}-{budget}-{seed}", measures, **more)


def numbers_of(
    entries: list[Entry], seeds: list[int], reference: str = "ref"
) -> dict[tuple[str, float | None, str], Number]:
    index = Index(entries, {"pairs/h": reference, "multiple_choice/q": "quiz"}, seeds, 100)
    found = table_numbers(index, CONFIG, ITEMS.__getitem__, PROMPTS)  # type: ignore[arg-type]
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


def test_differences_from_random_by_hand() -> None:
    entries = [
        entry("zero_shot", None, None, "ref"),
        entry("random", 0.1, 0, "two", verdicts={"j/h": "odd"}),
        entry("random", 0.1, 1, "one", verdicts={"j/h": "won"}),
        entry("rose", 0.1, 0, "one", verdicts={"j/h": "won"}),
        entry("rose", 0.1, 1, "two", verdicts={"j/h": "won"}),
        entry("rose", 0.2, 0, "one"),
        entry("rose", 0.2, 1, "two"),
    ]
    found = numbers_of(entries, [0, 1])
    margin = found["rose", 0.1, "h margin"].difference
    # a seed each: (1, -2) less (3, 2), then (3, 2) less (1, -2); the means are equal, the items and seeds are not
    differences = np.array([[-2.0, -4.0], [2.0, 4.0]])
    assert margin == mean_estimate(differences, resampling_of(CONFIG)) and margin.value == 0.0
    accuracy = found["rose", 0.1, "h accuracy"].difference
    assert accuracy == mean_estimate(np.array([[0.0, -1.0], [0.0, 1.0]]), resampling_of(CONFIG))
    assert found["rose", 0.1, "q choice_accuracy"].difference == Estimate(0.0, 0.0, 0.0)
    # item b has no verdict in one seed of random: over a alone, which both win at both seeds
    assert found["rose", 0.1, "h/j win_rate"].difference == Estimate(0.0, 0.0, 0.0)
    assert found["rose", 0.1, "h/j length_controlled_win_rate"].difference is None
    for row in (("zero_shot", None), ("random", 0.1), ("rose", 0.2)):
        assert found[*row, "h margin"].difference is None


def test_differences_are_told() -> None:
    entries = [entry("random", 0.1, 0, "two"), entry("rose", 0.1, 0, "one"), entry("rose", 0.2, 0, "one")]
    entries.append(entry("bm25", 0.1, 0, None, failure="diverged"))
    numbers = list(numbers_of(entries, [0]).values())
    lines = list(table_lines(numbers, 0.95))
    place = lines.index("  difference from random: same budget, seeds and items")
    head, rose, bm25 = lines[place + 1 : place + 4]
    assert head.split() == ["budget", "rows", "margin", "↑", "accuracy", "↑"]
    assert rose.startswith("  rose  10 %    10    -3.000 [-4.000, -2.000]  -0.500 [-1.000, +0.000]")
    assert bm25.split() == ["bm25", "10", "%", "10", "missing", "missing"] and lines[place + 4] == ""
    (line,) = [
        r
        for r in csv.DictReader(io.StringIO(table_csv(numbers)))
        if (r["arm"], r["budget"]) == ("rose", "0.1") and r["measure"] == "margin"
    ]
    assert (line["difference"], line["difference_low"], line["difference_high"]) == ("-3.0", "-4.0", "-2.0")
    alone = [n for n in numbers if n.arm != "random"]
    assert not [line for line in table_lines(alone, 0.95) if "difference" in line]


def test_a_row_and_random_on_other_items_are_refused() -> None:
    with pytest.raises(AccountingError, match=r"rose at 0\.1 and random at 0\.1 were measured on other items"):
        other = Entry("random", 0.1, 10, 0, "m", {"pairs/h": "one", "multiple_choice/q": "other_quiz"})
        numbers_of([other, entry("rose", 0.1, 0, "one")], [0])


def test_pairs_of_one_prompt_are_resampled_together() -> None:
    found = numbers_of(
        [entry("random", 0.1, 0, "other_three"), entry("rose", 0.1, 0, "three")], [0], reference="ref_three"
    )
    number = found["rose", 0.1, "h margin"]
    assert number.estimate is not None and (number.num_items, number.num_prompts) == (3, 2)
    # two prompts: of a the margin 1, of b and c 2 and 6; drawn twice, twice, or once each
    assert number.estimate == Estimate(3.0, 1.0, 4.0)
    assert number.difference == Estimate((1 + 3 + 9) / 3, 1.0, 6.0)
    assert "h: 3 items of 2 prompts; 95% intervals" in next(table_lines(list(found.values()), 0.95))


def test_measured_pairs_that_are_gone_from_their_files_are_said() -> None:
    with pytest.raises(AccountingError, match=r"evaluation h: 1 of 2 pairs .* first 'gone'"):
        numbers_of([entry("rose", 0.1, 0, "gone")], [0], reference="ref_gone")


def test_controls_that_share_their_models_stand_once() -> None:
    def control(arm: str, model: str) -> list[Entry]:
        return [Entry(arm, None, 5, seed, f"{model}{seed}", {"pairs/h": "one"}) for seed in (0, 1)]

    entries = [
        *control("dpo_shots:rose", "d"),
        *control("dpo_shots:less", "d"),
        *control("dpo_shots:other", "o"),
        *control("dpo_shots:gist", "d"),
        *control("sft_chosen:rose", "s"),
        entry("rose", 1.0, 0, "one"),
        entry("less", 1.0, 0, "one"),
    ]
    numbers = list(numbers_of(entries, [0, 1]).values())
    assert list(dict.fromkeys(number.arm for number in numbers)) == [
        "dpo_shots:rose",
        "dpo_shots:other",
        "sft_chosen:rose",
        "rose",
        "less",
    ]
    assert numbers[0].same_as == ("dpo_shots:less", "dpo_shots:gist")
    text = "\n".join(table_lines(numbers, 0.95))
    assert "  dpo_shots:rose +2  -" in text
    assert "  dpo_shots:rose: the same models as dpo_shots:less, dpo_shots:gist" in text
    assert json.loads(table_json(numbers))[0]["same_as"] == ["dpo_shots:less", "dpo_shots:gist"]
    assert next(csv.DictReader(io.StringIO(table_csv(numbers))))["same_as"] == "dpo_shots:less dpo_shots:gist"


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


def test_rules_that_random_rows_do_not_follow_are_said() -> None:
    def target(name: str, **selection: Any) -> TargetConfig:
        return TargetConfig(name=name, pairs=[PairInput(files=["-"])], selection=SelectionConfig(**selection))

    targets = [
        target("rose", decontaminate=Decontaminate(files=["-"]), exclude_sources=["math"]),
        target("less", decontaminate=Decontaminate(files=["-"]), method="round_robin"),
        target("untried", near_duplicates=NearDuplicates()),
    ]
    entries = [entry(arm, 0.1, 0, "one") for arm in ("random", "rose", "less", "full")]
    assert list(rule_lines(Index(entries, {}, [0], 100), targets)) == [
        "random and full: drawn without the rules of the arms' selections, so they may hold rows that these pass over: "
        "decontaminate (rose, less); exclude_sources (rose)"
    ]
    assert not list(rule_lines(Index(entries[1:3], {}, [0], 100), targets))
    assert not list(rule_lines(Index(entries, {}, [0], 100), [target("rose", count=3)]))


def test_agreement_of_judges() -> None:
    models = [("0", "won", "odd"), ("1", "won", "won")]
    entries = [
        Entry("rose", 0.1, 10, seed, model, {}, {"j/h": first, "k/h": second})
        for seed, (model, first, second) in enumerate(models)
    ]
    lines = list(judge_lines(Index(entries, {}, [0, 1], 100), CONFIG, ITEMS.__getitem__))  # type: ignore[arg-type]
    # two prompts, each with two comparisons that go together: at b both follow the order, at a none does
    assert lines[0] == "judge j: 4 comparisons, 0 without a verdict; 50.0% [0.0%, 100.0%] follow the order shown"
    # of k's comparisons the one of b without a verdict is left out
    assert lines[1] == "judge k: 4 comparisons, 1 without a verdict; 33.3% [0.0%, 100.0%] follow the order shown"
    assert lines[2].startswith("judges j and k: Cohen's kappa +1.000") and lines[2].endswith("over 3 comparisons")
    lines = list(judge_lines(Index(entries[:1], {}, [0], 100), CONFIG, ITEMS.__getitem__))  # type: ignore[arg-type]
    assert lines[1] == "judge k: 2 comparisons, 1 without a verdict; 0.0% follow the order shown"
    assert lines[2] == "judges j and k: Cohen's kappa undefined: both always say the same over 1 comparisons"
