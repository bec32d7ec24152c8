"""Taps refuse what no single call of a layer has the gradient of."""

from __future__ import annotations

import pytest
import torch
from peft.tuners.lora import Linear
from peft.tuners.lora import LoraConfig as PeftLoraConfig
from torch import Tensor, nn

from rose_ray.data.tokenize import Sample
from rose_ray.errors import ModelError
from rose_ray.model.batch import pad_batch
from rose_ray.model.taps import Taps

BATCH = pad_batch([Sample([1, 2, 3, 4], [False, True, True, True])] * 2)


class Repeating(nn.Module):
    """A layer with an adapter that runs so many times in a forward pass."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times
        config = PeftLoraConfig(r=1, lora_alpha=1, init_lora_weights=False)
        self.layer = Linear(nn.Linear(3, 3), adapter_name="default", config=config, r=1, lora_alpha=1)
        self.requires_grad_(False)

    def forward(self, hidden_BSI: Tensor) -> Tensor:
        for _ in range(self.times):
            hidden_BSI = self.layer(hidden_BSI)
        return hidden_BSI


def tapped(module: Repeating) -> Taps:
    factors = {key: getattr(module.layer, f"lora_{key}")["default"].weight for key in "AB"}
    return Taps(module, {f"layer.lora_{key}.weight": weight for key, weight in factors.items()})


def backward(module: Repeating) -> list[str]:
    taps = tapped(module)
    received: list[str] = []
    for _ in range(2):
        with taps.sending_to(lambda name, grads_BOI: received.append(name), BATCH):
            module(torch.ones(2, 4, 3)).sum().backward()
    return received


def test_each_pass_sends_every_weight_s_gradients_once() -> None:
    assert sorted(backward(Repeating(1))) == 2 * ["layer.lora_A.weight"] + 2 * ["layer.lora_B.weight"]


def test_a_layer_that_runs_twice_is_refused() -> None:
    with pytest.raises(ModelError, match=r"^layer runs more than once in a forward pass: .*lora\.target_modules\.$"):
        backward(Repeating(2))


def test_a_layer_that_takes_tokens_in_another_order_is_refused() -> None:
    module = Repeating(1)
    taps = tapped(module)
    message = r"^layer takes a tensor of shape \[8, 3\], .* Leave it out of lora\.target_modules\.$"
    with pytest.raises(ModelError, match=message), taps.sending_to(lambda name, grads_BOI: None, BATCH):
        module(torch.ones(8, 3))
    assert module(torch.ones(8, 3)).shape == (8, 3)  # nobody asks for gradients
