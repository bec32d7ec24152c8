"""Projection to the span of a bank's gradients, in which inner products with the bank are exact.

Shapes: B batch, D = J rows of the basis, n one slice of the flat parameter vector, P parameters, V vectors.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from rose_ray.errors import NonFiniteError, NumericsError, ShapeError
from rose_ray.kernels.hashing import blocks
from rose_ray.kernels.projection import ProjectionKind, check_slice

SPAN_VERSION = 1
"""Raised whenever the same basis would project otherwise; part of the identity."""

SPAN_BLOCK_BYTES = 64 << 20
"""Bytes of the vectors, or of the basis in another type, held at once as a copy."""

MIN_EIGENVALUE = 1e-12
"""Directions with a smaller eigenvalue of the Gram matrix of the unit vectors are dropped.

What is dropped of a vector is at most the root, 1e-6 of its length: about what float32 rounding leaves of a sum
over many parameters, so two gradients that differ by less are one gradient computed twice. It is far above the
Gram matrix's own rounding in float64, about ``V * 2e-16``, up to some 500 vectors; beyond, the bound grows with V.
"""


class SpanProjection:
    """Kind ``exact``: ``x -> Q x`` with a basis Q whose rows are orthonormal.

    ``<Q x, Q g> = <x, g>`` for every g in the span of the rows, whatever x is.

    Args:
        basis_JP: Q, float32 or float64. Kept, not copied.
        digest: Text that names the basis; it becomes part of the identity.

    Raises:
        ShapeError: The basis is not a matrix with at least one row.
        NumericsError: It is neither float32 nor float64.
    """

    kind: ProjectionKind = "exact"
    seed = 0

    def __init__(self, basis_JP: Tensor, digest: str) -> None:
        if basis_JP.ndim != 2 or 0 in basis_JP.shape:
            raise ShapeError(f"basis has shape {tuple(basis_JP.shape)}; expected [J, P] with J and P at least 1")
        _check_dtype(basis_JP)
        self.dim, self.num_parameters = basis_JP.shape
        self.num_exact = self.dim
        self.basis_JP, self.digest = basis_JP, digest

    def add(self, out_BD: Tensor, offset: int, values_Bn: Tensor) -> None:
        """See :class:`~rose_ray.kernels.projection.Projection`. The basis must be on the device of ``out_BD``."""
        check_slice(self, out_BD, offset, values_Bn)
        columns = max(1, SPAN_BLOCK_BYTES // (out_BD.element_size() * self.dim))
        for start, stop in blocks(0, values_Bn.shape[1], columns):
            basis_Jn = self.basis_JP[:, offset + start : offset + stop].to(out_BD.dtype)
            out_BD.addmm_(values_Bn[:, start:stop].to(out_BD.dtype), basis_Jn.T)

    def identity(self) -> str:
        """See :class:`~rose_ray.kernels.projection.Projection`."""
        return f"{self.kind}/v{SPAN_VERSION}/dim={self.dim}/basis={self.digest}"

    def to(self, device: torch.device | str) -> SpanProjection:
        """Return the same projection with its basis on a device."""
        return SpanProjection(self.basis_JP.to(device), self.digest)


def orthonormal_basis(vectors: Tensor | Iterable[Tensor]) -> Tensor:
    """Return orthonormal rows [J, P] that span the same space as V vectors, J at most V and at most P.

    The vectors' Gram matrix gives the combinations; a second pass takes out what rounding left of their overlap.
    Multiples and near-multiples of other vectors add no row, nor do zero vectors. Rows come by falling eigenvalue.
    Equal vectors on an equal machine give equal bits. Holds the vectors, the basis and some 64 MB.

    Args:
        vectors: [V, P], or blocks [V, n_k] of its columns in order (one per parameter tensor, say), which are
            kept and not joined. All float32 or all float64, on one device. Not modified.

    Returns:
        The basis, in the dtype and on the device of the vectors.

    Raises:
        ShapeError: There is no vector, or the blocks do not fit together.
        NonFiniteError: A vector has a NaN or infinity; the message has the row numbers.
        NumericsError: All vectors are zero, or the types are not as above.
    """
    parts = [vectors] if isinstance(vectors, Tensor) else list(vectors)
    _check_parts(parts)
    weights_JV = _weights(_gram(parts))
    basis_JP = parts[0].new_empty(weights_JV.shape[0], sum(part_Vn.shape[1] for part_Vn in parts))
    for piece in _pieces(parts):
        basis_JP[:, piece.start : piece.stop] = weights_JV @ piece.values_Vn.double()
    # Small eigenvalues leave rows that overlap by Gram rounding / eigenvalue. The symmetric root moves them least.
    values_J, vectors_JJ = _eigh(_gram([basis_JP]))
    assert float(values_J.min()) > 0.5, "kept an eigenvalue that is rounding"
    mend_JJ = (vectors_JJ * values_J.rsqrt()) @ vectors_JJ.T
    for piece in _pieces([basis_JP]):
        basis_JP[:, piece.start : piece.stop] = mend_JJ @ piece.values_Vn.double()
    return basis_JP


class _Piece(NamedTuple):
    start: int
    stop: int
    values_Vn: Tensor


def _pieces(parts: list[Tensor]) -> Iterable[_Piece]:
    """Runs of columns whose float64 copy stays below the bound."""
    offset = 0
    for part_Vn in parts:
        columns = max(1, SPAN_BLOCK_BYTES // (8 * part_Vn.shape[0]))
        for start, stop in blocks(0, part_Vn.shape[1], columns):
            yield _Piece(offset + start, offset + stop, part_Vn[:, start:stop])
        offset += part_Vn.shape[1]


def _gram(parts: list[Tensor]) -> Tensor:
    num_vectors = parts[0].shape[0]
    gram_VV = torch.zeros(num_vectors, num_vectors, dtype=torch.float64, device=parts[0].device)
    for piece in _pieces(parts):
        block_Vn = piece.values_Vn.double()
        # Added as a whole: rounding then grows with the root of the number of pieces, not of parameters.
        gram_VV += block_Vn @ block_Vn.T
    return gram_VV


def _weights(gram_VV: Tensor) -> Tensor:
    """Combinations [J, V] of the vectors that are orthonormal, up to rounding."""
    lengths_V = gram_VV.diagonal().sqrt()
    bad = torch.nonzero(~torch.isfinite(lengths_V)).flatten().tolist()
    if bad:
        raise NonFiniteError(f"{len(bad)} of {len(lengths_V)} vectors are not finite, rows {bad[:10]}; leave them out")
    if not bool(lengths_V.any()):
        raise NumericsError(f"all {len(lengths_V)} vectors are zero; their span has no basis")
    # Unit vectors, so that a short vector counts as much as a long one; zero vectors stay zero.
    inverse_V = torch.where(lengths_V > 0, 1 / lengths_V, 0.0)
    values_V, vectors_VV = _eigh(gram_VV * inverse_V * inverse_V.unsqueeze(1))
    # The largest eigenvalue is at most V, and an eigenvalue is known to about the largest one's rounding.
    kept = values_V > max(MIN_EIGENVALUE, 8 * len(lengths_V) * torch.finfo(torch.float64).eps)
    return (vectors_VV[:, kept] * values_V[kept].rsqrt()).T * inverse_V


def _eigh(matrix_VV: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues by size, largest first, and eigenvectors as columns, the largest entry of each positive."""
    # On the CPU: it is small, and so every device has the same signs and the same order.
    values_V, vectors_VV = torch.linalg.eigh(matrix_VV.cpu())
    values_V, vectors_VV = values_V.flip(0), vectors_VV.flip(1)
    largest_1V = vectors_VV.abs().argmax(0, keepdim=True)
    signs_1V = torch.where(vectors_VV.gather(0, largest_1V) < 0, -1.0, 1.0)
    return values_V.to(matrix_VV.device), (vectors_VV * signs_1V).to(matrix_VV.device)


def _check_parts(parts: list[Tensor]) -> None:
    shapes = [tuple(part.shape) for part in parts]
    if not parts or any(len(shape) != 2 or shape[0] != shapes[0][0] or 0 in shape for shape in shapes):
        raise ShapeError(f"vectors have shapes {shapes[:10]}; expected [V, n] with one V, at least 1, and n at least 1")
    for part in parts:
        _check_dtype(part)
        if part.dtype != parts[0].dtype:
            raise NumericsError(f"vectors are {parts[0].dtype} and {part.dtype}; expected one type")


def _check_dtype(tensor: Tensor) -> None:
    if tensor.dtype not in (torch.float32, torch.float64):
        raise NumericsError(f"vectors are {tensor.dtype}; expected float32 or float64")
