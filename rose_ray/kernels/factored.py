"""Two-sided random signs: every parameter matrix is multiplied by a small matrix from the left and the right.

Shapes: B batch, D projected dimensions, n one slice of the flat parameter vector; of one parameter matrix O rows
and I columns, of its projection a rows and b columns.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from rose_ray.errors import ConfigError, ShapeError
from rose_ray.kernels.hashing import WORD_BITS, sign_rows, word_keys
from rose_ray.kernels.projection import HeldNowhere, ProjectionKind, check_slice
from rose_ray.kernels.tables import TABLE_CACHE_BYTES, TableCache

FACTORED_VERSION = 1
"""Raised whenever any entry of the matrix changes; part of the identity."""


class Grid(NamedTuple):
    """How one parameter matrix [O, I] is projected, to [a, b]."""

    num_rows: int
    num_columns: int
    rows_kept: int
    columns_kept: int


class FactoredProjection(HeldNowhere):
    """``V [O, I]`` gives ``L V R^T``: L [a, O] of +-1/sqrt(a), R [b, I] of +-1/sqrt(b), own signs for each matrix.

    Unbiased, and cheap at any D, but noisier than ``sketch`` at the same D: entries of one row or column of V
    share signs. The features are the blocks [a, b] of all matrices, row by row, one after the other. ``dim`` is
    what they add up to, at most the dim asked for.

    The left signs of matrix m have the seed ``first + 2**32 second``, where (first, second) are the keys of word
    ``2 m`` of the stream; the right ones those of word ``2 m + 1``. Bit b of their word w at index o is the sign
    of row ``32 w + b``, 1 for +.

    Args:
        dim: Most features to make.
        seed: In [0, 2**63).
        shapes: (O, I) of each matrix, in their order in the flat vector.
        table_cache_bytes: Cap on the small matrices kept between calls.

    Raises:
        ConfigError: There is no matrix, one is empty, or there are more of them than ``dim``.
    """

    kind: ProjectionKind = "factored"

    def __init__(
        self,
        dim: int,
        seed: int,
        shapes: Sequence[tuple[int, int]],
        table_cache_bytes: int = TABLE_CACHE_BYTES,
    ) -> None:
        self.seed = seed
        self.grids = make_grids(dim, shapes)
        self._offsets = [0, *accumulate(grid.num_rows * grid.num_columns for grid in self.grids)]
        self._features = [0, *accumulate(grid.rows_kept * grid.columns_kept for grid in self.grids)]
        self._matrix_at = {offset: matrix for matrix, offset in enumerate(self._offsets)}
        self.num_parameters, self.dim = self._offsets[-1], self._features[-1]
        self._tables = TableCache(table_cache_bytes)

    def add(self, out_BD: Tensor, offset: int, values_Bn: Tensor) -> None:
        """See :class:`~rose_ray.kernels.projection.Projection`. Slices are one or more whole matrices.

        Raises:
            ShapeError: As there, or the slice cuts a matrix.
        """
        check_slice(self, out_BD, offset, values_Bn)
        stop = offset + values_Bn.shape[1]
        if offset not in self._matrix_at or stop not in self._matrix_at:
            raise ShapeError(f"slice {offset} to {stop} cuts a matrix; kind 'factored' takes whole matrices only")
        for matrix in range(self._matrix_at[offset], self._matrix_at[stop]):
            start, end = (self._offsets[m] - offset for m in (matrix, matrix + 1))
            block_BF = self._project(matrix, values_Bn[:, start:end].to(out_BD.dtype))
            out_BD[:, self._features[matrix] : self._features[matrix + 1]] += block_BF

    def identity(self) -> str:
        """See :class:`~rose_ray.kernels.projection.Projection`. The grids are in it as a digest."""
        digest = hashlib.sha256(repr([tuple(grid) for grid in self.grids]).encode()).hexdigest()[:16]
        return f"{self.kind}/v{FACTORED_VERSION}/dim={self.dim}/seed={self.seed}/grids={digest}"

    def _project(self, matrix: int, values_Bn: Tensor) -> Tensor:
        """``L V R^T`` of every row of values, [B, a b]. Batched products read the slice where it lies."""
        grid, num_batch = self.grids[matrix], values_Bn.shape[0]
        left_aO, right_bI = self._factors(matrix, values_Bn.dtype, values_Bn.device)
        values_BOI = values_Bn.unflatten(1, (grid.num_rows, grid.num_columns))
        half_BOb = torch.bmm(values_BOI, right_bI.T.expand(num_batch, -1, -1))
        return torch.bmm(left_aO.expand(num_batch, -1, -1), half_BOb).flatten(1)

    def _factors(self, matrix: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
        grid = self.grids[matrix]
        return self._tables.get(
            (matrix, dtype, str(device)),
            lambda: (
                self._signs(2 * matrix, grid.rows_kept, grid.num_rows, dtype, device),
                self._signs(2 * matrix + 1, grid.columns_kept, grid.num_columns, dtype, device),
            ),
        )

    def _signs(self, stream: int, num_rows: int, length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        first, second = word_keys(self.kind, self.seed, stream)
        own_seed = first | second << WORD_BITS
        keys = [word_keys(self.kind, own_seed, word) for word in range(-(-num_rows // WORD_BITS))]
        return sign_rows(keys, 0, length, dtype, device)[:num_rows] / math.sqrt(num_rows)


def make_grids(dim: int, shapes: Sequence[tuple[int, int]]) -> list[Grid]:
    """Share ``dim`` features among matrices: equally, except that none gets more than it has entries.

    Each block is as square as its share and its matrix allow.

    Raises:
        ConfigError: There is no matrix, one is empty, or there are more of them than ``dim``.
    """
    if not shapes or min(min(shape) for shape in shapes) < 1:
        raise ConfigError(f"matrix shapes are {list(shapes)}; expected at least one, and no empty ones")
    if dim < len(shapes):
        raise ConfigError(
            f"projection dim is {dim} and there are {len(shapes)} matrices; kind 'factored' needs a dim of at least "
            f"{len(shapes)}, or use kind 'sketch'"
        )
    share = _equal_share(dim, [rows * columns for rows, columns in shapes])
    return [Grid(rows, columns, *_squarest(share, rows, columns)) for rows, columns in shapes]


def _equal_share(total: int, sizes: list[int]) -> int:
    """Return the largest share with ``sum(min(share, size)) <= total``; small ones leave the rest to the others."""
    share, left = 0, total
    for num_before, size in enumerate(sorted(sizes)):
        share = left // (len(sizes) - num_before)
        if size > share:
            return share
        left -= size
    return max(sizes)


def _squarest(share: int, num_rows: int, num_columns: int) -> tuple[int, int]:
    rows_kept = min(math.isqrt(share), num_rows)
    columns_kept = min(share // rows_kept, num_columns)
    return min(share // columns_kept, num_rows), columns_kept
