"""What a model says of samples: their loss, or the log-probability of their labelled tokens.

Shapes: B batch, S tokens, T labelled positions of the batch, K most labelled positions of a row, V vocabulary.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from rose_ray.kernels.head import head_logps
from rose_ray.kernels.logit_shape import PROBE_N, UNALTERED, LogitShape, shape_of
from rose_ray.kernels.losses import selected_token_logps
from rose_ray.model.batch import Batch
from rose_ray.model.core import core_model

logger = logging.getLogger(__name__)

Reduction = Literal["mean_loss", "sum_logps"]
"""Token-mean cross-entropy, or summed log-probability, of a sample's labelled tokens."""


def sample_values(module: nn.Module, batch: Batch, reduction: Reduction) -> Tensor:
    """Return each sample's token-mean cross-entropy or summed log-probability: [B], nats.

    Logits are made at labelled positions only, and where the model's head is a plain linear layer a block of them at a
    time; a scale or a soft cap behind the head is part of that.
    """
    labels = batch.labels
    logps_T = _labelled_logps(module, batch)
    # Laid out as rows and summed: a scattered sum has no fixed order on a GPU.
    padded_BK = logps_T.new_zeros(batch.num_samples, labels.most)
    sums_B = padded_BK.index_put((labels.rows_T, labels.slots_T), logps_T).sum(1)
    return sums_B if reduction == "sum_logps" else -sums_B / labels.counts_B


def _labelled_logps(module: nn.Module, batch: Batch) -> Tensor:
    innermost = core_model(module)
    head = innermost.get_output_embeddings() if hasattr(innermost, "get_output_embeddings") else None  # type: ignore[operator]
    if type(head) is not nn.Linear:
        return _logps_of_logits(module, innermost, batch)
    if not hasattr(innermost, _LOGIT_SHAPE):
        random_state = _random_state(batch.input_ids.device)
        logps_T, untouched = _shaped_logps(module, head, batch, UNALTERED)
        if untouched:
            setattr(innermost, _LOGIT_SHAPE, UNALTERED)
            return logps_T
        _set_random_state(random_state, batch.input_ids.device)  # dropout goes on as if that pass had not been
        setattr(innermost, _LOGIT_SHAPE, _probed_shape(module, head, batch))
        _set_random_state(random_state, batch.input_ids.device)
    shape: LogitShape | None = getattr(innermost, _LOGIT_SHAPE)
    return _logps_of_logits(module, innermost, batch) if shape is None else _shaped_logps(module, head, batch, shape)[0]


def _shaped_logps(module: nn.Module, head: nn.Linear, batch: Batch, shape: LogitShape) -> tuple[Tensor, bool]:
    """Log-probabilities [T], and whether the model hands on what its head returns."""
    labels = batch.labels

    def logps(hidden_BSH: Tensor) -> Tensor:
        hidden_TH = hidden_BSH.flatten(0, 1).index_select(0, labels.flat_T)
        return head_logps(hidden_TH, head.weight, head.bias, labels.targets_T, shape)

    with _head_makes(head, logps) as made:
        found = module(**batch.model_inputs).logits
    kept, passed = made[0]
    # Same memory, not written to since: nothing was done to it (DeepSpeed's hooks return views).
    untouched = found.data_ptr() == passed.data_ptr() and passed._version == 0
    return (found if untouched else kept).flatten(), untouched


def forget_logit_shape(module: nn.Module) -> None:
    """Take back what was noted at the model about its logits."""
    vars(core_model(module)).pop(_LOGIT_SHAPE, None)


_LOGIT_SHAPE = "rose_ray_logit_shape"


@torch.no_grad()
def _probed_shape(module: nn.Module, head: nn.Linear, batch: Batch) -> LogitShape | None:
    """What the model does to its logits, by what it makes of numbers given in their place."""
    probe_N = PROBE_N.to(batch.input_ids.device)
    with _head_makes(head, lambda hidden_BSH: probe_N):
        shape = shape_of(module(**batch.model_inputs).logits.flatten())
    if shape is None:
        name = type(core_model(module)).__name__
        logger.info(f"{name} alters its logits in a way of its own: they are made whole at the labelled positions")
    return shape


@contextmanager
def _head_makes(head: nn.Linear, make: Callable[[Tensor], Tensor]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Let the head return numbers [1, T, 1] made of its input instead of logits.

    Inside the head's own forward, since there DeepSpeed has gathered its weight. Yields a list that gets them, as they
    came out of the head's hooks, on which DeepSpeed's backward pass relies, and the copy that the model is given to do
    to it as it likes.
    """
    made: list[tuple[Tensor, Tensor]] = []

    def forward(hidden_BSH: Tensor) -> Tensor:
        return make(hidden_BSH)[None, :, None]

    def keep(_head: nn.Module, _inputs: object, output_1T1: Tensor) -> Tensor:
        made.append((output_1T1, output_1T1.clone()))
        return made[-1][1]

    head.forward = forward  # type: ignore[method-assign, assignment]
    hook = head.register_forward_hook(keep)
    try:
        yield made
    finally:
        hook.remove()
        del head.forward


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)


def _logps_of_logits(module: nn.Module, innermost: nn.Module, batch: Batch) -> Tensor:
    """Log-probabilities [T] by the model's own logits, asked for at the columns that some row needs."""
    labels = batch.labels
    size = batch.input_ids.shape[1]
    keep, column_T = (labels.flat_T % size).unique(return_inverse=True)
    if "logits_to_keep" in inspect.signature(innermost.forward).parameters:
        logits_BKV = module(**batch.model_inputs, logits_to_keep=keep).logits
    else:
        logits_BKV = module(**batch.model_inputs).logits[:, keep]
    logps_BK = selected_token_logps(logits_BKV, batch.input_ids[:, keep + 1])
    return logps_BK[labels.flat_T // size, column_T]
