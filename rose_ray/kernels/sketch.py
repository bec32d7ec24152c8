"""The folded sketch: the parameter vector cut into blocks of D, each signed, turned round and added up.

Shapes: B batch, D projected dimensions, n one slice of the flat parameter vector, K blocks of D parameters that
the slice touches.

A count-sketch (Charikar et al. 2002) whose rows are not drawn one by one. Two parameters of one block never meet;
two of different blocks meet with probability 1/D, as in a count-sketch, and their signs are independent. So the
variance is at most the count-sketch's. Each block has a turn of its own: without it, a matrix whose row length
divides D would send a whole column to one row of the sketch, and a channel with large gradients would meet itself.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from rose_ray.kernels.hashing import blocks, hash_words, sign_run, word_keys
from rose_ray.kernels.projection import HeldNowhere, ProjectionKind, check_slice
from rose_ray.kernels.tables import TABLE_CACHE_BYTES, TableCache

SKETCH_VERSION = 2
"""Raised whenever any entry of the matrix changes; part of the identity. Version 1 drew every row by itself."""

SKETCH_BLOCK_COLUMNS = 1 << 16
"""Parameters worked on at once, so that copies stay in a cache; the tables are cached in pieces of this size."""

_MIN_DIM_BY_BLOCK = 257  # narrower blocks cost more in calls than the gather costs in memory

_MIN_BLOCKS_DOUBLED = 4  # below that, clearing and folding a doubled row costs more than it saves


class SketchProjection(HeldNowhere):
    """One +-1 in each column.

    Parameter i stands in block ``k = i // D`` at lane ``i % D`` and goes to row ``(i % D + shift(k)) % D``.
    ``shift(k)`` is hash word 0 at index k, modulo D. The sign is bit ``i % 32`` of hash word 1 at index
    ``i // 32``, 1 for +. The sums are made in one order on a device: the same call gives the same bits.

    Args:
        dim: D.
        seed: In [0, 2**63).
        num_parameters: At most 2**32.
        table_cache_bytes: Cap on the tables kept between calls, about 1 byte a parameter.
    """

    kind: ProjectionKind = "sketch"

    def __init__(self, dim: int, seed: int, num_parameters: int, table_cache_bytes: int = TABLE_CACHE_BYTES) -> None:
        self.dim, self.seed, self.num_parameters = dim, seed, num_parameters
        self._shift_keys, self._sign_keys = (word_keys(self.kind, seed, word) for word in (0, 1))
        self._tables = TableCache(table_cache_bytes)

    def shifts(self, first_block: int, num_blocks: int, device: torch.device) -> Tensor:
        """Return the turns [num_blocks] of blocks ``first_block`` on, int64 in [0, D)."""
        index = torch.arange(first_block, first_block + num_blocks, dtype=torch.int64, device=device)
        return hash_words(index, *self._shift_keys).remainder_(self.dim)

    def signs(self, start: int, stop: int, device: torch.device) -> Tensor:
        """Return the signs [stop - start] of parameters ``start`` to ``stop``, int8."""
        return sign_run(self._sign_keys, start, stop, device)

    def add(self, out_BD: Tensor, offset: int, values_Bn: Tensor) -> None:
        """See :class:`~rose_ray.kernels.projection.Projection`."""
        check_slice(self, out_BD, offset, values_Bn)
        for start, stop in blocks(offset, offset + values_Bn.shape[1], SKETCH_BLOCK_COLUMNS):
            block_Bn = values_Bn[:, start - offset : stop - offset].to(out_BD.dtype)
            signs_n, shifts_K = self._table(start, stop, out_BD.device)
            if out_BD.device.type == "cpu" and self.dim >= _MIN_DIM_BY_BLOCK:
                add_by_block(out_BD, start % self.dim, block_Bn, signs_n, shifts_K)
            else:
                add_by_gather(out_BD, start % self.dim, block_Bn, signs_n, shifts_K)

    def identity(self) -> str:
        """See :class:`~rose_ray.kernels.projection.Projection`."""
        return f"{self.kind}/v{SKETCH_VERSION}/dim={self.dim}/seed={self.seed}"

    def _table(self, start: int, stop: int, device: torch.device) -> tuple[Tensor, ...]:
        """Signs of parameters ``start`` to ``stop`` and turns of their blocks."""
        first, last = start // self.dim, (stop - 1) // self.dim
        return self._tables.get(
            (start, stop, str(device)),
            lambda: (self.signs(start, stop, device), self.shifts(first, last - first + 1, device)),
        )


def add_by_block(out_BD: Tensor, lane: int, values_Bn: Tensor, signs_n: Tensor, shifts_K: Tensor) -> None:
    """Add a sketch to ``out_BD``, block by block: many small operations at the speed of memory, for CPUs.

    Args:
        out_BD: Running sum.
        lane: Lane of the first parameter.
        values_Bn: The slice, in the dtype of ``out_BD``.
        signs_n: Its signs, int8.
        shifts_K: Turns of the blocks it touches, int64.
    """
    dim, num_columns = out_BD.shape[1], values_Bn.shape[1]
    edges = [0, *range(dim - lane, num_columns, dim), num_columns]
    widths = [right - left for left, right in pairwise(edges)]
    # In a row of 2 D every turned block is one run; folding it once saves an operation a block.
    doubled = shifts_K.shape[0] >= _MIN_BLOCKS_DOUBLED
    sum_BE = out_BD.new_zeros(out_BD.shape[0], 2 * dim) if doubled else out_BD
    parts = zip(shifts_K.tolist(), values_Bn.split(widths, dim=1), signs_n.to(out_BD.dtype).split(widths), strict=True)
    for shift, part_Bm, signs_m in parts:
        row, width = (lane + shift) % dim, part_Bm.shape[1]
        head = min(width, sum_BE.shape[1] - row)
        sum_BE.narrow(1, row, head).addcmul_(part_Bm.narrow(1, 0, head), signs_m.narrow(0, 0, head))
        if head < width:
            sum_BE.narrow(1, 0, width - head).addcmul_(part_Bm[:, head:], signs_m[head:])
        lane = 0
    if doubled:
        out_BD.add_(sum_BE[:, :dim]).add_(sum_BE[:, dim:])


def add_by_gather(out_BD: Tensor, lane: int, values_Bn: Tensor, signs_n: Tensor, shifts_K: Tensor) -> None:
    """Add a sketch as :func:`add_by_block` does, in a few large operations without atomics, for GPUs and small D.

    Holds about three times the slice. Arguments as there.
    """
    dim, num_blocks = out_BD.shape[1], shifts_K.shape[0]
    end = num_blocks * dim - lane - values_Bn.shape[1]
    signed_BE = torch.nn.functional.pad(values_Bn * signs_n, (lane, end))
    rows_D = torch.arange(dim, dtype=torch.int64, device=out_BD.device)
    first_K = torch.arange(num_blocks, dtype=torch.int64, device=out_BD.device).mul_(dim)
    source_KD = (rows_D - shifts_K.unsqueeze(1)).remainder_(dim).add_(first_K.unsqueeze(1))
    turned_BE = signed_BE.index_select(1, source_KD.flatten())
    out_BD.add_(turned_BE.unflatten(1, (num_blocks, dim)).sum(1))
