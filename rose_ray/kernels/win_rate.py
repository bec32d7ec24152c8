"""Win rates: of both orders of a comparison, and with the length of the answers held equal.

Shapes: N items.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rose_ray.errors import NonFiniteError, NumericsError, ShapeError

Preference = Literal["first", "second", "tie"]
Outcome = Literal["win", "tie", "loss"]

LENGTH_PENALTY = 1e-3
"""Weight of half the squared length coefficient beside the mean log-loss. Where length alone tells wins from losses the
coefficient would grow without bound; elsewhere this moves it by about a thousandth of the curvature."""

_MAX_STEPS = 100
_HALVINGS = 60


def both_orders_score(ours_first: Preference, ours_second: Preference) -> float:
    """Score of our answer in one comparison judged in both orders: 1 won twice, 0.5 tied or split, 0 lost twice.

    Args:
        ours_first: Verdict where our answer stood first.
        ours_second: Verdict where it stood second.
    """
    points = {"first": 1.0, "tie": 0.5, "second": 0.0}
    return (points[ours_first] + 1.0 - points[ours_second]) / 2


def outcome(score: float) -> Outcome:
    """Win above 0.5, loss below, tie at 0.5: a judge who follows the order has no preference."""
    return "win" if score > 0.5 else "loss" if score < 0.5 else "tie"


def position_bias(ours_first: Sequence[Preference], ours_second: Sequence[Preference]) -> float:
    """Share of the comparisons in which the same place, and so each answer once, is preferred in both orders."""
    same = [a == b and a != "tie" for a, b in zip(ours_first, ours_second, strict=True)]
    return sum(same) / len(same) if same else 0.0


def length_controlled_win_rate(scores_N: NDArray[Any], length_differences_N: NDArray[Any]) -> float:
    """Win rate that answers of equal length would have.

    Fits ``P(win) = sigmoid(a + b tanh(d / std(d)))`` by maximum likelihood, ties and splits as fractions of a win, and
    returns ``sigmoid(a)``. The length term of Dubois et al. 2024 (arXiv:2404.04475), without their term for the
    difficulty of a prompt. Where all scores are 1, or 0, that is the answer; where no length differs, the mean score.

    Args:
        scores_N: In [0, 1].
        length_differences_N: Length of our answer less that of the other, any unit.

    Raises:
        ShapeError: Not one-dimensional, of one length and not empty.
        NonFiniteError: A value is NaN or infinite.
        NumericsError: A score outside [0, 1].
    """
    scores_N = np.asarray(scores_N, dtype=np.float64)
    differences_N = np.asarray(length_differences_N, dtype=np.float64)
    if scores_N.ndim != 1 or scores_N.shape != differences_N.shape or not len(scores_N):
        raise ShapeError(
            f"scores have shape {scores_N.shape} and length differences {differences_N.shape}; expected one length"
        )
    if not (np.isfinite(scores_N).all() and np.isfinite(differences_N).all()):
        raise NonFiniteError("a score or a length is NaN or infinite")
    if scores_N.min() < 0 or scores_N.max() > 1:
        raise NumericsError(f"scores lie in [{scores_N.min()}, {scores_N.max()}]; expected [0, 1]")
    deviation = float(differences_N.std())
    if scores_N.min() == scores_N.max() and scores_N[0] in (0.0, 1.0):
        return float(scores_N[0])
    if not differences_N.any():
        return float(scores_N.mean())
    # A difference that never varies stands beside the intercept: the penalty parts them.
    term_N = np.tanh(differences_N / (deviation or float(np.abs(differences_N).mean())))
    intercept, _ = _fit(scores_N, term_N)
    return _sigmoid(intercept)


def _fit(scores_N: NDArray[np.float64], term_N: NDArray[np.float64]) -> tuple[float, float]:
    """Newton's method with halved steps on a convex loss of two numbers."""
    design_N2 = np.stack([np.ones_like(term_N), term_N], axis=1)
    penalty_2 = np.array([0.0, LENGTH_PENALTY])
    point_2 = np.zeros(2)
    loss = _loss(point_2, design_N2, scores_N)
    for _ in range(_MAX_STEPS):
        chance_N = 1 / (1 + np.exp(-design_N2 @ point_2))
        slope_2 = design_N2.T @ (chance_N - scores_N) / len(scores_N) + penalty_2 * point_2
        bend_22 = (design_N2.T * (chance_N * (1 - chance_N))) @ design_N2 / len(scores_N) + np.diag(penalty_2)
        step_2 = np.linalg.solve(bend_22 + 1e-12 * np.eye(2), slope_2)  # never singular in float64
        for halving in range(_HALVINGS):
            candidate_2 = point_2 - step_2 / 2**halving
            lower = _loss(candidate_2, design_N2, scores_N)
            if lower < loss:
                break
        else:
            break
        point_2, loss = candidate_2, lower
    return float(point_2[0]), float(point_2[1])


def _loss(point_2: NDArray[np.float64], design_N2: NDArray[np.float64], scores_N: NDArray[np.float64]) -> float:
    logits_N = design_N2 @ point_2
    return float((np.logaddexp(0, logits_N) - scores_N * logits_N).mean() + LENGTH_PENALTY * point_2[1] ** 2 / 2)


def _sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value)) if value >= 0 else math.exp(value) / (1 + math.exp(value))
