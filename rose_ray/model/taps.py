"""LoRA layers of a PEFT model that hand on the factors of their gradients."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rose_ray.errors import ModelError
from rose_ray.kernels.per_sample import (
    GradientConsumer,
    added_lora,
    linear_weight_gradients,
    packed_weight_gradients,
)

ADAPTER = "default"
"""PEFT's name for the one adapter."""


class Taps:
    """Takes the place of the forward pass of every LoRA layer in a model: same output, per-sample gradients on the way.

    Args:
        module: A PEFT model with one LoRA adapter on linear layers, all its parameters frozen.
        weights: The adapter slot: weights by layout name, whole and on the device, whoever holds the model's own.

    Raises:
        ModelError: The adapter is no plain LoRA (DoRA, a bias, an embedding).
    """

    def __init__(self, module: nn.Module, weights: Mapping[str, Tensor]) -> None:
        self._consume: GradientConsumer | None = None
        self._packed_lengths: Sequence[int] | None = None
        self._layers: dict[str, Any] = {n: layer for n, layer in module.named_modules() if hasattr(layer, "lora_A")}
        for name, layer in self._layers.items():  # all of them before the first is changed
            _check_plain(name, layer)
        for name, layer in self._layers.items():
            pair = weights[f"{name}.lora_A.weight"], weights[f"{name}.lora_B.weight"]
            layer.forward = functools.partial(self._forward, name, layer, pair)

    def remove(self) -> None:
        """Give the layers their own forward passes back."""
        for layer in self._layers.values():
            del layer.forward

    @contextmanager
    def sending_to(self, consume: GradientConsumer, packed_lengths: Sequence[int] | None) -> Iterator[None]:
        """Send each weight's gradients [B, O, I] to ``consume`` during backward.

        Args:
            consume: Receives ``(name, gradients)``; runs without autograd.
            packed_lengths: Tokens of each sample where they lie end to end in one row, else None.
        """
        self._consume, self._packed_lengths = consume, packed_lengths
        try:
            yield
        finally:
            self._consume = None

    def _forward(self, name: str, layer: Any, weights: tuple[Tensor, Tensor], hidden_BSI: Tensor) -> Tensor:
        base_BSO: Tensor = layer.base_layer(hidden_BSI)
        if layer.disable_adapters:
            return base_BSO
        receive = functools.partial(self._receive, name) if self._consume is not None else None
        dtype = weights[0].dtype  # no copies where base and adapter have one type
        scaling = layer.scaling[ADAPTER]
        return added_lora(base_BSO.to(dtype), hidden_BSI.to(dtype), *weights, scaling, receive).to(base_BSO.dtype)

    def _receive(self, name: str, which: str, input_BSI: Tensor, output_grad_BSO: Tensor) -> None:
        consume = self._consume
        assert consume is not None, "backward ran outside of `sending_to`"
        with torch.no_grad():
            if self._packed_lengths is None:
                grads_BOI = linear_weight_gradients(input_BSI, output_grad_BSO)
            else:
                grads_BOI = packed_weight_gradients(input_BSI[0], output_grad_BSO[0], self._packed_lengths)
            consume(f"{name}.lora_{which}.weight", grads_BOI)


def _check_plain(name: str, layer: Any) -> None:
    odd = [key for key in ("lora_variant", "lora_embedding_A") if len(getattr(layer, key, ()))]
    odd += [key for key in ("lora_A", "lora_B") if set(getattr(layer, key).keys()) != {ADAPTER}]
    odd += [
        f"{key}.bias"
        for key in ("lora_A", "lora_B")
        if any(part.bias is not None for part in getattr(layer, key).values())
    ]
    if odd:
        raise ModelError(
            f"{name}: per-sample gradients need one plain LoRA adapter named {ADAPTER!r} on linear layers; found {odd}."
        )
