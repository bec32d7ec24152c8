"""Two-sided signs against explicit Kronecker products, and how features are shared among matrices."""

from __future__ import annotations

import itertools
import math
import pickle

import pytest
import torch

from rose_ray.errors import ConfigError, ShapeError
from rose_ray.kernels.factored import FactoredProjection, make_grids
from rose_ray.kernels.projection import make_projection
from tests.unit.kernels.projection_oracles import (
    FLOAT32_ROUNDING,
    FLOAT64_ROUNDING,
    assert_unbiased,
    matrix_of,
    project,
    random_values,
    slow_factor,
    slow_factored,
)

torch.set_num_threads(1)  # tiny tensors: handing them to threads costs more than the sums

SHAPES = [(4, 40), (50, 3), (1, 1), (6, 9)]
NUM_PARAMETERS = sum(rows * columns for rows, columns in SHAPES)
GOLDEN_SIGNS = [
    "-++--++-+--++--+0000000000000000",
    "--++++--++----++0000000000000000",
    "+----+++-++++---0000000000000000",
    "0000000000000000-+-+-+-++-+-+-+-",
    "0000000000000000++--++--++--++--",
]


@pytest.mark.parametrize("dim", [4, 30, 100, 1000])
@pytest.mark.parametrize("seed", [0, 2**40 + 3])
def test_matrix_equals_the_explicit_one(dim: int, seed: int) -> None:
    projection = FactoredProjection(dim, seed, SHAPES)
    expected = slow_factored(dim, seed, SHAPES)
    assert (projection.dim, projection.num_parameters) == expected.shape
    torch.testing.assert_close(matrix_of(projection), expected, atol=FLOAT64_ROUNDING, rtol=0)
    values = random_values(3, NUM_PARAMETERS)
    single = project(projection, values.float()).double()
    torch.testing.assert_close(single, values @ expected.T, atol=FLOAT32_ROUNDING, rtol=0)


def test_many_rows_take_many_words() -> None:
    """More than 32 rows on each side."""
    projection = FactoredProjection(70 * 70, 1, [(80, 90)])
    left, right = slow_factor(1, 0, 70, 80), slow_factor(1, 1, 70, 90)
    values = random_values(2, 7200)
    expected = (left @ values.unflatten(1, (80, 90)) @ right.T).flatten(1)
    torch.testing.assert_close(project(projection, values), expected, atol=FLOAT64_ROUNDING, rtol=0)


def test_the_signs_are_the_same_everywhere_and_for_ever() -> None:
    """Pinned columns. If they change, raise FACTORED_VERSION: stored features no longer fit."""
    matrix = matrix_of(FactoredProjection(32, 12345, [(8, 8), (8, 8)]))
    found = ["".join("-0+"[int(sign) + 1] for sign in torch.sign(matrix[:, i])) for i in (0, 9, 63, 64, 127)]
    assert found == GOLDEN_SIGNS


def test_products_are_unbiased() -> None:
    x, y = random_values(2, NUM_PARAMETERS, seed=1)
    y = y + 0.5 * x
    products = []
    for seed in range(1000):
        projected = project(FactoredProjection(30, seed, SHAPES), torch.stack([x, y]))
        products.append(projected[0] @ projected[1])
    assert_unbiased(products, x @ y)


def test_slices_are_whole_matrices() -> None:
    values, projection = random_values(2, NUM_PARAMETERS), FactoredProjection(60, 0, SHAPES)
    whole = project(projection, values)
    for cuts in ([160], [310, 311], [160, 310, 311]):
        torch.testing.assert_close(project(projection, values, cuts), whole, atol=FLOAT64_ROUNDING, rtol=0)
    for cuts in ([1], [159], [160, 309]):
        with pytest.raises(ShapeError, match="whole matrices"):
            project(projection, values, cuts)


@pytest.mark.parametrize("dim", [4, 5, 17, 64, 100, 200, 365, 10_000])
def test_features_are_shared_equally_and_squarely(dim: int) -> None:
    grids = make_grids(dim, SHAPES)
    kept = [grid.rows_kept * grid.columns_kept for grid in grids]
    assert sum(kept) <= dim
    share = max(q for q in range(1, dim + 1) if sum(min(q, rows * columns) for rows, columns in SHAPES) <= dim)
    for grid, num_kept in zip(grids, kept, strict=True):
        assert grid.rows_kept <= grid.num_rows and grid.columns_kept <= grid.num_columns and num_kept <= share
        # nothing larger fits by one more row or column
        grown = [(grid.rows_kept + 1, grid.columns_kept), (grid.rows_kept, grid.columns_kept + 1)]
        for a, b in grown:
            assert a > grid.num_rows or b > grid.num_columns or a * b > share
        # as square as the matrix allows: the sides differ by more only where one of them is the matrix's own
        if grid.rows_kept < grid.num_rows and grid.columns_kept < grid.num_columns:
            assert grid.rows_kept == math.isqrt(share)
    assert [grid[:2] for grid in grids] == SHAPES


def test_equal_matrices_get_equal_blocks() -> None:
    grids = make_grids(8192, [(128, 4096), (4096, 128)] * 64)
    assert {grid[2:] for grid in grids} == {(8, 8)}


def test_no_two_factors_share_signs() -> None:
    """Left and right signs of all matrices, of one shape, differ about half the time."""
    projection = FactoredProjection(3 * 64, 9, [(500, 500)] * 3)
    factors = [part for m in range(3) for part in projection._factors(m, torch.float64, torch.device("cpu"))]
    for one, two in itertools.combinations(factors, 2):
        agreement = float((torch.sign(one) == torch.sign(two)).double().mean())
        assert abs(agreement - 0.5) < 5 * 0.5 / math.sqrt(8 * 500)  # five standard errors of 4,000 coin tosses


def test_identity_names_the_grids_and_pickles() -> None:
    projection = FactoredProjection(16, 3, [(4, 9)])
    assert projection.identity().startswith("factored/v1/dim=16/seed=3/grids=")
    others = [
        FactoredProjection(16, 3, [(9, 4)]),
        FactoredProjection(16, 4, [(4, 9)]),
        FactoredProjection(9, 3, [(4, 9)]),
    ]
    assert len({projection.identity(), *(other.identity() for other in others)}) == 4
    matrix_of(projection)
    copy = pickle.loads(pickle.dumps(projection))
    assert copy.identity() == projection.identity() and torch.equal(matrix_of(copy), matrix_of(projection))


@pytest.mark.parametrize("cap", [0, 10**6])
def test_the_cap_on_tables_changes_no_number(cap: int) -> None:
    values = random_values(2, NUM_PARAMETERS)
    projection = FactoredProjection(60, 5, SHAPES, table_cache_bytes=cap)
    for _ in range(2):
        assert torch.equal(project(projection, values), project(FactoredProjection(60, 5, SHAPES), values))
    assert (projection._tables.num_bytes > 0) == (cap > 0)


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match="there are 4 matrices"):
        FactoredProjection(3, 0, SHAPES)
    for shapes in ([], [(3, 0)]):
        with pytest.raises(ConfigError, match="no empty ones"):
            FactoredProjection(3, 0, shapes)
    with pytest.raises(ConfigError, match="hold 365 parameters"):
        make_projection("factored", 60, 0, NUM_PARAMETERS + 1, shapes=SHAPES)
    made = make_projection("factored", 60, 0, NUM_PARAMETERS, shapes=SHAPES)
    assert made.kind == "factored" and made.dim <= 60
