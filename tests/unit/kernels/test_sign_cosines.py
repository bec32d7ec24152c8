"""Cosines by stored signs against counting bits, and against the vectors that the signs came from."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rose_ray.errors import NonFiniteError, ShapeError
from rose_ray.kernels import diversity
from rose_ray.kernels.diversity import CosineFilter
from rose_ray.kernels.quantization import quantize
from rose_ray.kernels.sign_cosines import SignCosines, sign_rows
from tests.oracles import greedy_diverse_rows, sign_cosine
from tests.unit.kernels.test_diversity import walk

FLOAT64_ROUNDING = 1e-12


def made(num_rows: int, dim: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features in bunches, the exact parts along a shared direction, and both as they are compared."""
    random = np.random.default_rng(seed)
    centres = random.normal(size=(5, dim))
    features = (centres[random.integers(0, 5, num_rows)] + 0.7 * random.normal(size=(num_rows, dim))).astype(np.float32)
    shared = random.uniform(-1, 1, num_rows).astype(np.float32)
    bits, scales = quantize(features, "bit1")
    assert scales is not None
    rows, good = sign_rows(bits, scales, shared)
    assert good.all() and rows.dtype == np.uint64 and rows.shape == (num_rows, -(-dim // 64) + 1)
    return features, shared, rows


@pytest.mark.parametrize("dim", [1, 7, 8, 64, 100, 130])
def test_both_ways_equal_counted_bits(dim: int) -> None:
    features, shared, rows = made(13, dim)
    cosines = SignCosines(dim)
    found = cosines.blockwise(rows[:6], rows)
    for i in range(6):
        for k in range(13):
            expected = sign_cosine(features[i], features[k], (float(shared[i]), float(shared[k])))
            assert found[i, k] == pytest.approx(expected, abs=FLOAT64_ROUNDING)
            assert cosines.exactly(rows[i], rows[k]) == pytest.approx(expected, abs=FLOAT64_ROUNDING)
    assert cosines.error(rows.shape[1]) <= FLOAT64_ROUNDING


@pytest.mark.parametrize("cosine", [0.0, 0.3, 0.9, 0.99, -0.5])
def test_signs_of_projected_vectors_tell_their_cosine(cosine: float) -> None:
    dim, size = 16384, 40
    random = np.random.default_rng(1)
    x, y = np.linalg.qr(random.normal(size=(size, 2)))[0].T
    vectors = np.stack([x, cosine * x + math.sqrt(1 - cosine**2) * y])
    bits, scales = quantize((vectors @ random.normal(size=(size, dim))).astype(np.float32), "bit1")
    assert scales is not None
    rows, _ = sign_rows(bits, scales, None)
    # An angle is pi times the part of signs that differ, a mean of D draws; its cosine moves by less than it does.
    part = math.acos(cosine) / math.pi
    deviation = math.pi * math.sqrt(part * (1 - part) / dim)
    assert SignCosines(dim).exactly(rows[0], rows[1]) == pytest.approx(cosine, abs=5 * deviation)


@pytest.mark.parametrize("max_cosine", [0.2, 0.5, 0.7])
def test_the_filter_against_all_pairs(monkeypatch: pytest.MonkeyPatch, max_cosine: float) -> None:
    monkeypatch.setattr(diversity, "_BLOCK_ROWS", 5)
    monkeypatch.setattr(diversity, "_CHUNK_ROWS", 4)
    for seed in range(3):
        features, shared, rows = made(60, 64, seed)
        pairs = list(zip(features, shared.tolist(), strict=True))
        expected = greedy_diverse_rows(pairs, max_cosine, lambda a, b: sign_cosine(a[0], b[0], (a[1], b[1])))
        kept, refused = walk(rows, max_cosine, 60, SignCosines(64))
        assert (kept, refused) == expected and len(kept) > 3 and len(refused) > 3


def test_a_cosine_that_equals_the_bound_is_allowed() -> None:
    _, _, rows = made(2, 64)
    exact = SignCosines(64).exactly(rows[0], rows[1])
    for bound, kept in ((exact, True), (np.nextafter(exact, 0), False)):
        chosen = CosineFilter(float(bound), SignCosines(64))
        chosen.add(0, rows[0])
        chosen.add(1, rows[1])
        chosen.keep(0)
        assert (chosen.find(1) is None) == kept


def test_rows_without_a_direction() -> None:
    bits = np.zeros((5, 2), np.uint8)
    scales = np.array([1, 0, 0, np.nan, 1], np.float32)
    _, good = sign_rows(bits, scales, np.array([0.5, 0, 0.5, 0.5, np.inf]))
    assert good.tolist() == [True, False, True, False, False]


def test_what_is_refused() -> None:
    with pytest.raises(ShapeError, match="0 signs a row"):
        SignCosines(0)
    bits, scales = quantize(np.ones((1, 8), np.float32), "bit1")
    assert scales is not None
    for bad in (1.5, np.nan):
        rows, _ = sign_rows(bits, scales, np.array([bad]))
        with pytest.raises(NonFiniteError, match="row 3: its part along the shared direction"):
            CosineFilter(0.5, SignCosines(8)).add(3, rows[0])
