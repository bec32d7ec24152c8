"""Scores made of losses and log-probabilities alone.

Shapes: N rows, A anchors. Everything in nats, float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rose_ray.errors import ShapeError

Floats = NDArray[np.float64]


def ifd_ratio(given_N: NDArray[Any], alone_N: NDArray[Any]) -> Floats:
    """Instruction-following difficulty (Cherry LLM, arXiv:2308.12032).

    Args:
        given_N: Mean cross-entropy of each answer's tokens given its prompt.
        alone_N: Of the same tokens without the prompt.

    Returns:
        Array [N]: their ratio. High: the prompt helps little. Above 1: it hinders. NaN or infinite where an answer
        costs nothing alone.

    Raises:
        ShapeError: The shapes differ.
    """
    _same_shape(given_N, alone_N)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio_N: Floats = given_N.astype(np.float64) / alone_N.astype(np.float64)
    return ratio_N


def loss_drop(before_N: NDArray[Any], after_N: NDArray[Any]) -> Floats:
    """Share of each row's loss that training on the target took away.

    Args:
        before_N: Mean cross-entropy under the base model.
        after_N: Under the model that was trained on the target.

    Returns:
        Array [N]: ``(before - after) / before``, at most 1, negative where the loss rose. NaN or infinite where there
        was no loss to lose.

    Raises:
        ShapeError: The shapes differ.
    """
    _same_shape(before_N, after_N)
    before, after = before_N.astype(np.float64), after_N.astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        dropped_N: Floats = (before - after) / before
    return dropped_N


def rises(one_shot_NA: NDArray[Any], zero_shot_A: NDArray[Any]) -> Floats:
    """Whether each anchor's answer is likelier behind each row as a demonstration (Nuggets, arXiv:2312.10302).

    Args:
        one_shot_NA: Log-probability of the anchor's answer with the row before it.
        zero_shot_A: Without one.

    Returns:
        Array [N, A]: 1 where it rose, else 0; the mean over anchors is the golden score. NaN where a
        log-probability is.

    Raises:
        ShapeError: The anchors differ in number.
    """
    if one_shot_NA.ndim != 2 or one_shot_NA.shape[1:] != zero_shot_A.shape:
        raise ShapeError(
            f"log-probabilities have shapes {one_shot_NA.shape} and {zero_shot_A.shape}; expected [N, A] and [A]"
        )
    rise_NA = (one_shot_NA > zero_shot_A).astype(np.float64)
    rise_NA[np.isnan(one_shot_NA) | np.isnan(zero_shot_A)] = np.nan
    return rise_NA


def _same_shape(first_N: NDArray[Any], second_N: NDArray[Any]) -> None:
    if first_N.ndim != 1 or first_N.shape != second_N.shape:
        raise ShapeError(f"losses have shapes {first_N.shape} and {second_N.shape}; expected [N] twice")
