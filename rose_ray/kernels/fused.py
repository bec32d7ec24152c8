"""Adam direction, its squares and its folded sketch in one pass over a module's gradients.

Shapes: B batch, P parameters of one module, D buckets, K blocks of D parameters in the whole flat vector.

It has been run under Triton's interpreter only, on a CPU, and compiled for CUDA; it has not been run on a GPU, so
its speed is not known.

The folded sketch: flat index i lies in block ``k = i // D`` and lane ``l = i % D``, and goes to bucket
``(l + shift(k)) % D`` with ``sign(i)``. Shift and sign come from the hash of :mod:`rose_ray.kernels.hashing`,
stream ``sketch``: ``shift(k)`` is hash word 0 at k, modulo D; ``sign(i)`` is bit ``i % 32`` of hash word 1 at
``i // 32``, 1 for plus. A shift of its own for each block keeps one column of a matrix out of one bucket.

Sums have a fixed order and no atomics: the same call on the same device gives the same bytes. Rows do not touch
each other. Arithmetic is float32, with the device's fused multiply-adds, roots and quotients; the squares, and inner
products with a common vector, are float32 within a tile of buckets and float64 across tiles, so that a row whose
direction is below about 1e-19, or above 1e19, in its largest number has no usable square.
"""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from rose_ray.errors import ConfigError, NumericsError, ShapeError
from rose_ray.kernels.adam import LESS_CODE_BETA1, LESS_CODE_BETA2, LESS_CODE_EPS, AdamMode, AdamState
from rose_ray.kernels.hashing import hash_words, word_keys

DIRECTION_WIDTH = 1 << 13
"""Columns that the pass without a sketch spreads over programs at once."""

_MAX_TILES = 65535
"""Programs along the second axis of a CUDA grid."""

_MAX_INT32 = (1 << 31) - 1
_FLOATS = (torch.float32, torch.bfloat16)
_SQUARES = (torch.float32, torch.float64)


@dataclass(frozen=True)
class SketchKeys:
    """What the folded sketch needs besides the numbers, on one device.

    Attributes:
        dim: D.
        num_parameters: Length of the flat parameter vector.
        shifts_K: ``shift(k)`` of each block, int32 [K].
        sign_keys: The two keys of hash word 1.
    """

    dim: int
    num_parameters: int
    shifts_K: Tensor
    sign_keys: tuple[int, int]


@dataclass(frozen=True)
class Along:
    """A vector that inner products with the directions are wanted of, and their sums.

    Attributes:
        common_P: The vector's part for the module, float32 or bfloat16 [P].
        sum_B: Running inner products, float32 or float64 [B].
    """

    common_P: Tensor
    sum_B: Tensor


