"""Similarity of texts, by hand."""

from __future__ import annotations

import pytest

from rose_ray.data.similarity import similarity


def test_similarity_is_the_part_of_matching_words() -> None:
    assert similarity(["a", "b", "c", "d"], ["a", "b", "c", "e"]) == pytest.approx(0.75)
    assert similarity(["a"], ["a"]) == 1.0
    assert similarity(["a", "b"], ["c", "d"], least=0.9) < 0.9
