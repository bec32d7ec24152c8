"""Per-sample gradients of a LoRA layer, batch at once, layer by layer as backward runs.

For a linear map ``y = x W^T`` over a sequence, sample b's weight gradient is the sum over its tokens of the outer
product of the output gradient and the input. The adapter's part of a layer runs as one autograd function, which hands
both factors to a receiver in the backward pass, after which they are free. Autograd never forms a weight gradient,
``param.grad`` is never read, and the matrix of all gradients never exists.

Shapes: B batch, S tokens of a padded row, T of a packed one, K of its longest sample, I inputs, O outputs, R rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import linear

GradientConsumer = Callable[[str, Tensor], None]
"""Called once per parameter and backward pass with its name and gradients [B, O, I]."""

FactorReceiver = Callable[[str, Tensor, Tensor], None]
"""Called with ``A`` or ``B`` and the factors of that weight's gradients: input [B, S, I], output gradient [B, S, O]."""


def linear_weight_gradients(input_BSI: Tensor, output_grad_BSO: Tensor) -> Tensor:
    """Return each sample's weight gradient of a linear layer, [B, O, I].

    Args:
        input_BSI: What went into the layer.
        output_grad_BSO: Gradient of the summed loss in the layer's output, zero at padding; type of the input.

    Returns:
        Gradients in float32, or in float64 where the inputs are. Products of bfloat16 are added up in float32; on the
        CPU the sums are rounded to bfloat16 once (8 bits an entry, no worse than the activations they come from).
    """
    dtype = torch.promote_types(output_grad_BSO.dtype, torch.float32)
    if output_grad_BSO.is_cuda and output_grad_BSO.dtype is not dtype:
        return torch.bmm(output_grad_BSO.transpose(1, 2), input_BSI, out_dtype=dtype)
    return torch.bmm(output_grad_BSO.transpose(1, 2), input_BSI).to(dtype)


@dataclass(frozen=True)
class PackedRows:
    """Samples that lie end to end, and where each of their tokens comes to lie when they lie side by side.

    Attributes:
        places_T: In the flattened [B, K], int64, where K is the length of the longest.
        num_samples: B.
        longest: K.
    """

    places_T: Tensor
    num_samples: int
    longest: int

    @classmethod
    def of(cls, rows_T: Tensor, slots_T: Tensor, num_samples: int, longest: int) -> Self:
        """From the sample of each token, and its number within the sample."""
        return cls(rows_T * longest + slots_T, num_samples, longest)

    def side_by_side(self, packed_TI: Tensor) -> Tensor:
        """Return the samples' rows [B, K, I], zero behind each."""
        rows_NI = packed_TI.new_zeros(self.num_samples * self.longest, packed_TI.shape[1])
        rows_NI.index_copy_(0, self.places_T, packed_TI)
        return rows_NI.view(self.num_samples, self.longest, -1)


def packed_weight_gradients(input_TI: Tensor, output_grad_TO: Tensor, rows: PackedRows) -> Tensor:
    """Return each sample's weight gradient where samples lie end to end in one row, [B, O, I].

    Two copies and one product: a product a sample would be as many calls as there are samples.

    Args:
        input_TI: What went into the layer.
        output_grad_TO: Gradient of the summed loss in the layer's output.
        rows: Where the samples lie.

    Returns:
        As `linear_weight_gradients`.
    """
    return linear_weight_gradients(rows.side_by_side(input_TI), rows.side_by_side(output_grad_TO))


