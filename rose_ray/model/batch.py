"""Samples side by side as tensors: padded, or packed end to end.

Shapes: B batch, S tokens, T labelled positions of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from rose_ray.data.tokenize import Sample
from rose_ray.kernels.per_sample import PackedRows


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
        targets_T = self.input_ids.flatten()[flat_T + 1]
        return Labels(flat_T, targets_T, rows_T, slots_T, counts_B, int(counts_B.max()))

    @cached_property
    def packed_rows(self) -> PackedRows | None:
        """Where the samples lie, where they are packed."""
        if self.lengths is None:
            return None
        lengths_B = torch.tensor(self.lengths)
        rows_T = torch.repeat_interleave(lengths_B)
        slots_T = torch.arange(len(rows_T)) - (lengths_B.cumsum(0) - lengths_B)[rows_T]
        device = self.input_ids.device
        return PackedRows.of(rows_T.to(device), slots_T.to(device), len(self.lengths), max(self.lengths))

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
        most: The largest of them.
    """

    flat_T: Tensor
    targets_T: Tensor
    rows_T: Tensor
    slots_T: Tensor
    counts_B: Tensor
    most: int

    @cached_property
    def packed_rows(self) -> PackedRows:
        """Where the samples lie when nothing else is left of the batch."""
        return PackedRows.of(self.rows_T, self.slots_T, len(self.counts_B), self.most)


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
