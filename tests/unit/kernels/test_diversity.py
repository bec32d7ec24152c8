"""The diversity filter against comparing every row with every kept one in float64."""

from __future__ import annotations

import numpy as np
import pytest

from rose_ray.errors import ConfigError, NonFiniteError, ShapeError
from rose_ray.kernels import diversity
from rose_ray.kernels.diversity import CosineFilter, Cosines, unit_vectors
from tests.oracles import greedy_diverse_rows


def bunches(seed: int, num_rows: int = 120, dim: int = 6) -> np.ndarray:
    """Unit rows, many of them near others, some of them copies, two of them right at a cosine of 0.8."""
    random = np.random.default_rng(seed)
    centres = random.normal(size=(9, dim))
    rows = centres[random.integers(0, 9, num_rows)] + random.uniform(0, 1, (num_rows, 1)) * random.normal(
        size=(num_rows, dim)
    )
    rows[num_rows // 2] = rows[3]
    rows[0], rows[1] = np.eye(dim)[0], 0.8 * np.eye(dim)[0] + 0.6 * np.eye(dim)[1]
    return unit_vectors(rows)[0]


def walk(
    rows: np.ndarray, max_cosine: float, ahead: int, cosines: Cosines | None = None
) -> tuple[list[int], dict[int, int]]:
    """Ask about rows in order, `ahead` of them waiting at a time."""
    chosen = CosineFilter(max_cosine, cosines)
    kept: list[int] = []
    refused: dict[int, int] = {}
    for start in range(0, len(rows), ahead):
        places = range(start, min(start + ahead, len(rows)))
        for place in places:
            chosen.add(place, rows[place])
        for place in places:
            decide(chosen, place, kept, refused)
            assert place not in chosen
    return kept, refused


def decide(chosen: CosineFilter, place: int, kept: list[int], refused: dict[int, int]) -> None:
    """Keep or drop a row that waits, and note which."""
    match = chosen.find(place)
    if match is None:
        chosen.keep(place)
        kept.append(place)
    else:
        chosen.drop(place)
        refused[place] = match


@pytest.mark.parametrize("max_cosine", [0.2, 0.8, 0.95])
@pytest.mark.parametrize("ahead", [1, 7, 120])
@pytest.mark.parametrize(("block", "chunk"), [(1, 1), (5, 4), (256, 1024)])
def test_against_all_pairs(
    monkeypatch: pytest.MonkeyPatch, max_cosine: float, ahead: int, block: int, chunk: int
) -> None:
    monkeypatch.setattr(diversity, "_BLOCK_ROWS", block)
    monkeypatch.setattr(diversity, "_CHUNK_ROWS", chunk)
    for seed in range(5):
        rows = bunches(seed)
        expected = greedy_diverse_rows(rows, max_cosine)
        assert walk(rows, max_cosine, ahead) == expected
        assert len(expected[0]) > 3 and len(expected[1]) > 3


def test_what_float32_cannot_tell_is_decided_in_float64() -> None:
    rows = bunches(0)
    exact = rows[5].astype(np.float64) @ rows[6].astype(np.float64)
    for bound, kept in ((exact, True), (np.nextafter(exact, 0), False)):
        chosen = CosineFilter(float(bound))
        chosen.add(5, rows[5])
        chosen.add(6, rows[6])
        chosen.keep(5)
        assert (chosen.find(6) is None) == kept


def test_rows_asked_about_out_of_order_and_after_others_were_kept() -> None:
    rows = bunches(1)
    order = np.random.default_rng(2).permutation(len(rows)).tolist()
    chosen = CosineFilter(0.8)
    for place in range(len(rows)):
        chosen.add(place, rows[place])
    kept: list[int] = []
    for place in order:
        near = [other for other in kept if rows[place].astype(np.float64) @ rows[other].astype(np.float64) > 0.8]
        assert chosen.find(place) == (near[0] if near else None)
        if not near and place % 3:  # one that is let through need not be taken, and may be asked about again
            chosen.keep(place)
            kept.append(place)


def test_a_restart_gives_what_a_fresh_filter_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diversity, "_CHUNK_ROWS", 4)
    rows = bunches(3)
    chosen = CosineFilter(0.8)
    for place, row in enumerate(rows):
        chosen.add(place, row)
    for _ in range(2):
        kept: list[int] = []
        refused: dict[int, int] = {}
        for place, row in enumerate(rows):
            if place not in chosen:
                chosen.add(place, row)
            decide(chosen, place, kept, refused)
        assert (kept, refused) == greedy_diverse_rows(rows, 0.8)
        chosen.restart()
        assert all(place in chosen for place in kept)


def test_rows_without_a_direction() -> None:
    tiny, huge = np.full(3, 1e-320), np.full(3, 1e300)
    rows = np.array([[3.0, 4.0, 0.0], [0.0, 0.0, 0.0], [np.nan, 1.0, 1.0], [np.inf, 0.0, 0.0], tiny, huge])
    units, good = unit_vectors(rows)
    assert good.tolist() == [True, False, False, False, True, True] and units.dtype == np.float32
    np.testing.assert_allclose(units[0], [0.6, 0.8, 0.0], rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(units[good], axis=1), 1.0, rtol=1e-6)
    assert not units[~good].any()
    assert unit_vectors(np.zeros((0, 3)))[0].shape == (0, 3)


def test_what_is_refused() -> None:
    for bound in (0.0, 1.0, float("nan")):
        with pytest.raises(ConfigError, match="expected a number between 0 and 1"):
            CosineFilter(bound)
    chosen = CosineFilter(0.9)
    chosen.add(0, np.array([1, 0], np.float32))
    with pytest.raises(ShapeError, match=r"row 1: float32 \(3,\); expected float32 \(2,\)"):
        chosen.add(1, np.array([1, 0, 0], np.float32))
    for bad in ([0, 0], [np.nan, 0], [1, 1]):
        with pytest.raises(NonFiniteError, match="expected 1"):
            chosen.add(1, np.array(bad, np.float32))
