"""From the numbers of every trial to the numbers of every row of the table, each with an interval.

Shapes: S seeds, N items.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rose_ray.config.evaluation import EvaluationConfig
from rose_ray.errors import AccountingError
from rose_ray.evaluate.index import Entry, Index
from rose_ray.evaluate.measures import HIGHER_IS_BETTER, Item, pair_values, question_values
from rose_ray.kernels.bootstrap import Estimate, Resampling, crossed_estimate, mean_estimate
from rose_ray.kernels.knee import knee
from rose_ray.kernels.win_rate import length_controlled_win_rate

Reader = Callable[[str], Sequence[Item]]
"""Gives the items of a folder."""

PAIR_MEASURES = ("margin", "accuracy", "dpo_loss", "ce_chosen", "length_normalised_loss")


@dataclass(frozen=True)
class Number:
    """One measure of one row of the table.

    Attributes:
        arm, budget, num_rows: Of the row.
        benchmark: Name of the held-out set or task; with ``/JUDGE`` behind it for win rates.
        measure: Key of ``HIGHER_IS_BETTER``.
        estimate: None where a seed is missing: what is there is not averaged over.
        seeds: Measured.
        missing: Not measured.
        num_items: Items of each seed that count.
        num_unusable: Comparisons without a verdict, over all seeds.
        is_knee: Whether the arm's curve of this measure has its knee here.
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
    num_unusable: int = 0
    is_knee: bool = False


def resampling_of(config: EvaluationConfig) -> Resampling:
    """Return how intervals are made."""
    settings = config.intervals
    return Resampling(settings.resamples, settings.level, settings.seed)


def table_numbers(index: Index, config: EvaluationConfig, read: Reader) -> list[Number]:
    """Return every number of the table, knees marked.

    Args:
        index: Of the evaluation.
        config: Betas and intervals.
        read: Gives the items of a folder; each is read once per use.

    Raises:
        AccountingError: Seeds of one row were measured on other items.
    """
    resampling = resampling_of(config)
    references = {folder: list(read(folder)) for key, folder in index.untrained.items() if key.startswith("pairs/")}
    numbers: list[Number] = []
    for group in grouped(index.entries):
        seeds: list[int | None] = [None] if group[0].seed is None else list(index.seeds)
        by_seed = {entry.seed: entry for entry in group}
        for key in _benchmarks(index, config):
            folders = [by_seed[seed].measures.get(key) if seed in by_seed else None for seed in seeds]
            numbers += _measured(group[0], key, seeds, folders, index, config, references, read, resampling)
        for key in verdict_keys(config):
            folders = [by_seed[seed].verdicts.get(key) if seed in by_seed else None for seed in seeds]
            numbers += _judged(group[0], key, seeds, folders, read, resampling)
    return with_knees(numbers)


def grouped(entries: Sequence[Entry]) -> list[list[Entry]]:
    """Return the entries of each row of the table, rows in the order of their first entry."""
    groups: dict[tuple[str, float | None], list[Entry]] = {}
    for entry in entries:
        groups.setdefault((entry.arm, entry.budget), []).append(entry)
    return list(groups.values())


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


def _measured(
    first: Entry,
    key: str,
    seeds: Sequence[int | None],
    folders: Sequence[str | None],
    index: Index,
    config: EvaluationConfig,
    references: Mapping[str, Sequence[Item]],
    read: Reader,
    resampling: Resampling,
) -> Iterator[Number]:
    kind, _, name = key.partition("/")
    measures = {"pairs": PAIR_MEASURES, "multiple_choice": ("choice_accuracy",), "exact_match": ("exact_match",)}[kind]
    missing = [seed for seed, folder in zip(seeds, folders, strict=True) if folder is None]
    found = [list(read(folder)) for folder in folders if folder is not None]
    _check_items(first, name, found)
    reference = references.get(index.untrained[key], [])
    values = [_values(key, items, reference, config) for items in found]
    for measure in measures:
        estimate = None
        if not missing:
            estimate = mean_estimate(np.stack([each[measure] for each in values]), resampling)
        yield Number(
            first.arm,
            first.budget,
            first.num_rows,
            name,
            measure,
            estimate,
            [seed for seed in seeds if seed not in missing],
            missing,
            len(found[0]) if found else 0,
        )


def _judged(
    first: Entry,
    key: str,
    seeds: Sequence[int | None],
    folders: Sequence[str | None],
    read: Reader,
    resampling: Resampling,
) -> Iterator[Number]:
    judge, _, name = key.partition("/")
    missing = [seed for seed, folder in zip(seeds, folders, strict=True) if folder is None]
    if len(missing) == len(seeds):
        return  # the row has no opponent, or the judge has not come to it
    found = [list(read(folder)) for folder in folders if folder is not None]
    _check_items(first, key, found)
    usable = [all(items[place]["score"] is not None for items in found) for place in range(len(found[0]))]
    unusable = sum(item["score"] is None for items in found for item in items)
    scores_SN, lengths_SN = (
        np.array([[item[what] for item, use in zip(items, usable, strict=True) if use] for items in found], dtype=float)
        for what in ("score", "length_difference")
    )

    def controlled(taken_S: NDArray[np.int64], taken_N: NDArray[np.int64]) -> float:
        places = np.ix_(taken_S, taken_N)
        return length_controlled_win_rate(scores_SN[places].ravel(), lengths_SN[places].ravel())

    whole = not missing and scores_SN.size > 0
    estimates = {
        "win_rate": mean_estimate(scores_SN, resampling) if whole else None,
        "length_controlled_win_rate": crossed_estimate(len(found), sum(usable), controlled, resampling)
        if whole
        else None,
    }
    for measure, estimate in estimates.items():
        yield Number(
            first.arm,
            first.budget,
            first.num_rows,
            f"{name}/{judge}",
            measure,
            estimate,
            [seed for seed in seeds if seed not in missing],
            missing,
            sum(usable),
            unusable,
        )


def _check_items(first: Entry, name: str, found: Sequence[Sequence[Item]]) -> None:
    ids = [[item["item_id"] for item in items] for items in found]
    if any(each != ids[0] for each in ids):
        raise AccountingError(
            f"evaluation: {first.arm} at {first.budget}: its seeds were measured on other items of {name}. Run "
            "`rose-ray evaluate` again."
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
    estimate = number.estimate
    return {
        "arm": number.arm,
        "budget": number.budget,
        "rows": number.num_rows,
        "benchmark": number.benchmark,
        "measure": number.measure,
        "value": estimate.value if estimate else None,
        "low": estimate.low if estimate else None,
        "high": estimate.high if estimate else None,
        "seeds": number.seeds,
        "missing_seeds": number.missing,
        "items": number.num_items,
        "unusable": number.num_unusable,
        "knee": number.is_knee,
    }
