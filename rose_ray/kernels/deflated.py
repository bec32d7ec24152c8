"""A random projection that keeps one direction exactly.

Shapes: B batch, D the inner projection's dimensions, E = D + 1, n one slice of the flat parameter vector,
P parameters.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from rose_ray.errors import ConfigError, NonFiniteError, NumericsError, ShapeError
from rose_ray.kernels.hashing import tensor_digest
from rose_ray.kernels.projection import Projection, check_slice

DEFLATED_VERSION = 1
"""Raised whenever the same inner projection and common vector would give another matrix; part of the identity."""


class DeflatedProjection:
    """``[S (I - c c^T); c^T]``: S on what is left beside a common direction, whose own part stays exact.

    With momentum every Adam direction has a part in common, and S's error grows with the whole length. Here the
    inner product of x and y errs by ``|x - <x, c> c| |y - <y, c> c|`` where S alone errs by ``|x| |y|``, times the
    same factor. Unbiased as S is. ``kind`` and ``seed`` are those of S.

    Args:
        inner: S. One with a device of its own must be on that of the common vector.
        common_P: Any vector but zero, float32 or float64, [P]; c is it over its length. Not modified.
        digest: Text that names the vector in the identity; computed from its values where it is left out.

    Raises:
        ShapeError: The vector does not have one number per parameter.
        NumericsError: It is neither float32 nor float64.
        NonFiniteError: It has a NaN or infinity.
        ConfigError: It is zero.
    """

    def __init__(self, inner: Projection, common_P: Tensor, digest: str | None = None) -> None:
        _check_common(inner, common_P)
        length = torch.linalg.vector_norm(common_P, dtype=torch.float64)
        if not bool(torch.isfinite(length)):
            raise NonFiniteError("the common direction is not finite; is the checkpoint's optimizer state damaged?")
        if float(length) == 0.0:
            raise ConfigError("the common direction is zero: nothing to take out; use the inner projection undeflated")
        self.inner, self.kind, self.seed = inner, inner.kind, inner.seed
        self.dim, self.num_parameters = inner.dim + 1, inner.num_parameters
        self.num_exact = inner.num_exact + 1
        self.digest = tensor_digest(common_P) if digest is None else digest
        self._unit_P = (common_P / length).to(common_P.dtype)
        sketched_1D = torch.zeros(1, inner.dim, dtype=torch.float64, device=common_P.device)
        inner.add(sketched_1D, 0, self._unit_P.unsqueeze(0))
        self._sketched_D = sketched_1D[0]

    def add(self, out_BE: Tensor, offset: int, values_Bn: Tensor) -> None:
        """See :class:`~rose_ray.kernels.projection.Projection`. The common vector must be on the same device."""
        self.take_out(out_BE, self.add_all(out_BE, offset, values_Bn))

    def add_all(self, out_BE: Tensor, offset: int, values_Bn: Tensor) -> Tensor:
        """Do as `add` does, but leave in what is common, and return its amount [B]: `take_out` once for many slices."""
        check_slice(self, out_BE, offset, values_Bn)
        self.inner.add(out_BE[:, :-1], offset, values_Bn)
        unit_n = self.unit(offset, values_Bn.shape[1]).to(out_BE.dtype)
        return values_Bn.to(out_BE.dtype) @ unit_n

    def unit(self, offset: int, num_parameters: int) -> Tensor:
        """Return a slice of c, [n]."""
        unit_n: Tensor = self._unit_P[offset : offset + num_parameters]
        return unit_n

    def take_out(self, out_BE: Tensor, along_B: Tensor) -> None:
        """Move what is common out of the first D numbers and into the last.

        Args:
            out_BE: S of values in the first D.
            along_B: Product of those values with `unit`.
        """
        # S is linear, so what it makes of the common part is known without another look at the values.
        out_BE[:, :-1].addr_(along_B, self._sketched_D.to(out_BE.dtype), alpha=-1)
        out_BE[:, -1] += along_B

    def identity(self) -> str:
        """See :class:`~rose_ray.kernels.projection.Projection`."""
        return f"deflated/v{DEFLATED_VERSION}/{self.inner.identity()}/common={self.digest}"

    def to(self, device: torch.device | str) -> DeflatedProjection:
        """Return the same projection with its vectors on a device. An inner one that holds a basis moves too."""
        moved = copy.copy(self)
        moved._unit_P, moved._sketched_D = self._unit_P.to(device), self._sketched_D.to(device)
        moved.inner = self.inner.to(device)
        return moved


def _check_common(inner: Projection, common_P: Tensor) -> None:
    if common_P.shape != (inner.num_parameters,):
        raise ShapeError(f"common direction has shape {tuple(common_P.shape)}; expected [{inner.num_parameters}]")
    if common_P.dtype not in (torch.float32, torch.float64):
        raise NumericsError(f"common direction is {common_P.dtype}; expected float32 or float64")
