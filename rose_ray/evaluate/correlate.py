"""Which cheap loss follows what one wants: correlations across the trained models of an evaluation.

Shapes: M models, G rows of the table (an arm at a budget).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rose_ray.config.evaluation import EvaluationConfig
from rose_ray.errors import StoreError
from rose_ray.evaluate.index import Entry, Index
from rose_ray.evaluate.results import Reader, entry_values, resampling_of
from rose_ray.kernels.association import kendall, partial_spearman
from rose_ray.kernels.bootstrap import Estimate, Resampling, unit_estimate
from rose_ray.kernels.correlation import spearman

LOSSES = ("ce_chosen", "dpo_loss", "length_normalised_loss")
MIN_MODELS = 4
"""With fewer, a rank correlation has next to no values to take."""

_WIN_RATE = "win_rate"
_LENGTHS = ("answer_length", "training_length")

Columns = dict[str, float]


@dataclass(frozen=True)
class Association:
    """How a loss and an outcome go together across models.

    Attributes:
        held_out: Whose pairs both were measured on.
        loss: One of ``LOSSES``.
        outcome: ``margin``, ``accuracy``, or ``win_rate JUDGE``.
        num_models: Models that have both.
        num_groups: Rows of the table that these are seeds of; resampled whole.
        spearman, kendall: None where a side does not vary.
        partial: Spearman with a length held fixed, by its name; None where nothing is left.
    """

    held_out: str
    loss: str
    outcome: str
    num_models: int
    num_groups: int
    spearman: Estimate | None
    kendall: Estimate | None
    partial: dict[str, Estimate | None]


def associations(
    index: Index, config: EvaluationConfig, read: Reader, training_lengths: Mapping[str, float]
) -> list[Association]:
    """Correlate every loss with every outcome, on every held-out set.

    A model counts once, whatever rows of the table share it. Lengths held fixed: ``answer_length``, the mean characters
    of the model's answers, where it answered; ``training_length``, the mean labelled tokens of the rows it was trained
    on. Intervals resample rows of the table, all seeds of one together, since they are no independent models.

    Args:
        index: Of the evaluation.
        config: Its settings.
        read: Gives the items of a folder.
        training_lengths: By key of the model.

    Raises:
        StoreError: Fewer than ``MIN_MODELS`` models.
    """
    resampling = resampling_of(config)
    found: list[Association] = []
    for held_out in config.held_out:
        groups = _columns(index, config, read, held_out.name, training_lengths)
        models = sum(len(group) for group in groups)
        if models < MIN_MODELS:
            raise StoreError(
                f"correlate: {models} models were measured on {held_out.name}, expected at least {MIN_MODELS}. Run "
                "`rose-ray evaluate` with more budgets, arms or seeds."
            )
        outcomes = ["margin", "accuracy", *(f"{_WIN_RATE} {judge.name}" for judge in config.judges)]
        for loss in LOSSES:
            for outcome in outcomes:
                own = _having(groups, (loss, outcome))
                if sum(map(len, own)) >= MIN_MODELS:
                    found.append(_association(held_out.name, loss, outcome, own, resampling))
    return found


def _association(
    held_out: str, loss: str, outcome: str, groups: list[list[Columns]], resampling: Resampling
) -> Association:
    partials = {}
    for length in _LENGTHS:
        with_length = _having(groups, (length,))
        if sum(map(len, with_length)) >= MIN_MODELS:
            names = (loss, outcome, length)
            partials[length] = _estimate(with_length, names, partial_spearman, resampling)
    return Association(
        held_out,
        loss,
        outcome,
        sum(map(len, groups)),
        len(groups),
        _estimate(groups, (loss, outcome), spearman, resampling),
        _estimate(groups, (loss, outcome), kendall, resampling),
        partials,
    )


def _estimate(
    groups: list[list[Columns]],
    names: Sequence[str],
    statistic: Callable[..., float | None],
    resampling: Resampling,
) -> Estimate | None:
    return unit_estimate(len(groups), partial(_of_groups, groups, names, statistic), resampling)


def _of_groups(
    groups: list[list[Columns]],
    names: Sequence[str],
    statistic: Callable[..., float | None],
    taken_G: NDArray[np.int64],
) -> float | None:
    models = [model for place in taken_G for model in groups[place]]
    return statistic(*(np.array([model[name] for model in models]) for name in names))


def _having(groups: list[list[Columns]], names: Sequence[str]) -> list[list[Columns]]:
    kept = [[model for model in group if all(name in model for name in names)] for group in groups]
    return [group for group in kept if group]


def _columns(
    index: Index, config: EvaluationConfig, read: Reader, held_out: str, training_lengths: Mapping[str, float]
) -> list[list[Columns]]:
    key = f"pairs/{held_out}"
    groups: dict[tuple[str, float | None], list[Columns]] = {}
    seen: set[str] = set()
    for entry in index.entries:
        if key not in entry.measures or entry.model in seen:
            continue
        seen.add(entry.model)
        values = entry_values(entry, index, config, key, read)
        columns = {name: float(values[name].mean()) for name in (*LOSSES, "margin", "accuracy")}
        columns |= _rates(entry, config, held_out, read)
        if f"answers/{held_out}" in entry.measures:
            answers = read(entry.measures[f"answers/{held_out}"])
            columns["answer_length"] = sum(len(item["answer"]) for item in answers) / len(answers)
        if entry.model in training_lengths:
            columns["training_length"] = training_lengths[entry.model]
        groups.setdefault((entry.arm, entry.budget), []).append(columns)
    return list(groups.values())


def _rates(entry: Entry, config: EvaluationConfig, held_out: str, read: Reader) -> Columns:
    rates: Columns = {}
    for judge in config.judges:
        folder = entry.verdicts.get(f"{judge.name}/{held_out}")
        scores = [item["score"] for item in read(folder) if item["score"] is not None] if folder else []
        if scores:
            rates[f"{_WIN_RATE} {judge.name}"] = math.fsum(scores) / len(scores)
    return rates


def association_lines(found: Sequence[Association], level: float) -> Iterator[str]:
    """Yield associations as lines of text. A loss that follows an outcome well is near -1: lower loss, more of it."""
    for held_out in dict.fromkeys(each.held_out for each in found):
        own = [each for each in found if each.held_out == held_out]
        yield f"{held_out}: rank correlation across models; {level:.0%} intervals over rows of the table"
        for each in own:
            partials = "".join(f"  partial on {name} {_text(value)}" for name, value in each.partial.items())
            yield (
                f"  {each.loss:<22} {each.outcome:<18} Spearman {_text(each.spearman)}  Kendall {_text(each.kendall)}"
                f"{partials}  ({each.num_models} models of {each.num_groups} rows)"
            )
        if not any(each.outcome.startswith(_WIN_RATE) for each in own):
            yield (
                "  dpo_loss is computed from each pair's margin, so that it follows margin and accuracy says next to "
                "nothing: a judge's win rate would be another measure"
            )


def _text(estimate: Estimate | None) -> str:
    if estimate is None:
        return "undefined"
    if estimate.low is None:
        return f"{estimate.value:+.2f}"
    return f"{estimate.value:+.2f} [{estimate.low:+.2f}, {estimate.high:+.2f}]"


def association_records(found: Sequence[Association]) -> list[dict[str, Any]]:
    """Return associations as JSON-ready objects."""
    return [asdict(each) for each in found]
