"""What the fused kernel refuses, on the CPU: what is wrong is seen before the device is."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from typing import Any

import pytest
import torch

from rose_ray.errors import ConfigError, NumericsError, ShapeError
from rose_ray.kernels.adam import AdamState
from rose_ray.kernels.fused import Along, fused_direction_sketch, make_sketch_keys

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def _refused(**changes: Any) -> None:
    """Call with one thing wrong."""
    given: dict[str, Any] = {
        "grads_BP": torch.ones(2, 6),
        "exp_avg_P": torch.ones(6),
        "exp_avg_sq_P": torch.ones(6),
        "state": AdamState(num_updates=11, adam_beta1=0.85, adam_beta2=0.97, adam_eps=1e-4),
        "mode": "torch",
        "offset": 3,
        "dim": 4,
        "sketch_keys": make_sketch_keys(1, 4, 20, "cpu"),
        "out_BD": torch.zeros(2, 4),
        "square_B": torch.zeros(2, dtype=torch.float64),
        "total_square_B": torch.zeros(2, dtype=torch.float64),
        "direction_out_BP": torch.zeros(2, 6),
    }
    fused_direction_sketch(**(given | changes))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"mode": "adamw"}, ConfigError, "'adamw'"),
        ({"exp_avg_P": None}, ConfigError, "needs exp_avg,"),
        ({"exp_avg_sq_P": None, "mode": "v_only"}, ConfigError, "needs exp_avg_sq"),
        ({"grads_BP": torch.ones(2, 3, 2)}, ShapeError, r"expected \[B, P\]"),
        ({"grads_BP": torch.ones(2, 6).double()}, NumericsError, "gradients is torch.float64"),
        ({"grads_BP": torch.ones(6, 2).T}, ShapeError, "gradients has stride 2"),
        ({"exp_avg_P": torch.ones(5)}, ShapeError, r"exp_avg has shape \(5,\); expected \(6,\)"),
        ({"exp_avg_sq_P": torch.ones(6).half()}, NumericsError, "exp_avg_sq is torch.float16"),
        ({"exp_avg_sq_P": torch.ones(6, device="meta")}, ConfigError, "exp_avg_sq is on meta"),
        ({"out_BD": torch.zeros(2, 5)}, ShapeError, "out has shape"),
        ({"out_BD": torch.zeros(2, 4).double()}, NumericsError, "out is torch.float64; expected torch.float32"),
        ({"square_B": torch.zeros(3)}, ShapeError, "square has shape"),
        ({"total_square_B": torch.zeros(2).half()}, NumericsError, "total_square is torch.float16"),
        ({"direction_out_BP": torch.zeros(2, 5)}, ShapeError, "direction_out has shape"),
        ({"along": Along(torch.ones(5), torch.zeros(2))}, ShapeError, r"common has shape \(5,\); expected \(6,\)"),
        ({"along": Along(torch.ones(6).double(), torch.zeros(2))}, NumericsError, "common is torch.float64"),
        ({"along": Along(torch.ones(6), torch.zeros(3))}, ShapeError, "along has shape"),
        ({"offset": 15}, ShapeError, "15 to 21 leaves the vector of 20 parameters"),
        ({"offset": -1}, ShapeError, "-1 to 5 leaves"),
        ({"dim": 5}, ConfigError, "dim is 5 and the sketch keys are of dim 4"),
    ],
)
def test_what_cannot_be_used_is_refused(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        _refused(**changes)


@pytest.mark.parametrize(("seed", "dim", "num_parameters"), [(-1, 4, 9), (1, 0, 9), (1, 1 << 24, 9), (1, 4, 0)])
def test_keys_out_of_range_are_refused(seed: int, dim: int, num_parameters: int) -> None:
    with pytest.raises(ConfigError, match="folded sketch has dim"):
        make_sketch_keys(seed, dim, num_parameters, "cpu")


@pytest.mark.skipif(INTERPRETED, reason="the interpreter does run on the CPU")
@needs_triton
def test_tensors_on_the_cpu_are_refused() -> None:
    with pytest.raises(ConfigError, match="runs on CUDA and the gradients are on cpu"):
        _refused()


def test_without_triton_it_can_be_imported_and_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "rose_ray.kernels.fused_triton", raising=False)
    monkeypatch.delitem(sys.modules, "rose_ray.kernels.fused")
    assert importlib.import_module("rose_ray.kernels.fused")
    with pytest.raises(ConfigError, match="pip install triton"):
        _refused()
