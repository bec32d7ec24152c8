"""A model's answers to labelled rows: ``{"id": ROW_ID, "samples": [ANSWER, ...]}`` a record."""

from __future__ import annotations

from collections.abc import Sequence

from rose_ray.data.records import RejectedRecord, iter_records
from rose_ray.errors import PairError
from rose_ray.filesystem import Location


def read_samples(locations: Sequence[Location]) -> dict[str, list[str]]:
    """Return the answers by row id; those of several records of a row are joined.

    Raises:
        DataError: A file cannot be read.
        PairError: A record is no such object; file and row are named.
    """
    samples: dict[str, list[str]] = {}
    for location in locations:
        for record in iter_records(location):
            where = f"{location.name} row {record.place}"
            if isinstance(record, RejectedRecord):
                raise PairError(f"{where}: {record.reason}: {record.detail}. Mend the file.")
            row_id, answers = record.value.get("id"), record.value.get("samples")
            texts = [answer for answer in answers if isinstance(answer, str)] if isinstance(answers, list) else []
            if not isinstance(row_id, str) or not texts or len(texts) != len(answers or ()):
                raise PairError(
                    f"{where}: expected id (text) and samples (a list of texts, at least one), found the keys "
                    f"{sorted(record.value)}. Mend the file."
                )
            samples.setdefault(row_id, []).extend(texts)
    return samples
