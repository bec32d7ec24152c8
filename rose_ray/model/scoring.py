"""One forward and one backward pass over a batch, per sample: what features and bank are both made of.

Shapes: B batch, S tokens, T labelled positions of the batch, K most labelled positions of a row, V vocabulary.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rose_ray.data.tokenize import Sample
from rose_ray.kernels.head import head_logps
from rose_ray.kernels.losses import selected_token_logps
from rose_ray.kernels.per_sample import GradientConsumer
from rose_ray.model.layout import adapter_parameters
from rose_ray.model.taps import Taps

logger = logging.getLogger(__name__)

Reduction = Literal["mean_loss", "sum_logps"]
"""Token-mean cross-entropy, or summed log-probability, of a sample's labelled tokens."""


@dataclass(frozen=True)
class Batch:
    """Samples padded on the right, or packed end to end in one row.

    Attributes:
        input_ids: [B, S], int64; [1, S] where packed.
        attention_mask: Same shape, int64; 0 at padding.
        loss_mask: Same shape, bool; True where the token carries loss.
        lengths: Tokens of each sample where packed, else None.
    """

    input_ids: Tensor
    attention_mask: Tensor
    loss_mask: Tensor
    lengths: tuple[int, ...] | None = None

    @property
    def num_samples(self) -> int:
        """B."""
        return len(self.lengths) if self.lengths is not None else len(self.input_ids)

    @cached_property
    def labels(self) -> Labels:
        """Where the labelled tokens are. Every sample needs one behind its first token, which nothing predicts."""
        rows_T, places_T = self.loss_mask[:, 1:].nonzero(as_tuple=True)
        if self.lengths is not None:
            ends = torch.tensor(list(accumulate(self.lengths)), device=places_T.device)
            rows_T = torch.searchsorted(ends, places_T + 1, right=True)
        counts_B = torch.bincount(rows_T, minlength=self.num_samples)
        starts_B = counts_B.cumsum(0) - counts_B
        slots_T = torch.arange(len(rows_T), device=rows_T.device) - starts_B[rows_T]
        size = self.input_ids.shape[1]
        flat_T = places_T if self.lengths is not None else rows_T * size + places_T
        return Labels(flat_T, self.input_ids.flatten()[flat_T + 1], rows_T, slots_T, counts_B)

    @property
    def model_inputs(self) -> dict[str, Tensor]:
        """What the model is called with.

        No mask for padding: it stands on the right, where causal attention never looks from a real token, and without
        a mask the kernels skip the upper half. Positions that start again tell where packed samples begin.
        """
        if self.lengths is None:
            return {"input_ids": self.input_ids}
        positions = torch.cat([torch.arange(length) for length in self.lengths]).to(self.input_ids.device)
        return {"input_ids": self.input_ids, "position_ids": positions[None]}


@dataclass(frozen=True)
class Labels:
    """The labelled tokens of a batch, sample after sample.

    Attributes:
        flat_T: Place of the position that predicts each, in the flattened batch.
        targets_T: The tokens.
        rows_T, slots_T: Sample, and number within the sample.
        counts_B: How many each sample has.
    """

    flat_T: Tensor
    targets_T: Tensor
    rows_T: Tensor
    slots_T: Tensor
    counts_B: Tensor


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


def pack_batch(samples: Sequence[Sample], *, device: torch.device | str = "cpu") -> Batch:
    """Lay samples end to end in one row, for attention kernels that keep them apart."""
    input_ids = torch.tensor([token for sample in samples for token in sample.input_ids])[None]
    masks = [[False, *sample.loss_mask[1:]] for sample in samples]
    loss_mask = torch.tensor([label for mask in masks for label in mask])[None]
    lengths = tuple(len(sample.input_ids) for sample in samples)
    return Batch(input_ids.to(device), torch.ones_like(input_ids).to(device), loss_mask.to(device), lengths)


