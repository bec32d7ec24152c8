"""Where a margin comes from: how far training moved each side of the held-out pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rose_ray.evaluate.index import Index
from rose_ray.evaluate.measures import Item
from rose_ray.evaluate.results import Reader, grouped


def moved_sides(index: Index, read: Reader) -> list[dict[str, Any]]:
    """Return a row for every row of the evaluation's table and held-out set, the untrained model left out.

    ``chosen`` and ``rejected`` are changes of the summed log-probability of an answer, nats, the mean over seeds and
    pairs: a margin is their difference times beta.

    Args:
        index: Of the evaluation.
        read: Gives the items of a folder.
    """
    rows = []
    for group in grouped(index.entries):
        for key, folder in index.untrained.items():
            measured = [entry.measures[key] for entry in group if key in entry.measures]
            if not key.startswith("pairs/") or group[0].seed is None or not measured:
                continue
            before = _sides(read(folder))
            chosen, rejected = np.mean([_sides(read(each)) - before for each in measured], axis=(0, 2))
            rows.append(
                {
                    "held out": key.partition("/")[2],
                    "arm": group[0].arm,
                    "budget": group[0].budget,
                    "seeds": len(measured),
                    "chosen": float(chosen),
                    "rejected": float(rejected),
                }
            )
    return rows


def _sides(items: Sequence[Item]) -> np.ndarray:
    return np.array([[item[f"logp_{side}"] for item in items] for side in ("chosen", "rejected")], dtype=float)
