"""The first reading of an input file: which rows are equal, which ids clash, what is in the sample.

Of every row a few bytes are kept (some 150 while they are settled), so a file may be far larger than memory.
Shape suffixes: N valid rows of the file.
"""

from __future__ import annotations

import hashlib
from array import array
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from rose_ray.data.digests import DIGEST_BYTES, digest_words, first_places, is_sampled
from rose_ray.data.records import RejectedRecord


@dataclass(frozen=True)
class PoolRow:
    """A valid record: its place, identity, source, own id, exact text and conversation."""

    place: int
    row_id: str
    source: str
    record_id: str | None
    record: str
    conversation: str


class Census:
    """First reading: a few bytes of every row."""

    def __init__(self, sample_fraction: float, sample_seed: int) -> None:
        self.sample_fraction = sample_fraction
        self.sample_seed = sample_seed
        self.num_read = 0
        self.row_digests = bytearray()
        self.id_digests = bytearray()
        self.places = array("q")
        self.source_codes = array("q")
        self.sampled = bytearray()
        self.sources: dict[str, int] = {}
        self.rejected: list[RejectedRecord] = []

    def add(self, row: PoolRow | RejectedRecord) -> None:
        """Take note of a record, in file order."""
        self.num_read += 1
        if isinstance(row, RejectedRecord):
            self.rejected.append(row)
            return
        # A row without an id stands for itself: its place is an id nobody else has.
        own_id = f"place {row.place}" if row.record_id is None else f"id {row.source}\0{row.record_id}"
        self.row_digests += bytes.fromhex(row.row_id)
        self.id_digests += hashlib.sha256(own_id.encode()).digest()[:DIGEST_BYTES]
        self.places.append(row.place)
        self.source_codes.append(self.sources.setdefault(row.source, len(self.sources)))
        self.sampled.append(is_sampled(row.row_id, self.sample_fraction, self.sample_seed))

    def settle(self) -> Fates:
        """Decide what becomes of every valid row."""
        words_N2 = digest_words([bytes(self.row_digests)])
        first_of_id_N = first_places(digest_words([bytes(self.id_digests)]))
        clashing_N = (words_N2 != words_N2[first_of_id_N]).any(axis=1)
        sampled_N = np.frombuffer(bytes(self.sampled), dtype=bool)
        taken_N = np.flatnonzero(sampled_N & ~clashing_N)
        owners_N = taken_N[first_places(words_N2[taken_N])]
        places_N = np.frombuffer(self.places, dtype=np.int64)
        rejected = self.rejected + [
            RejectedRecord(
                int(places_N[row]),
                "id_conflict",
                f"row {places_N[first_of_id_N[row]]} of this source has the same id and other content",
            )
            for row in np.flatnonzero(clashing_N)
        ]
        return Fates(
            num_read=self.num_read,
            words_N2=words_N2,
            num_copies_N=np.bincount(owners_N, minlength=len(words_N2)),
            taken_N=taken_N,
            outside_N=np.flatnonzero(~sampled_N & ~clashing_N),
            source_codes_N=np.frombuffer(self.source_codes, dtype=np.int64),
            sources=list(self.sources),
            rejected=sorted(rejected, key=lambda record: record.place),
        )


@dataclass(frozen=True)
class Fates:
    """What becomes of the N valid rows of a file, numbered in file order.

    Attributes:
        num_read: Records of the file, rejected ones included.
        words_N2: Digests of the conversations.
        num_copies_N: For the first of equal rows how many there are, 0 for every other row.
        taken_N, outside_N: Numbers of the rows inside and outside the sample, clashing ids left out.
        source_codes_N: Place of each row's source in ``sources``.
        sources: Names.
        rejected: All rejected records of the file, by place.
    """

    num_read: int
    words_N2: npt.NDArray[np.uint64]
    num_copies_N: npt.NDArray[np.int64]
    taken_N: npt.NDArray[np.int64]
    outside_N: npt.NDArray[np.int64]
    source_codes_N: npt.NDArray[np.int64]
    sources: list[str]
    rejected: list[RejectedRecord] = field(repr=False)

    def counts(self) -> dict[str, int]:
        """Count rows by fate; ``unique`` is left for those who write them."""
        return {
            "rows_read": self.num_read,
            "unique": 0,
            "duplicates": len(self.taken_N) - int(np.count_nonzero(self.num_copies_N)),
            "rejected": len(self.rejected),
            "unsampled": len(self.outside_N),
        }

    def source_tally(self) -> dict[str, dict[str, int]]:
        """Count unique rows, duplicates and rows outside the sample by source."""
        taken, unique, outside = (
            np.bincount(self.source_codes_N[rows], minlength=len(self.sources))
            for rows in (self.taken_N, np.flatnonzero(self.num_copies_N), self.outside_N)
        )
        return {
            name: {
                "unique": int(unique[code]),
                "duplicates": int(taken[code] - unique[code]),
                "unsampled": int(outside[code]),
            }
            for code, name in sorted(enumerate(self.sources), key=lambda item: item[1])
        }
