# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# mypy: disable-error-code="import-untyped,import-not-found"
"""The device side of :mod:`rose_ray.kernels.fused`; importing it needs triton.

Shapes: R rows of one program, T buckets of one program. A program owns a tile of the sketch and walks the blocks
of the slice in ascending order, so every sum has one order and nothing is added atomically.
"""

import triton
import triton.language as tl

ROWS = 8
"""Rows of one program. Moments and signs are fetched and hashed once for all of them."""

BUCKETS = 128
"""Buckets of one program: with four warps, one column a thread and all rows of it."""

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether triton runs the kernels in Python on the CPU; settled when this module is imported."""


@triton.jit
def mix(words):
    """``_mix_`` of :mod:`rose_ray.kernels.hashing`; uint32 drops what its masks drop."""
    words = (words ^ (words >> 16)) * 0x21F0AAAD
    words = (words ^ (words >> 15)) * 0x735A2D97
    return words ^ (words >> 15)


@triton.jit
def sign_bits(indices, first_key, second_key):
    """Sign bit of each parameter index, uint32: 1 is plus. The keys are the bits of uint32 numbers in int32."""
    first = first_key.to(tl.uint32, bitcast=True)
    second = second_key.to(tl.uint32, bitcast=True)
    words = mix(mix((indices >> 5) ^ first) ^ second)
    return (words >> (indices & 31)) & 1


@triton.jit(
    do_not_specialize=["num_rows", "num_columns", "num_blocks", "start", "offset", "first_key", "second_key"],
)
def direction_sketch_kernel(
    grads_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    common_ptr,
    shifts_ptr,
    out_ptr,
    direction_ptr,
    squares_ptr,
    grads_stride,
    out_stride,
    direction_stride,
    num_rows,
    num_columns,
    num_blocks,
    dim,
    start,  # column of the first block's lane 0: 0 or less
    offset,
    first_key,
    second_key,
    beta1,
    rest1,  # 1 - beta1
    beta2,
    rest2,
    scale,  # 1 / (1 - beta1**t)
    root_scale,  # 1 / sqrt(1 - beta2**t)
    eps,
    MODE: tl.constexpr,
    SKETCH: tl.constexpr,
    COMMON: tl.constexpr,
    WRITE: tl.constexpr,
    ROWS: tl.constexpr,
    BUCKETS: tl.constexpr,
):
    """Add one tile [R, T] to the sketch, and store its rows' partial squares in squares [2 or 3, tiles, B].

    Without ``SKETCH`` a lane is its own bucket and only squares and directions are made. With ``COMMON`` the third part
    takes inner products of the directions with the common vector.
    """
    # Row groups come first in the grid: those that share a tile's moments run side by side and find them in L2.
    rows_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    buckets_T = tl.program_id(1) * BUCKETS + tl.arange(0, BUCKETS)
    in_R = rows_R < num_rows
    wide_R = rows_R.to(tl.int64)  # B times P may pass 2**31
    sums_RT = tl.zeros((ROWS, BUCKETS), tl.float32)
    squares_RT = tl.zeros((ROWS, BUCKETS), tl.float32)
    totals_RT = tl.zeros((ROWS, BUCKETS), tl.float32)
    alongs_RT = tl.zeros((ROWS, BUCKETS), tl.float32)
    for block in range(num_blocks):
        lanes_T = buckets_T
        if SKETCH:
            lanes_T = buckets_T - tl.load(shifts_ptr + block)
            lanes_T = tl.where(lanes_T < 0, lanes_T + dim, lanes_T)
        columns_T = start + block * dim + lanes_T
        in_T = (buckets_T < dim) & (columns_T >= 0) & (columns_T < num_columns)
        in_RT = in_R[:, None] & in_T[None, :]
        grads_at = grads_ptr + wide_R[:, None] * grads_stride + columns_T[None, :]
        grads_RT = tl.load(grads_at, mask=in_RT, other=0.0).to(tl.float32)
        direction_RT = grads_RT
        if MODE != "sgd":
            sq_T = tl.load(exp_avg_sq_ptr + columns_T, mask=in_T, other=0.0).to(tl.float32)
            second_RT = grads_RT * grads_RT * rest2 + (sq_T * beta2)[None, :]
            if MODE == "v_only":
                direction_RT = grads_RT / (tl.sqrt(second_RT) * root_scale + eps)
            else:
                avg_T = tl.load(exp_avg_ptr + columns_T, mask=in_T, other=0.0).to(tl.float32)
                total_RT = grads_RT * rest1 + (avg_T * beta1)[None, :]
                totals_RT += total_RT * total_RT
                if MODE == "less_code":
                    direction_RT = total_RT / tl.sqrt(second_RT + eps)
                else:
                    direction_RT = total_RT * scale / (tl.sqrt(second_RT) * root_scale + eps)
            # An eps too small for float32 makes 0 / 0 of what lies outside the slice.
            direction_RT = tl.where(in_RT, direction_RT, 0.0)
        if WRITE:
            direction_at = direction_ptr + wide_R[:, None] * direction_stride + columns_T[None, :]
            tl.store(direction_at, direction_RT.to(direction_ptr.dtype.element_ty), mask=in_RT)
        squares_RT += direction_RT * direction_RT
        if COMMON:
            common_T = tl.load(common_ptr + columns_T, mask=in_T, other=0.0).to(tl.float32)
            alongs_RT += direction_RT * common_T[None, :]
        if SKETCH:
            indices_T = offset.to(tl.uint32, bitcast=True) + columns_T.to(tl.uint32, bitcast=True)
            plus_T = sign_bits(indices_T, first_key, second_key) != 0
            sums_RT += tl.where(plus_T[None, :], direction_RT, -direction_RT)
    if SKETCH:
        out_at = out_ptr + wide_R[:, None] * out_stride + buckets_T[None, :]
        in_out_RT = in_R[:, None] & (buckets_T < dim)[None, :]
        tl.store(out_at, tl.load(out_at, mask=in_out_RT, other=0.0) + sums_RT, mask=in_out_RT)
    squares_at = squares_ptr + tl.program_id(1) * num_rows + rows_R
    tl.store(squares_at, tl.sum(squares_RT, axis=1), mask=in_R)
    tl.store(squares_at + tl.num_programs(1) * num_rows, tl.sum(totals_RT, axis=1), mask=in_R)
    if COMMON:
        tl.store(squares_at + 2 * tl.num_programs(1) * num_rows, tl.sum(alongs_RT, axis=1), mask=in_R)
