"""The fused kernel against adam.py and an explicit sketch matrix.

Triton decides when it is imported whether it interprets, so the tests that run the kernel do so in a process of their
own with TRITON_INTERPRET=1 (`test_under_tritons_interpreter`), and here only where there is a CUDA device.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from rose_ray.kernels.adam import AdamMode, AdamState, adam_direction
from rose_ray.kernels.deflated import DeflatedProjection
from rose_ray.kernels.direction_sums import DirectionSums, KernelKind
from rose_ray.kernels.fused import Along, SketchKeys, fused_direction, fused_direction_sketch, make_sketch_keys
from rose_ray.kernels.hashing import hash_words, mix, word_keys
from rose_ray.kernels.projection import Projection, make_projection
from rose_ray.kernels.span import SpanProjection

ROOT = Path(__file__).parents[3]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")

# About ten roundings of 6e-8, of which a GPU's root and quotient take two units each; as much of the largest
# number for what cancels between the moment and the gradient.
DIRECTION_RELATIVE = 2e-6
# A float32 sum of at most 200 terms, of the sum of their sizes; rounding hardly ever adds up so badly.
SUM_RELATIVE = 2e-6
# Of a sketch of a vector of length 1, before or after most of it is taken out: 50 numbers a bucket, each rounded to
# 6e-8 of the few that stand in the running sum, in 60 buckets.
UNIT_ROUNDING = 5e-7
# One unit of bfloat16: the interpreter cuts digits off where a GPU rounds.
BFLOAT16_RELATIVE = 2**-7
SEED = 20240607

# offset, parameters, dim, rows: whole blocks, parts of one, wraps, dims that are no power of two, rows past a group
SHAPES = [
    (0, 100, 24, 3),
    (24, 24, 24, 8),
    (7, 100, 24, 9),
    (990, 30, 1000, 2),
    (500, 2300, 1000, 9),
    (1234, 50, 1000, 9),
    (3, 300, 128, 8),
    (5, 1, 1, 1),
    (5, 40, 1, 2),
]


def runs_the_kernel(test: Callable[..., None]) -> Callable[..., None]:
    if INTERPRETED:
        return test
    skip = pytest.mark.skipif(
        not (HAS_TRITON and torch.cuda.is_available()),
        reason="needs a CUDA device and triton; test_under_tritons_interpreter runs it on the CPU",
    )
    marked: Callable[..., None] = pytest.mark.gpu(skip(test))
    return marked


def _state(eps: float = 1e-4) -> AdamState:
    return AdamState(num_updates=11, adam_beta1=0.85, adam_beta2=0.97, adam_eps=eps)


@dataclass
class _Call:
    """Inputs and running sums of one call."""

    grads: Tensor
    avg: Tensor
    sq: Tensor
    out: Tensor
    square: Tensor
    total: Tensor
    direction: Tensor

    @classmethod
    def make(cls, num_rows: int, num_columns: int, dim: int, dtype: torch.dtype = torch.float32) -> _Call:
        generator = torch.Generator().manual_seed(num_columns)
        grads = torch.randn(num_rows, num_columns, generator=generator)
        avg = torch.randn(num_columns, generator=generator) * 0.1
        sq = torch.rand(num_columns, generator=generator) * 0.1
        out = torch.randn(num_rows, dim, generator=generator)
        squares = torch.rand(2, num_rows, generator=generator, dtype=torch.float64)
        tensors = (grads.to(dtype), avg, sq, out, squares[0], squares[1], torch.full_like(grads, 7.0))
        return cls(*(tensor.clone().to(DEVICE) for tensor in tensors))

    def copy(self) -> _Call:
        return _Call(*(tensor.clone() for tensor in vars(self).values()))

    def run(self, mode: AdamMode, offset: int, keys: SketchKeys, write: bool = True, eps: float = 1e-4) -> _Call:
        given = (self.grads, self.avg, self.sq, _state(eps), mode)
        sums = {"out_BD": self.out, "square_B": self.square, "total_square_B": self.total}
        sketch: dict[str, Any] = {"offset": offset, "dim": keys.dim, "sketch_keys": keys}
        fused_direction_sketch(*given, **sketch, **sums, direction_out_BP=self.direction if write else None)
        return self


def _keys(dim: int, num_parameters: int = 10_000) -> SketchKeys:
    return make_sketch_keys(SEED, dim, num_parameters, DEVICE)


def _word(hash_word: int, index: int) -> int:
    first, second = word_keys("sketch", SEED, hash_word)
    return mix(mix(index ^ first) ^ second)


@cache
def _matrix(offset: int, num_columns: int, dim: int) -> Tensor:
    """The sketch matrix [D, P], column by column from its definition."""
    matrix = torch.zeros(dim, num_columns, dtype=torch.float64)
    for j in range(num_columns):
        block, lane = divmod(offset + j, dim)
        bucket = (lane + _word(0, block) % dim) % dim
        plus = _word(1, (offset + j) // 32) >> ((offset + j) % 32) & 1
        matrix[bucket, j] = 1.0 if plus else -1.0
    return matrix


def _check_direction(call: _Call, mode: AdamMode) -> Tensor:
    """Compare what was written with adam.py; return adam.py's total square."""
    grads = call.grads.float().cpu()
    expected = adam_direction(grads, call.avg.cpu(), call.sq.cpu(), _state(), mode)
    atol = DIRECTION_RELATIVE * float(expected.direction_B.abs().max())
    torch.testing.assert_close(call.direction.cpu(), expected.direction_B, rtol=DIRECTION_RELATIVE, atol=atol)
    return expected.total_norm_B.double().square()