class _AddedLora(torch.autograd.Function):
    """``base + scaling * B A x``, in place on ``base``.

    Inputs go through ``save_for_backward``, so activation checkpointing recomputes them like any other. The anchor
    requires a gradient and gets none: it starts the graph at the lowest adapter, so nothing runs backward below it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        base_BSO: Tensor,
        input_BSI: Tensor,
        anchor: Tensor,
        weight_RI: Tensor,
        weight_OR: Tensor,
        scaling: float,
        receive: FactorReceiver | None,
    ) -> Tensor:
        inner_BSR = linear(input_BSI, weight_RI)
        # view raises where flatten would copy, and so lose what is added
        base_BSO.view(-1, base_BSO.shape[-1]).addmm_(inner_BSR.flatten(0, -2), weight_OR.T, alpha=scaling)
        ctx.mark_dirty(base_BSO)
        ctx.save_for_backward(input_BSI, inner_BSR, weight_RI, weight_OR)
        ctx.scaling, ctx.receive = scaling, receive
        return base_BSO

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        input_BSI, inner_BSR, weight_RI, weight_OR = ctx.saved_tensors
        grad_BSO = grads[0]
        inner_grad_BSR = (grad_BSO @ weight_OR).mul_(ctx.scaling)
        if ctx.receive is not None:
            ctx.receive("A", input_BSI, inner_grad_BSR)
            ctx.receive("B", inner_BSR * ctx.scaling, grad_BSO)
        input_grad_BSI = inner_grad_BSR @ weight_RI if ctx.needs_input_grad[1] else None
        return grad_BSO, input_grad_BSI, None, None, None, None, None


def added_lora(
    base_BSO: Tensor,
    input_BSI: Tensor,
    weight_RI: Tensor,
    weight_OR: Tensor,
    scaling: float,
    receive: FactorReceiver | None,
) -> Tensor:
    """Add a LoRA layer's part to what its base layer gave, and send the factors of its gradients on in backward.

    Args:
        base_BSO: Output of the base layer; changed in place where it is contiguous and no view.
        input_BSI: What went into both, in the type of the adapter.
        weight_RI, weight_OR: The adapter's A and B; constants.
        scaling: What the adapter's output is multiplied by.
        receive: Gets the factors of both weights' gradients in the backward pass; None where nobody wants them.

    Returns:
        The sum, part of the graph where somebody receives, whether or not its inputs are.
    """
    # A view may be of another custom function: autograd does not let it be changed.
    if base_BSO._is_view() or not base_BSO.is_contiguous():
        base_BSO = base_BSO.clone(memory_format=torch.contiguous_format)
    anchor = torch.zeros((), requires_grad=receive is not None)
    out_BSO: Tensor = _AddedLora.apply(base_BSO, input_BSI, anchor, weight_RI, weight_OR, scaling, receive)
    return out_BSO


class _MergedLora(torch.autograd.Function):
    """``x W'^T + bias``, where ``W'`` has the adapter in it.

    Inner products, which only gradients of B need, are made in the backward pass. The anchor is that of `_AddedLora`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input_BSI: Tensor,
        anchor: Tensor,
        merged_OI: Tensor,
        bias_O: Tensor | None,
        weight_RI: Tensor,
        weight_OR: Tensor,
        scaling: float,
        receive: FactorReceiver | None,
    ) -> Tensor:
        ctx.save_for_backward(input_BSI, merged_OI, weight_RI, weight_OR)
        ctx.scaling, ctx.receive = scaling, receive
        return linear(input_BSI, merged_OI, bias_O)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        input_BSI, merged_OI, weight_RI, weight_OR = ctx.saved_tensors
        grad_BSO = grads[0]
        if ctx.receive is not None:
            ctx.receive("A", input_BSI, (grad_BSO @ weight_OR).mul_(ctx.scaling))
            ctx.receive("B", linear(input_BSI, weight_RI).mul_(ctx.scaling), grad_BSO)
        input_grad_BSI = grad_BSO @ merged_OI if ctx.needs_input_grad[0] else None
        return input_grad_BSI, None, None, None, None, None, None, None


def merged_lora(
    input_BSI: Tensor,
    merged_OI: Tensor,
    bias_O: Tensor | None,
    weight_RI: Tensor,
    weight_OR: Tensor,
    scaling: float,
    receive: FactorReceiver | None,
) -> Tensor:
    """Run a linear layer whose weights have the adapter in them, and send the factors of its gradients on in backward.

    Forward a token takes one product where the base layer and `added_lora` take three; backward one and the two inner
    ones that the factors are made of, where those take three.

    Args:
        input_BSI: What goes into the layer, in the type of its weights.
        merged_OI: ``W + scaling * B A``; a constant.
        bias_O: The base layer's, or None.
        weight_RI, weight_OR: The adapter's A and B; constants.
        scaling: What the adapter's output is multiplied by.
        receive: Gets the factors of both weights' gradients in the backward pass; None where nobody wants them.

    Returns:
        The output [B, S, O], part of the graph where somebody receives, whether or not its input is.
    """
    anchor = torch.zeros((), requires_grad=receive is not None)
    out_BSO: Tensor = _MergedLora.apply(input_BSI, anchor, merged_OI, bias_O, weight_RI, weight_OR, scaling, receive)
    return out_BSO
