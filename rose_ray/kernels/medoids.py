"""A few rows that stand for many: the members nearest to the centres of k-means.

Shapes: N rows, H numbers each, K clusters.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rose_ray.errors import ConfigError, NonFiniteError, ShapeError

MAX_ROUNDS = 50
"""Rounds of Lloyd's algorithm at most; a few dozen settle it, and any state of it makes a fair choice."""


def cluster_medoids(vectors_NH: NDArray[Any], num_clusters: int, seed: int) -> NDArray[np.int64]:
    """Return the places of K different rows, one near the centre of each cluster of k-means.

    Starts by k-means++, with a random stream of its own. Where all rows of a cluster went elsewhere its centre stays.
    Rows nearest to a centre settle ties by place, so equal rows in equal order give an equal choice.

    Args:
        vectors_NH: Floating point. Worked on in float64.
        num_clusters: K, at most N.
        seed: Of the random stream.

    Returns:
        Array [K], int64, ascending.

    Raises:
        ShapeError: Not a matrix.
        ConfigError: K is below 1 or above N.
        NonFiniteError: A row has a NaN or infinity.
    """
    if vectors_NH.ndim != 2:
        raise ShapeError(f"vectors have shape {vectors_NH.shape}; expected [N, H]")
    if not 1 <= num_clusters <= len(vectors_NH):
        raise ConfigError(f"{num_clusters} clusters of {len(vectors_NH)} rows; expected 1 to {len(vectors_NH)}")
    rows_NH = vectors_NH.astype(np.float64)
    if not np.isfinite(rows_NH).all():
        raise NonFiniteError("vectors to cluster are not finite; leave their rows out")
    centres_KH = rows_NH[_start(rows_NH, num_clusters, np.random.default_rng(seed))]
    owner_N = np.full(len(rows_NH), -1)
    for _ in range(MAX_ROUNDS):
        nearest_N = _squares(rows_NH, centres_KH).argmin(axis=1)
        if (nearest_N == owner_N).all():
            break
        owner_N = nearest_N
        for cluster in np.unique(owner_N):
            centres_KH[cluster] = rows_NH[owner_N == cluster].mean(axis=0)
    return _nearest_rows(_squares(rows_NH, centres_KH))


def _start(rows_NH: NDArray[np.float64], num_clusters: int, random: np.random.Generator) -> list[int]:
    """k-means++ (Arthur and Vassilvitskii, 2007): each next start with a chance by its square distance."""
    chosen = [int(random.integers(len(rows_NH)))]
    reach_N = _squares(rows_NH, rows_NH[chosen])[:, 0]
    while len(chosen) < num_clusters:
        reach_N[chosen] = 0.0
        total = reach_N.sum()
        if total > 0:
            place = int(np.searchsorted(np.cumsum(reach_N), random.random() * total, side="right"))
        else:  # only copies of the starts are left
            place = next(row for row in range(len(rows_NH)) if row not in set(chosen))
        chosen.append(min(place, len(rows_NH) - 1))
        reach_N = np.minimum(reach_N, _squares(rows_NH, rows_NH[chosen[-1:]])[:, 0])
    return chosen


def _nearest_rows(squares_NK: NDArray[np.float64]) -> NDArray[np.int64]:
    free_N = np.ones(len(squares_NK), dtype=bool)
    chosen = []
    for cluster in range(squares_NK.shape[1]):
        chosen.append(int(np.where(free_N, squares_NK[:, cluster], np.inf).argmin()))
        free_N[chosen[-1]] = False
    return np.sort(np.array(chosen, dtype=np.int64))


def _squares(rows_NH: NDArray[np.float64], centres_KH: NDArray[np.float64]) -> NDArray[np.float64]:
    squares: NDArray[np.float64] = np.stack(
        [((rows_NH - centre_H) ** 2).sum(axis=1) for centre_H in centres_KH], axis=1
    )
    return squares
