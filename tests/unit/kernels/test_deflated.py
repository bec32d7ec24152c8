"""Projections that keep a common direction, against the explicit matrix."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import Tensor

from rose_ray.errors import ConfigError, NonFiniteError, NumericsError, ShapeError
from rose_ray.kernels.deflated import DeflatedProjection
from rose_ray.kernels.projection import Projection, ProjectionKind, make_projection
from rose_ray.kernels.span import SpanProjection, orthonormal_basis
from tests.unit.kernels.projection_oracles import (
    FLOAT32_ROUNDING,
    FLOAT64_ROUNDING,
    assert_unbiased,
    matrix_of,
    project,
    random_values,
)

torch.set_num_threads(1)  # tiny tensors: handing them to threads costs more than the sums

KINDS: list[ProjectionKind] = ["rademacher", "sketch", "factored", "none"]
SHAPES = [(20, 30), (100, 4)]
NUM_PARAMETERS = 1000
# Errors of 60 seeds and 15 pairs: their root mean square is known to about 10 %, the quotient of two to 15 %.
QUOTIENT_TOLERANCE = 0.4


def _inner(kind: ProjectionKind, dim: int = 300, seed: int = 3) -> Projection:
    return make_projection(kind, dim, seed, NUM_PARAMETERS, shapes=SHAPES)


def _common(dtype: torch.dtype = torch.float64) -> Tensor:
    return 7 * random_values(1, NUM_PARAMETERS, seed=8)[0].to(dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_matrix_equals_the_explicit_one(kind: ProjectionKind) -> None:
    inner, common = _inner(kind), _common()
    projection = DeflatedProjection(inner, common)
    assert (projection.kind, projection.dim) == (kind, inner.dim + 1)
    unit = common / common.norm()
    beside = matrix_of(inner) @ (torch.eye(NUM_PARAMETERS).double() - torch.outer(unit, unit))
    expected = torch.cat([beside, unit.unsqueeze(0)])
    torch.testing.assert_close(matrix_of(projection), expected, atol=FLOAT64_ROUNDING, rtol=0)
    values = random_values(3, NUM_PARAMETERS)
    single = project(DeflatedProjection(inner, common.float()), values.float()).double()
    torch.testing.assert_close(single, values @ expected.T, atol=FLOAT32_ROUNDING, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_cuts_views_and_half_precision_do_not_matter(kind: ProjectionKind) -> None:
    projection, values = DeflatedProjection(_inner(kind), _common()), random_values(2, NUM_PARAMETERS)
    whole = project(projection, values)
    torch.testing.assert_close(project(projection, values, [600]), whole, atol=FLOAT64_ROUNDING, rtol=0)
    if kind != "factored":
        torch.testing.assert_close(project(projection, values, [1, 77, 998]), whole, atol=FLOAT64_ROUNDING, rtol=0)
    out = torch.zeros(2, projection.dim)
    projection.add(out, 0, values.bfloat16())
    expected = project(projection, values.bfloat16().float())
    torch.testing.assert_close(out, expected, atol=FLOAT32_ROUNDING, rtol=0)


@pytest.mark.parametrize("kind", ["rademacher", "sketch", "factored"])
def test_products_are_unbiased(kind: ProjectionKind) -> None:
    common = _common()
    x, y = random_values(2, NUM_PARAMETERS, seed=1) + 0.2 * common
    products = []
    for seed in range(300):
        projected = project(DeflatedProjection(_inner(kind, 24, seed), common), torch.stack([x, y]))
        products.append(projected[0] @ projected[1])
    assert_unbiased(products, x @ y)


@pytest.mark.parametrize("share", [0.5, 0.95])
def test_the_error_shrinks_with_what_is_left(share: float) -> None:
    """By |x - <x, c> c| |y - <y, c> c| / (|x| |y|), here 1 - share^2, and the root of the cosines' (1 + c^2)."""
    common = _common()
    unit = common / common.norm()
    beside = random_values(6, NUM_PARAMETERS, seed=1)
    beside = torch.nn.functional.normalize(beside - (beside @ unit).unsqueeze(1) * unit)
    values = share * unit + (1 - share**2) ** 0.5 * beside
    upper = torch.triu(torch.ones(6, 6), diagonal=1).bool()
    squares: dict[str, list[Tensor]] = {"plain": [], "deflated": []}
    for seed in range(60):
        inner = _inner("sketch", 128, seed)
        for name, projection in (("plain", inner), ("deflated", DeflatedProjection(inner, common))):
            projected = project(projection, values)
            squares[name].append((projected @ projected.T - values @ values.T)[upper].square())
    plain, deflated = (float(torch.cat(squares[name]).mean().sqrt()) for name in ("plain", "deflated"))
    expected = (1 - share**2) / (1 + share**4) ** 0.5  # the pairs' cosine is share^2, beside the direction about 0
    assert deflated / plain == pytest.approx(expected, rel=QUOTIENT_TOLERANCE)


def test_the_common_part_is_exact() -> None:
    common = _common()
    projection = DeflatedProjection(_inner("sketch", 16), common)
    x = random_values(1, NUM_PARAMETERS, seed=1)
    products = project(projection, x) @ project(projection, common.unsqueeze(0)).T
    torch.testing.assert_close(products[0, 0], x[0] @ common, atol=FLOAT64_ROUNDING * 1e3, rtol=0)  # |x| |c| is 7e3


def test_a_span_can_be_deflated() -> None:
    """Products with the span stay exact where the direction lies in it."""
    bank, common = random_values(4, NUM_PARAMETERS, seed=2), _common()
    basis = orthonormal_basis(torch.cat([bank, common.unsqueeze(0)]))
    projection = DeflatedProjection(SpanProjection(basis, "b"), common).to("cpu")
    x = random_values(3, NUM_PARAMETERS, seed=1)
    ours = project(projection, x) @ project(projection, bank).T
    torch.testing.assert_close(ours, x @ bank.T, atol=FLOAT64_ROUNDING * 1e3, rtol=0)  # |x| |g| is 1e3


def test_identity_names_the_direction_and_pickles() -> None:
    inner, common = _inner("sketch"), _common()
    projection = DeflatedProjection(inner, common)
    prefix = "deflated/v1/sketch/v2/dim=300/seed=3/common="
    assert projection.identity().startswith(prefix) and len(projection.identity()) == len(prefix) + 16
    assert DeflatedProjection(inner, common, "moments-7").identity() == prefix + "moments-7"
    assert DeflatedProjection(inner, common.clone()).identity() == projection.identity()
    changed = common.clone()
    changed[-1] += 1e-9
    assert DeflatedProjection(inner, changed).identity() != projection.identity()
    values = random_values(2, NUM_PARAMETERS).float()
    copy = pickle.loads(pickle.dumps(projection))
    assert copy.identity() == projection.identity()
    assert torch.equal(project(copy, values), project(projection, values))


def test_the_common_vector_is_checked() -> None:
    inner, common = _inner("sketch"), _common()
    with pytest.raises(ConfigError, match="use the inner projection undeflated"):
        DeflatedProjection(inner, torch.zeros_like(common))
    common[3] = float("nan")
    with pytest.raises(NonFiniteError, match="not finite"):
        DeflatedProjection(inner, common)
    with pytest.raises(ShapeError, match=r"expected \[1000\]"):
        DeflatedProjection(inner, common[1:])
    with pytest.raises(NumericsError, match="float16"):
        DeflatedProjection(inner, common.half())
    with pytest.raises(ShapeError, match="out has shape"):
        DeflatedProjection(inner, _common()).add(torch.zeros(2, 300), 0, torch.zeros(2, 5))