def make_sketch_keys(seed: int, dim: int, num_parameters: int, device: torch.device | str) -> SketchKeys:
    """Make the keys of a folded sketch; once for a run, not once for a call.

    Args:
        seed: In [0, 2**63).
        dim: D, from 1 to about 8 million.
        num_parameters: Length of the flat parameter vector, from 1 to 2**32.
        device: Where the gradients will be.

    Raises:
        ConfigError: A number is out of its range.
    """
    if not 1 <= dim <= 1 << 23 or not 1 <= num_parameters <= 1 << 32 or not 0 <= seed < 1 << 63:
        raise ConfigError(
            f"folded sketch has dim {dim}, {num_parameters} parameters and seed {seed}; "
            "expected 1 to 2**23, 1 to 2**32 and 0 to 2**63 - 1"
        )
    blocks_K = torch.arange(-(-num_parameters // dim), dtype=torch.int64, device=device)
    shifts_K = hash_words(blocks_K, *word_keys("sketch", seed, 0)).remainder_(dim).to(torch.int32)
    return SketchKeys(dim, num_parameters, shifts_K, word_keys("sketch", seed, 1))


def fused_direction_sketch(
    grads_BP: Tensor,
    exp_avg_P: Tensor | None,
    exp_avg_sq_P: Tensor | None,
    state: AdamState,
    mode: AdamMode,
    *,
    offset: int,
    dim: int,
    sketch_keys: SketchKeys,
    out_BD: Tensor,
    square_B: Tensor,
    total_square_B: Tensor,
    along: Along | None = None,
    direction_out_BP: Tensor | None = None,
) -> None:
    """Add one module's directions to their sketch and squares, in place.

    Directions are those of :func:`rose_ray.kernels.adam.adam_direction` on the gradients in float32, to float32
    rounding: some ten roundings, and what cancels between ``b1 m`` and ``(1 - b1) g``. The momentum's own square
    is the same for all rows and is left to the caller.

    Args:
        grads_BP: Loss gradients, float32 or bfloat16 [B, P], each row without gaps. Not modified, unless it is
            ``direction_out_BP`` too.
        exp_avg_P: First moment, float32 or bfloat16 [P]; not looked at in ``v_only`` and ``sgd``.
        exp_avg_sq_P: Second moment, at least 0, float32 or bfloat16 [P]; not looked at in ``sgd``.
        state: Number of updates, betas and eps of the optimizer that ran.
        mode: ``torch``, ``less_code``, ``v_only`` or ``sgd``.
        offset: Place of the module in the flat parameter vector.
        dim: D, the one of the keys.
        sketch_keys: From :func:`make_sketch_keys`, on the device of the gradients.
        out_BD: Running sketch, float32 [B, D].
        square_B: Running ``||direction||**2``, float32 or float64 [B].
        total_square_B: Running ``||b1 m + (1 - b1) g||**2``, float32 or float64 [B]; unchanged in ``v_only`` and
            ``sgd``.
        along: What to take inner products with in the same pass, if anything.
        direction_out_BP: Where to write the directions, float32 or bfloat16 [B, P], if anywhere. May be
            ``grads_BP`` itself, but must not overlap it otherwise.

    Raises:
        ConfigError: The mode is unknown or lacks a moment, the keys are of another dim, triton is missing, or
            the tensors are not together on one CUDA device.
        ShapeError: Shapes disagree, the module leaves the parameter vector or is too large for one call, or rows
            have gaps.
        NumericsError: A tensor's type is none of those above.
    """
    _check(grads_BP, exp_avg_P, exp_avg_sq_P, mode, square_B, total_square_B, direction_out_BP)
    num_rows, num_columns = grads_BP.shape
    if sketch_keys.dim != dim:
        raise ConfigError(f"dim is {dim} and the sketch keys are of dim {sketch_keys.dim}; expected the same")
    if offset < 0 or offset + num_columns > sketch_keys.num_parameters:
        raise ShapeError(
            f"module {offset} to {offset + num_columns} leaves the vector of {sketch_keys.num_parameters} parameters"
        )
    _check_tensor("out", out_BD, (num_rows, dim), (torch.float32,), grads_BP.device)
    _check_tensor("shifts", sketch_keys.shifts_K, sketch_keys.shifts_K.shape, (torch.int32,), grads_BP.device)
    if along is not None:
        _check_tensor("common", along.common_P, (num_columns,), _FLOATS, grads_BP.device)
        _check_tensor("along", along.sum_B, (num_rows,), _SQUARES, grads_BP.device)
    if grads_BP.numel() == 0:
        return
    first, last = offset // dim, (offset + num_columns - 1) // dim
    fold = _Fold(dim, first * dim - offset, last - first + 1, offset, sketch_keys.sign_keys)
    shifts_K = sketch_keys.shifts_K[first : last + 1]
    vectors = (exp_avg_P, exp_avg_sq_P, along.common_P if along is not None else None)
    sums = _launch(grads_BP, vectors, state, mode, fold, shifts_K, out_BD, direction_out_BP)
    square_B.add_(sums[0])
    total_square_B.add_(sums[1])
    if along is not None:
        along.sum_B.add_(sums[2])


def fused_direction(
    grads_BP: Tensor,
    exp_avg_P: Tensor | None,
    exp_avg_sq_P: Tensor | None,
    state: AdamState,
    mode: AdamMode,
    *,
    square_B: Tensor,
    total_square_B: Tensor,
    direction_out_BP: Tensor | None = None,
) -> None:
    """Write one module's directions and add their squares, for projections other than the folded sketch.

    Arguments and errors are those of :func:`fused_direction_sketch`, less the sketch's.
    """
    _check(grads_BP, exp_avg_P, exp_avg_sq_P, mode, square_B, total_square_B, direction_out_BP)
    if grads_BP.numel() == 0:
        return
    # A lane stands for its own bucket here; how many there are settles only how the columns are shared out.
    width = min(DIRECTION_WIDTH, grads_BP.shape[1])
    fold = _Fold(width, 0, -(-grads_BP.shape[1] // width), 0, (0, 0))
    sums = _launch(grads_BP, (exp_avg_P, exp_avg_sq_P, None), state, mode, fold, None, None, direction_out_BP)
    square_B.add_(sums[0])
    total_square_B.add_(sums[1])


@dataclass(frozen=True)
class _Fold:
    """How a slice lies in blocks: block length, column of the first block's lane 0, number of blocks."""

    dim: int
    start: int
    num_blocks: int
    offset: int
    sign_keys: tuple[int, int]


def _launch(
    grads_BP: Tensor,
    vectors: tuple[Tensor | None, Tensor | None, Tensor | None],
    state: AdamState,
    mode: AdamMode,
    fold: _Fold,
    shifts_K: Tensor | None,
    out_BD: Tensor | None,
    direction_BP: Tensor | None,
) -> Tensor:
    """Run the kernel; return both sums of squares, and inner products with a third vector, float64 [2 or 3, B]."""
    device = _device_side(grads_BP.device)
    num_rows, num_columns = grads_BP.shape
    grid = (-(-num_rows // device.ROWS), -(-fold.dim // device.BUCKETS))
    if grid[1] > _MAX_TILES or num_columns + 2 * fold.dim > _MAX_INT32:
        raise ShapeError(
            f"{num_columns} parameters in {fold.dim} buckets are too many for one call; expected at most "
            f"{_MAX_TILES * device.BUCKETS} buckets, and parameters plus twice the buckets below 2**31"
        )
    num_sums = 2 if vectors[2] is None else 3
    squares_TB = torch.empty(num_sums, grid[1], num_rows, dtype=torch.float32, device=grads_BP.device)
    # A tensor that the mode does not use still needs a pointer.
    pointers = (grads_BP, *vectors, shifts_K, out_BD, direction_BP)
    with torch.cuda.device_of(grads_BP):
        device.direction_sketch_kernel[grid](
            *(grads_BP if tensor is None else tensor for tensor in pointers),
            squares_TB,
            *(0 if tensor is None else tensor.stride(0) for tensor in (grads_BP, out_BD, direction_BP)),
            num_rows,
            num_columns,
            fold.num_blocks,
            fold.dim,
            fold.start,
            *(_as_int32(number) for number in (fold.offset, *fold.sign_keys)),
            *_scalars(state, mode),
            MODE=mode,
            SKETCH=out_BD is not None,
            COMMON=vectors[2] is not None,
            WRITE=direction_BP is not None,
            ROWS=device.ROWS,
            BUCKETS=device.BUCKETS,
            num_warps=4,
            enable_fp_fusion=True,  # said, since triton's default changes with its version
        )
    return squares_TB.sum(dim=1, dtype=torch.float64)


def _scalars(state: AdamState, mode: AdamMode) -> tuple[float, ...]:
    """Beta 1 and 2 with their rests, both corrections as factors, and eps; made in float64."""
    if mode == "less_code":
        beta1, beta2, eps = LESS_CODE_BETA1, LESS_CODE_BETA2, LESS_CODE_EPS
    else:
        beta1, beta2, eps = state.adam_beta1, state.adam_beta2, state.adam_eps
    step = state.num_updates + 1
    scale, root_scale = 1.0 / (1.0 - beta1**step), 1.0 / math.sqrt(1.0 - beta2**step)
    return beta1, 1.0 - beta1, beta2, 1.0 - beta2, scale, root_scale, eps


def _as_int32(number: int) -> int:
    """The int32 with the bits of a uint32, so that the kernel is compiled for one type."""
    return number - (1 << 32) if number > _MAX_INT32 else number


def _device_side(device: torch.device) -> Any:
    try:
        module = importlib.import_module("rose_ray.kernels.fused_triton")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "triton":
            raise
        raise ConfigError(
            "the fused kernel needs triton, which is not installed; install it (pip install triton; CUDA builds of "
            "torch bring it along) or use the kernels of torch"
        ) from error
    if device.type != "cuda" and not module.INTERPRETED:
        raise ConfigError(
            f"the fused kernel runs on CUDA and the gradients are on {device}; move them, use the kernels of torch, "
            "or set TRITON_INTERPRET=1 before Python starts to try it slowly on the CPU"
        )
    return module


def _check(
    grads_BP: Tensor,
    exp_avg_P: Tensor | None,
    exp_avg_sq_P: Tensor | None,
    mode: AdamMode,
    square_B: Tensor,
    total_square_B: Tensor,
    direction_BP: Tensor | None,
) -> None:
    if mode not in get_args(AdamMode):
        raise ConfigError(f"Adam mode is {mode!r}; expected one of {', '.join(get_args(AdamMode))}")
    if grads_BP.ndim != 2:
        raise ShapeError(f"gradients have shape {tuple(grads_BP.shape)}; expected [B, P]")
    shape, device = grads_BP.shape, grads_BP.device
    _check_tensor("gradients", grads_BP, shape, _FLOATS, device)
    if mode != "sgd":
        _check_moment("exp_avg_sq", exp_avg_sq_P, grads_BP, mode)
    if mode in ("torch", "less_code"):
        _check_moment("exp_avg", exp_avg_P, grads_BP, mode)
    _check_tensor("square", square_B, shape[:1], _SQUARES, device)
    _check_tensor("total_square", total_square_B, shape[:1], _SQUARES, device)
    if direction_BP is not None:
        _check_tensor("direction_out", direction_BP, shape, _FLOATS, device)


def _check_moment(name: str, moment_P: Tensor | None, grads_BP: Tensor, mode: AdamMode) -> None:
    if moment_P is None:
        raise ConfigError(
            f"Adam mode {mode!r} needs {name}, and the checkpoint has none; "
            "use a checkpoint with its optimizer state, or mode 'sgd'"
        )
    _check_tensor(name, moment_P, grads_BP.shape[1:], _FLOATS, grads_BP.device)


def _check_tensor(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], device: torch.device
) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise ShapeError(f"{name} has shape {tuple(tensor.shape)}; expected {tuple(shape)}")
    if tensor.dtype not in dtypes:
        raise NumericsError(f"{name} is {tensor.dtype}; expected {' or '.join(map(str, dtypes))}")
    if tensor.device != device:
        raise ConfigError(f"{name} is on {tensor.device} and the gradients on {device}; expected one device")
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ShapeError(f"{name} has stride {tensor.stride(-1)} along its last axis; call contiguous() on it")
