"""Bases of a bank's span against exact float64 algebra, and the projection made of one."""

from __future__ import annotations

import pickle
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import rose_ray.kernels.span as span_module
from rose_ray.errors import NonFiniteError, NumericsError, ShapeError
from rose_ray.kernels.span import MIN_EIGENVALUE, SpanProjection, orthonormal_basis
from tests.unit.kernels.projection_oracles import FLOAT32_ROUNDING, FLOAT64_ROUNDING, project, random_values

torch.set_num_threads(1)  # tiny tensors: handing them to threads costs more than the sums

NUM_PARAMETERS = 700
ORTHONORMAL = {torch.float32: 1e-6, torch.float64: 1e-13}  # the entries' own rounding, of rows of length 1
# Relative to the two lengths. float32: rounding of the basis and of sums of 700 products.
EXACT = {torch.float32: 2e-6, torch.float64: 1e-13}
DROPPED = 2 * MIN_EIGENVALUE**0.5  # of a vector's length, where near-duplicates are taken for one


def _bank(num_vectors: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Vectors with a large part in common and lengths that differ a millionfold."""
    vectors = random_values(num_vectors, NUM_PARAMETERS, seed) + 3 * random_values(1, NUM_PARAMETERS, seed + 1)
    return (vectors * torch.logspace(-3, 3, num_vectors, dtype=torch.float64).unsqueeze(1)).to(dtype)


def _largest_error(basis: Tensor, bank: Tensor, combinations: Tensor) -> float:
    """Largest error of <Q x, Q g> over |x| |g|, products taken in float64 except for Q x and Q g themselves."""
    vectors = random_values(5, NUM_PARAMETERS, seed=9) + bank.double().sum(0) / bank.double().norm()
    span = combinations @ bank.double()
    projection = SpanProjection(basis, "test")
    projected_x, projected_g = (project(projection, values.to(basis.dtype)).double() for values in (vectors, span))
    errors = projected_x @ projected_g.T - vectors @ span.T
    return float((errors / vectors.norm(dim=1, keepdim=True) / span.norm(dim=1)).abs().max())


def _assert_orthonormal(basis: Tensor) -> None:
    gram = basis.double() @ basis.double().T
    torch.testing.assert_close(gram, torch.eye(len(gram)).double(), atol=ORTHONORMAL[basis.dtype], rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_vectors", [1, 2, 40])
def test_products_with_the_span_are_exact(dtype: torch.dtype, num_vectors: int) -> None:
    bank = _bank(num_vectors, dtype)
    basis = orthonormal_basis(bank)
    assert basis.shape == (num_vectors, NUM_PARAMETERS) and basis.dtype == dtype
    _assert_orthonormal(basis)
    combinations = torch.cat([torch.eye(num_vectors).double(), random_values(3, num_vectors, seed=5)])
    assert _largest_error(basis, bank, combinations) < EXACT[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_duplicates_multiples_sums_and_zeros_add_no_row(dtype: torch.dtype) -> None:
    bank = _bank(6, dtype)
    extra = [bank, bank[:2], -2 * bank[2:3], bank[:1] / 4 + bank[1:2] / 2, torch.zeros_like(bank[:1])]
    many = torch.cat(extra)
    basis = orthonormal_basis(many)
    assert basis.shape[0] == 6
    _assert_orthonormal(basis)
    # the sum of two vectors is rounded to float32, so it leaves the span by that much
    assert _largest_error(basis, many, torch.eye(len(many)).double()[:-1]) < EXACT[dtype]


@pytest.mark.parametrize(("distance", "num_rows"), [(1e-9, 4), (1e-7, 4), (1e-5, 8), (1e-3, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_near_duplicates_do_not_blow_up(distance: float, num_rows: int, dtype: torch.dtype) -> None:
    """Above the bound they are kept, and still orthonormal; below it they are one vector."""
    bank = random_values(4, NUM_PARAMETERS)
    other = bank + distance * random_values(4, NUM_PARAMETERS, seed=3)
    both = torch.cat([bank, other]).to(dtype)
    basis = orthonormal_basis(both)
    assert basis.shape[0] == num_rows
    _assert_orthonormal(basis)
    bound = EXACT[dtype] + (DROPPED if num_rows == 4 else 0.0)
    assert _largest_error(basis, both, torch.eye(8).double()) < bound


@pytest.mark.parametrize("distance", [3e-7, 1e-6, 2e-6, 4e-6])
def test_eigenvalues_at_the_bound_give_a_clean_basis(distance: float) -> None:
    """Whichever of them are kept."""
    bank = random_values(1, NUM_PARAMETERS) + distance * random_values(60, NUM_PARAMETERS, seed=3)
    basis = orthonormal_basis(bank)
    assert 1 <= basis.shape[0] <= 60
    _assert_orthonormal(basis)
    # many small parts may be dropped at once
    assert _largest_error(basis, bank, torch.eye(60).double()) < DROPPED


def test_more_vectors_than_parameters() -> None:
    vectors = random_values(30, 7)
    basis = orthonormal_basis(vectors)
    assert basis.shape == (7, 7)
    _assert_orthonormal(basis)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_blocks_of_columns_and_pieces_give_the_same_space(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    bank = _bank(12, dtype)
    whole = orthonormal_basis(bank)

    def blocks() -> Iterator[Tensor]:
        yield from bank.split([300, 1, 399], dim=1)

    monkeypatch.setattr(span_module, "SPAN_BLOCK_BYTES", 12 * 8 * 37)
    pieces = orthonormal_basis(blocks())
    assert pieces.dtype == dtype
    tolerance = 10 * EXACT[dtype]  # rows of close eigenvalues turn with the order of the sums
    torch.testing.assert_close(pieces, whole, atol=tolerance, rtol=0)
    values = random_values(3, NUM_PARAMETERS).to(dtype)
    small = project(SpanProjection(whole, "x"), values)
    torch.testing.assert_close(small, values @ whole.T, atol=FLOAT32_ROUNDING, rtol=0)


def test_equal_vectors_give_equal_bits() -> None:
    bank = _bank(20, torch.float32)
    assert torch.equal(orthonormal_basis(bank), orthonormal_basis(bank.clone()))


def test_vectors_are_checked() -> None:
    bank = _bank(6, torch.float32)
    for bad in (float("nan"), float("inf"), -float("inf")):
        broken = bank.clone()
        broken[[1, 4], 3] = bad
        with pytest.raises(NonFiniteError, match=r"2 of 6 vectors are not finite, rows \[1, 4\]"):
            orthonormal_basis(broken)
    with pytest.raises(NumericsError, match="all 6 vectors are zero"):
        orthonormal_basis(torch.zeros_like(bank))
    with pytest.raises(NumericsError, match="bfloat16"):
        orthonormal_basis(bank.bfloat16())
    with pytest.raises(NumericsError, match="one type"):
        orthonormal_basis([bank, bank.double()])
    for shapes in ([], [bank, bank[:2]], [bank[0]], [bank[:0]]):
        with pytest.raises(ShapeError, match="expected"):
            orthonormal_basis(shapes)


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("basis_dtype", [torch.float32, torch.float64])
def test_projection_is_the_product_however_it_is_cut(
    out_dtype: torch.dtype, basis_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(span_module, "SPAN_BLOCK_BYTES", 4 * 5 * 33)
    basis, values = _bank(5, basis_dtype) / 1000, random_values(3, NUM_PARAMETERS)
    projection = SpanProjection(basis, "abc")
    expected = values @ basis.double().T
    rounding = FLOAT32_ROUNDING if out_dtype is torch.float32 else FLOAT64_ROUNDING
    for cuts in ([], [1], [300, 301, 699]):
        ours = project(projection, values.to(out_dtype), cuts)
        assert ours.dtype == out_dtype
        torch.testing.assert_close(ours.double(), expected, atol=rounding, rtol=1e-6)


def test_projection_has_an_identity_and_moves() -> None:
    basis = orthonormal_basis(_bank(5, torch.float32))
    projection = SpanProjection(basis, "0123abcd")
    assert (projection.kind, projection.dim, projection.num_parameters) == ("exact", 5, NUM_PARAMETERS)
    assert projection.identity() == "exact/v1/dim=5/basis=0123abcd"
    values = random_values(2, NUM_PARAMETERS).float()
    for other in (pickle.loads(pickle.dumps(projection)), projection.to("cpu")):
        assert other.identity() == projection.identity()
        assert torch.equal(project(other, values), project(projection, values))
    with pytest.raises(ShapeError, match="leaves the parameter vector"):
        projection.add(torch.zeros(2, 5), 1, values)
    for bad in (basis[0], basis[:0]):
        with pytest.raises(ShapeError, match="basis has shape"):
            SpanProjection(bad, "x")
    with pytest.raises(NumericsError, match="float16"):
        SpanProjection(basis.half(), "x")
