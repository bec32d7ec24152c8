"""The direction of a target's few pairs beside that of held-out pairs, subtask by subtask, checkpoint by checkpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from rose_ray.config.job import JobConfig
from rose_ray.config.target import PairInput, TargetConfig
from rose_ray.data.preferences import PreferencePair
from rose_ray.errors import ConfigError, PairError, SpaceMismatchError
from rose_ray.kernels.alignment import cosines_between_halves, cosines_with_sums, half_weights, resampled_weights
from rose_ray.kernels.pair_terms import pair_terms
from rose_ray.stages.diagnose.findings import listed
from rose_ray.stages.diagnose.stored import StoredBank, check_gradients

LEVEL = 0.95
"""Of the intervals."""


@dataclass(frozen=True)
class Cosine:
    """A cosine and its percentile interval over held-out pairs drawn with replacement; None where there is one pair."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class SubtaskAlignment:
    """One subtask.

    Attributes:
        subtask: Its name.
        num_pairs, num_held_out: Pairs on either side.
        checkpoints: The cosine at each checkpoint.
        weighted: Their mean by the checkpoints' weights.
        halves: The same cosine between two random halves of the held-out pairs, mean over draws: how well half of them
            know the direction. None for fewer than two pairs.
    """

    subtask: str
    num_pairs: int
    num_held_out: int
    checkpoints: dict[str, Cosine]
    weighted: Cosine
    halves: float | None


@dataclass(frozen=True)
class AlignmentReport:
    """What `alignment` found.

    Attributes:
        target, objective: As configured.
        num_resamples: Of the intervals.
        subtasks: In the target's order.
        unmatched: Subtasks without held-out pairs, and the other way round.
    """

    target: str
    objective: str
    num_resamples: int
    subtasks: tuple[SubtaskAlignment, ...]
    unmatched: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """The same for a file."""
        return asdict(self)


def held_out_target(config: JobConfig, target: TargetConfig, held_out: Sequence[str], num: int | None) -> TargetConfig:
    """Return a target like this one whose pairs are the held-out ones.

    Args:
        config: Of the job.
        target: Its objective, encoding and normalisation are kept.
        held_out: ``FILES``, read as the target's files are, or ``SUBTASK=FILES``.
        num: Take the first so many of every subtask; all where None.

    Raises:
        ConfigError: The target's method takes no gradients; or it is scored exactly, so that held-out pairs would live
            in a space of their own; or its inputs are read in several ways, and ``FILES`` does not say which is meant.
    """
    check_gradients(target)
    if config.is_exact(target):
        raise ConfigError(
            f"target {target.name}: exact targets have a basis of their own pairs, in which held-out pairs cannot be "
            "compared. Set `exact: false` and a `gradients.projection` for this command."
        )
    names = {entry.subtask for entry in target.pairs}
    inputs = []
    for text in held_out:
        subtask, equals, files = text.partition("=")
        if equals and subtask in names:
            like = next(entry for entry in target.pairs if entry.subtask == subtask)
            inputs.append(like.model_copy(update={"files": [files]}))
            continue
        ways = {entry.model_copy(update={"files": ["-"]}).model_dump_json() for entry in target.pairs}
        if len(ways) > 1:
            known = ", ".join(sorted(name for name in names if name))
            raise ConfigError(
                f"target {target.name}: {text!r} does not say which subtask it holds, and the target's inputs differ. "
                f"Write SUBTASK=FILES with one of {known or 'its subtasks'}."
            )
        inputs.append(target.pairs[0].model_copy(update={"files": [text]}))
    return target.model_copy(update={"name": f"{target.name}-held-out", "pairs": _valid(inputs), "shots": num})


def _valid(inputs: Sequence[PairInput]) -> list[PairInput]:
    return [PairInput.model_validate(entry.model_dump()) for entry in inputs]


def check_apart(target: TargetConfig, pairs: Sequence[PreferencePair], held_out: Sequence[PreferencePair]) -> None:
    """Refuse held-out pairs that are among the target's own.

    Raises:
        PairError: Some are, by id or by prompt and both answers; they are listed.
    """

    def content(pair: PreferencePair) -> tuple[str, ...]:
        return (pair.raw_prompt.strip(), pair.chosen.strip(), pair.rejected.strip())

    ids, contents = {pair.pair_id for pair in pairs}, {content(pair) for pair in pairs}
    shared = [pair.pair_id for pair in held_out if pair.pair_id in ids or content(pair) in contents]
    if shared:
        raise PairError(
            f"target {target.name}: {len(shared)} of {len(held_out)} held-out pairs are among its own: "
            f"{listed(shared)}. Take them out of the held-out files."
        )


