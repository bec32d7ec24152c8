"""Dense random signs.

Shapes: B batch, D projected dimensions, n one slice of the flat parameter vector.
"""

from __future__ import annotations

from torch import Tensor

from rose_ray.kernels.hashing import WORD_BITS, blocks, sign_rows, word_keys
from rose_ray.kernels.projection import HeldNowhere, ProjectionKind, check_slice

RADEMACHER_VERSION = 1
"""Raised whenever any entry of the matrix changes; part of the identity."""

DENSE_BLOCK_BYTES = 64 << 20
"""Bytes of the signs and their integer form held at once."""


class RademacherProjection(HeldNowhere):
    """Dense signs over ``sqrt(D)``. Bit b of word w at index i is the sign of row ``32 w + b``, 1 for +."""

    kind: ProjectionKind = "rademacher"

    def __init__(self, dim: int, seed: int, num_parameters: int) -> None:
        self.dim, self.seed, self.num_parameters = dim, seed, num_parameters
        num_words = -(-dim // WORD_BITS)
        self._keys = [word_keys(self.kind, seed, word) for word in range(num_words)]

    def add(self, out_BD: Tensor, offset: int, values_Bn: Tensor) -> None:
        """See :class:`~rose_ray.kernels.projection.Projection`."""
        check_slice(self, out_BD, offset, values_Bn)
        num_rows = len(self._keys) * WORD_BITS
        columns = max(1, DENSE_BLOCK_BYTES // (num_rows * (8 + out_BD.element_size())))
        scale = self.dim**-0.5
        for start, stop in blocks(0, values_Bn.shape[1], columns):
            signs_Dn = sign_rows(self._keys, offset + start, offset + stop, out_BD.dtype, out_BD.device)[: self.dim]
            block_Bn = values_Bn[:, start:stop].to(out_BD.dtype)
            out_BD.addmm_(block_Bn, signs_Dn.T, alpha=scale)

    def identity(self) -> str:
        """See :class:`~rose_ray.kernels.projection.Projection`."""
        return f"{self.kind}/v{RADEMACHER_VERSION}/dim={self.dim}/seed={self.seed}"
