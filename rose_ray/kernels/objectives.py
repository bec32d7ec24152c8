"""Objectives as arithmetic on the two stored gradients of each pair.

Shapes: V pairs, U directions (one a pair, or one a subtask), D projected dimensions.

The bank keeps, per pair and checkpoint, ``g_w = R grad log p(chosen)`` and ``g_l = R grad log p(rejected)``,
both of summed log-probabilities. By linearity every objective follows from them without a backward pass. A
direction is the gradient of the objective's loss, so a training step along ``-Gamma`` lowers that loss by
``<Gamma, direction>``: a positive influence helps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from rose_ray.errors import ConfigError, NonFiniteError, NumericsError, ShapeError

Objective = Literal["rose", "rose_simpo", "rose_balanced", "less", "dpo_weighted"]
Normalize = Literal["exact", "own", "projected", "none"]
Floats = NDArray[np.float64]

CANCELLATION_FRACTION = 1e-6
"""A difference shorter than this part of the two lengths it is made of counts as zero: float32 gradients of
equal answers, computed in different batches, differ by about this much."""


@dataclass(frozen=True, eq=False)
class PairGradients:
    """What the bank knows of a target's pairs at one checkpoint. Arrays are turned into float64.

    Args:
        pair_ids: V names for messages.
        g_w_VD: Projected gradients of the chosen answers' summed log-probabilities.
        g_l_VD: Of the rejected answers'.
        norms_w_V: Exact lengths of the unprojected chosen gradients, computed in float64.
        norms_l_V: Of the rejected ones.
        dots_wl_V: Exact inner products of the two unprojected gradients, computed in float64.
        tokens_w_V: Answer tokens of the chosen side, at least 1.
        tokens_l_V: Of the rejected side.
        logps_w_V: Summed log-probabilities under the checkpoint, nats. With ``logps_l_V`` and the two
            ``ref_`` arrays (under the reference) needed by ``dpo_weighted`` alone, else None will do.

    Raises:
        ShapeError: The shapes disagree.
        NonFiniteError: An array holds NaN or infinity; the message names the pairs.
        NumericsError: A token count is below 1; the message names the pairs.
    """

    pair_ids: Sequence[str]
    g_w_VD: Floats
    g_l_VD: Floats
    norms_w_V: Floats
    norms_l_V: Floats
    dots_wl_V: Floats
    tokens_w_V: Floats
    tokens_l_V: Floats
    logps_w_V: Floats | None = None
    logps_l_V: Floats | None = None
    ref_logps_w_V: Floats | None = None
    ref_logps_l_V: Floats | None = None

    def __post_init__(self) -> None:
        num_pairs = len(self.pair_ids)
        width = np.shape(self.g_w_VD)[-1:]
        for name, value in tuple(vars(self).items()):
            if name == "pair_ids" or value is None:
                continue
            array = np.asarray(value, dtype=np.float64)
            expected = (num_pairs, *width) if name.endswith("_VD") else (num_pairs,)
            if array.shape != expected:
                raise ShapeError(f"{name} has shape {array.shape}; expected {expected}")
            bad = np.unique(np.argwhere(~np.isfinite(array))[:, 0])
            if bad.size:
                raise NonFiniteError(f"{name} is not finite in {self._named(bad)}; compute the bank again")
            object.__setattr__(self, name, array)
        few = np.flatnonzero((self.tokens_w_V < 1) | (self.tokens_l_V < 1))
        if few.size:
            raise NumericsError(f"answers without tokens in {self._named(few)}; expected at least 1 a side")

    def _named(self, positions: NDArray[np.intp]) -> str:
        return _listed([self.pair_ids[position] for position in positions.tolist()])


@dataclass(frozen=True, eq=False)
class Directions:
    """Directions of one target at one checkpoint.

    Args:
        vectors_UD: float64, normalised as asked.
        names: The pair each row belongs to, or its subtask in ``dpo_weighted``.
        subtasks: Subtask of each row.
        exact_norms_U: Length of the direction before projecting and normalising, float64; in
            ``dpo_weighted`` that of the projected sum.
    """

    vectors_UD: Floats
    names: tuple[str, ...]
    subtasks: tuple[str, ...]
    exact_norms_U: Floats


def bank_directions(
    objective: Objective,
    pairs: PairGradients,
    *,
    dpo_beta: float,
    subtasks: Sequence[str],
    normalize: Normalize = "exact",
) -> Directions:
    """Return the direction of each pair, or of each subtask, under an objective.

    With n the token counts, M the margin and sigma the logistic function::

        rose           g_l - g_w              ROSE (arXiv:2412.00631): the DPO gradient up to its scale
        rose_simpo     g_l / n_l - g_w / n_w  length-normalised margin, as in SimPO (arXiv:2405.14734)
        rose_balanced  g_l / |g_l| - g_w / |g_w|, exact lengths: neither side outweighs the other
        less           -g_w / n_w             LESS (arXiv:2402.04333) on the chosen answers
        dpo_weighted   per subtask, the sum over its pairs of dpo_beta sigma(-M) (g_l - g_w)

    ``dpo_beta`` and the reference matter in ``dpo_weighted`` alone: elsewhere they would only scale a pair.

    Args:
        objective: One of the five above.
        pairs: Stored gradients at one checkpoint.
        dpo_beta: Above 0.
        subtasks: Subtask of each pair. Rows of ``dpo_weighted`` come in order of first appearance.
        normalize: ``exact`` divides by the unprojected length, found from the stored lengths and inner
            products. Inner products across pairs are not stored, so in ``dpo_weighted`` it is the length of
            the projected sum. ``own`` is for deflated projections, whose last number is the inner product with the
            direction that all rows have in common: that part is left out of vector and length. ``projected`` divides
            by the projected length, ``none`` by nothing.

    Raises:
        ConfigError: An unknown name, ``dpo_beta`` out of range, or log-probabilities missing.
        ShapeError: The number of subtask labels is not that of the pairs.
        NumericsError: A direction, or what ``own`` leaves of it, is zero within rounding; the message names the pairs.
    """
    if objective not in get_args(Objective):
        raise ConfigError(f"objective is {objective!r}; expected one of {', '.join(get_args(Objective))}")
    if normalize not in get_args(Normalize):
        raise ConfigError(f"normalize is {normalize!r}; expected one of {', '.join(get_args(Normalize))}")
    if not (np.isfinite(dpo_beta) and dpo_beta > 0):
        raise ConfigError(f"dpo_beta is {dpo_beta!r}; expected a finite number above 0, usually 0.1")
    if len(subtasks) != len(pairs.pair_ids):
        raise ShapeError(f"{len(subtasks)} subtask labels for {len(pairs.pair_ids)} pairs; expected one each")
    if objective == "dpo_weighted":
        raw = _subtask_directions(pairs, dpo_beta, subtasks)
    else:
        raw = _pair_directions(objective, pairs, subtasks)
    if normalize == "none":
        return raw
    if normalize == "own":
        own_UD = without_common(raw.vectors_UD)
        squares_U = raw.exact_norms_U**2 - raw.vectors_UD[:, -1] ** 2
        _refuse_zero(squares_U <= CANCELLATION_FRACTION * raw.exact_norms_U**2, raw.names, "own")
        return Directions(own_UD / np.sqrt(squares_U)[:, None], raw.names, raw.subtasks, raw.exact_norms_U)
    lengths_U = raw.exact_norms_U if normalize == "exact" else np.linalg.norm(raw.vectors_UD, axis=1)
    _refuse_zero(lengths_U == 0, raw.names, "projected")
    return Directions(raw.vectors_UD / lengths_U[:, None], raw.names, raw.subtasks, raw.exact_norms_U)


def without_common(vectors_UD: Floats) -> Floats:
    """Return vectors of a deflated projection with their last number, the common direction's part, set to 0."""
    own_UD = vectors_UD.copy()
    own_UD[:, -1] = 0.0
    return own_UD