def alignments(bank: StoredBank, held_out: StoredBank, *, num_resamples: int, seed: int) -> AlignmentReport:
    """Compare two banks of one space.

    Args:
        bank: Of the target.
        held_out: Of the held-out pairs, with the same objective and normalisation.
        num_resamples: Of the held-out pairs.
        seed: Of the resampling.

    Raises:
        SpaceMismatchError: The banks live in different spaces.
        NumericsError: A direction is zero.
    """
    spaces = [each.manifest.made_from["space"] for each in (bank, held_out)]
    if spaces[0] != spaces[1]:
        raise SpaceMismatchError(
            f"{bank.manifest.folder} and {held_out.manifest.folder} were made in different spaces. Run "
            "`rose-ray bank CONFIG`, then this again."
        )
    own, other = _terms(bank), _terms(held_out)
    counts, held_counts = Counter(bank.subtasks), Counter(held_out.subtasks)
    random = np.random.default_rng(seed)
    found = []
    for name, number in counts.items():
        if name not in held_counts:
            continue
        directions = [terms[_members(bank, name)].sum(axis=0) for terms in own]
        vectors = [terms[_members(held_out, name)] for terms in other]
        size = held_counts[name]
        weights_RH = np.concatenate([np.ones((1, size)), resampled_weights(size, num_resamples, random)])
        cosines_CR = np.stack(
            [cosines_with_sums(d_D, each, weights_RH) for d_D, each in zip(directions, vectors, strict=True)]
        )
        halves = None
        if size > 1:
            first_RH = half_weights(size, num_resamples, random)
            halves = float(np.mean(bank.weights_C @ [cosines_between_halves(each, first_RH) for each in vectors]))
        found.append(
            SubtaskAlignment(
                name,
                number,
                size,
                {at: _cosine(row_R, size) for at, row_R in zip(bank.checkpoints, cosines_CR, strict=True)},
                _cosine(bank.weights_C @ cosines_CR, size),
                halves,
            )
        )
    unmatched = [f"{name}: no held-out pair" for name in counts if name not in held_counts]
    unmatched += [f"{name}: held-out pairs alone" for name in held_counts if name not in counts]
    return AlignmentReport(bank.target.name, bank.target.objective, num_resamples, tuple(found), tuple(unmatched))


def _terms(bank: StoredBank) -> list[np.ndarray]:
    target = bank.target
    return [
        pair_terms(target.objective, pairs, dpo_beta=target.dpo_beta, normalize=target.normalize)
        for pairs in bank.pairs
    ]


def _members(bank: StoredBank, subtask: str) -> np.ndarray:
    return np.flatnonzero([name == subtask for name in bank.subtasks])


def _cosine(values_R: np.ndarray, num_pairs: int) -> Cosine:
    """Of the pairs as they are, first of the values, with an interval by the others."""
    if num_pairs == 1:
        return Cosine(float(values_R[0]), None, None)
    low, high = np.quantile(values_R[1:], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Cosine(float(values_R[0]), float(low), float(high))


def alignment_lines(report: AlignmentReport) -> Iterator[str]:
    """Tell a report to people."""
    yield (
        f"target {report.target}, objective {report.objective}: cosine of its direction with that of held-out pairs "
        f"[{LEVEL:.0%} of {report.num_resamples:,} resamples of the held-out pairs]"
    )
    width = max([len(each.subtask) for each in report.subtasks], default=7)
    for each in report.subtasks:
        halves = "" if each.halves is None else f"; halves of the held-out pairs {each.halves:+.3f}"
        yield (
            f"  {each.subtask:<{width}}  {_shown(each.weighted)}  {each.num_pairs} pairs, {each.num_held_out} held "
            f"out{halves}"
        )
        for name, cosine in each.checkpoints.items():
            yield f"  {'':<{width}}    {name}: {_shown(cosine)}"
    for line in report.unmatched:
        yield f"  {line}"


def _shown(cosine: Cosine) -> str:
    interval = "" if cosine.low is None else f" [{cosine.low:+.3f}, {cosine.high:+.3f}]"
    return f"{cosine.value:+.3f}{interval}"
