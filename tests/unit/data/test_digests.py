"""Equal rows and samples, against the obvious loops."""

import hashlib
import random

import numpy as np
import pyarrow as pa
import pytest

from rose_ray.data.digests import DigestIndex, digest_words, first_places, is_sampled, row_id_words
from rose_ray.errors import AlteredFileError


def test_first_places_equal_a_dictionary():
    generator = random.Random(0)
    digests = [hashlib.md5(str(generator.randrange(40)).encode()).digest() for _ in range(300)]
    seen: dict[bytes, int] = {}
    expected = [seen.setdefault(digest, place) for place, digest in enumerate(digests)]
    assert first_places(digest_words(digests)).tolist() == expected


def test_no_rows():
    assert first_places(digest_words([])).tolist() == []


def test_digests_that_differ_in_one_word_only():
    words = np.array([[1, 2], [1, 3], [0, 2], [1, 2]], dtype=np.uint64)
    assert first_places(words).tolist() == [0, 1, 2, 0]


def test_an_index_finds_what_a_dictionary_finds():
    generator = np.random.default_rng(0)
    words = generator.integers(0, 12, (400, 2)).astype(np.uint64)  # most share their first half with others
    known = np.unique(words[:200], axis=0)[::-1]
    places = {tuple(row): place for place, row in enumerate(known.tolist())}
    expected = [places.get(tuple(row), -1) for row in words.tolist()]
    assert DigestIndex(known).places(words).tolist() == expected and -1 in expected
    assert DigestIndex(known).places(digest_words([])).tolist() == []
    assert DigestIndex(digest_words([])).places(words).tolist() == [-1] * len(words)


def test_sampling_is_stable_nested_and_near_its_fraction():
    ids = [hashlib.sha256(str(i).encode()).hexdigest()[:32] for i in range(4000)]
    small = {row for row in ids if is_sampled(row, 0.1, 0)}
    large = {row for row in ids if is_sampled(row, 0.3, 0)}
    other = {row for row in ids if is_sampled(row, 0.1, 1)}
    assert small < large and small != other
    # Five standard deviations of a binomial count: a fixed outcome anyway, the bound says it is no accident.
    assert abs(len(small) - 400) < 5 * (4000 * 0.1 * 0.9) ** 0.5
    assert all(is_sampled(row, 1.0, 0) for row in ids)


def test_row_ids_as_words_sort_as_they_do() -> None:
    row_ids = sorted(hashlib.sha256(str(number).encode()).hexdigest()[:32] for number in range(50))
    column = pa.chunked_array([row_ids[:20], row_ids[20:], pa.array([], pa.string())])
    words = row_id_words(column)
    assert words.tolist() == digest_words(map(bytes.fromhex, row_ids)).tolist()
    assert words.tolist() == sorted(words.tolist())
    assert row_id_words(pa.array(row_ids).slice(7, 9)).tolist() == words[7:16].tolist()
    assert row_id_words(pa.array([], pa.string())).shape == (0, 2)


@pytest.mark.parametrize("bad", ["u", "A" * 32, "g" + "0" * 31, "0" * 31, "0" * 33])
def test_row_ids_of_another_form_are_refused(bad: str) -> None:
    with pytest.raises(AlteredFileError, match=f"row id '{bad}': expected 32 hex digits"):
        row_id_words(pa.array(["0" * 32, bad]))