@runs_the_kernel
@pytest.mark.parametrize("mode", get_args(AdamMode))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("offset", "num_columns", "dim", "num_rows"), SHAPES[:5])
def test_every_mode_against_adam_and_the_matrix(
    mode: AdamMode, dtype: torch.dtype, offset: int, num_columns: int, dim: int, num_rows: int
) -> None:
    before = _Call.make(num_rows, num_columns, dim, dtype)
    after = before.copy().run(mode, offset, _keys(dim))
    total = _check_direction(after, mode)
    direction, matrix = after.direction.double().cpu(), _matrix(offset, num_columns, dim)
    expected = before.out.double().cpu() + direction @ matrix.T
    sizes = before.out.double().cpu().abs() + direction.abs() @ matrix.abs().T
    assert ((after.out.cpu() - expected).abs() <= SUM_RELATIVE * sizes).all()
    square = before.square.cpu() + direction.square().sum(1)
    torch.testing.assert_close(after.square.cpu(), square, rtol=SUM_RELATIVE, atol=0)
    torch.testing.assert_close(after.total.cpu(), before.total.cpu() + total, rtol=SUM_RELATIVE, atol=0)
    for name in ("grads", "avg", "sq"):
        assert torch.equal(getattr(before, name), getattr(after, name)), "inputs must stay as they are"


@runs_the_kernel
@pytest.mark.parametrize(("offset", "num_columns", "dim", "num_rows"), SHAPES)
def test_whole_numbers_are_sketched_exactly(offset: int, num_columns: int, dim: int, num_rows: int) -> None:
    generator = torch.Generator().manual_seed(2)
    call = _Call.make(num_rows, num_columns, dim)
    call.grads = torch.randint(-9, 10, (num_rows, num_columns), generator=generator).float().to(DEVICE)
    call.out = torch.randint(-9, 10, (num_rows, dim), generator=generator).float().to(DEVICE)
    grads, out, square = call.grads.double().cpu(), call.out.double().cpu(), call.square.cpu().clone()
    total = call.total.clone()
    call.run("sgd", offset, _keys(dim), write=False)
    assert torch.equal(call.out.double().cpu(), out + grads @ _matrix(offset, num_columns, dim).T)
    assert torch.equal(call.square.cpu(), square + grads.square().sum(1))
    assert torch.equal(call.total, total) and (call.direction == 7).all()


