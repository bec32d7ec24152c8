"""From influences on pairs to one score a row.

Shapes: N pool rows, V pairs (or other directions), T subtasks.

Columns are added one after the other, so a row's result does not depend on how many rows come with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from rose_ray.errors import ConfigError, ShapeError

SubtaskMode = Literal["mean"]
ScoreMode = Literal["max", "mean"]


def subtask_order(subtask_of_V: Sequence[str]) -> tuple[str, ...]:
    """Subtasks in order of first appearance: the columns of :func:`aggregate_subtasks`."""
    return tuple(dict.fromkeys(subtask_of_V))


def aggregate_subtasks(
    influences_NV: NDArray[Any], subtask_of_V: Sequence[str], mode: SubtaskMode = "mean"
) -> NDArray[np.float64]:
    """Mean influence over the pairs of each subtask, as LESS averages over its shots (section 4).

    Args:
        influences_NV: One column a pair.
        subtask_of_V: Subtask of each column.
        mode: ``mean``.

    Returns:
        Array [N, T], float64; columns in :func:`subtask_order`.

    Raises:
        ConfigError: The mode is unknown.
        ShapeError: Labels and columns differ in number, or there are none.
    """
    _check_mode("subtask aggregation", mode, get_args(SubtaskMode))
    if influences_NV.ndim != 2 or influences_NV.shape[1] != len(subtask_of_V) or not len(subtask_of_V):
        raise ShapeError(
            f"influences have shape {influences_NV.shape} for {len(subtask_of_V)} subtask labels; "
            "expected one label for each of at least one column"
        )
    names = subtask_order(subtask_of_V)
    sums_NT = np.zeros((influences_NV.shape[0], len(names)), dtype=np.float64)
    counts_T = np.zeros(len(names), dtype=np.float64)
    for column, subtask in enumerate(subtask_of_V):
        sums_NT[:, names.index(subtask)] += influences_NV[:, column]
        counts_T[names.index(subtask)] += 1
    return sums_NT / counts_T


def aggregate_scores(subtask_scores_NT: NDArray[Any], mode: ScoreMode = "max") -> NDArray[np.float64]:
    """One score a row: the best subtask (``max``, as LESS and ROSE do) or the mean of all subtasks.

    Args:
        subtask_scores_NT: One column a subtask.
        mode: ``max`` or ``mean``.

    Returns:
        Array [N], float64. NaN passes through.

    Raises:
        ConfigError: The mode is unknown.
        ShapeError: There is no column, or the array is not two-dimensional.
    """
    _check_mode("score aggregation", mode, get_args(ScoreMode))
    if subtask_scores_NT.ndim != 2 or subtask_scores_NT.shape[1] == 0:
        raise ShapeError(f"subtask scores have shape {subtask_scores_NT.shape}; expected [N, T], T at least 1")
    scores_NT = subtask_scores_NT.astype(np.float64)
    if mode == "max":
        best_N: NDArray[np.float64] = scores_NT.max(axis=1)
        return best_N
    total_N = np.zeros(scores_NT.shape[0], dtype=np.float64)
    for column in range(scores_NT.shape[1]):
        total_N += scores_NT[:, column]
    mean_N: NDArray[np.float64] = total_N / scores_NT.shape[1]
    return mean_N


def _check_mode(what: str, mode: str, known: tuple[str, ...]) -> None:
    if mode not in known:
        raise ConfigError(f"{what} is {mode!r}; expected one of {', '.join(known)}")
