"""Projections against explicit matrices built one entry at a time with plain integers."""

from __future__ import annotations

import itertools
import math
import pickle
from collections.abc import Callable
from typing import get_args

import pytest
import torch
from torch import Tensor

import rose_ray.kernels.projection as projection_module
from rose_ray.errors import ConfigError, NumericsError, ShapeError
from rose_ray.kernels.projection import Projection, ProjectionKind, SketchProjection, make_projection

torch.set_num_threads(1)  # tiny tensors: handing them to threads costs more than the sums

RANDOM_KINDS: list[ProjectionKind] = ["rademacher", "sketch"]
GOLDEN_WORDS = ["8929e8d6", "2c2bfc41", "b84096a7", "441d7004", "e7ef56a1", "c96b6baa"]
GOLDEN_ENTRIES = [(6832, 1), (3621, 1), (5003, -1), (4385, -1), (6993, 1), (4185, -1)]
FLOAT64_ROUNDING = 1e-12  # sums of a few hundred numbers of order 1, in whatever order
FLOAT32_ROUNDING = 1e-4  # the same in float32
STANDARD_ERRORS = 5.0  # seeds are fixed, so this bound either holds for ever or points at a fault


def _slow_mix(x: int) -> int:
    x ^= x >> 16
    x = x * 0x21F0AAAD % 2**32
    x ^= x >> 15
    x = x * 0x735A2D97 % 2**32
    return x ^ (x >> 15)


