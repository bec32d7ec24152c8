"""What the rows of the table have on one benchmark: numbers of every seed and item, beside those of random rows.

Shapes: S seeds, N items.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rose_ray.errors import AccountingError
from rose_ray.evaluate.index import Entry
from rose_ray.evaluate.measures import Item
from rose_ray.kernels.bootstrap import Estimate, Resampling, crossed_estimate, mean_estimate
from rose_ray.kernels.win_rate import length_controlled_win_rate

Prompts = Mapping[str, Mapping[str, str]]
"""The prompt of every pair by name of the held-out set and pair id."""

WIN_RATE, CONTROLLED = "win_rate", "length_controlled_win_rate"


@dataclass(frozen=True)
class Gathered:
    """What the seeds of one row of the table have on one benchmark.

    Attributes:
        row: The row, for messages.
        item_ids: Of the items, N.
        seeds: Measured, S.
        missing: Not measured.
        values: By measure, [S, N]; NaN for a comparison without a verdict.
        prompts_N: A number for each item, the same for those that share a prompt.
        usable_N: Whether an item has a number at every seed.
    """

    row: str
    item_ids: list[str]
    seeds: list[int | None]
    missing: list[int | None]
    values: dict[str, NDArray[np.float64]]
    prompts_N: NDArray[np.int64]
    usable_N: NDArray[np.bool_]

    @property
    def num_unusable(self) -> int:
        """Comparisons without a verdict, over all seeds."""
        return int(np.isnan(self.values[WIN_RATE]).sum()) if WIN_RATE in self.values else 0

    @property
    def num_prompts(self) -> int:
        """Prompts of the usable items."""
        return len(set(self.prompts_N[self.usable_N].tolist()))

    def estimate(self, measure: str, resampling: Resampling) -> Estimate | None:
        """Return a measure's mean, or the length-controlled rate; None where a seed is missing, or no item usable.

        Items of one prompt are resampled together: three pairs of one question tell less than three questions.
        """
        if self.missing or not self.usable_N.any():
            return None
        groups_N = self.prompts_N[self.usable_N]
        values_SN = self.values[measure][:, self.usable_N]
        if measure != CONTROLLED:
            return mean_estimate(values_SN, resampling, groups_N)
        lengths_SN = self.values["length_difference"][:, self.usable_N]

        def controlled(taken_S: NDArray[np.int64], taken_N: NDArray[np.int64]) -> float:
            places = np.ix_(taken_S, taken_N)
            return length_controlled_win_rate(values_SN[places].ravel(), lengths_SN[places].ravel())

        return crossed_estimate(len(values_SN), values_SN.shape[1], controlled, resampling, groups_N)

    def difference(self, other: Gathered, measure: str, resampling: Resampling) -> Estimate | None:
        """Return by how much a measure's mean is above another row's, each item at each seed less the other's.

        Seeds and items are drawn once for both rows, so what they share, easy items or a lucky seed, is no part of the
        interval. Over items usable in both. None where a seed of either is missing, no item is usable, or the measure
        is no mean over items.

        Raises:
            AccountingError: The two were measured on other items.
        """
        if self.item_ids and other.item_ids and self.item_ids != other.item_ids:
            raise AccountingError(
                f"evaluation: {self.row} and {other.row} were measured on other items. Run `rose-ray evaluate` again."
            )
        if measure == CONTROLLED or self.missing or other.missing:
            return None
        usable_N = self.usable_N & other.usable_N
        if not usable_N.any():
            return None
        differences_SN = (self.values[measure] - other.values[measure])[:, usable_N]
        return mean_estimate(differences_SN, resampling, self.prompts_N[usable_N])


def gather(
    group: Sequence[Entry],
    seeds: Sequence[int | None],
    benchmark: str,
    found: Mapping[int | None, Sequence[Item]],
    measures: Callable[[Sequence[Item]], Mapping[str, NDArray[np.float64]]],
    prompts: Mapping[str, str] | None,
) -> Gathered:
    """Put together what the seeds of a row have.

    Args:
        group: Entries of the row.
        seeds: That it should have.
        benchmark: Name, for messages.
        found: Items by seed.
        measures: Gives the values of one seed's items, [N] each; NaN where there is none.
        prompts: Of held-out pairs, by id; None where every item has its own.

    Raises:
        AccountingError: The seeds were measured on other items, or on pairs whose prompt is not known.
    """
    row = f"{group[0].arm} at {group[0].budget}"
    measured = [seed for seed in seeds if seed in found]
    ids = [[str(item["item_id"]) for item in found[seed]] for seed in measured]
    if any(each != ids[0] for each in ids):
        raise AccountingError(
            f"evaluation: {row}: its seeds were measured on other items of {benchmark}. Run `rose-ray evaluate` again."
        )
    item_ids = ids[0] if ids else []
    own = [measures(found[seed]) for seed in measured]
    values = {name: np.stack([each[name] for each in own]) for name in (own[0] if own else ())}
    # Only verdicts may lack a number: a NaN among measures is refused when they are averaged.
    lacking_N = np.isnan(values[WIN_RATE]).sum(axis=0) if WIN_RATE in values else np.zeros(len(item_ids))
    missing = [seed for seed in seeds if seed not in found]
    places_N = _prompt_places(item_ids, prompts, benchmark)
    return Gathered(row, item_ids, measured, missing, values, places_N, np.asarray(lacking_N == 0))


def verdict_values(items: Sequence[Item]) -> dict[str, NDArray[np.float64]]:
    """Return scores and differences of length of verdicts, [N] each; NaN without a verdict."""
    scores_N = np.array([np.nan if item["score"] is None else item["score"] for item in items], dtype=float)
    lengths_N = np.array([item["length_difference"] for item in items], dtype=float)
    return {WIN_RATE: scores_N, CONTROLLED: scores_N, "length_difference": lengths_N}


def _prompt_places(item_ids: Sequence[str], prompts: Mapping[str, str] | None, benchmark: str) -> NDArray[np.int64]:
    if prompts is None:
        return np.arange(len(item_ids))
    unknown = [item_id for item_id in item_ids if item_id not in prompts]
    if unknown:
        raise AccountingError(
            f"evaluation {benchmark}: {len(unknown)} of {len(item_ids)} pairs that were measured on are not in its "
            f"files any more, first {unknown[0]!r}: which of them share a prompt is not known. Put the files back, or "
            "run `rose-ray evaluate` again."
        )
    places: dict[str, int] = {}
    return np.array([places.setdefault(prompts[item_id], len(places)) for item_id in item_ids], dtype=np.int64)