def _pair_directions(objective: Objective, pairs: PairGradients, subtasks: Sequence[str]) -> Directions:
    names = tuple(pairs.pair_ids)
    scale_w_V, scale_l_V = side_scales(objective, pairs)
    vectors_VD = scale_l_V[:, None] * pairs.g_l_VD - scale_w_V[:, None] * pairs.g_w_VD
    lengths_w_V, lengths_l_V = scale_w_V * pairs.norms_w_V, scale_l_V * pairs.norms_l_V
    squares_V = lengths_w_V**2 + lengths_l_V**2 - 2 * scale_w_V * scale_l_V * pairs.dots_wl_V
    norms_V = np.sqrt(np.maximum(squares_V, 0.0))
    _refuse_zero(norms_V <= CANCELLATION_FRACTION * (lengths_w_V + lengths_l_V), names, objective)
    return Directions(vectors_VD, names, tuple(subtasks), norms_V)


def side_scales(objective: Objective, pairs: PairGradients) -> tuple[Floats, Floats]:
    """What the chosen and the rejected gradient of each pair are multiplied by, [V] each.

    A pair's direction is ``scale_l g_l - scale_w g_w``, the gradient of ``scale_l log p(l) - scale_w log p(w)``.
    ``dpo_weighted`` points, pair by pair, as ``rose`` does, so its scales are those.

    Raises:
        NumericsError: ``rose_balanced`` meets a side without a gradient; the message names the pairs.
    """
    ones_V = np.ones(len(pairs.pair_ids))
    if objective in ("rose", "dpo_weighted"):
        return ones_V, ones_V
    if objective == "rose_simpo":
        return 1 / pairs.tokens_w_V, 1 / pairs.tokens_l_V
    if objective == "less":
        return 1 / pairs.tokens_w_V, 0 * ones_V
    zero_V = (pairs.norms_w_V == 0) | (pairs.norms_l_V == 0)
    _refuse_zero(zero_V, pairs.pair_ids, objective)
    return 1 / pairs.norms_w_V, 1 / pairs.norms_l_V


