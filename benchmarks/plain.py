"""The price of training: a plain LoRA step, without the optimizer's own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from rose_ray.model.batch import Batch
from rose_ray.model.values import sample_values


def full_logits_step(model: nn.Module, batches: Sequence[Batch]) -> None:
    """Forward with the logits of every position as transformers makes them, summed loss, backward into the adapter."""
    for batch in batches:
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        labels = batch.input_ids.masked_fill(~batch.loss_mask, -100)
        loss = cross_entropy(
            logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
        )
        loss.backward()
        model.zero_grad(set_to_none=True)


def label_only_step(model: nn.Module, batches: Sequence[Batch]) -> None:
    """The same with this project's head: cross-entropy at labelled positions only, in blocks."""
    for batch in batches:
        torch.neg(sample_values(model, batch, "sum_logps")).sum().backward()
        model.zero_grad(set_to_none=True)
