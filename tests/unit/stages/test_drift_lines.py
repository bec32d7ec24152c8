"""The report of a drift, for people and as a file."""

from __future__ import annotations

import json

import pytest

from rose_ray.stages.drift import Drift, Shift
from rose_ray.stages.drift_lines import drift_json, drift_lines
from rose_ray.stores.history import Version


def found(num_new: int, num_new_rows: int) -> Drift:
    return Drift(
        num_old=40,
        num_new=num_new,
        num_common=0,
        gained={},
        lost={},
        num_new_rows=num_new_rows,
        num_gone=3,
        mean_tokens_old=10.0,
        mean_tokens_new=11.0,
        shifts={"score": Shift(7, (-0.1, 0.0, 0.1), None)},
    )


@pytest.mark.parametrize(("num_new", "num_new_rows", "share"), [(40, 5, 0.125), (3, 3, 1.0), (40, 0, 0.0), (0, 0, 0.0)])
def test_the_share_of_new_rows_is_told(num_new: int, num_new_rows: int, share: float) -> None:
    drift = found(num_new, num_new_rows)
    versions = [Version(number, "f", "p", 1, 1, "now") for number in (1, 2)]
    text = "\n".join(drift_lines("alpha", *versions, drift))
    assert f"new rows of the pool: {num_new_rows}, {share:.1%} of the selection; gone from it: 3" in text
    content = json.loads(json.dumps(drift_json(drift)))
    assert content["new_rows_share"] == share and content["num_new_rows"] == num_new_rows and "jaccard" in content
