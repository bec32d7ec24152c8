"""The folded sketch: both ways to add it, its turns and signs, and channels with large gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import rose_ray.kernels.sketch as sketch_module
from rose_ray.kernels.hashing import word_keys
from rose_ray.kernels.projection import make_projection
from rose_ray.kernels.sketch import SketchProjection
from tests.unit.kernels.projection_oracles import (
    FLOAT64_ROUNDING,
    STANDARD_ERRORS,
    matrix_of,
    project,
    random_values,
    slow_keys,
    slow_matrix,
    slow_sketch_entry,
)

torch.set_num_threads(1)  # tiny tensors: handing them to threads costs more than the sums

CPU = torch.device("cpu")
GOLDEN_ENTRIES = [
    (0, 6832, 1),
    (1, 6833, -1),
    (31, 6863, 1),
    (32, 6864, 1),
    (8191, 6831, -1),
    (8192, 3621, 1),
    (1000000, 6096, 1),
    (4294967295, 946, -1),
]
GOLDEN_KEYS = (3065943817, 2176918596, 2807492451, 3175326630)
# The root mean square of the errors below is known to about 15 % for the sketch, 10 % for the dense signs.
OUTLIER_FACTOR = 1.5
TURNLESS_FACTOR = 5.0  # entries of one column would meet in 4 rows, not 1024: the root of 256, less what is kept apart


@pytest.fixture(params=["block", "gather"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each of the two ways to add, whatever D is."""
    monkeypatch.setattr(sketch_module, "_MIN_DIM_BY_BLOCK", 1 if request.param == "block" else 1 << 40)
    return str(request.param)