def _subtask_directions(pairs: PairGradients, dpo_beta: float, subtasks: Sequence[str]) -> Directions:
    weights_V = dpo_weights(pairs, dpo_beta)
    names = tuple(dict.fromkeys(subtasks))
    labels_V = np.asarray(subtasks, dtype=object)
    sums, norms = [], []
    for name in names:
        members = np.flatnonzero(labels_V == name)
        weights = weights_V[members]
        total_D = weights @ (pairs.g_l_VD[members] - pairs.g_w_VD[members])
        reach = weights @ (
            np.linalg.norm(pairs.g_l_VD[members], axis=1) + np.linalg.norm(pairs.g_w_VD[members], axis=1)
        )
        length = float(np.linalg.norm(total_D))
        if length <= CANCELLATION_FRACTION * reach:
            raise _zero_direction("dpo_weighted", [pairs.pair_ids[member] for member in members.tolist()])
        sums.append(total_D)
        norms.append(length)
    return Directions(np.array(sums).reshape(len(names), -1), names, names, np.array(norms))


def dpo_weights(pairs: PairGradients, dpo_beta: float) -> Floats:
    """Return ``dpo_beta sigma(-M)`` of each pair [V]: how strongly the DPO loss still pulls at it.

    Raises:
        ConfigError: Log-probabilities are missing.
    """
    return dpo_beta * _sigmoid(-_margins(pairs, dpo_beta))


def _margins(pairs: PairGradients, dpo_beta: float) -> Floats:
    logps = (pairs.logps_w_V, pairs.logps_l_V, pairs.ref_logps_w_V, pairs.ref_logps_l_V)
    w_V, l_V, ref_w_V, ref_l_V = (np.zeros(0) if part is None else part for part in logps)
    if any(part is None for part in logps):
        raise ConfigError(
            "objective 'dpo_weighted' needs log-probabilities under the checkpoint and under the reference, "
            "and the bank lacks some; compute the bank for this objective"
        )
    return dpo_beta * ((w_V - ref_w_V) - (l_V - ref_l_V))


def _sigmoid(x: Floats) -> Floats:
    """Logistic function; never overflows."""
    small = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + small), small / (1 + small))


def _refuse_zero(zero: NDArray[np.bool_], names: Sequence[str], what: str) -> None:
    if zero.any():
        raise _zero_direction(what, [names[position] for position in np.flatnonzero(zero).tolist()])


def _zero_direction(what: str, names: Sequence[str]) -> NumericsError:
    return NumericsError(
        f"the {what} direction is zero within rounding in {_listed(names)}; "
        "the answers ask for no step or for opposite ones: remove or correct these pairs"
    )


def _listed(names: Sequence[str]) -> str:
    """At most ten names, with the number of all."""
    return f"{len(names)} of the bank's rows ({', '.join(names[:10])}{', ...' if len(names) > 10 else ''})"
