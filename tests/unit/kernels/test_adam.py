"""Adam directions against torch.optim.Adam and against the formulas number by number."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from torch import Tensor

from rose_ray.errors import ConfigError, NumericsError, ShapeError
from rose_ray.kernels.adam import AdamMode, AdamState, adam_direction, common_direction

torch.set_num_threads(1)  # tiny tensors: handing them to threads costs more than the sums

# (theta_before - theta_after) / lr loses digits of theta: 1e-16 * |theta| / lr with |theta| about 3, lr 1e-3
OPTIMIZER_DIFFERENCE = 1e-11
FLOAT64_RELATIVE = 1e-13  # a dozen float64 operations
FLOAT32_RELATIVE = 1e-5  # a dozen float32 operations, one of them a square
SHAPES = [(4, 3), (5,), (2, 1, 3)]


def _trained(num_steps: int, lr: float = 1e-3) -> tuple[list[Tensor], torch.optim.Adam, torch.Generator]:
    """Parameters and an optimizer that has taken some steps."""
    generator = torch.Generator().manual_seed(num_steps)
    params = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
    optimizer = torch.optim.Adam(params, lr=lr, betas=(0.85, 0.97), eps=1e-4)
    for _ in range(num_steps):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator, dtype=torch.float64)
        optimizer.step()
    return params, optimizer, generator


def _state(num_updates: int) -> AdamState:
    return AdamState(num_updates=num_updates, adam_beta1=0.85, adam_beta2=0.97, adam_eps=1e-4)


def _moments(optimizer: torch.optim.Adam, param: Tensor) -> tuple[Tensor, Tensor]:
    stored = optimizer.state[param]
    if not stored:
        return torch.zeros_like(param), torch.zeros_like(param)
    return stored["exp_avg"].clone(), stored["exp_avg_sq"].clone()


@pytest.mark.parametrize("num_steps", [0, 1, 7, 40])
def test_torch_mode_is_what_the_optimizer_would_do(num_steps: int) -> None:
    params, optimizer, generator = _trained(num_steps)
    grads = [torch.randn((2, *param.shape), generator=generator, dtype=torch.float64) for param in params]
    ours = [
        adam_direction(grad, *_moments(optimizer, param), _state(num_steps), "torch").direction_B
        for grad, param in zip(grads, params, strict=True)
    ]
    before = [param.clone() for param in params]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad[1]
    optimizer.step()
    for param, old, direction in zip(params, before, ours, strict=True):
        moved = (old - param) / 1e-3
        torch.testing.assert_close(direction[1], moved, atol=OPTIMIZER_DIFFERENCE, rtol=OPTIMIZER_DIFFERENCE)


def _slow_direction(g: float, m: float, v: float, t: int, mode: str) -> float:
    b1, b2, eps = (0.9, 0.999, 1e-8) if mode == "less_code" else (0.85, 0.97, 1e-4)
    first = b1 * m + (1 - b1) * g
    second = b2 * v + (1 - b2) * g**2
    if mode == "torch":
        return (first / (1 - b1**t)) / (math.sqrt(second / (1 - b2**t)) + eps)
    if mode == "less_code":
        return first / math.sqrt(second + eps)
    if mode == "v_only":
        return g / (math.sqrt(second / (1 - b2**t)) + eps)
    return g


@pytest.mark.parametrize("mode", get_args(AdamMode))
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, FLOAT64_RELATIVE), (torch.float32, FLOAT32_RELATIVE)])
def test_every_mode_equals_its_formula(mode: AdamMode, dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(1)
    grads = torch.randn(3, 2, 4, generator=generator, dtype=torch.float64).to(dtype)
    m = (torch.randn(2, 4, generator=generator, dtype=torch.float64) * 0.1).to(dtype)
    v = (torch.rand(2, 4, generator=generator, dtype=torch.float64) * 1e-9).to(dtype)
    copies = grads.clone(), m.clone(), v.clone()
    result = adam_direction(grads, m, v, _state(11), mode)
    columns = (x.expand(3, 2, 4).flatten().tolist() for x in (grads, m, v))
    flat = zip(*columns, strict=True)
    expected = torch.tensor([_slow_direction(gi, mi, vi, 12, mode) for gi, mi, vi in flat], dtype=torch.float64)
    assert result.direction_B.dtype is dtype
    torch.testing.assert_close(result.direction_B.double(), expected.view(3, 2, 4), rtol=tolerance, atol=tolerance)
    for tensor, copy in zip((grads, m, v), copies, strict=True):
        assert torch.equal(tensor, copy), "inputs must stay as they are"


@pytest.mark.parametrize(("mode", "beta1"), [("torch", 0.85), ("less_code", 0.9)])
def test_squares_add_up_over_parameters_to_the_momentum_share(mode: AdamMode, beta1: float) -> None:
    generator = torch.Generator().manual_seed(5)
    momentum, total = torch.zeros((), dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    all_grads, all_moments = [], []
    for shape in SHAPES:
        grads = torch.randn((4, *shape), generator=generator)
        m, v = torch.randn(shape, generator=generator), torch.rand(shape, generator=generator)
        result = adam_direction(grads, m, v, _state(3), mode)
        momentum = momentum + result.momentum_norm.double().square()
        total = total + result.total_norm_B.double().square()
        all_grads.append(grads.double().flatten(1))
        all_moments.append(m.double().flatten())
    g, m = torch.cat(all_grads, dim=1), torch.cat(all_moments)
    expected = (beta1 * m).norm() / (beta1 * m + (1 - beta1) * g).norm(dim=1)
    torch.testing.assert_close((momentum / total).sqrt(), expected, rtol=FLOAT32_RELATIVE, atol=FLOAT32_RELATIVE)


def test_modes_without_momentum_report_none_of_it_and_need_no_moments() -> None:
    grads = torch.ones(2, 3)
    assert adam_direction(grads, None, None, _state(0), "sgd").direction_B is grads
    for mode, second in (("sgd", None), ("v_only", torch.ones(3))):
        result = adam_direction(grads, None, second, _state(0), mode)  # type: ignore[arg-type]
        assert result.momentum_norm.item() == 0 and result.total_norm_B.tolist() == [0, 0]


def test_first_step_without_moments_is_the_sign() -> None:
    grads = torch.tensor([[3.0, -0.5]], dtype=torch.float64)
    zero = torch.zeros(2, dtype=torch.float64)
    state = AdamState(num_updates=0, adam_beta1=0.9, adam_beta2=0.999, adam_eps=1e-12)
    direction = adam_direction(grads, zero, zero, state).direction_B
    torch.testing.assert_close(direction, torch.tensor([[1.0, -1.0]], dtype=torch.float64))


def test_rows_do_not_depend_on_their_batch() -> None:
    generator = torch.Generator().manual_seed(8)
    grads = torch.randn(5, 4, 3, generator=generator)
    m, v = torch.randn(4, 3, generator=generator), torch.rand(4, 3, generator=generator)
    whole = adam_direction(grads, m, v, _state(2))
    for row in range(5):
        alone = adam_direction(grads[row : row + 1], m, v, _state(2))
        assert torch.equal(alone.direction_B[0], whole.direction_B[row])


def test_empty_batch() -> None:
    result = adam_direction(torch.zeros(0, 3), torch.zeros(3), torch.zeros(3), _state(0))
    assert result.direction_B.shape == (0, 3) and result.total_norm_B.shape == (0,)


def test_what_cannot_be_used_is_refused() -> None:
    grads, moment = torch.ones(2, 3), torch.ones(3)
    with pytest.raises(ConfigError, match="'adamw'"):
        adam_direction(grads, moment, moment, _state(0), "adamw")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="needs exp_avg,"):
        adam_direction(grads, None, moment, _state(0), "torch")
    with pytest.raises(ConfigError, match="needs exp_avg_sq"):
        adam_direction(grads, moment, None, _state(0), "v_only")
    with pytest.raises(ShapeError, match="exp_avg_sq has shape"):
        adam_direction(grads, moment, torch.ones(2, 3), _state(0), "torch")
    with pytest.raises(NumericsError, match="bfloat16"):
        adam_direction(grads.bfloat16(), moment, moment, _state(0), "torch")


@pytest.mark.parametrize(
    "change",
    [
        {"num_updates": -1},
        {"adam_beta1": 1.0},
        {"adam_beta2": -0.1},
        {"adam_eps": 0.0},
        {"adam_eps": math.nan},
    ],
)
def test_state_is_checked(change: dict[str, float]) -> None:
    values = {"num_updates": 0, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_eps": 1e-8} | change
    with pytest.raises(ConfigError, match=next(iter(change))):
        AdamState(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", get_args(AdamMode))
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, FLOAT64_RELATIVE), (torch.float32, FLOAT32_RELATIVE)])
def test_common_direction_is_that_of_a_zero_gradient(mode: AdamMode, dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(1)
    avg = torch.randn(3, 4, generator=generator, dtype=dtype)
    sq = torch.rand(3, 4, generator=generator, dtype=dtype)
    common = common_direction(avg, sq, _state(6), mode)
    zero = adam_direction(torch.zeros(1, 3, 4, dtype=dtype), avg, sq, _state(6), mode).direction_B[0]
    if mode in ("v_only", "sgd"):
        assert common is None and not zero.any()
        return
    assert common is not None and common.dtype == dtype and torch.equal(common, zero)
    for ours, m, v in zip(common.flatten().tolist(), avg.flatten().tolist(), sq.flatten().tolist(), strict=True):
        assert ours == pytest.approx(_slow_direction(0.0, m, v, 7, mode), rel=tolerance)


def test_common_direction_checks_its_moments() -> None:
    avg = torch.ones(3, dtype=torch.bfloat16)
    for moments in ((None, avg), (avg, None)):
        with pytest.raises(ConfigError, match="the checkpoint has none"):
            common_direction(*moments, _state(1), "torch")
    with pytest.raises(ShapeError, match="exp_avg_sq has shape"):
        common_direction(avg, avg[:2], _state(1), "less_code")
    with pytest.raises(ConfigError, match="'adamw'"):
        common_direction(avg, avg, _state(1), "adamw")  # type: ignore[arg-type]
    half = common_direction(avg, avg, _state(1), "torch")
    assert half is not None and half.dtype == torch.float32
