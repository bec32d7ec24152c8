"""What becomes of every row of a file, against the obvious loop."""

from rose_ray.data.census import Census, PoolRow
from rose_ray.data.records import RejectedRecord


def test_census_of_nothing_but_rejected_rows():
    census = Census(1.0, 0)
    census.add(RejectedRecord(1, "not_json", ""))
    fates = census.settle()
    assert fates.counts() == {"rows_read": 1, "unique": 0, "duplicates": 0, "rejected": 1, "unsampled": 0}


def test_census_equals_a_plain_loop():
    census, kinds, ids = Census(1.0, 0), [3, 1, 3, 2, 1, 1, 2], ["a", None, "a", "a", None, "b", "c"]
    for place, (kind, own) in enumerate(zip(kinds, ids, strict=True), start=1):
        census.add(PoolRow(place, f"{kind:032x}", "s", own, "", ""))
    fates = census.settle()
    # Row 4 has the id of row 1 and other content; the second row 2 is then the first of its kind.
    assert fates.num_copies_N.tolist() == [2, 3, 0, 0, 0, 0, 1]
    assert [record.place for record in fates.rejected] == [4]
