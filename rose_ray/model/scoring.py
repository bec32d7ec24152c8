"""One forward and one backward pass over a batch, per sample: what features and bank are both made of.

Shapes: B batch, S tokens, K positions whose next token carries loss in any row, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rose_ray.data.tokenize import Sample
from rose_ray.kernels.losses import selected_token_logps
from rose_ray.kernels.per_sample import GradientConsumer, tapped
from rose_ray.model.layout import adapter_layers, adapter_parameters

Reduction = Literal["mean_loss", "sum_logps"]
"""Token-mean cross-entropy, or summed log-probability, of a sample's labelled tokens."""


@dataclass(frozen=True)
class Batch:
    """Samples padded on the right.

    Attributes:
        input_ids: [B, S], int64.
        attention_mask: [B, S], int64; 0 at padding.
        loss_mask: [B, S], bool; True where the token carries loss.
    """

    input_ids: Tensor
    attention_mask: Tensor
    loss_mask: Tensor


def pad_batch(samples: Sequence[Sample], *, device: torch.device | str = "cpu") -> Batch:
    """Pad samples to the longest. Padding uses token 0: attention and loss masks hide it."""
    length = max(len(sample.input_ids) for sample in samples)
    input_ids = torch.zeros(len(samples), length, dtype=torch.int64)
    attention_mask = torch.zeros(len(samples), length, dtype=torch.int64)
    loss_mask = torch.zeros(len(samples), length, dtype=torch.bool)
    for row, sample in enumerate(samples):
        size = len(sample.input_ids)
        input_ids[row, :size] = torch.tensor(sample.input_ids)
        attention_mask[row, :size] = 1
        loss_mask[row, :size] = torch.tensor(sample.loss_mask)
    return Batch(input_ids.to(device), attention_mask.to(device), loss_mask.to(device))


def sample_values(module: nn.Module, batch: Batch, reduction: Reduction) -> Tensor:
    """Return each sample's token-mean cross-entropy or summed log-probability: [B], nats.

    Logits are asked for at the positions that some row needs, and only there. Every row needs a labelled token.
    """
    keep = batch.loss_mask[:, 1:].any(0).nonzero()[:, 0]
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    if "logits_to_keep" in inspect.signature(_innermost(module).forward).parameters:
        logits_BKV = module(**inputs, logits_to_keep=keep).logits
    else:
        logits_BKV = module(**inputs).logits[:, keep]
    logps_BK = selected_token_logps(logits_BKV, batch.input_ids[:, keep + 1])
    mask_BK = batch.loss_mask[:, keep + 1]
    sums_B = logps_BK.masked_fill(~mask_BK, 0.0).sum(1)
    return sums_B if reduction == "sum_logps" else -sums_B / mask_BK.sum(1)


class ScoringModel:
    """A PEFT model with one adapter slot, ready to give per-sample gradients.

    Every parameter is frozen: autograd carries activation gradients only, and taps on the adapter's layers form the
    weight gradients per sample.

    Args:
        module: What is called: the PEFT model, as whoever holds it wants it called.
        device: Where batches go.
        checkpointed: Activations are recomputed; Hugging Face does so in training mode only.
    """

    def __init__(self, module: nn.Module, device: torch.device | str, *, checkpointed: bool = False) -> None:
        self.module = module
        self.device = torch.device(device)
        self.layers = adapter_layers(module)
        module.requires_grad_(False)
        module.train(checkpointed)
        if checkpointed:
            _remove_dropout(module)
        embedding = module.get_input_embeddings()  # type: ignore[operator]
        embedding.register_forward_hook(_require_grad)

    def load_adapter(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy an adapter's weights into the slot, by parameter name."""
        for name, parameter in adapter_parameters(self.module).items():
            parameter.data.copy_(tensors[name])

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """The untouched base model: the reference of DPO."""
        try:
            with self.module.disable_adapter():  # type: ignore[operator]
                yield
        finally:
            self.module.requires_grad_(False)  # PEFT makes an adapter trainable when it comes back

    def sample_values(self, batch: Batch, reduction: Reduction) -> Tensor:
        """Return each sample's value: see ``sample_values``."""
        return sample_values(self.module, batch, reduction)

    def backward_per_sample(
        self,
        batch: Batch,
        reduction: Reduction,
        consume: GradientConsumer,
        before_backward: Callable[[Tensor], None] = lambda values_B: None,
    ) -> Tensor:
        """Run one forward and one backward pass.

        Args:
            batch: What goes through.
            reduction: The value whose gradient is taken, per sample.
            consume: Gets each adapter parameter's name and gradients [B, O, I] while backward runs.
            before_backward: Gets the values [B] in between.

        Returns:
            The values [B], detached.
        """
        with tapped(self.layers, consume):
            values_B = self.sample_values(batch, reduction)
            before_backward(values_B.detach())
            values_B.sum().backward()
        return values_B.detach()


def _require_grad(_module: nn.Module, _inputs: object, output: Tensor) -> None:
    # With every weight frozen, this is where the graph begins.
    if torch.is_grad_enabled():
        output.requires_grad_(True)


def _innermost(module: Any) -> nn.Module:
    while hasattr(module, "module"):  # DeepSpeed's engine around the model
        module = module.module
    base: nn.Module = module.get_base_model() if hasattr(module, "get_base_model") else module
    return base


def _remove_dropout(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        if hasattr(part, "attention_dropout"):
            setattr(part, "attention_dropout", 0.0)  # noqa: B010 - a plain attribute that nn.Module does not declare
