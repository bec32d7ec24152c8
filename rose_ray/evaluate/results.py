"""From the numbers of every trial to the numbers of every row of the table, each with an interval.

Shapes: S seeds, N items.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rose_ray.config.evaluation import EvaluationConfig
from rose_ray.evaluate.gathered import CONTROLLED, WIN_RATE, Gathered, Prompts, gather, verdict_values
from rose_ray.evaluate.index import Entry, Index
from rose_ray.evaluate.measures import HIGHER_IS_BETTER, Item, pair_values, question_values
from rose_ray.evaluate.trials import RANDOM
from rose_ray.kernels.bootstrap import Estimate, Resampling
from rose_ray.kernels.knee import knee

Reader = Callable[[str], Sequence[Item]]
"""Gives the items of a folder."""

MEASURES = {
    "pairs": ("margin", "accuracy", "dpo_loss", "ce_chosen", "length_normalised_loss"),
    "multiple_choice": ("choice_accuracy",),
    "exact_match": ("exact_match",),
}
"""Measures of each kind of benchmark."""


@dataclass(frozen=True)
class Number:
    """One measure of one row of the table.

    Attributes:
        arm, budget, num_rows: Of the row; the first arm where several controls share their models.
        benchmark: Name of the held-out set or task; with ``/JUDGE`` behind it for win rates.
        measure: Key of ``HIGHER_IS_BETTER``.
        estimate: None where a seed is missing: what is there is not averaged over.
        seeds: Measured.
        missing: Not measured.
        num_items: Items of each seed that count.
        num_prompts: Prompts that they are of; the items of one are resampled together.
        num_unusable: Comparisons without a verdict, over all seeds.
        is_knee: Whether the arm's curve of this measure has its knee here.
        difference: From ``random`` at the same budget, seeds and items; None where there is none, a seed is missing on
            either side, or the measure is no mean over items.
        same_as: Further controls with the same models.
    """

    arm: str
    budget: float | None
    num_rows: int
    benchmark: str
    measure: str
    estimate: Estimate | None
    seeds: list[int | None]
    missing: list[int | None]
    num_items: int
    num_prompts: int
    num_unusable: int = 0
    is_knee: bool = False
    difference: Estimate | None = None
    same_as: tuple[str, ...] = ()


def resampling_of(config: EvaluationConfig) -> Resampling:
    """Return how intervals are made."""
    settings = config.intervals
    return Resampling(settings.resamples, settings.level, settings.seed)


def table_numbers(index: Index, config: EvaluationConfig, read: Reader, prompts: Prompts) -> list[Number]:
    """Return every number of the table, knees marked.

    Args:
        index: Of the evaluation.
        config: Betas and intervals.
        read: Gives the items of a folder; each is read once per use.
        prompts: Of every held-out set.

    Raises:
        AccountingError: Seeds of one row, or a row and the random one, were measured on other items; or pairs are not
            among the held-out ones.
    """
    resampling = resampling_of(config)
    groups, same = once(grouped(index.entries))
    numbers: list[Number] = []
    keys = [(key, False) for key in _benchmarks(index, config)] + [(key, True) for key in verdict_keys(config)]
    for key, is_judged in keys:
        collect = _gather_verdicts if is_judged else _gather_measures
        gathered = [collect(group, key, index, config, read, prompts) for group in groups]
        paired = {group[0].budget: each for group, each in zip(groups, gathered, strict=True) if group[0].arm == RANDOM}
        for group, own in zip(groups, gathered, strict=True):
            if own is not None:
                other = None if group[0].arm == RANDOM else paired.get(group[0].budget)
                for number in _numbers(group[0], key, is_judged, own, other, resampling):
                    numbers.append(replace(number, same_as=same.get(number.arm, ())))
    order = {(group[0].arm, group[0].budget): place for place, group in enumerate(groups)}
    numbers.sort(key=lambda number: order[number.arm, number.budget])
    return with_knees(numbers)


def grouped(entries: Sequence[Entry]) -> list[list[Entry]]:
    """Return the entries of each row of the table, rows in the order of their first entry."""
    groups: dict[tuple[str, float | None], list[Entry]] = {}
    for entry in entries:
        groups.setdefault((entry.arm, entry.budget), []).append(entry)
    return list(groups.values())


def once(groups: Sequence[list[Entry]]) -> tuple[list[list[Entry]], dict[str, tuple[str, ...]]]:
    """Return each control once: those of targets with the same pairs have the same models.

    Args:
        groups: From `grouped`.

    Returns:
        The groups without repetitions, and by the arm of one that was repeated the arms that are left out.
    """
    kept: dict[Any, list[Entry]] = {}
    same: dict[str, tuple[str, ...]] = {}
    for group in groups:
        arm = group[0].arm
        control, colon, _ = arm.partition(":")
        models = tuple((entry.seed, entry.model) for entry in group)
        first = kept.setdefault((control, group[0].budget, models) if colon else (arm, group[0].budget), group)[0].arm
        if first != arm:
            same[first] = (*same.get(first, ()), arm)
    return list(kept.values()), same


def verdict_keys(config: EvaluationConfig) -> list[str]:
    """Return ``JUDGE/HELD_OUT`` of every judge and held-out set."""
    return [f"{judge.name}/{held_out.name}" for judge in config.judges for held_out in config.held_out]


def entry_values(
    entry: Entry, index: Index, config: EvaluationConfig, key: str, read: Reader
) -> dict[str, NDArray[np.float64]]:
    """Return a trial's measures on a benchmark, an array over items each."""
    reference = read(index.untrained[key]) if key.startswith("pairs/") else []
    return _values(key, read(entry.measures[key]), reference, config)


