"""What goes into a spool comes out again, in the order asked for."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from rose_ray.stores import spool
from rose_ray.stores.spool import PlacedSpool, Spool

SCHEMA = pa.schema([pa.field("place", pa.int64(), metadata={"unit": "rows"}), pa.field("text", pa.string())])


def table(places: list[int]) -> pa.Table:
    return pa.table([places, [str(place) for place in places]], schema=SCHEMA)


@pytest.mark.parametrize("num_rows", [1, 2, 3, 7, 100])
def test_tables_come_back_in_parts_of_the_size_asked_for(num_rows: int) -> None:
    parts = [table([1, 2, 3]), table([]), table([4]), table([5, 6, 7])]
    with Spool(SCHEMA) as spooled:
        for part in parts:
            spooled.append(part)
        found = list(spooled.read(num_rows))
        assert spooled.num_rows == 7
    assert all(part.num_rows == num_rows for part in found[:-1])
    assert pa.concat_tables(found).equals(table(list(range(1, 8))), check_metadata=True)


def test_an_empty_spool_gives_nothing() -> None:
    with Spool(SCHEMA) as spooled:
        assert list(spooled.read(5)) == []


@pytest.mark.parametrize("num_rows", [1, 9, 10, 11, 237])
@pytest.mark.parametrize("waiting_bytes", [0, 1 << 26])
def test_rows_come_back_by_their_places(monkeypatch: pytest.MonkeyPatch, num_rows: int, waiting_bytes: int) -> None:
    for name, value in {"_LEAST_ROWS": 10, "_MOST_SPOOLS": 7, "_WAITING_BYTES": waiting_bytes}.items():
        monkeypatch.setattr(spool, name, value)
    places = np.random.default_rng(num_rows).permutation(num_rows) + 1
    with PlacedSpool(SCHEMA, "place", num_rows) as spooled:
        for part in np.array_split(places, 5):
            spooled.append(table(part.tolist()))
        found = pa.concat_tables(spooled.read())
    assert found.equals(table(list(range(1, num_rows + 1))), check_metadata=True)
