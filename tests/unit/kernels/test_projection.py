"""What all kinds of projection have in common, and the dense one."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

import rose_ray.kernels.rademacher as rademacher_module
import rose_ray.kernels.sketch as sketch_module
from rose_ray.errors import ConfigError, NumericsError, ShapeError
from rose_ray.kernels.projection import Projection, ProjectionKind, make_projection
from tests.unit.kernels.projection_oracles import (
    FLOAT32_ROUNDING,
    FLOAT64_ROUNDING,
    STANDARD_ERRORS,
    matrix_of,
    project,
    random_values,
    slow_matrix,
    slow_sketch_entry,
    slow_word,
)

torch.set_num_threads(1)  # tiny tensors: handing them to threads costs more than the sums

RANDOM_KINDS: list[ProjectionKind] = ["rademacher", "sketch"]  # those that take any slice
MADE_KINDS: list[ProjectionKind] = ["rademacher", "sketch", "factored", "none"]
GOLDEN_WORDS = ["8929e8d6", "2c2bfc41", "b84096a7", "441d7004", "e7ef56a1", "c96b6baa"]


def _make(kind: ProjectionKind, dim: int, seed: int, num_parameters: int) -> Projection:
    return make_projection(kind, dim, seed, num_parameters, shapes=[(1, num_parameters)])


@pytest.mark.parametrize("kind", RANDOM_KINDS)
@pytest.mark.parametrize("dim", [1, 31, 32, 70])
@pytest.mark.parametrize("seed", [0, 7, 2**40 + 3])
def test_matrix_equals_the_explicit_one(kind: ProjectionKind, dim: int, seed: int) -> None:
    ours = matrix_of(make_projection(kind, dim, seed, 23))
    torch.testing.assert_close(ours, slow_matrix(kind, dim, seed, 23), atol=FLOAT64_ROUNDING, rtol=0)


@pytest.mark.parametrize("kind", RANDOM_KINDS)
def test_projection_equals_the_explicit_product(kind: ProjectionKind) -> None:
    values = random_values(3, 101)
    projection = make_projection(kind, 40, 5, 101)
    expected = values @ slow_matrix(kind, 40, 5, 101).T
    torch.testing.assert_close(project(projection, values), expected, atol=FLOAT64_ROUNDING, rtol=0)
    single = project(projection, values.float())
    assert single.dtype is torch.float32
    torch.testing.assert_close(single.double(), expected, atol=FLOAT32_ROUNDING, rtol=0)


def test_the_dense_matrix_is_the_same_everywhere_and_for_ever() -> None:
    """Pinned entries. If they change, raise RADEMACHER_VERSION: stored features no longer fit."""
    dense = matrix_of(make_projection("rademacher", 64, 12345, 3)) > 0
    words = [sum(int(dense[32 * word + bit, i]) << bit for bit in range(32)) for word in range(2) for i in range(3)]
    assert [f"{word:08x}" for word in words] == GOLDEN_WORDS


@pytest.mark.parametrize("kind", [*RANDOM_KINDS, "none"])
@pytest.mark.parametrize("cuts", [[1], [50, 51, 99], list(range(1, 101))])
def test_how_the_vector_is_cut_does_not_matter(kind: ProjectionKind, cuts: Sequence[int]) -> None:
    values = random_values(2, 101)
    projection = make_projection(kind, 40, 5, 101)
    torch.testing.assert_close(
        project(projection, values, cuts), project(projection, values), atol=FLOAT64_ROUNDING, rtol=0
    )


@pytest.mark.parametrize("kind", RANDOM_KINDS)
def test_inner_blocks_do_not_matter(kind: ProjectionKind, monkeypatch: pytest.MonkeyPatch) -> None:
    values = random_values(2, 101)
    expected = project(make_projection(kind, 40, 5, 101), values)
    monkeypatch.setattr(rademacher_module, "DENSE_BLOCK_BYTES", 64 * 16 * 7)
    monkeypatch.setattr(sketch_module, "SKETCH_BLOCK_COLUMNS", 9)
    ours = project(make_projection(kind, 40, 5, 101), values)
    torch.testing.assert_close(ours, expected, atol=FLOAT64_ROUNDING, rtol=0)


def _pairs_that_meet(kind: ProjectionKind, dim: int, num_parameters: int) -> Tensor:
    """Which pairs i, j add to the variance: those that share a row of R with random signs."""
    if kind == "rademacher":
        return 1 - torch.eye(num_parameters, dtype=torch.float64)
    block = torch.arange(num_parameters) // dim
    return (block != block.unsqueeze(1)).double()


@pytest.mark.parametrize("kind", RANDOM_KINDS)
@pytest.mark.parametrize("dim", [4, 16, 33])
def test_inner_products_are_unbiased_with_the_known_variance(kind: ProjectionKind, dim: int) -> None:
    """Mean <x, y>; variance the sum of (x_i^2 y_j^2 + x_i y_i x_j y_j) / D over the pairs that can meet."""
    num_seeds, num_parameters = 1500, 70
    x, y = random_values(2, num_parameters, seed=1)
    y = y + 0.5 * x
    products = []
    for seed in range(num_seeds):
        projected = project(make_projection(kind, dim, seed, num_parameters), torch.stack([x, y]))
        products.append(projected[0] @ projected[1])
    sample = torch.stack(products)
    terms = torch.outer(x**2, y**2) + torch.outer(x * y, x * y)
    variance = float((terms * _pairs_that_meet(kind, dim, num_parameters)).sum()) / dim
    error = abs(float(sample.mean() - x @ y))
    assert error < STANDARD_ERRORS * math.sqrt(variance / num_seeds), (
        f"mean of the projected products is off by {error:.3g}; is the 1/sqrt(D) factor right?"
    )
    # the variance of 1,500 draws is known to about 4 % (normal) or 8 % (the sketch's heavier tails)
    assert float(sample.var()) == pytest.approx(variance, rel=0.25)


@pytest.mark.parametrize("kind", RANDOM_KINDS)
@pytest.mark.parametrize("dim", [256, 1024])
def test_cosines_err_by_the_root_of_one_over_dim(kind: ProjectionKind, dim: int) -> None:
    """With exact lengths the error of a cosine c has standard deviation sqrt((1 + c^2) / D)."""
    values = random_values(64, 12_000, seed=2)
    values[1:] += 0.6 * values[0]
    unit = values / values.norm(dim=1, keepdim=True)
    projected = project(make_projection(kind, dim, 11, 12_000), unit)
    cosines = unit[1:] @ unit[0]
    errors = (projected[1:] @ projected[0] - cosines) / ((1 + cosines**2) / dim).sqrt()
    # 63 errors share one projected vector; their root mean square is known to about 15 %
    assert 0.6 < float(errors.square().mean().sqrt()) < 1.5


@pytest.mark.parametrize(
    "partner",
    [lambda i, k: i + k, lambda i, k: i ^ k, lambda i, k: i + 32 * k],
    ids=["shifted", "flipped", "stride"],
)
def test_rows_are_no_copies_of_each_other(partner: Callable[[Tensor, int], Tensor]) -> None:
    """No two rows agree after a shift or a bit flip of the index, as weak counter hashes do."""
    num_columns, num_rows = 4096, 96
    signs = matrix_of(make_projection("rademacher", num_rows, 0, 2 * num_columns)) * math.sqrt(num_rows)
    index = torch.arange(num_columns)
    # off-diagonal correlations are normal with standard deviation 1/sqrt(n); the largest of
    # 10 * 96^2 of them stays below 5.3 of it with probability 0.99
    bound = 5.5 / math.sqrt(num_columns)
    for k in (0, 1, 2, 3, 4, 8, 16, 31, 33, 64):
        correlation = signs[:, :num_columns] @ signs[:, partner(index, k)].T / num_columns
        if k == 0:
            correlation.fill_diagonal_(0)
        assert float(correlation.abs().max()) < bound, f"rows repeat at distance {k}"


@pytest.mark.parametrize("kind", MADE_KINDS)
def test_same_bits_every_time_and_after_pickling(kind: ProjectionKind) -> None:
    values = random_values(3, 101).float()
    projection = _make(kind, 40, 5, 101)
    first = project(projection, values)
    data = pickle.dumps(projection)
    assert len(data) < 2000, "tables travel with the projection"
    for other in (projection, pickle.loads(data), _make(kind, 40, 5, 101)):
        assert torch.equal(project(other, values), first)
        assert other.identity() == projection.identity()


def test_no_projection_copies() -> None:
    values = random_values(2, 9)
    projection = make_projection("none", 4, 0, 9)
    assert (projection.kind, projection.dim) == ("none", 9)
    assert torch.equal(project(projection, values, [4]), values)


@pytest.mark.parametrize("kind", MADE_KINDS)
def test_add_adds_and_leaves_the_values_alone(kind: ProjectionKind) -> None:
    values = random_values(2, 9)
    projection = _make(kind, 9, 0, 9)
    copy, once = values.clone(), project(projection, values)
    twice = once.clone()
    projection.add(twice, 0, values)
    torch.testing.assert_close(twice, 2 * once, atol=FLOAT64_ROUNDING, rtol=0)
    assert torch.equal(values, copy)


@pytest.mark.parametrize("kind", MADE_KINDS)
@pytest.mark.parametrize("num_parameters", [50, 2900])
def test_out_and_values_may_be_views(kind: ProjectionKind, num_parameters: int) -> None:
    dim = min(num_parameters, 300)
    projection = _make(kind, dim, 0, num_parameters)
    values = random_values(2, 2 * num_parameters)[:, ::2]
    wide = torch.zeros(2, projection.dim + 3, dtype=torch.float64)
    projection.add(wide[:, 1:-2], 0, values)
    torch.testing.assert_close(wide[:, 1:-2], project(projection, values), atol=FLOAT64_ROUNDING, rtol=0)
    assert not wide[:, 0].any() and not wide[:, -2:].any()


@pytest.mark.parametrize("kind", MADE_KINDS)
def test_half_precision_values_are_summed_in_the_dtype_of_out(kind: ProjectionKind) -> None:
    values = random_values(2, 50).bfloat16()
    projection = _make(kind, 50, 0, 50)
    out = torch.zeros(2, projection.dim)
    projection.add(out, 0, values)
    torch.testing.assert_close(out, project(projection, values.float()), atol=FLOAT32_ROUNDING, rtol=0)


def test_identities_tell_matrices_apart() -> None:
    kinds: list[ProjectionKind] = [*RANDOM_KINDS, "factored"]
    made = [_make(kind, dim, seed, 9) for kind in kinds for dim in (4, 8) for seed in (0, 1)]
    made.append(make_projection("none", 4, 0, 9))
    assert len({projection.identity() for projection in made}) == len(made)
    assert made[0].identity() == "rademacher/v1/dim=4/seed=0"
    assert made[4].identity() == "sketch/v2/dim=4/seed=0"
    assert not torch.equal(matrix_of(made[0]), matrix_of(made[1]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gaussian", 4, 0, 9), "'gaussian'"),
        (("exact", 4, 0, 9), "needs a bank"),
        (("sketch", 0, 0, 9), "dim is 0"),
        (("sketch", 4, -1, 9), "seed is -1"),
        (("sketch", 4, 2**63, 9), "seed"),
        (("rademacher", 4, 0, 2**32 + 1), "index at most"),
        (("factored", 4, 0, 9), "needs the shapes"),
        (("none", 4, 0, 0), "num_parameters is 0"),
    ],
)
def test_settings_are_checked(arguments: tuple[ProjectionKind, int, int, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_projection(*arguments)


@pytest.mark.parametrize("kind", MADE_KINDS)
def test_slices_are_checked(kind: ProjectionKind) -> None:
    projection = _make(kind, 9, 0, 9)
    out, values = torch.zeros(2, projection.dim), torch.ones(2, 3)
    for offset in (-1, 7):
        with pytest.raises(ShapeError, match="leaves the parameter vector"):
            projection.add(out, offset, values)
    with pytest.raises(ShapeError, match="out has shape"):
        projection.add(out[:, 1:], 0, values)
    with pytest.raises(ShapeError, match="values have shape"):
        projection.add(out, 0, torch.ones(3, 3))
    with pytest.raises(NumericsError, match="bfloat16"):
        projection.add(out.bfloat16(), 0, values)


def test_indices_near_the_upper_end_do_not_overflow() -> None:
    """The last slice of the largest vector allowed, entry by entry."""
    num_parameters = 2**32
    for kind in RANDOM_KINDS:
        projection = make_projection(kind, 40, 9, num_parameters)
        out = torch.zeros(5, 40, dtype=torch.float64)
        projection.add(out, num_parameters - 5, torch.eye(5, dtype=torch.float64))
        for i in range(5):
            index = num_parameters - 5 + i
            if kind == "sketch":
                row, sign = slow_sketch_entry(40, 9, index)
                assert out[i, row] == sign and int((out[i] != 0).sum()) == 1
                continue
            bits = [slow_word(kind, 9, row // 32, index) >> (row % 32) & 1 for row in range(40)]
            assert (out[i] > 0).long().tolist() == bits
