"""Random words from integers: the source of every random matrix.

Shapes: n indices, W hash words of 32 signs.

A word depends on (stream, seed, number of the word, index) alone and is computed with integers, so it is the
same on every machine and device. A word with keys (a, b) at index i is ``mix(mix(i ^ a) ^ b)``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

from rose_ray.errors import NumericsError

WORD_BITS = 32
WORD_MASK = 0xFFFFFFFF

_STREAM = {"rademacher": 0x52414445, "sketch": 0x534B4554, "factored": 0x46414354}


def mix(word: int) -> int:
    """Bijection of 32-bit words in which every input bit sways every output bit.

    Xor-shift-multiply after the finaliser of MurmurHash3, with constants of Wellons' hash-prospector. Both
    are below 2**31, so that a product stays below 2**63: int64 never overflows, on any device.
    """
    word = ((word ^ (word >> 16)) * 0x21F0AAAD) & WORD_MASK
    word = ((word ^ (word >> 15)) * 0x735A2D97) & WORD_MASK
    return word ^ (word >> 15)


def word_keys(stream: str, seed: int, word: int) -> tuple[int, int]:
    """Two keys of one hash word. Two, since with one the words would be permutations of each other.

    Args:
        stream: ``rademacher``, ``sketch`` or ``factored``.
        seed: In [0, 2**64).
        word: Number of the word, in [0, 2**31).
    """
    state = mix(mix(_STREAM[stream] ^ (seed & WORD_MASK)) ^ (seed >> WORD_BITS))
    first = mix(state ^ mix(2 * word + 1))
    return first, mix(first ^ mix(2 * word + 2))


def hash_words(index: Tensor, first_key: int | Tensor, second_key: int | Tensor) -> Tensor:
    """Return 32 random bits for each index, as int64 in [0, 2**32).

    Args:
        index: int64 in [0, 2**32), any shape. Not modified.
        first_key: From :func:`word_keys`, or int64 keys that broadcast with the index.
        second_key: Likewise.
    """
    return _mix_(_mix_(index ^ first_key).bitwise_xor_(second_key))


def sign_rows(keys: list[tuple[int, int]], start: int, stop: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return signs [32 W, stop - start]: bit b of word w at an index is the sign of row ``32 w + b``, 1 for +."""
    keys_2W = torch.tensor(keys, dtype=torch.int64, device=device).T
    index_1n = torch.arange(start, stop, dtype=torch.int64, device=device).unsqueeze(0)
    words_Wn = hash_words(index_1n, keys_2W[0].unsqueeze(1), keys_2W[1].unsqueeze(1))
    shifts = torch.arange(WORD_BITS, dtype=torch.int64, device=device).view(1, -1, 1)
    bits = (words_Wn.unsqueeze(1) >> shifts).bitwise_and_(1)
    return bits.to(dtype).mul_(2).sub_(1).flatten(0, 1)


def sign_run(keys: tuple[int, int], start: int, stop: int, device: torch.device) -> Tensor:
    """Return signs [stop - start], int8: bit ``i % 32`` of the word at index ``i // 32`` is the sign of i, 1 for +."""
    first, last = start // WORD_BITS, -(-stop // WORD_BITS)
    words = hash_words(torch.arange(first, last, dtype=torch.int64, device=device), *keys)
    # Signs of a byte are looked up: about ten times faster than shifting each bit out of an int64.
    bits = torch.arange(8, device=device)
    signs_of_byte = ((torch.arange(256, device=device).unsqueeze(1) >> bits) & 1).mul_(2).sub_(1).to(torch.int8)
    word_bytes = (words.unsqueeze(1) >> (8 * torch.arange(4, device=device))).bitwise_and_(0xFF)
    signs = signs_of_byte.index_select(0, word_bytes.flatten()).flatten()
    skipped = start - first * WORD_BITS
    return signs[skipped : skipped + stop - start]


def tensor_digest(tensor: Tensor) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of a tensor's shape, type and little-endian values.

    Raises:
        NumericsError: It is neither float32 nor float64.
    """
    if tensor.dtype not in (torch.float32, torch.float64):
        raise NumericsError(f"tensor is {tensor.dtype}; expected float32 or float64")
    array = tensor.detach().cpu().contiguous().numpy()
    digest = hashlib.sha256(f"{tuple(tensor.shape)}:{tensor.dtype};".encode())
    digest.update(array.astype(array.dtype.newbyteorder("<"), copy=False).data)
    return digest.hexdigest()[:16]


def blocks(start: int, stop: int, width: int) -> Iterator[tuple[int, int]]:
    """Cut ``start`` to ``stop`` into runs of ``width``, the last one shorter."""
    for left in range(start, stop, width):
        yield left, min(left + width, stop)


def _mix_(words: Tensor) -> Tensor:
    """:func:`mix` on int64 tensors of 32-bit words, in place."""
    words.bitwise_xor_(words >> 16).mul_(0x21F0AAAD).bitwise_and_(WORD_MASK)
    words.bitwise_xor_(words >> 15).mul_(0x735A2D97).bitwise_and_(WORD_MASK)
    return words.bitwise_xor_(words >> 15)
