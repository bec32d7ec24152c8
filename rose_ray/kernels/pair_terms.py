"""What each pair puts into the direction of its subtask.

Shapes: V pairs, D projected dimensions, T subtasks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rose_ray.errors import NumericsError, ShapeError
from rose_ray.kernels.objectives import (
    CANCELLATION_FRACTION,
    Floats,
    Normalize,
    Objective,
    PairGradients,
    bank_directions,
    dpo_weights,
    side_scales,
    without_common,
)


def swapped(pairs: PairGradients) -> PairGradients:
    """Return the same pairs with chosen and rejected in each other's place: a flipped label."""
    return PairGradients(
        pairs.pair_ids,
        g_w_VD=pairs.g_l_VD,
        g_l_VD=pairs.g_w_VD,
        norms_w_V=pairs.norms_l_V,
        norms_l_V=pairs.norms_w_V,
        dots_wl_V=pairs.dots_wl_V,
        tokens_w_V=pairs.tokens_l_V,
        tokens_l_V=pairs.tokens_w_V,
        logps_w_V=pairs.logps_l_V,
        logps_l_V=pairs.logps_w_V,
        ref_logps_w_V=pairs.ref_logps_l_V,
        ref_logps_l_V=pairs.ref_logps_w_V,
    )


def pair_terms(objective: Objective, pairs: PairGradients, *, dpo_beta: float, normalize: Normalize) -> Floats:
    """Return the vector of each pair [V, D], float64, whose sum over a subtask points as the subtask does.

    In all objectives but ``dpo_weighted`` these are the pairs' directions, and a subtask's direction is their mean.
    There they are ``dpo_beta sigma(-M) (g_l - g_w)``, not normalised, and a subtask's direction is their sum over the
    sum's length (over nothing with ``normalize: none``).

    Raises:
        ConfigError, NumericsError: As `bank_directions`.
    """
    if objective == "dpo_weighted":
        weights_V = dpo_weights(pairs, dpo_beta)
        terms_VD: Floats = weights_V[:, None] * (pairs.g_l_VD - pairs.g_w_VD)
        return without_common(terms_VD) if normalize == "own" else terms_VD
    each = [f"{number}" for number in range(len(pairs.pair_ids))]
    return bank_directions(objective, pairs, dpo_beta=dpo_beta, subtasks=each, normalize=normalize).vectors_UD


def chosen_shares(objective: Objective, pairs: PairGradients) -> Floats:
    """Return how much of each pair's direction is its chosen side, [V].

    A direction ``d = a_l g_l - a_w g_w`` is a sum of two vectors, so ``|d|^2 = <d, -a_w g_w> + <d, a_l g_l>``. The
    share is the first term over the sum; the rejected side has the rest. Computed from the exact lengths and inner
    products of the bank. Shares leave [0, 1] where the two gradients are so alike that the smaller one is taken from.

    Raises:
        NumericsError: A direction is zero; the message names the pairs.
    """
    scales_w_V, scales_l_V = side_scales(objective, pairs)
    own_w_V = (scales_w_V * pairs.norms_w_V) ** 2
    own_l_V = (scales_l_V * pairs.norms_l_V) ** 2
    shared_V = scales_w_V * scales_l_V * pairs.dots_wl_V
    squares_V = own_w_V + own_l_V - 2 * shared_V
    zero_V = squares_V <= (CANCELLATION_FRACTION * (np.sqrt(own_w_V) + np.sqrt(own_l_V))) ** 2
    if zero_V.any():
        names = [pairs.pair_ids[place] for place in np.flatnonzero(zero_V).tolist()]
        raise NumericsError(f"the {objective} direction is zero in {len(names)} pairs: {', '.join(names[:10])}")
    shares_V: Floats = (own_w_V - shared_V) / squares_V
    return shares_V


def cosines_with_rest(terms_VD: NDArray[np.float64], subtasks: Sequence[str]) -> Floats:
    """Return the cosine of each pair's vector with the sum of the others of its subtask, [V].

    NaN where the subtask has no other pair, or a vector is zero: there is nothing to compare.

    Raises:
        ShapeError: Vectors and labels differ in number.
    """
    if terms_VD.ndim != 2 or len(terms_VD) != len(subtasks):
        raise ShapeError(f"terms have shape {terms_VD.shape} for {len(subtasks)} labels; expected one a row")
    cosines_V = np.full(len(subtasks), np.nan)
    labels_V = np.asarray(subtasks, dtype=object)
    for name in dict.fromkeys(subtasks):
        members = np.flatnonzero(labels_V == name)
        if len(members) < 2:
            continue
        own = terms_VD[members]
        rest = own.sum(axis=0) - own
        lengths = np.linalg.norm(own, axis=1) * np.linalg.norm(rest, axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            cosines_V[members] = np.where(lengths > 0, (own * rest).sum(axis=1) / lengths, np.nan)
    return cosines_V