def _benchmarks(index: Index, config: EvaluationConfig) -> list[str]:
    keys = [f"pairs/{held_out.name}" for held_out in config.held_out]
    keys += [f"{task.kind}/{task.name}" for task in config.tasks]
    return [key for key in keys if key in index.untrained]


def _values(
    key: str, items: Sequence[Item], reference: Sequence[Item], config: EvaluationConfig
) -> dict[str, NDArray[np.float64]]:
    if not key.startswith("pairs/"):
        return question_values(items)
    name = key.partition("/")[2]
    beta = next(held_out.dpo_beta for held_out in config.held_out if held_out.name == name)
    return pair_values(items, reference, dpo_beta=beta, length_normalised_beta=config.length_normalised_beta)


def _gather_measures(
    group: Sequence[Entry], key: str, index: Index, config: EvaluationConfig, read: Reader, prompts: Prompts
) -> Gathered:
    kind, _, name = key.partition("/")
    reference = read(index.untrained[key]) if kind == "pairs" else []
    known = prompts[name] if kind == "pairs" else None
    found = {entry.seed: read(entry.measures[key]) for entry in group if key in entry.measures}
    return gather(group, _seeds(group, index), name, found, lambda items: _values(key, items, reference, config), known)


def _gather_verdicts(
    group: Sequence[Entry], key: str, index: Index, config: EvaluationConfig, read: Reader, prompts: Prompts
) -> Gathered | None:
    """None where no seed was judged: the row has no opponent, or the judge has not come to it."""
    found = {entry.seed: read(entry.verdicts[key]) for entry in group if key in entry.verdicts}
    name = key.partition("/")[2]
    return gather(group, _seeds(group, index), key, found, verdict_values, prompts[name]) if found else None


def _seeds(group: Sequence[Entry], index: Index) -> list[int | None]:
    return [None] if group[0].seed is None else list(index.seeds)


def _numbers(
    first: Entry, key: str, is_judged: bool, own: Gathered, other: Gathered | None, resampling: Resampling
) -> Iterator[Number]:
    kind, _, name = key.partition("/")  # of verdicts, judge and held-out set
    for measure in (WIN_RATE, CONTROLLED) if is_judged else MEASURES[kind]:
        yield Number(
            first.arm,
            first.budget,
            first.num_rows,
            f"{name}/{kind}" if is_judged else name,
            measure,
            own.estimate(measure, resampling),
            own.seeds,
            own.missing,
            int(own.usable_N.sum()),
            own.num_prompts,
            own.num_unusable,
            difference=None if other is None else own.difference(other, measure, resampling),
        )


def with_knees(numbers: Sequence[Number]) -> list[Number]:
    """Mark the knee of every arm's curve of every measure; curves with a missing number have none."""
    curves: dict[tuple[str, str, str], list[Number]] = {}
    for number in numbers:
        if number.budget is not None:
            curves.setdefault((number.arm, number.benchmark, number.measure), []).append(number)
    knees = set()
    for (_, _, measure), curve in curves.items():
        points = sorted(curve, key=lambda number: number.budget or 0.0)
        values = [number.estimate.value for number in points if number.estimate is not None]
        if len(values) == len(points):
            budgets = [number.budget or 0.0 for number in points]
            place = knee(budgets, values, higher_is_better=HIGHER_IS_BETTER[measure])
            if place is not None:
                knees.add(id(points[place]))
    return [replace(number, is_knee=id(number) in knees) for number in numbers]


def number_record(number: Number) -> dict[str, Any]:
    """Return a number as a flat record: a line of the CSV, an object of the JSON."""
    estimate, difference = number.estimate, number.difference
    return {
        "arm": number.arm,
        "budget": number.budget,
        "rows": number.num_rows,
        "benchmark": number.benchmark,
        "measure": number.measure,
        "value": estimate.value if estimate else None,
        "low": estimate.low if estimate else None,
        "high": estimate.high if estimate else None,
        "difference": difference.value if difference else None,
        "difference_low": difference.low if difference else None,
        "difference_high": difference.high if difference else None,
        "seeds": number.seeds,
        "missing_seeds": number.missing,
        "items": number.num_items,
        "prompts": number.num_prompts,
        "unusable": number.num_unusable,
        "knee": number.is_knee,
        "same_as": list(number.same_as),
    }
