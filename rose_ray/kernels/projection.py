"""Seeded random projections of flat parameter vectors.

Shapes: B batch, D projected dimensions, n one slice of the flat parameter vector, W hash words of 32 signs.

Every entry of a projection matrix R is a function of (seed, parameter index, row) alone, computed with
integers. So R is the same on every machine and device, is never stored, and does not depend on how the
parameters are cut into tensors or in which order the tensors come. Both random kinds satisfy
``E[R^T R] = I``: inner products are kept on average, with a relative error of about ``sqrt(1 / D)``.
Sums are floating-point: cutting the vector differently changes results by rounding, and ``sketch`` on CUDA
adds in an order that varies from run to run.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from rose_ray.errors import ConfigError, NumericsError, ShapeError

ProjectionKind = Literal["rademacher", "sketch", "none"]

PROJECTION_VERSION = 1
"""Raised whenever any entry of any matrix changes; part of every projection's identity."""

DENSE_BLOCK_BYTES = 64 << 20
"""Bytes of the signs and their integer form that the dense kind holds at once."""

SKETCH_BLOCK_COLUMNS = 1 << 18
"""Parameters that the sketch works on at once; its tables are cached in pieces of this size."""

TABLE_CACHE_BYTES = 1 << 30
"""Default cap on the sketch's cached tables: 5 bytes a parameter, so about 2 * 10**8 parameters."""

_WORD = 0xFFFFFFFF
_WORD_BITS = 32
_MAX_PARAMETERS = 1 << _WORD_BITS
_MAX_SEED = 1 << 63
_STREAM = {"rademacher": 0x52414445, "sketch": 0x534B4554}


class Projection(Protocol):
    """A linear map from ``num_parameters`` to ``dim`` numbers, applied slice by slice."""

    kind: ProjectionKind
    dim: int
    seed: int
    num_parameters: int

    def add(self, out_BD: Tensor, offset: int, values_Bn: Tensor) -> None:
        """Add the projection of parameters ``offset`` to ``offset + n`` to ``out_BD``, in place.

        Args:
            out_BD: Running sum, float32 or float64; the arithmetic is done in its dtype. Start with zeros.
            offset: Place of the slice in the flat parameter vector.
            values_Bn: The slice, floating point, on the device of ``out_BD``. Not modified.

        Raises:
            ShapeError: The shapes disagree, or the slice leaves the parameter vector.
            NumericsError: ``out_BD`` is neither float32 nor float64.
        """
        ...

    def identity(self) -> str:
        """Text that names the matrix: kind, version, dim and seed. Stored with everything made by it."""
        ...


def make_projection(
    kind: ProjectionKind,
    dim: int,
    seed: int,
    num_parameters: int,
    *,
    table_cache_bytes: int = TABLE_CACHE_BYTES,
) -> Projection:
    """Make a projection.

    Args:
        kind: ``rademacher``, a dense matrix of +-1/sqrt(D); ``sketch``, one +-1 in each column
            (count-sketch, Charikar et al. 2002), about D times cheaper; ``none``, the identity.
        dim: D, at least 1. Not looked at by ``none``, whose D is ``num_parameters``.
        seed: In [0, 2**63). Not looked at by ``none``.
        num_parameters: Length of the flat parameter vector, at least 1, at most 2**32 for the random kinds.
        table_cache_bytes: Cap on the tables that ``sketch`` keeps between calls; past it they are made anew.

    Raises:
        ConfigError: A value is unknown or out of its range.
    """
    kinds = get_args(ProjectionKind)
    if kind not in kinds:
        raise ConfigError(f"projection kind is {kind!r}; expected one of {', '.join(kinds)}")
    if num_parameters < 1:
        raise ConfigError(f"num_parameters is {num_parameters}; expected at least 1")
    if kind == "none":
        return NoProjection(num_parameters)
    if dim < 1 or dim >= _MAX_PARAMETERS:
        raise ConfigError(f"projection dim is {dim}; expected 1 to {_MAX_PARAMETERS - 1}")
    if not 0 <= seed < _MAX_SEED:
        raise ConfigError(f"projection seed is {seed}; expected 0 to {_MAX_SEED - 1}")
    if num_parameters > _MAX_PARAMETERS:
        raise ConfigError(f"num_parameters is {num_parameters}; random projections index at most {_MAX_PARAMETERS}")
    if kind == "rademacher":
        return RademacherProjection(dim, seed, num_parameters)
    return SketchProjection(dim, seed, num_parameters, table_cache_bytes)