def _slow_word(kind: str, seed: int, word: int, index: int) -> int:
    """Two rounds over the index, each with a key of (kind, seed, word)."""
    letters = {"rademacher": b"RADE", "sketch": b"SKET"}[kind]
    state = int.from_bytes(letters, "big")
    for half in (seed % 2**32, seed // 2**32):
        state = _slow_mix(state ^ half)
    for step in (1, 2):
        state = _slow_mix(state ^ _slow_mix(2 * word + step))
        index = _slow_mix(index ^ state)
    return index


def _slow_matrix(kind: str, dim: int, seed: int, num_parameters: int) -> Tensor:
    matrix = torch.zeros(dim, num_parameters, dtype=torch.float64)
    for i in range(num_parameters):
        if kind == "sketch":
            row = _slow_word(kind, seed, 0, i) % dim
            matrix[row, i] = 1.0 if _slow_word(kind, seed, 1, i) >= 2**31 else -1.0
            continue
        for row in range(dim):
            bit = _slow_word(kind, seed, row // 32, i) // 2 ** (row % 32) % 2
            matrix[row, i] = (1.0 if bit else -1.0) / math.sqrt(dim)
    return matrix


def _project(projection: Projection, values: Tensor, cuts: list[int] | None = None) -> Tensor:
    out = torch.zeros(values.shape[0], projection.dim, dtype=values.dtype)
    edges = [0, *(cuts or []), values.shape[1]]
    for start, stop in itertools.pairwise(edges):
        projection.add(out, start, values[:, start:stop])
    return out


def _matrix(projection: Projection) -> Tensor:
    return _project(projection, torch.eye(projection.num_parameters, dtype=torch.float64)).T


def _values(num_rows: int, num_parameters: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, num_parameters, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("kind", RANDOM_KINDS)
@pytest.mark.parametrize("dim", [1, 31, 32, 70])
@pytest.mark.parametrize("seed", [0, 7, 2**40 + 3])
def test_matrix_equals_the_explicit_one(kind: ProjectionKind, dim: int, seed: int) -> None:
    ours = _matrix(make_projection(kind, dim, seed, 23))
    torch.testing.assert_close(ours, _slow_matrix(kind, dim, seed, 23), atol=FLOAT64_ROUNDING, rtol=0)


@pytest.mark.parametrize("kind", RANDOM_KINDS)
def test_projection_equals_the_explicit_product(kind: ProjectionKind) -> None:
    values = _values(3, 101)
    projection = make_projection(kind, 40, 5, 101)
    expected = values @ _slow_matrix(kind, 40, 5, 101).T
    torch.testing.assert_close(_project(projection, values), expected, atol=FLOAT64_ROUNDING, rtol=0)
    single = _project(projection, values.float())
    assert single.dtype is torch.float32
    torch.testing.assert_close(single.double(), expected, atol=FLOAT32_ROUNDING, rtol=0)


def test_matrices_are_the_same_everywhere_and_for_ever() -> None:
    """Pinned entries. If they change, raise PROJECTION_VERSION: stored features no longer fit."""
    dense = _matrix(make_projection("rademacher", 64, 12345, 3)) > 0
    words = [sum(int(dense[32 * word + bit, i]) << bit for bit in range(32)) for word in range(2) for i in range(3)]
    assert [f"{word:08x}" for word in words] == GOLDEN_WORDS
    sketch = _matrix(make_projection("sketch", 8192, 12345, 6))
    rows = [int(column.abs().argmax()) for column in sketch.T]
    assert [(row, int(sketch[row, i])) for i, row in enumerate(rows)] == GOLDEN_ENTRIES


@pytest.mark.parametrize("kind", get_args(ProjectionKind))
@pytest.mark.parametrize("cuts", [[1], [50, 51, 99], list(range(1, 101))])
def test_how_the_vector_is_cut_does_not_matter(kind: ProjectionKind, cuts: list[int]) -> None:
    values = _values(2, 101)
    projection = make_projection(kind, 40, 5, 101)
    torch.testing.assert_close(
        _project(projection, values, cuts), _project(projection, values), atol=FLOAT64_ROUNDING, rtol=0
    )


@pytest.mark.parametrize("kind", RANDOM_KINDS)
def test_inner_blocks_do_not_matter(kind: ProjectionKind, monkeypatch: pytest.MonkeyPatch) -> None:
    values = _values(2, 101)
    expected = _project(make_projection(kind, 40, 5, 101), values)
    monkeypatch.setattr(projection_module, "DENSE_BLOCK_BYTES", 64 * 16 * 7)
    monkeypatch.setattr(projection_module, "SKETCH_BLOCK_COLUMNS", 9)
    ours = _project(make_projection(kind, 40, 5, 101), values)
    torch.testing.assert_close(ours, expected, atol=FLOAT64_ROUNDING, rtol=0)


@pytest.mark.parametrize("kind", RANDOM_KINDS)
@pytest.mark.parametrize("dim", [16, 33])
def test_inner_products_are_unbiased_with_the_known_variance(kind: ProjectionKind, dim: int) -> None:
    """Both kinds: mean <x, y>, variance (|x|^2 |y|^2 + <x, y>^2 - 2 sum x_i^2 y_i^2) / D."""
    num_seeds, num_parameters = 1500, 24
    x, y = _values(2, num_parameters, seed=1)
    y = y + 0.5 * x
    products = []
    for seed in range(num_seeds):
        projected = _project(make_projection(kind, dim, seed, num_parameters), torch.stack([x, y]))
        products.append(projected[0] @ projected[1])
    sample = torch.stack(products)
    variance = float((x @ x) * (y @ y) + (x @ y) ** 2 - 2 * (x**2 @ y**2)) / dim
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
    values = _values(64, 3000, seed=2)
    values[1:] += 0.6 * values[0]
    unit = values / values.norm(dim=1, keepdim=True)
    projected = _project(make_projection(kind, dim, 11, 3000), unit)
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
    signs = _matrix(make_projection("rademacher", num_rows, 0, 2 * num_columns)) * math.sqrt(num_rows)
    index = torch.arange(num_columns)
    # off-diagonal correlations are normal with standard deviation 1/sqrt(n); the largest of
    # 10 * 96^2 of them stays below 5.3 of it with probability 0.99
    bound = 5.5 / math.sqrt(num_columns)
    for k in (0, 1, 2, 3, 4, 8, 16, 31, 33, 64):
        correlation = signs[:, :num_columns] @ signs[:, partner(index, k)].T / num_columns
        if k == 0:
            correlation.fill_diagonal_(0)
        assert float(correlation.abs().max()) < bound, f"rows repeat at distance {k}"


def test_sketch_spreads_evenly_and_without_pattern() -> None:
    dim, num_parameters = 64, 64 * 400
    projection = make_projection("sketch", dim, 3, num_parameters)
    assert isinstance(projection, SketchProjection)
    rows, signs = projection._table(0, num_parameters, torch.device("cpu"))
    counts = torch.bincount(rows, minlength=dim).double()
    chi_square = float(((counts - 400) ** 2 / 400).sum())
    assert chi_square < 63 + STANDARD_ERRORS * math.sqrt(2 * 63)
    assert abs(float(signs.double().mean())) < STANDARD_ERRORS / math.sqrt(num_parameters)
    step_counts = torch.bincount((rows[1:].long() - rows[:-1]).remainder(dim), minlength=dim).double()
    expected = (num_parameters - 1) / dim
    assert float(((step_counts - expected) ** 2 / expected).sum()) < 63 + STANDARD_ERRORS * math.sqrt(2 * 63)


@pytest.mark.parametrize("cap", [0, 5 * 40, 10**6])
def test_the_cap_on_tables_changes_no_number(cap: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projection_module, "SKETCH_BLOCK_COLUMNS", 20)
    values = _values(2, 101)
    expected = _project(make_projection("sketch", 40, 5, 101), values)
    projection = make_projection("sketch", 40, 5, 101, table_cache_bytes=cap)
    assert isinstance(projection, SketchProjection)
    for _ in range(2):
        assert torch.equal(_project(projection, values), expected)
    kept = sum(part.nbytes for table in projection._tables.values() for part in table)
    assert kept <= cap and kept == min(cap, 5 * 101)


@pytest.mark.parametrize("kind", get_args(ProjectionKind))
def test_same_bits_every_time_and_after_pickling(kind: ProjectionKind) -> None:
    values = _values(3, 101).float()
    projection = make_projection(kind, 40, 5, 101)
    first = _project(projection, values)
    copy: Projection = pickle.loads(pickle.dumps(projection))
    for other in (projection, copy, make_projection(kind, 40, 5, 101)):
        assert torch.equal(_project(other, values), first)
        assert other.identity() == projection.identity()


def test_no_projection_copies() -> None:
    values = _values(2, 9)
    projection = make_projection("none", 4, 0, 9)
    assert (projection.kind, projection.dim) == ("none", 9)
    assert torch.equal(_project(projection, values, [4]), values)


def test_add_adds_and_leaves_the_values_alone() -> None:
    values = _values(2, 9)
    for kind in get_args(ProjectionKind):
        projection = make_projection(kind, 9, 0, 9)
        copy, once = values.clone(), _project(projection, values)
        twice = once.clone()
        projection.add(twice, 0, values)
        torch.testing.assert_close(twice, 2 * once, atol=FLOAT64_ROUNDING, rtol=0)
        assert torch.equal(values, copy)


def test_half_precision_values_are_summed_in_the_dtype_of_out() -> None:
    values = _values(2, 50).bfloat16()
    for kind in get_args(ProjectionKind):
        projection = make_projection(kind, 50, 0, 50)
        out = torch.zeros(2, 50)
        projection.add(out, 0, values)
        torch.testing.assert_close(out, _project(projection, values.float()), atol=FLOAT32_ROUNDING, rtol=0)


def test_identities_tell_matrices_apart() -> None:
    made = [make_projection(kind, dim, seed, 9) for kind in RANDOM_KINDS for dim in (4, 8) for seed in (0, 1)]
    made.append(make_projection("none", 4, 0, 9))
    assert len({projection.identity() for projection in made}) == len(made)
    assert made[0].identity() == "rademacher/v1/dim=4/seed=0"
    assert not torch.equal(_matrix(made[0]), _matrix(made[1]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gaussian", 4, 0, 9), "'gaussian'"),
        (("sketch", 0, 0, 9), "dim is 0"),
        (("sketch", 4, -1, 9), "seed is -1"),
        (("sketch", 4, 2**63, 9), "seed"),
        (("rademacher", 4, 0, 2**32 + 1), "index at most"),
        (("none", 4, 0, 0), "num_parameters is 0"),
    ],
)
def test_settings_are_checked(arguments: tuple[ProjectionKind, int, int, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_projection(*arguments)


@pytest.mark.parametrize("kind", get_args(ProjectionKind))
def test_slices_are_checked(kind: ProjectionKind) -> None:
    projection = make_projection(kind, 9, 0, 9)
    out, values = torch.zeros(2, 9), torch.ones(2, 3)
    for offset in (-1, 7):
        with pytest.raises(ShapeError, match="leaves the parameter vector"):
            projection.add(out, offset, values)
    with pytest.raises(ShapeError, match="out has shape"):
        projection.add(torch.zeros(2, 8), 0, values)
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
                row = _slow_word(kind, 9, 0, index) % 40
                assert out[i, row].abs() == 1 and int((out[i] != 0).sum()) == 1
                continue
            bits = [_slow_word(kind, 9, row // 32, index) >> (row % 32) & 1 for row in range(40)]
            assert (out[i] > 0).long().tolist() == bits