@pytest.mark.parametrize(("dim", "num_parameters"), [(1, 5), (7, 100), (64, 64), (64, 500), (300, 1700), (500, 99)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_ways_equal_the_explicit_matrix(way: str, dim: int, num_parameters: int, dtype: torch.dtype) -> None:
    values = random_values(2, num_parameters).to(dtype)
    ours = project(SketchProjection(dim, 2**33 + 5, num_parameters), values)
    expected = values.double() @ slow_matrix("sketch", dim, 2**33 + 5, num_parameters).T
    rounding = 1e-4 if dtype is torch.float32 else FLOAT64_ROUNDING  # sums of at most 100 numbers of order 1
    torch.testing.assert_close(ours.double(), expected, atol=rounding, rtol=0)


@pytest.mark.parametrize("cuts", [[1], [63], [64], [65, 66, 400], list(range(1, 500, 7))])
def test_cuts_and_inner_blocks_do_not_matter(way: str, cuts: Sequence[int], monkeypatch: pytest.MonkeyPatch) -> None:
    values = random_values(2, 500)
    expected = project(SketchProjection(64, 5, 500), values)
    assert_close = torch.testing.assert_close
    assert_close(project(SketchProjection(64, 5, 500), values, cuts), expected, atol=FLOAT64_ROUNDING, rtol=0)
    monkeypatch.setattr(sketch_module, "SKETCH_BLOCK_COLUMNS", 150)
    assert_close(project(SketchProjection(64, 5, 500), values, cuts), expected, atol=FLOAT64_ROUNDING, rtol=0)


def test_the_matrix_is_the_same_everywhere_and_for_ever() -> None:
    """Pinned (parameter, row, sign). If they change, raise SKETCH_VERSION: stored features no longer fit."""
    projection = SketchProjection(8192, 12345, 2**32)
    assert (*word_keys("sketch", 12345, 0), *word_keys("sketch", 12345, 1)) == GOLDEN_KEYS
    found = []
    for index, _, _ in GOLDEN_ENTRIES:
        out = torch.zeros(1, 8192, dtype=torch.float64)
        projection.add(out, index, torch.ones(1, 1, dtype=torch.float64))
        row = int(out[0].abs().argmax())
        found.append((index, row, int(out[0, row])))
    assert found == GOLDEN_ENTRIES


def test_keys_turns_and_signs_are_those_of_the_matrix() -> None:
    projection = SketchProjection(40, 77, 2**32)
    assert [word_keys("sketch", 77, word) for word in (0, 1)] == [slow_keys("sketch", 77, word) for word in (0, 1)]
    start = 40 * 2**20 + 13
    shifts, signs = projection.shifts(start // 40, 3, CPU), projection.signs(start, start + 67, CPU)
    assert (shifts.dtype, signs.dtype) == (torch.int64, torch.int8)
    for i in range(67):
        index = start + i
        row = (index % 40 + int(shifts[index // 40 - start // 40])) % 40
        assert (row, int(signs[i])) == slow_sketch_entry(40, 77, index)


def test_columns_have_one_entry_and_blocks_no_collision() -> None:
    matrix = matrix_of(SketchProjection(30, 3, 95))
    assert torch.equal(matrix.abs().sum(0), torch.ones(95, dtype=torch.float64))
    for start in range(0, 95, 30):
        assert int(matrix[:, start : start + 30].abs().sum(1).max()) == 1


def test_turns_and_signs_are_even_and_without_pattern() -> None:
    dim, num_blocks = 64, 64 * 400
    projection = SketchProjection(dim, 3, 2**32)
    shifts = projection.shifts(0, num_blocks, CPU)
    bound = dim - 1 + STANDARD_ERRORS * math.sqrt(2 * (dim - 1))  # chi-square with D - 1 degrees of freedom
    for distance in (0, 1, 2, 4, 64):
        steps = shifts if distance == 0 else (shifts[distance:] - shifts[:-distance]).remainder(dim)
        counts = torch.bincount(steps, minlength=dim).double()
        expected = steps.numel() / dim
        assert float(((counts - expected) ** 2 / expected).sum()) < bound, f"pattern at distance {distance}"
    signs = projection.signs(0, 2**16, CPU).double()
    for distance in (0, 1, 31, 32, 33, 1024):
        mean = signs.mean() if distance == 0 else (signs[distance:] * signs[:-distance]).mean()
        assert abs(float(mean)) < STANDARD_ERRORS / math.sqrt(2**16 - distance), f"pattern at distance {distance}"


class _Turnless(SketchProjection):
    """What the turns are there to prevent."""

    def shifts(self, first_block: int, num_blocks: int, device: torch.device) -> Tensor:
        return torch.zeros(num_blocks, dtype=torch.int64, device=device)


def test_outlier_channels_do_not_meet_themselves() -> None:
    """One input channel 100 times larger, rows of a length that divides D: as good as dense signs."""
    dim, num_outputs, num_inputs = 1024, 64, 256
    values_BOI = random_values(8, num_outputs * num_inputs, seed=4).unflatten(1, (num_outputs, num_inputs))
    values_BOI[:, :, 5] *= 100
    unit = torch.nn.functional.normalize(values_BOI.flatten(1))
    upper = torch.triu(torch.ones(8, 8), diagonal=1).bool()

    def error(make: type[SketchProjection] | None, num_seeds: int) -> float:
        squares = []
        for seed in range(num_seeds):
            projection = (
                make(dim, seed, unit.shape[1]) if make else make_projection("rademacher", dim, seed, unit.shape[1])
            )
            projected = project(projection, unit.float()).double()
            squares.append((projected @ projected.T - unit @ unit.T)[upper].square())
        return float(torch.cat(squares).mean().sqrt())

    dense = error(None, 6)
    assert error(SketchProjection, 100) < OUTLIER_FACTOR * dense
    assert error(_Turnless, 20) > TURNLESS_FACTOR * dense, "the test has lost its teeth"


@pytest.mark.parametrize("cap", [0, 60, 10**6])
def test_the_cap_on_tables_changes_no_number(way: str, cap: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sketch_module, "SKETCH_BLOCK_COLUMNS", 20)
    values = random_values(2, 101)
    expected = project(SketchProjection(40, 5, 101), values)
    projection = make_projection("sketch", 40, 5, 101, table_cache_bytes=cap)
    assert isinstance(projection, SketchProjection)
    for _ in range(2):
        assert torch.equal(project(projection, values), expected)
    kept = projection._tables.num_bytes
    # signs are 1 byte; turns are 8, and each of the six pieces lies in one block
    assert kept <= cap and kept == {0: 0, 60: 2 * (20 + 8), 10**6: 101 + 6 * 8}[cap]
