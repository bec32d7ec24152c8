"""How many shots it takes until the selection no longer hangs on which ones they are.

A shot is a pair, or all pairs of a labelled row: those share prompt and chosen side, so they are drawn, left out and
flipped together. All of it is arithmetic on stored vectors: no model, no gradient.

Shapes: V pairs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from rose_ray.config.selection import SelectionConfig
from rose_ray.data.preferences import Shot
from rose_ray.errors import NumericsError
from rose_ray.kernels.pair_draws import numbered, two_subsets
from rose_ray.stages.diagnose.findings import listed
from rose_ray.stages.diagnose.pool_scores import PoolScores, Scored

FLIPPED = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
"""Shares of labels that the flip curve turns round, each to the nearest whole shot."""

LEVEL = 0.95
"""Of the intervals."""


@dataclass(frozen=True)
class DrawSettings:
    """How many draws, and from where on a selection is stable.

    Attributes:
        num_draws: Random draws for each point of a curve.
        threshold: Jaccard index that the lower end of the interval must reach.
        seed: Of the draws.
    """

    num_draws: int = 50
    threshold: float = 0.8
    seed: int = 0


@dataclass(frozen=True)
class Spread:
    """A number over draws: mean, and the percentile interval of ``LEVEL``; None where no draw defines it."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """Of the values that are numbers."""
        known = np.array([value for value in values if np.isfinite(value)])
        if not known.size:
            return None
        low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return cls(float(known.mean()), float(low), float(high))


@dataclass(frozen=True)
class ShotPoint:
    """Agreement at one number of shots a subtask.

    Attributes:
        num_shots: Of every subtask; all where it has fewer.
        jaccard, spearman: With the selection, and the scores, of all pairs. Draws share pairs with the whole, the more
            the larger they are, so this comes near 1 of itself.
        apart_jaccard, apart_spearman: Between two draws without a shot in common: what another set of as many would
            give. None where a subtask has too few for two.
    """

    num_shots: int
    jaccard: Spread
    spearman: Spread | None
    apart_jaccard: Spread | None
    apart_spearman: Spread | None


@dataclass(frozen=True)
class LeftOut:
    """Agreement with the selection of all pairs once one shot is left out.

    Attributes:
        name: Id of the pair, or of the labelled row.
        subtask: Its.
        num_pairs: Of the shot.
        jaccard, spearman: With the selection, and the scores, of all pairs.
    """

    name: str
    subtask: str
    num_pairs: int
    jaccard: float
    spearman: float | None


@dataclass(frozen=True)
class FlipPoint:
    """Agreement once some labels are flipped, with the selection and scores of the labels as they are.

    Attributes:
        share: Of the shots, flipped.
        num_flipped: Shots flipped, all pairs of each.
        jaccard, spearman: With the selection, and the scores, of the labels as they are.
    """

    share: float
    num_flipped: int
    jaccard: Spread
    spearman: Spread | None


@dataclass(frozen=True)
class ShotsReport:
    """What `shots` found out about a target.

    Attributes:
        target, objective: As configured.
        subtasks: Shots of each.
        num_pairs: Of all shots.
        num_rows, num_selected: Scored rows, and selected ones with all pairs.
        settings: Of the draws.
        curve: By number of shots.
        stable_shots: The smallest number of shots from which on every point's lower end of ``jaccard`` reaches the
            threshold; None where there is none below all pairs.
        left_out: The shot that changes the selection most comes first.
        alone: Shots that are their subtask's only one, and cannot be left out.
        flips: By share.
        skipped_draws: Draws whose pairs cancel each other.
        not_applied: Keys of the target's ``selection`` that need rows' texts or vectors, and were left aside.
    """

    target: str
    objective: str
    subtasks: dict[str, int]
    num_pairs: int
    num_rows: int
    num_selected: int
    settings: DrawSettings
    curve: tuple[ShotPoint, ...]
    stable_shots: int | None
    left_out: tuple[LeftOut, ...]
    alone: tuple[str, ...]
    flips: tuple[FlipPoint, ...]
    skipped_draws: int
    not_applied: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """The same for a file."""
        return asdict(self)


def shots_report(scores: PoolScores, shots: Sequence[Shot], settings: DrawSettings) -> ShotsReport:
    """Draw shots again and again, and compare what they select with what all pairs select.

    Args:
        scores: Of the pool, read.
        shots: Of each pair, in the bank's order.
        settings: Draws, threshold, seed.

    Raises:
        NumericsError: The direction of all pairs is zero in a subtask.
        ConfigError: The selection asks for more rows than it may choose from.
    """
    runner = _Runner(scores, shots, settings)
    curve = tuple(runner.curve())
    left_out = sorted(runner.left_out(), key=lambda each: (each.jaccard, each.name))
    counts = runner.counts
    return ShotsReport(
        target=scores.target.name,
        objective=scores.target.objective,
        subtasks=dict(counts),
        num_pairs=len(shots),
        num_rows=scores.num_rows,
        num_selected=len(runner.whole.chosen),
        settings=settings,
        curve=curve,
        stable_shots=stable_shots(curve, settings.threshold),
        left_out=tuple(left_out),
        alone=tuple(shot.name for shot in runner.names if counts[shot.subtask] == 1),
        flips=tuple(runner.flips()),
        skipped_draws=runner.num_skipped,
        not_applied=tuple(_gates(scores.target.selection)),
    )


def _gates(selection: SelectionConfig) -> Iterator[str]:
    return (name for name in ("near_duplicates", "decontaminate", "diversity") if getattr(selection, name) is not None)


def stable_shots(curve: Sequence[ShotPoint], threshold: float) -> int | None:
    """Return the smallest number of shots from which on all lower ends of ``jaccard`` reach the threshold."""
    stable = None
    for point in sorted(curve, key=lambda each: -each.num_shots):
        if point.jaccard.low < threshold:
            break
        stable = point.num_shots
    return stable


def shot_numbers(most: int) -> list[int]:
    """Return the numbers of shots of a curve below ``most``: all up to 3, then each about half as large again."""
    numbers, number = [], 1
    while number < most:
        numbers.append(number)
        number = max(number + 1, round(number * 1.5))
    return numbers


class _Runner:
    def __init__(self, scores: PoolScores, shots: Sequence[Shot], settings: DrawSettings) -> None:
        self.scores, self.shots, self.settings = scores, shots, settings
        self.subtasks = [shot.subtask for shot in shots]
        self.names, self.numbers_V = list(dict.fromkeys(shots)), numbered(shots)
        self.counts = Counter(shot.subtask for shot in self.names)
        self.random = np.random.default_rng(settings.seed)
        self.num_skipped = 0
        self.all_V = np.ones(len(shots), dtype=bool)
        self.whole = scores.scored(self.all_V)

    def _scored(self, drawn_V: np.ndarray, flipped_V: np.ndarray | None = None) -> Scored | None:
        try:
            return self.scores.scored(drawn_V, flipped_V)
        except NumericsError:
            self.num_skipped += 1
            return None

    def curve(self) -> Iterator[ShotPoint]:
        counts = self.counts
        for number in shot_numbers(max(counts.values())):
            with_whole, apart = [], []
            for _ in range(self.settings.num_draws):
                first_V, second_V = two_subsets(self.subtasks, self.shots, number, self.random)
                first = self._scored(first_V)
                if first is None:
                    continue
                with_whole.append(first.agreement(self.whole))
                if min(counts.values()) >= 2 * number and (second := self._scored(second_V)) is not None:
                    apart.append(first.agreement(second))
            jaccard, spearman = _spreads(with_whole)
            if jaccard is not None:
                yield ShotPoint(number, jaccard, spearman, *_spreads(apart))

    def left_out(self) -> Iterator[LeftOut]:
        for number, shot in enumerate(self.names):
            rest_V = self.numbers_V != number
            if self.counts[shot.subtask] == 1 or (found := self._scored(rest_V)) is None:
                continue
            jaccard, spearman = found.agreement(self.whole)
            num_pairs = int((~rest_V).sum())
            known = spearman if np.isfinite(spearman) else None
            yield LeftOut(shot.name, shot.subtask, num_pairs, jaccard, known)

    def flips(self) -> Iterator[FlipPoint]:
        total = len(self.names)
        for number in sorted({round(share * total) for share in FLIPPED}):
            found = []
            for _ in range(self.settings.num_draws if number else 1):
                flipped_V = np.isin(self.numbers_V, self.random.choice(total, number, replace=False))
                if (scored := self._scored(self.all_V, flipped_V)) is not None:
                    found.append(scored.agreement(self.whole))
            jaccard, spearman = _spreads(found)
            if jaccard is not None:
                yield FlipPoint(number / total, number, jaccard, spearman)


def _spreads(agreements: Sequence[tuple[float, float]]) -> tuple[Spread | None, Spread | None]:
    return Spread.of([each[0] for each in agreements]), Spread.of([each[1] for each in agreements])


def shots_lines(report: ShotsReport) -> Iterator[str]:
    """Tell a report to people."""
    settings = report.settings
    num_shots = sum(report.subtasks.values())
    drawn = "" if num_shots == report.num_pairs else f" ({num_shots} shots: pairs of a labelled row stay together)"
    yield (
        f"target {report.target}: {report.num_pairs} pairs{drawn} in {len(report.subtasks)} subtasks, "
        f"{report.num_selected:,} of {report.num_rows:,} rows selected, objective {report.objective}"
    )
    if report.not_applied:
        keys = " and ".join(f"selection.{name}" for name in report.not_applied)
        yield f"{keys} left aside: no row is passed over for what it holds here, so a run selects other rows"
    yield f"mean [{LEVEL:.0%} of {settings.num_draws} draws] of the selection's Jaccard index and the scores' Spearman"
    yield f"  {'shots':>5}  {'Jaccard with all':<19}  {'Spearman':<20}  {'Jaccard, other shots':<20}  {'Spearman':<20}"
    for point in report.curve:
        yield (
            f"  {point.num_shots:>5}  {_shown(point.jaccard):<19}  {_shown(point.spearman):<20}  "
            f"{_shown(point.apart_jaccard):<20}  {_shown(point.apart_spearman):<20}"
        ).rstrip()
    most = max(report.subtasks.values())
    if not report.curve:
        yield "  no number of shots to compare: every subtask has one shot"
    elif report.stable_shots is None:
        yield f"not stable below all {most} shots: a lower end of {settings.threshold:g} is not reached. Add some."
    else:
        yield f"stable from {report.stable_shots} shots of {most} on: from there every lower end is at least " + (
            f"{settings.threshold:g}"
        )
    if report.left_out:
        yield "one shot left out, those that matter most:"
        for each in report.left_out[:5]:
            yield f"  {each.name} ({each.subtask}): Jaccard {each.jaccard:.3f}, Spearman {_number(each.spearman)}"
    if report.alone:
        yield f"not left out, since each is its subtask's only shot: {listed(report.alone)}"
    yield "labels flipped at random:"
    for flip in report.flips:
        yield f"  {flip.share:>4.0%} ({flip.num_flipped} shots): Jaccard {_shown(flip.jaccard)}, Spearman " + (
            _shown(flip.spearman)
        )
    if report.skipped_draws:
        yield f"{report.skipped_draws} draws passed over: their pairs cancel each other"


def _shown(spread: Spread | None) -> str:
    return "-" if spread is None else f"{spread.mean:.2f} [{spread.low:.2f}, {spread.high:.2f}]"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:+.3f}"
