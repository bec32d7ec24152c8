"""LoRA layers of a PEFT model that hand on the factors of their gradients."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rose_ray.errors import ModelError, ResourceError
from rose_ray.kernels.per_sample import (
    GradientConsumer,
    PackedRows,
    added_lora,
    linear_weight_gradients,
    merged_lora,
    packed_weight_gradients,
)
from rose_ray.model.batch import Batch
from rose_ray.model.memory import is_out_of_memory

ADAPTER = "default"
"""PEFT's name for the one adapter."""

MERGED_SHARE = 1 / 64
"""A layer's adapter is merged where its factors have at least this share of the weights' numbers. What is saved of the
layer's own products is half of it, each way."""


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
        self._rows: dict[str, PackedRows | None] = {}
        self._merged: dict[str, Tensor] = {}
        self._received: set[str] = set()
        self._layers: dict[str, Any] = {n: layer for n, layer in module.named_modules() if hasattr(layer, "lora_A")}
        for name, layer in self._layers.items():  # all of them before the first is changed
            _check_plain(name, layer)
        self._weights = {n: (weights[f"{n}.lora_A.weight"], weights[f"{n}.lora_B.weight"]) for n in self._layers}
        for name, layer in self._layers.items():
            layer.forward = functools.partial(self._forward, name, layer, self._weights[name])

    @property
    def names(self) -> list[str]:
        """The layers."""
        return list(self._layers)

    def merge(self) -> None:
        """Add the adapter in the slot to copies of the weights, which take the base layers' place until the next call.

        Layers are left as they are where their weights are packed, partitioned or of less than 32 bits, whose rounding
        would swallow a small adapter, and where the copy would save little: see `MERGED_SHARE`.

        Raises:
            ResourceError: No memory for the copies.
        """
        copies, self._merged = self._merged, {}  # none is in use before all are made
        for name, (weight_RI, weight_OR) in self._weights.items():
            layer = self._layers[name]
            if _merging_pays(layer.base_layer, weight_RI, weight_OR):
                base = layer.base_layer.weight
                try:
                    copy = copies[name] if name in copies else torch.empty_like(base)
                    copies[name] = torch.addmm(base, weight_OR, weight_RI, alpha=layer.scaling[ADAPTER], out=copy)
                except RuntimeError as error:
                    if not is_out_of_memory(error):
                        raise
                    raise ResourceError(
                        f"no memory for a copy of the adapter's layers, {len(copies)} of them made: {error} "
                        "Set model.merge_adapter: never."
                    ) from error
        self._merged = copies

    def remove(self) -> None:
        """Give the layers their own forward passes back."""
        for layer in self._layers.values():
            del layer.forward

    @contextmanager
    def sending_to(
        self, consume: GradientConsumer, batch: Batch, labelled_only: Set[str] = frozenset()
    ) -> Iterator[None]:
        """Send each weight's gradients [B, O, I] to ``consume`` during backward.

        Args:
            consume: Receives ``(name, gradients)``; runs without autograd.
            batch: What goes through the model.
            labelled_only: Layers that get the batch's labelled positions alone, end to end in one row.

        Raises:
            ModelError: A layer takes no rows of tokens [B, S, I]; or, in the backward pass, it ran more than once in
                the forward pass, so that no single call has the whole gradient of its weights.
        """
        labelled = batch.labels.packed_rows if labelled_only else None
        self._rows = {n: labelled if n in labelled_only else batch.packed_rows for n in self._layers}
        self._consume = consume
        self._received.clear()
        try:
            yield
        finally:
            self._consume = None

    def _forward(self, name: str, layer: Any, weights: tuple[Tensor, Tensor], hidden_BSI: Tensor) -> Tensor:
        if layer.disable_adapters:
            base_BSO: Tensor = layer.base_layer(hidden_BSI)
            return base_BSO
        receive = None
        if self._consume is not None:
            if hidden_BSI.dim() != 3:
                raise ModelError(
                    f"{name} takes a tensor of shape {list(hidden_BSI.shape)}, in which tokens no longer stand row by "
                    "row. Leave it out of lora.target_modules."
                )
            receive = functools.partial(self._receive, name)
        scaling = layer.scaling[ADAPTER]
        if name in self._merged:
            return merged_lora(hidden_BSI, self._merged[name], layer.base_layer.bias, *weights, scaling, receive)
        base_BSO = layer.base_layer(hidden_BSI)
        dtype = weights[0].dtype  # no copies where base and adapter have one type
        return added_lora(base_BSO.to(dtype), hidden_BSI.to(dtype), *weights, scaling, receive).to(base_BSO.dtype)

    def _receive(self, name: str, which: str, input_BSI: Tensor, output_grad_BSO: Tensor) -> None:
        consume, weight = self._consume, f"{name}.lora_{which}.weight"
        assert consume is not None, "backward ran outside of `sending_to`"
        if weight in self._received:
            raise ModelError(
                f"{name} runs more than once in a forward pass: its weights' gradients would have to be added up "
                "before Adam, which sees them call by call. Leave it out of lora.target_modules."
            )
        self._received.add(weight)
        rows = self._rows[name]
        with torch.no_grad():
            if rows is None:
                grads_BOI = linear_weight_gradients(input_BSI, output_grad_BSO)
            else:
                grads_BOI = packed_weight_gradients(input_BSI[0], output_grad_BSO[0], rows)
            consume(weight, grads_BOI)


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


def _merging_pays(base: nn.Module, weight_RI: Tensor, weight_OR: Tensor) -> bool:
    weight = base.weight
    if type(base) is not nn.Linear or hasattr(weight, "ds_id") or weight.dtype != weight_RI.dtype:
        return False
    wide = weight.dtype in (torch.float32, torch.float64)
    return wide and weight_RI.numel() + weight_OR.numel() >= MERGED_SHARE * weight.numel()