def sample_values(module: nn.Module, batch: Batch, reduction: Reduction) -> Tensor:
    """Return each sample's token-mean cross-entropy or summed log-probability: [B], nats.

    Logits are made at labelled positions only, and where the model's head is a plain linear layer a block of them at a
    time.
    """
    labels = batch.labels
    logps_T = _labelled_logps(module, batch)
    # Laid out as rows and summed: a scattered sum has no fixed order on a GPU.
    padded_BK = logps_T.new_zeros(batch.num_samples, int(labels.slots_T.max()) + 1)
    sums_B = padded_BK.index_put((labels.rows_T, labels.slots_T), logps_T).sum(1)
    return sums_B if reduction == "sum_logps" else -sums_B / labels.counts_B


def _labelled_logps(module: nn.Module, batch: Batch) -> Tensor:
    innermost = core_model(module)
    head = innermost.get_output_embeddings() if hasattr(innermost, "get_output_embeddings") else None  # type: ignore[operator]
    if type(head) is nn.Linear and not getattr(innermost, _ALTERS_LOGITS, False):
        with _fused_head(head, batch.labels) as made:
            found = module(**batch.model_inputs).logits
        # Same memory: nothing was done to them since (DeepSpeed's hooks return views).
        if found.data_ptr() == made[0].data_ptr():
            logps_T: Tensor = found.flatten()
            return logps_T
        setattr(innermost, _ALTERS_LOGITS, True)
        logger.info(f"{type(innermost).__name__} alters its logits: they are made whole at the labelled positions")
    return _logps_of_logits(module, innermost, batch)


_ALTERS_LOGITS = "rose_ray_alters_logits"


@contextmanager
def _fused_head(head: nn.Linear, labels: Labels) -> Iterator[list[Tensor]]:
    """Let the head return log-probabilities [1, T, 1] of the labelled tokens instead of logits.

    Inside the head's own forward, since there DeepSpeed has gathered its weight.
    """
    made: list[Tensor] = []

    def forward(hidden_BSH: Tensor) -> Tensor:
        hidden_TH = hidden_BSH.flatten(0, 1).index_select(0, labels.flat_T)
        made.append(head_logps(hidden_TH, head.weight, head.bias, labels.targets_T)[None, :, None])
        return made[0]

    head.forward = forward  # type: ignore[method-assign, assignment]
    try:
        yield made
    finally:
        del head.forward


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


class ScoringModel:
    """A PEFT model with one adapter slot, ready to give per-sample gradients.

    Every parameter is frozen: autograd carries activation gradients only, no further down than the lowest adapter, and
    taps on the adapter's layers form the weight gradients per sample.

    Args:
        module: What is called: the PEFT model, as whoever holds it wants it called.
        device: Where batches go.
        checkpointed: Activations are recomputed; Hugging Face does so in training mode only.
    """

    def __init__(self, module: nn.Module, device: torch.device | str, *, checkpointed: bool = False) -> None:
        self.module = module
        self.device = torch.device(device)
        self.weights = self._slot()
        self.taps = Taps(module, self.weights)
        self._trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self._training = [(part, part.training) for part in module.modules()]
        module.requires_grad_(False)
        module.train(checkpointed)
        if checkpointed:
            _remove_dropout(module)

    def close(self) -> None:
        """Give the module back as it came: what was trainable, in training mode, its layers' own forward passes.

        Once, after which this is of no use. Dropout that ``checkpointed`` took out stays out.
        """
        self.taps.remove()
        for parameter in self._trainable:
            parameter.requires_grad_(True)
        for part, training in self._training:
            part.training = training
        vars(core_model(self.module)).pop(_ALTERS_LOGITS, None)

    def load_adapter(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy an adapter's weights into the slot, by parameter name."""
        for name, weight in self.weights.items():
            weight.copy_(tensors[name])

    def _slot(self) -> dict[str, Tensor]:
        """The adapter's weights by layout name; here those of the model itself."""
        return dict(adapter_parameters(self.module))  # not their data, which others may set anew

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
        with self.taps.sending_to(consume, batch.lengths):
            values_B = self.sample_values(batch, reduction)
            before_backward(values_B.detach())
            values_B.sum().backward()
        return values_B.detach()


def core_model(module: Any) -> nn.Module:
    """Return the model that PEFT and DeepSpeed were put around."""
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
