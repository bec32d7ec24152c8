"""The order of rows: score descending, then row id ascending. Some 30 bytes a row while it is found.

Shapes: N rows, W words of an id.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rose_ray.errors import DataError, NonFiniteError, ShapeError

Positions = NDArray[np.int64]
Labels = Sequence[Any] | NDArray[Any]
"""Row ids: anything that sorts, or uint64 [N, W], numbers of 64 W bits with the highest word first."""

_ROW_BLOCK = 1 << 20
_NUM_NAMED = 10


def rank_order(scores_N: NDArray[Any], row_ids: Labels) -> Positions:
    """Positions of the rows, best first: score descending, then row_id ascending.

    Raises:
        ShapeError: Scores and row ids differ in number.
        NonFiniteError: A score is NaN; the message names the rows.
        DataError: A row_id occurs twice, so ties could not be settled.
    """
    check_distinct(row_ids)
    scores_N = np.asarray(scores_N)
    check_scores(scores_N, row_ids)
    words_NW = id_words(row_ids)
    keys_N = np.empty(len(words_NW), dtype=np.uint64)
    for start in range(0, len(keys_N), _ROW_BLOCK):
        block = slice(start, start + _ROW_BLOCK)
        keys_N[block] = _sort_keys(scores_N[block], words_NW[block, 0])
    order_N = np.argsort(keys_N).astype(np.int64, copy=False)
    _settle_ties(order_N, keys_N, words_NW)
    return order_N


def ranks(scores_N: NDArray[Any], row_ids: Labels) -> Positions:
    """Rank of each row, int64, 1 for the best; no two are equal. Raises as :func:`rank_order`."""
    order_N = rank_order(scores_N, row_ids)
    ranks_N = np.empty(len(order_N), dtype=np.int64)
    for start in range(0, len(order_N), _ROW_BLOCK):
        block = order_N[start : start + _ROW_BLOCK]
        ranks_N[block] = np.arange(start + 1, start + 1 + len(block))
    return ranks_N


def id_words(row_ids: Labels) -> NDArray[np.uint64]:
    """Row ids, all different, as numbers that sort like them: uint64 [N, W]; W is 1 for labels."""
    if _are_words(row_ids):
        return np.asarray(row_ids)
    ids = _as_list(row_ids)
    words_N1 = np.empty((len(ids), 1), dtype=np.uint64)
    words_N1[sorted(range(len(ids)), key=ids.__getitem__), 0] = np.arange(len(ids))
    return words_N1


def check_distinct(row_ids: Labels) -> None:
    """Refuse ids that occur twice.

    Raises:
        DataError: One does; the message names it.
    """
    if _are_words(row_ids):
        twice = _repeated(np.asarray(row_ids))
        if twice is None:
            return
        name, times = _shown(twice), int((np.asarray(row_ids) == twice).all(axis=1).sum())
    else:
        ids = _as_list(row_ids)
        if len(set(ids)) == len(ids):
            return
        ((name, times),) = Counter(ids).most_common(1)
    raise DataError(f"row_id {name!r} occurs {times} times; expected every row once in the score table")


def check_scores(scores_N: NDArray[Any], row_ids: Labels) -> None:
    """Refuse scores that cannot be ordered; raises as :func:`rank_order`."""
    if scores_N.shape != (len(row_ids),):
        raise ShapeError(f"scores have shape {scores_N.shape} for {len(row_ids)} row ids; expected one each")
    bad = np.flatnonzero(np.isnan(scores_N))
    if bad.size:
        first = [row_ids[position] for position in bad[:_NUM_NAMED].tolist()]
        raise_nan(bad.size, first)


def raise_nan(num_rows: int, first: Labels) -> None:
    """Say how many rows have no score.

    Raises:
        NonFiniteError: Always; the message names ``first``.
    """
    named = ", ".join(_shown(each) for each in first)
    raise NonFiniteError(f"{num_rows} rows have NaN as their score, first: {named}; score them again")


def _sort_keys(scores_N: NDArray[Any], first_words_N: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Numbers that sort as the order does, but for ties: the score's bits, and with float32 half a word of the id."""
    if scores_N.dtype == np.float32:
        bits_N: NDArray[np.uint64] = _ascending_bits(-scores_N, np.uint32).astype(np.uint64)
        return bits_N << np.uint64(32) | first_words_N >> np.uint64(32)
    return _ascending_bits(-scores_N.astype(np.float64), np.uint64)


def _ascending_bits(values_N: NDArray[Any], kind: type[np.unsignedinteger[Any]]) -> NDArray[Any]:
    """Bits of floats, turned so that they sort as unsigned numbers; both zeros are one."""
    bits_N = (values_N + values_N.dtype.type(0)).view(kind)
    sign = kind(1 << (8 * bits_N.itemsize - 1))
    turned_N: NDArray[Any] = np.where(bits_N & sign, ~bits_N, bits_N | sign)
    return turned_N


def _settle_ties(order_N: Positions, keys_N: NDArray[np.uint64], words_NW: NDArray[np.uint64]) -> None:
    """Sort runs of equal keys by row id, in place. Only tied rows are sorted: that is what costs time."""
    tied_N = np.zeros(len(order_N), dtype=bool)
    for start in range(0, len(order_N), _ROW_BLOCK):
        sorted_B = keys_N[order_N[start : start + _ROW_BLOCK + 1]]
        same_B = sorted_B[1:] == sorted_B[:-1]
        tied_N[start : start + len(same_B)] |= same_B
        tied_N[start + 1 : start + 1 + len(same_B)] |= same_B
    places = np.flatnonzero(tied_N)
    tied = order_N[places]
    by_id = np.lexsort((*words_NW[tied].T[::-1], keys_N[tied]))
    order_N[places] = tied[by_id]


def _repeated(words_NW: NDArray[np.uint64]) -> NDArray[np.uint64] | None:
    first_N = np.sort(words_NW[:, 0])
    shared = np.unique(first_N[1:][first_N[1:] == first_N[:-1]])
    if not shared.size:
        return None
    ids, counts = np.unique(words_NW[np.isin(words_NW[:, 0], shared)], axis=0, return_counts=True)
    return ids[counts.argmax()] if counts.max() > 1 else None


def _are_words(row_ids: Labels) -> bool:
    return isinstance(row_ids, np.ndarray) and row_ids.ndim == 2


def _as_list(row_ids: Labels) -> list[Any]:
    return row_ids.tolist() if isinstance(row_ids, np.ndarray) else list(row_ids)


def _shown(row_id: Any) -> str:
    return "".join(f"{int(word):016x}" for word in row_id) if isinstance(row_id, np.ndarray) else str(row_id)
