"""Directions of many draws of pairs, as sums of a few stored vectors.

Shapes: C checkpoints, V pairs, T subtasks, D projected dimensions, K atoms, N pool rows.

A score is linear in the pairs' directions, so the influence of every row on every pair is worked out once, [N, V], and
a draw of pairs (some left out, some with their label flipped) is a matrix product with its weights. Two objectives need
more: under ``less`` a flipped pair has another direction, so it has two atoms; under ``dpo_weighted`` a subtask's
direction is divided by its own length, which differs from checkpoint to checkpoint, so the checkpoints stay apart.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from rose_ray.errors import ConfigError, NumericsError, ShapeError
from rose_ray.kernels.aggregation import subtask_order
from rose_ray.kernels.feature_matrix import FeatureMatrix
from rose_ray.kernels.influence import influence
from rose_ray.kernels.objectives import CANCELLATION_FRACTION, Floats, Normalize, Objective, PairGradients, dpo_weights
from rose_ray.kernels.pair_terms import pair_terms, swapped


class PairAtoms:
    """What any draw of one target's pairs makes its directions of.

    Args:
        objective, dpo_beta, normalize: Of the target.
        pairs: The bank, one for each checkpoint.
        weights_C: Of the checkpoints.
        subtasks: Of each pair.

    Attributes:
        subtasks: Names, in the order of their columns.
        num_pairs: V.
        num_atoms: K.
    """

    def __init__(
        self,
        objective: Objective,
        pairs: Sequence[PairGradients],
        weights_C: NDArray[np.float64],
        subtasks: Sequence[str],
        *,
        dpo_beta: float,
        normalize: Normalize,
    ) -> None:
        def terms(each: PairGradients) -> Floats:
            return pair_terms(objective, each, dpo_beta=dpo_beta, normalize=normalize)

        if len(subtasks) != len(pairs[0].pair_ids):
            raise ShapeError(f"{len(subtasks)} subtasks for {len(pairs[0].pair_ids)} pairs; expected one each")
        self.subtasks, self.num_pairs = subtask_order(subtasks), len(subtasks)
        self._labels_V = np.array([self.subtasks.index(name) for name in subtasks])
        self._weights_C = np.asarray(weights_C, dtype=np.float64)
        self._is_weighted, self._divides = objective == "dpo_weighted", normalize != "none"
        self._vectors = [terms(each) for each in pairs]
        self._two_sided = objective == "less"
        if self._two_sided:
            self._vectors = [
                np.concatenate([own, terms(swapped(each))]) for own, each in zip(self._vectors, pairs, strict=True)
            ]
        if self._is_weighted:
            self._flip_ratios = [dpo_weights(swapped(each), dpo_beta) / dpo_weights(each, dpo_beta) for each in pairs]
            self._grams = [own @ own.T for own in self._vectors]
        per_checkpoint = len(self._vectors[0])
        self.num_atoms = per_checkpoint * (len(pairs) if self._is_weighted else 1)

    def influences(self, features: Sequence[NDArray[np.floating] | FeatureMatrix]) -> Floats:
        """Return the influence of rows on the atoms, [N, K], float64.

        Args:
            features: [N, D] for each checkpoint, or as they are stored, in the scale of the target's ``normalize``.
        """
        each = (influence(features_ND, own) for features_ND, own in zip(features, self._vectors, strict=True))
        if self._is_weighted:
            return np.concatenate(list(each), axis=1)
        return np.asarray(sum(weight * part for weight, part in zip(self._weights_C, each, strict=True)))

    def columns(self, drawn_V: NDArray[np.bool_], flipped_V: NDArray[np.bool_]) -> Floats:
        """Return the weights [K, T] that make a draw's subtask scores of the influences on the atoms.

        Args:
            drawn_V: Pairs that take part; of every subtask at least one.
            flipped_V: Pairs with chosen and rejected in each other's place.

        Raises:
            NumericsError: A subtask has no pair, or its direction is zero.
        """
        counts_T = np.bincount(self._labels_V[drawn_V], minlength=len(self.subtasks))
        if (counts_T == 0).any():
            missing = [self.subtasks[place] for place in np.flatnonzero(counts_T == 0).tolist()]
            raise NumericsError(f"a draw leaves no pair of {', '.join(missing)}; expected one of every subtask")
        member_VT = (drawn_V[:, None] & (self._labels_V[:, None] == np.arange(len(self.subtasks)))).astype(np.float64)
        if self._is_weighted:
            return np.concatenate([self._weighted(number, member_VT, flipped_V) for number in range(len(self._grams))])
        mean_VT = member_VT / counts_T
        if self._two_sided:
            return np.concatenate([mean_VT * ~flipped_V[:, None], mean_VT * flipped_V[:, None]])
        signed_VT: Floats = np.where(flipped_V[:, None], -mean_VT, mean_VT)
        return signed_VT

    def signed_atoms(self, drawn_V: NDArray[np.bool_], flipped_V: NDArray[np.bool_]) -> list[tuple[int, float]]:
        """Return the atom that is each drawn pair's own direction, and its sign, in the pairs' order.

        Raises:
            ConfigError: Under ``dpo_weighted`` single pairs have no scores.
        """
        if self._is_weighted:
            raise ConfigError("dpo_weighted makes one direction of a subtask's pairs: single pairs have no scores")
        if self._two_sided:
            return [(v + self.num_pairs * int(flipped_V[v]), 1.0) for v in np.flatnonzero(drawn_V).tolist()]
        return [(v, -1.0 if flipped_V[v] else 1.0) for v in np.flatnonzero(drawn_V).tolist()]

    def _weighted(self, number: int, member_VT: Floats, flipped_V: NDArray[np.bool_]) -> Floats:
        amounts_V = np.where(flipped_V, -self._flip_ratios[number], 1.0)
        sums_VT = amounts_V[:, None] * member_VT
        if self._divides:
            gram_VV = self._grams[number]
            squares_T = np.einsum("vt,vw,wt->t", sums_VT, gram_VV, sums_VT)
            reaches_T = np.sqrt(np.diag(gram_VV)) @ np.abs(sums_VT)
            if (squares_T <= (CANCELLATION_FRACTION * reaches_T) ** 2).any():
                raise NumericsError("the direction of a draw is zero within rounding: its pairs cancel each other")
            sums_VT = sums_VT / np.sqrt(squares_T)
        return np.asarray(self._weights_C[number] * sums_VT)


def two_subsets(
    subtasks: Sequence[str], shots: Sequence[Hashable], num_shots: int, random: np.random.Generator
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Draw shots of every subtask without replacement, and again from what is left.

    Args:
        subtasks: Of each pair.
        shots: Of each pair; those of one shot are equal, and of one subtask.
        num_shots: Of each subtask; all where it has fewer. Where too few are left, the second draw has fewer or none.
        random: Draws.

    Returns:
        Which pairs were drawn first, and then: bool [V] each.
    """
    labels_V, shots_V = np.asarray(subtasks, dtype=object), numbered(shots)
    first_V, second_V = np.zeros((2, len(subtasks)), dtype=bool)
    for name in dict.fromkeys(subtasks):
        order = random.permutation(np.unique(shots_V[labels_V == name]))
        first_V |= np.isin(shots_V, order[:num_shots])
        second_V |= np.isin(shots_V, order[num_shots : 2 * num_shots])
    return first_V, second_V


def numbered(shots: Sequence[Hashable]) -> NDArray[np.int64]:
    """Return the number of each pair's shot [V], counted from 0 in the order in which shots appear."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(shot, len(numbers)) for shot in shots], dtype=np.int64)


def jaccard(first: NDArray[np.int64], second: NDArray[np.int64]) -> float:
    """Size of the intersection over that of the union of two sets of positions, none twice; 1 for two empty ones."""
    shared = len(np.intersect1d(first, second, assume_unique=True))
    union = len(first) + len(second) - shared
    return shared / union if union else 1.0
