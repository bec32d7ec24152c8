"""Per-sample gradients of linear layers, batch at once, module by module as backward runs.

For a linear map ``y = x W^T`` over a sequence, sample b's weight gradient is the sum over its tokens of the outer
product of the output gradient and the input. A tap on the output keeps the input through the forward pass and
hands both to a consumer in the backward pass, after which they are free. Autograd never forms a weight gradient,
``param.grad`` is never read, and the matrix of all gradients never exists.

Shapes: B batch, S tokens, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

GradientConsumer = Callable[[str, Tensor], None]
"""Called once per parameter and backward pass with its name and gradients [B, O, I]."""


def linear_weight_gradients(input_BSI: Tensor, output_grad_BSO: Tensor) -> Tensor:
    """Return each sample's weight gradient of a linear layer, [B, O, I].

    Args:
        input_BSI: What went into the layer.
        output_grad_BSO: Gradient of the summed loss in the layer's output, zero at padding.

    Returns:
        Gradients in float32, or in float64 where the inputs are; accumulated over S in that type.
    """
    dtype = torch.promote_types(output_grad_BSO.dtype, torch.float32)
    return torch.bmm(output_grad_BSO.to(dtype).transpose(1, 2), input_BSI.to(dtype))


class _Tap(torch.autograd.Function):
    """Identity on a layer's output that sees input and output gradient in the backward pass.

    The input goes through ``save_for_backward``, so activation checkpointing recomputes it like any other.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, layer_input: Tensor, receive: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(layer_input)
        ctx.receive = receive
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (layer_input,) = ctx.saved_tensors
        ctx.receive(layer_input, grads[0])
        return grads[0], None, None


@contextmanager
def tapped(layers: Mapping[str, nn.Module], consume: GradientConsumer) -> Iterator[None]:
    """Send the per-sample weight gradient of each layer to ``consume`` during backward.

    Args:
        layers: Linear layers by the name of their weight. Weights must be frozen: their gradients would be paid twice.
        consume: Receives ``(name, gradients [B, O, I])``; runs without autograd.
    """

    def hook_for(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def receive(layer_input: Tensor, output_grad: Tensor) -> None:
            with torch.no_grad():
                consume(name, linear_weight_gradients(layer_input, output_grad))

        def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            tap: Tensor = _Tap.apply(output, inputs[0], receive)
            return tap

        return hook

    handles = [layer.register_forward_hook(hook_for(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