class RademacherProjection:
    """Dense signs over ``sqrt(D)``. Bit b of word w at index i is the sign of row ``32 w + b``, 1 for +."""

    kind: ProjectionKind = "rademacher"

    def __init__(self, dim: int, seed: int, num_parameters: int) -> None:
        self.dim, self.seed, self.num_parameters = dim, seed, num_parameters
        num_words = -(-dim // _WORD_BITS)
        self._keys = [_word_keys(self.kind, seed, word) for word in range(num_words)]

    def add(self, out_BD: Tensor, offset: int, values_Bn: Tensor) -> None:
        """See :class:`Projection`."""
        _check_slice(self, out_BD, offset, values_Bn)
        keys_2W = torch.tensor(self._keys, dtype=torch.int64, device=out_BD.device).T
        num_rows = keys_2W.shape[1] * _WORD_BITS
        columns = max(1, DENSE_BLOCK_BYTES // (num_rows * (8 + out_BD.element_size())))
        scale = self.dim**-0.5
        for start, stop in _blocks(values_Bn.shape[1], columns):
            signs_Dn = _signs(keys_2W, offset + start, offset + stop, out_BD.dtype)[: self.dim]
            block_Bn = values_Bn[:, start:stop].to(out_BD.dtype)
            out_BD.addmm_(block_Bn, signs_Dn.T, alpha=scale)

    def identity(self) -> str:
        """See :class:`Projection`."""
        return f"{self.kind}/v{PROJECTION_VERSION}/dim={self.dim}/seed={self.seed}"


class SketchProjection:
    """Count-sketch: parameter i goes with a random sign to one random row, with no pattern over i."""

    kind: ProjectionKind = "sketch"

    def __init__(self, dim: int, seed: int, num_parameters: int, table_cache_bytes: int) -> None:
        self.dim, self.seed, self.num_parameters = dim, seed, num_parameters
        self._keys = [_word_keys(self.kind, seed, word) for word in range(2)]
        self._cache_bytes_left = table_cache_bytes
        self._tables: dict[tuple[int, int, str], tuple[Tensor, Tensor]] = {}

    def add(self, out_BD: Tensor, offset: int, values_Bn: Tensor) -> None:
        """See :class:`Projection`."""
        _check_slice(self, out_BD, offset, values_Bn)
        for start, stop in _blocks(values_Bn.shape[1], SKETCH_BLOCK_COLUMNS):
            rows_n, signs_n = self._table(offset + start, offset + stop, out_BD.device)
            block_Bn = values_Bn[:, start:stop].to(out_BD.dtype) * signs_n
            out_BD.index_add_(1, rows_n.long(), block_Bn)  # int64 indices take the fast path on CPU

    def identity(self) -> str:
        """See :class:`Projection`."""
        return f"{self.kind}/v{PROJECTION_VERSION}/dim={self.dim}/seed={self.seed}"

    def _table(self, start: int, stop: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Row and sign of parameters ``start`` to ``stop``; kept while the cap allows."""
        key = (start, stop, str(device))
        if key not in self._tables:
            table = self._make_table(start, stop, device)
            num_bytes = sum(part.numel() * part.element_size() for part in table)
            if num_bytes > self._cache_bytes_left:
                return table
            self._cache_bytes_left -= num_bytes
            self._tables[key] = table
        return self._tables[key]

    def _make_table(self, start: int, stop: int, device: torch.device) -> tuple[Tensor, Tensor]:
        index_n = torch.arange(start, stop, dtype=torch.int64, device=device)
        row_words, sign_words = (_hash_words(index_n, *keys) for keys in self._keys)
        row_dtype = torch.int32 if self.dim <= torch.iinfo(torch.int32).max else torch.int64
        signs_n = (sign_words >> (_WORD_BITS - 1)).mul_(2).sub_(1)
        return row_words.remainder_(self.dim).to(row_dtype), signs_n.to(torch.int8)


class NoProjection:
    """The identity, for small models and for tests: D is the number of parameters."""

    kind: ProjectionKind = "none"
    seed = 0

    def __init__(self, num_parameters: int) -> None:
        self.dim = self.num_parameters = num_parameters

    def add(self, out_BD: Tensor, offset: int, values_Bn: Tensor) -> None:
        """See :class:`Projection`."""
        _check_slice(self, out_BD, offset, values_Bn)
        out_BD[:, offset : offset + values_Bn.shape[1]] += values_Bn.to(out_BD.dtype)

    def identity(self) -> str:
        """See :class:`Projection`."""
        return f"{self.kind}/v{PROJECTION_VERSION}/dim={self.dim}"


def _check_slice(projection: Projection, out_BD: Tensor, offset: int, values_Bn: Tensor) -> None:
    if out_BD.ndim != 2 or out_BD.shape[1] != projection.dim:
        raise ShapeError(f"out has shape {tuple(out_BD.shape)}; expected [B, {projection.dim}]")
    if values_Bn.ndim != 2 or values_Bn.shape[0] != out_BD.shape[0]:
        raise ShapeError(f"values have shape {tuple(values_Bn.shape)}; expected [{out_BD.shape[0]}, n]")
    stop = offset + values_Bn.shape[1]
    if offset < 0 or stop > projection.num_parameters:
        raise ShapeError(f"slice {offset} to {stop} leaves the parameter vector of {projection.num_parameters} numbers")
    if out_BD.dtype not in (torch.float32, torch.float64):
        raise NumericsError(f"out is {out_BD.dtype}; expected float32 or float64")


def _blocks(length: int, width: int) -> Iterator[tuple[int, int]]:
    for start in range(0, length, width):
        yield start, min(start + width, length)


def _mix(word: int) -> int:
    """Bijection of 32-bit words in which every input bit sways every output bit.

    Xor-shift-multiply after the finaliser of MurmurHash3, with constants of Wellons' hash-prospector. Both
    are below 2**31, so that a product stays below 2**63: int64 never overflows, on any device.
    """
    word = ((word ^ (word >> 16)) * 0x21F0AAAD) & _WORD
    word = ((word ^ (word >> 15)) * 0x735A2D97) & _WORD
    return word ^ (word >> 15)


def _mix_(words: Tensor) -> Tensor:
    """:func:`_mix` on int64 tensors of 32-bit words, in place."""
    words.bitwise_xor_(words >> 16).mul_(0x21F0AAAD).bitwise_and_(_WORD)
    words.bitwise_xor_(words >> 15).mul_(0x735A2D97).bitwise_and_(_WORD)
    return words.bitwise_xor_(words >> 15)


def _word_keys(kind: str, seed: int, word: int) -> tuple[int, int]:
    """Two keys of one hash word. Two, since with one the words would be permutations of each other."""
    state = _mix(_mix(_STREAM[kind] ^ (seed & _WORD)) ^ (seed >> _WORD_BITS))
    first = _mix(state ^ _mix(2 * word + 1))
    return first, _mix(first ^ _mix(2 * word + 2))


def _hash_words(index: Tensor, first_key: int | Tensor, second_key: int | Tensor) -> Tensor:
    """32 random bits for each parameter index, as int64 in [0, 2**32)."""
    return _mix_(_mix_(index ^ first_key).bitwise_xor_(second_key))


def _signs(keys_2W: Tensor, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Signs [32 W, stop - start] of a run of parameters."""
    index_1n = torch.arange(start, stop, dtype=torch.int64, device=keys_2W.device).unsqueeze(0)
    words_Wn = _hash_words(index_1n, keys_2W[0].unsqueeze(1), keys_2W[1].unsqueeze(1))
    shifts = torch.arange(_WORD_BITS, dtype=torch.int64, device=keys_2W.device).view(1, -1, 1)
    bits = (words_Wn.unsqueeze(1) >> shifts).bitwise_and_(1)
    return bits.to(dtype).mul_(2).sub_(1).flatten(0, 1)