@runs_the_kernel
@pytest.mark.parametrize("offset", [0, 2**31 - 1500, 2**31 + 77, 2**32 - 3000])
def test_signs_and_shifts_are_those_of_torch_bit_for_bit(offset: int) -> None:
    num_columns, dim = 3000, 4001
    keys = _keys(dim, 1 << 32)
    call = _Call.make(1, num_columns, dim)
    call.grads, call.out = torch.ones_like(call.grads), torch.zeros_like(call.out)
    call.run("sgd", offset, keys)
    index = torch.arange(offset, offset + num_columns)
    shifts = hash_words(index // dim, *word_keys("sketch", SEED, 0)) % dim
    words = hash_words(index // 32, *word_keys("sketch", SEED, 1))
    signs = ((words >> (index % 32)) & 1) * 2 - 1
    expected = torch.zeros(1, dim).index_add_(1, (index % dim + shifts) % dim, signs.float()[None])
    assert torch.equal(call.out.cpu(), expected)


@runs_the_kernel
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy, under the interpreter
@pytest.mark.parametrize("mode", get_args(AdamMode))
def test_rows_and_surroundings_do_not_leak(mode: AdamMode) -> None:
    clean = _Call.make(9, 100, 40)
    spoilt = clean.copy()
    # The slice lies in the middle of NaN, as a module's part of a larger buffer may.
    wide = torch.full((9, 164), float("nan"), device=DEVICE)
    wide[:, 32:132] = spoilt.grads
    spoilt.grads = wide[:, 32:132]
    spoilt.grads[1, 50], spoilt.grads[4, :], spoilt.out[7, 3] = float("nan"), float("inf"), float("nan")
    for name in ("avg", "sq"):
        around = torch.full((164,), float("nan"), device=DEVICE)
        around[32:132] = getattr(spoilt, name)
        setattr(spoilt, name, around[32:132])
    # This eps is 0 in float32, and makes 0 / 0 of what lies outside the slice.
    clean.run(mode, 13, _keys(40), eps=1e-60)
    spoilt.run(mode, 13, _keys(40), eps=1e-60)
    assert all(tensor.isfinite().all() for tensor in vars(clean).values())
    others = [0, 2, 3, 5, 6, 8]
    for name in ("out", "square", "total", "direction"):
        assert torch.equal(getattr(clean, name)[others], getattr(spoilt, name)[others])
    assert spoilt.square[1].isnan() and int(spoilt.out[1].isnan().sum()) == 1
    assert not spoilt.square[4].isfinite() and int(spoilt.out[7].isnan().sum()) == 1


@runs_the_kernel
def test_two_calls_give_the_same_bytes_and_a_row_does_not_depend_on_its_batch() -> None:
    start, keys = _Call.make(11, 700, 300), _keys(300)
    first, second = start.copy().run("torch", 450, keys), start.copy().run("torch", 450, keys)
    for name in vars(first):
        assert torch.equal(getattr(first, name), getattr(second, name))
    for row in (0, 10):
        part = start.copy()
        for name in ("grads", "out", "square", "total", "direction"):
            setattr(part, name, getattr(part, name)[row : row + 1])
        part.run("torch", 450, keys)
        assert torch.equal(part.out[0], first.out[row]) and torch.equal(part.direction[0], first.direction[row])


@runs_the_kernel
def test_a_vector_in_parts_is_the_whole() -> None:
    whole, keys = _Call.make(3, 500, 90), _keys(90)
    parts = whole.copy()
    whole.run("less_code", 100, keys)
    for start, stop in ((0, 1), (1, 77), (77, 350), (350, 500)):
        part = parts.copy()
        part.grads, part.direction = part.grads[:, start:stop], part.direction[:, start:stop]
        part.avg, part.sq = part.avg[start:stop], part.sq[start:stop]
        part.out, part.square, part.total = parts.out, parts.square, parts.total
        part.run("less_code", 100 + start, keys)
    for name in ("out", "square", "total"):
        one, other = getattr(whole, name), getattr(parts, name)
        # each bucket's few terms come in another order
        torch.testing.assert_close(one, other, rtol=SUM_RELATIVE, atol=SUM_RELATIVE * float(one.abs().max()))


@runs_the_kernel
def test_directions_may_overwrite_their_gradients_and_be_bfloat16() -> None:
    start, keys = _Call.make(5, 130, 50), _keys(50)
    apart, over, half = start.copy().run("torch", 20, keys), start.copy(), start.copy()
    over.direction = over.grads
    over.run("torch", 20, keys)
    half.direction = half.direction.bfloat16()
    half.run("torch", 20, keys)
    for name in ("direction", "out", "square", "total"):
        assert torch.equal(getattr(apart, name), getattr(over, name))
    assert torch.equal(half.out, apart.out)
    torch.testing.assert_close(half.direction.float(), apart.direction, rtol=BFLOAT16_RELATIVE, atol=0)


@runs_the_kernel
@pytest.mark.parametrize("mode", get_args(AdamMode))
def test_without_a_sketch(mode: AdamMode) -> None:
    sketched = _Call.make(3, 1000, 60)
    call = sketched.copy()
    call.square, call.total = call.square.float(), call.total.float()
    sketched.run(mode, 0, _keys(60))
    avg, sq = call.avg if mode in ("torch", "less_code") else None, call.sq if mode != "sgd" else None
    sums = {"square_B": call.square, "total_square_B": call.total}
    fused_direction(call.grads, avg, sq, _state(), mode, **sums, direction_out_BP=call.direction)
    assert torch.equal(call.direction, sketched.direction)
    torch.testing.assert_close(call.square.double(), sketched.square, rtol=SUM_RELATIVE, atol=0)
    torch.testing.assert_close(call.total.double(), sketched.total, rtol=SUM_RELATIVE, atol=0)


@runs_the_kernel
def test_without_a_sketch_columns_past_one_width() -> None:
    grads = torch.ones(2, 8192 + 300, device=DEVICE)
    square = torch.zeros(2, dtype=torch.float64, device=DEVICE)
    fused_direction(grads, None, None, _state(), "sgd", square_B=square, total_square_B=square.clone())
    assert square.tolist() == [8492.0, 8492.0]


@runs_the_kernel
def test_nothing_comes_of_nothing() -> None:
    for num_rows, num_columns in ((0, 5), (2, 0)):
        call = _Call.make(num_rows, num_columns, 10)
        expected = call.copy()
        call.run("torch", 3, _keys(10))
        assert torch.equal(call.out, expected.out) and torch.equal(call.square, expected.square)


def _projections(kinds: str, num_parameters: int) -> list[Projection]:
    generator = torch.Generator().manual_seed(4)
    sketch = make_projection("sketch", 60, SEED, num_parameters)
    made = {
        "sketch": sketch,
        "deflated": DeflatedProjection(sketch, torch.randn(num_parameters, generator=generator)),
        "exact": SpanProjection(torch.randn(5, num_parameters, generator=generator), "made"),
    }
    return [made[kind].to(DEVICE) for kind in kinds.split()]


@runs_the_kernel
@pytest.mark.parametrize("mode", get_args(AdamMode))
@pytest.mark.parametrize(
    "kinds", ["", "sketch", "deflated", "exact", "deflated exact", "exact sketch", "sketch deflated exact"]
)
def test_sums_of_a_batch_are_those_of_torch(kinds: str, mode: AdamMode) -> None:
    shapes = [(8, 30), (30, 8), (4, 25)]
    num_parameters = sum(rows * columns for rows, columns in shapes)
    generator = torch.Generator().manual_seed(3)
    sums = []
    for kernel in get_args(KernelKind):
        made = DirectionSums(9, _projections(kinds, num_parameters), mode, _state(), kernel=kernel, device=DEVICE)
        generator.manual_seed(3)
        offset = 0
        for shape in shapes:
            grads_BOI = torch.randn(9, *shape, generator=generator)
            avg, sq = torch.randn(shape, generator=generator) * 0.1, torch.rand(shape, generator=generator) * 0.1
            has_avg, has_sq = mode in ("torch", "less_code"), mode != "sgd"
            made.add(
                offset, grads_BOI.to(DEVICE), avg.to(DEVICE) if has_avg else None, sq.to(DEVICE) if has_sq else None
            )
            offset += shape[0] * shape[1]
        sums.append(made.ended())
    ours, fused = sums
    for one, other in zip(ours.projected, fused.projected, strict=True):
        # float32 sums of some 600 terms whose order differs, of the largest one
        torch.testing.assert_close(other, one, rtol=SUM_RELATIVE, atol=3 * SUM_RELATIVE * float(one.abs().max()))
    for name in ("square_B", "total_square_B", "momentum_square"):
        torch.testing.assert_close(getattr(fused, name), getattr(ours, name), rtol=SUM_RELATIVE, atol=0)
    torch.testing.assert_close(fused.momentum_shares(), ours.momentum_shares(), rtol=SUM_RELATIVE, atol=0)


@runs_the_kernel
@pytest.mark.parametrize("mode", ["torch", "sgd"])
@pytest.mark.parametrize(("offset", "num_columns", "dim", "num_rows"), [*SHAPES[:3], *SHAPES[-2:]])
def test_products_with_a_common_vector_change_nothing_else(
    mode: AdamMode, offset: int, num_columns: int, dim: int, num_rows: int
) -> None:
    start, keys = _Call.make(num_rows, num_columns, dim), _keys(dim)
    without, beside = start.copy().run(mode, offset, keys), start.copy()
    # From the middle of NaN, as a module's part of the whole vector may be cut.
    around = torch.full((num_columns + 64,), float("nan"), device=DEVICE)
    common = around[32 : 32 + num_columns].copy_(torch.linspace(-1, 2, num_columns))
    along = Along(common, torch.ones(num_rows, dtype=torch.float64, device=DEVICE))
    given = (beside.grads, beside.avg, beside.sq, _state(), mode)
    sums = {"out_BD": beside.out, "square_B": beside.square, "total_square_B": beside.total}
    sketch: dict[str, Any] = {"offset": offset, "dim": dim, "sketch_keys": keys}
    fused_direction_sketch(*given, **sketch, **sums, along=along, direction_out_BP=beside.direction)
    for name in vars(start):
        assert torch.equal(getattr(without, name), getattr(beside, name))
    directions, vector = beside.direction.double().cpu(), common.double().cpu()
    sizes = directions.abs() @ vector.abs()
    assert ((along.sum_B.cpu() - 1 - directions @ vector).abs() <= SUM_RELATIVE * sizes).all()


@runs_the_kernel
@pytest.mark.parametrize("share", [0.5, 0.99, 0.9999])
@pytest.mark.parametrize("kernel", get_args(KernelKind))
def test_the_common_part_is_taken_out_to_rounding_however_large_it_is(kernel: KernelKind, share: float) -> None:
    """Against the explicit subtraction before the sketch, in float64. The error is a part of the whole direction, so of
    what is left beside the common part it is 1 / sqrt(1 - share**2) times as much."""
    num_parameters, dim, cuts = 3000, 60, (0, 1100, 1150, 3000)
    generator = torch.Generator().manual_seed(5)
    unit, beside = torch.randn(2, num_parameters, generator=generator, dtype=torch.float64)
    unit /= unit.norm()
    beside -= (beside @ unit) * unit
    vectors_BP = (share * unit + (1 - share**2) ** 0.5 * beside / beside.norm()).repeat(3, 1).float()
    inner = make_projection("sketch", dim, SEED, num_parameters)
    deflated = DeflatedProjection(inner, unit.float()).to(DEVICE)
    sums = DirectionSums(3, [deflated], "sgd", _state(), kernel=kernel, device=DEVICE)
    for start, stop in pairwise(cuts):
        sums.add(start, vectors_BP[:, None, start:stop].clone().to(DEVICE), None, None)
    exact_BP, common = vectors_BP.double(), unit.float().double()
    common /= common.norm()
    along_B = exact_BP @ common
    sketched = torch.zeros(3, dim, dtype=torch.float64)
    inner.add(sketched, 0, exact_BP - along_B[:, None] * common)
    expected = torch.cat([sketched, along_B[:, None]], dim=1)
    found = sums.ended().projected[0].double().cpu()
    assert float((found - expected).norm(dim=1).max()) < UNIT_ROUNDING


@pytest.mark.skipif(INTERPRETED, reason="this is the process that the test starts")
@needs_triton
def test_under_tritons_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", str(Path(__file__).resolve())]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout and "needs a CUDA device" not in result.stdout, result.stdout


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@needs_triton
@pytest.mark.parametrize("mode", get_args(AdamMode))
@pytest.mark.parametrize(
    ("dtype", "sketches", "common", "writes"),
    [
        ("fp32", True, False, True),
        ("bf16", True, True, True),
        ("fp32", True, True, False),
        ("fp32", False, False, True),
    ],
)
def test_it_compiles_for_cuda_without_a_device(
    mode: AdamMode,
    dtype: str,
    sketches: bool,
    common: bool,
    writes: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import triton
    from triton.backends.compiler import GPUTarget

    from rose_ray.kernels import fused_triton

    if "nvidia" not in triton.backends.backends:
        pytest.skip("this triton has no CUDA backend")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = fused_triton.direction_sketch_kernel
    tile = {"ROWS": fused_triton.ROWS, "BUCKETS": fused_triton.BUCKETS}
    constants = {"MODE": mode, "SKETCH": sketches, "COMMON": common, "WRITE": writes, **tile}
    types = dict.fromkeys(kernel.arg_names, "i32")
    types |= {name: "*fp32" for name in types if name.endswith("_ptr")} | dict.fromkeys(constants, "constexpr")
    types |= dict.fromkeys(("beta1", "rest1", "beta2", "rest2", "scale", "root_scale", "eps"), "fp32")
    types |= {"grads_ptr": f"*{dtype}", "direction_ptr": f"*{dtype}", "shifts_ptr": "*i32"}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = triton.compiler.ASTSource(kernel, types, constexprs=places)
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": True})
    assert not re.search(r"\b(atom|red)\.(global|relaxed|add)", built.asm["ptx"]), "sums must have one order"
