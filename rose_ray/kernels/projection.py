"""Linear maps from flat parameter vectors to a few numbers.

Shapes: B batch, D projected dimensions, n one slice of the flat parameter vector.

Every entry of a random matrix R is a function of (seed, parameter index, row) alone, computed with integers.
So R is the same on every machine and device, and is never stored. All random kinds satisfy ``E[R^T R] = I``:
inner products are kept on average; ``rademacher`` and ``sketch`` err by about ``sqrt(1 / D)`` of the lengths,
``factored`` by more. How the vector is cut into slices changes results by rounding only. ``exact``
(:mod:`rose_ray.kernels.span`) is made from a bank and keeps inner products with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol, Self, get_args

import torch
from torch import Tensor

from rose_ray.errors import ConfigError, NumericsError, ShapeError
from rose_ray.kernels.tables import TABLE_CACHE_BYTES

ProjectionKind = Literal["rademacher", "sketch", "factored", "none", "exact"]

NO_PROJECTION_VERSION = 1

MAX_PARAMETERS = 1 << 32
MAX_SEED = 1 << 63


class Projection(Protocol):
    """A linear map from ``num_parameters`` to ``dim`` numbers, applied slice by slice."""

    kind: ProjectionKind
    dim: int
    seed: int
    num_parameters: int
    num_exact: int
    """How many of the ``dim`` numbers, the last ones, are exact inner products; they are stored in float32."""

    def to(self, device: torch.device | str) -> Projection:
        """Return the same map with what it holds on a device. What is computed, not held, needs no move."""
        ...

    def add(self, out_BD: Tensor, offset: int, values_Bn: Tensor) -> None:
        """Add the projection of parameters ``offset`` to ``offset + n`` to ``out_BD``, in place.

        Args:
            out_BD: Running sum, float32 or float64, contiguous or not; the arithmetic is done in its dtype.
                Start with zeros.
            offset: Place of the slice in the flat parameter vector.
            values_Bn: The slice, floating point, on the device of ``out_BD``. Not modified.

        Raises:
            ShapeError: The shapes disagree, or the slice leaves the parameter vector.
            NumericsError: ``out_BD`` is neither float32 nor float64.
        """
        ...

    def identity(self) -> str:
        """Text that names the matrix: kind, version, dim and what it is made from. Stored with all made by it."""
        ...


def make_projection(
    kind: ProjectionKind,
    dim: int,
    seed: int,
    num_parameters: int,
    *,
    shapes: Sequence[tuple[int, int]] | None = None,
    table_cache_bytes: int = TABLE_CACHE_BYTES,
) -> Projection:
    """Make a projection.

    Args:
        kind: ``rademacher``, a dense matrix of +-1/sqrt(D); ``sketch``, one +-1 in each column, about D times
            cheaper; ``factored``, a small matrix on each side of every parameter matrix; ``none``, the identity.
        dim: D, at least 1. ``factored`` uses at most that many. Not looked at by ``none``, whose D is
            ``num_parameters``.
        seed: In [0, 2**63). Not looked at by ``none``.
        num_parameters: Length of the flat parameter vector, at least 1, at most 2**32 for the random kinds.
        shapes: (rows, columns) of the parameter matrices in their order in the flat vector. Only ``factored``
            looks at them.
        table_cache_bytes: Cap on the tables that ``sketch`` and ``factored`` keep between calls; past it they
            are made anew.

    Raises:
        ConfigError: A value is unknown or out of its range, shapes are missing or do not fit
            ``num_parameters``, or the kind is ``exact``, which needs a bank.
    """
    # The kinds import what stands above.
    from rose_ray.kernels.factored import FactoredProjection
    from rose_ray.kernels.rademacher import RademacherProjection
    from rose_ray.kernels.sketch import SketchProjection

    _check_settings(kind, dim, seed, num_parameters)
    if kind == "none":
        return NoProjection(num_parameters)
    if kind == "rademacher":
        return RademacherProjection(dim, seed, num_parameters)
    if kind == "sketch":
        return SketchProjection(dim, seed, num_parameters, table_cache_bytes)
    if shapes is None:
        raise ConfigError("projection kind 'factored' needs the shapes of the parameter matrices, and got none")
    factored = FactoredProjection(dim, seed, shapes, table_cache_bytes)
    if factored.num_parameters != num_parameters:
        raise ConfigError(f"shapes hold {factored.num_parameters} parameters; expected {num_parameters}")
    return factored


class HeldNowhere:
    """What maps have in common that are computed from seeds: no tensors to move, nothing exact."""

    num_exact = 0

    def to(self, device: torch.device | str) -> Self:
        """See :class:`Projection`."""
        return self


class NoProjection(HeldNowhere):
    """The identity, for small models and for tests: D is the number of parameters."""

    kind: ProjectionKind = "none"
    seed = 0

    def __init__(self, num_parameters: int) -> None:
        self.dim = self.num_parameters = num_parameters

    def add(self, out_BD: Tensor, offset: int, values_Bn: Tensor) -> None:
        """See :class:`Projection`."""
        check_slice(self, out_BD, offset, values_Bn)
        out_BD[:, offset : offset + values_Bn.shape[1]] += values_Bn.to(out_BD.dtype)

    def identity(self) -> str:
        """See :class:`Projection`."""
        return f"{self.kind}/v{NO_PROJECTION_VERSION}/dim={self.dim}"


def check_slice(projection: Projection, out_BD: Tensor, offset: int, values_Bn: Tensor) -> None:
    """Raise what :meth:`Projection.add` promises to raise."""
    if out_BD.ndim != 2 or out_BD.shape[1] != projection.dim:
        raise ShapeError(f"out has shape {tuple(out_BD.shape)}; expected [B, {projection.dim}]")
    if values_Bn.ndim != 2 or values_Bn.shape[0] != out_BD.shape[0]:
        raise ShapeError(f"values have shape {tuple(values_Bn.shape)}; expected [{out_BD.shape[0]}, n]")
    stop = offset + values_Bn.shape[1]
    if offset < 0 or stop > projection.num_parameters:
        raise ShapeError(f"slice {offset} to {stop} leaves the parameter vector of {projection.num_parameters} numbers")
    if out_BD.dtype not in (torch.float32, torch.float64):
        raise NumericsError(f"out is {out_BD.dtype}; expected float32 or float64")


def _check_settings(kind: str, dim: int, seed: int, num_parameters: int) -> None:
    kinds = get_args(ProjectionKind)
    if kind not in kinds:
        raise ConfigError(f"projection kind is {kind!r}; expected one of {', '.join(kinds)}")
    if kind == "exact":
        raise ConfigError("projection kind 'exact' needs a bank; make it with SpanProjection from the bank's basis")
    if num_parameters < 1:
        raise ConfigError(f"num_parameters is {num_parameters}; expected at least 1")
    if kind == "none":
        return
    if dim < 1 or dim >= MAX_PARAMETERS:
        raise ConfigError(f"projection dim is {dim}; expected 1 to {MAX_PARAMETERS - 1}")
    if not 0 <= seed < MAX_SEED:
        raise ConfigError(f"projection seed is {seed}; expected 0 to {MAX_SEED - 1}")
    if num_parameters > MAX_PARAMETERS:
        raise ConfigError(f"num_parameters is {num_parameters}; random projections index at most {MAX_PARAMETERS}")
