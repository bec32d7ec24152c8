"""Batches as Hugging Face collators make them: checked, and turned into ours.

Shapes: B batch, S tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rose_ray.data.tokenize import Sample
from rose_ray.errors import DataError, ShapeError
from rose_ray.model.batch import Batch

UNLABELLED = -100
"""The label of a token without loss, in transformers."""

_KEYS = ("input_ids", "attention_mask", "labels")


def collated_batch(tensors: Mapping[str, Tensor], device: torch.device | str, what: str = "batch") -> Batch:
    """Turn a collated batch into ours.

    Args:
        tensors: ``input_ids``, ``attention_mask`` (0 at padding, which is on the right) and ``labels`` (the token
            itself, or -100 where it carries no loss), each [B, S] of integers. Nothing else.
        device: Where the result goes.
        what: Name of the batch, for messages.

    Raises:
        DataError: Keys are missing or unknown; rows are padded on the left, have no labelled token behind their first,
            or carry labels at padding or other than their tokens. The message has the row numbers.
        ShapeError: The tensors are not [B, S] of one B and S, both at least 1.
    """
    _check_shapes(tensors, what)
    input_ids, attention_mask, labels = (tensors[name].to(device).long() for name in _KEYS)
    loss_mask = labels != UNLABELLED
    filled = attention_mask != 0
    gaps_B = ~filled[:, 0] | (filled[:, 1:] & ~filled[:, :-1]).any(1)
    _refuse(gaps_B, what, "are padded on the left or inside", "padding on the right: tokenizer.padding_side = 'right'")
    _refuse((loss_mask & ~filled).any(1), what, "have labels at padding", f"{UNLABELLED} there")
    others_B = (loss_mask & (labels != input_ids)).any(1)
    _refuse(others_B, what, "have labels other than their tokens", f"each label its own token, or {UNLABELLED}")
    _refuse(~loss_mask[:, 1:].any(1), what, "have no labelled token behind their first", "at least one a row")
    return Batch(input_ids, filled.long(), loss_mask)


def collated_samples(batch: Batch) -> list[Sample]:
    """Return the rows of a padded batch, padding taken off."""
    sizes = batch.attention_mask.sum(1).tolist()
    rows = zip(batch.input_ids.tolist(), batch.loss_mask.tolist(), sizes, strict=True)
    return [Sample(ids[:size], mask[:size]) for ids, mask, size in rows]


def _check_shapes(tensors: Mapping[str, Any], what: str) -> None:
    if set(tensors) != set(_KEYS):
        raise DataError(f"{what} has {sorted(tensors)}; expected {sorted(_KEYS)} and nothing else")
    kinds = {name: type(tensors[name]).__name__ for name in _KEYS if not isinstance(tensors[name], Tensor)}
    kinds |= {name: str(tensors[name].dtype) for name in set(_KEYS) - set(kinds) if tensors[name].is_floating_point()}
    if kinds:
        raise DataError(f"{what} has {kinds}; expected tensors of integers: return_tensors='pt'")
    shapes = {name: tuple(tensors[name].shape) for name in _KEYS}
    first = shapes["input_ids"]
    if len(set(shapes.values())) > 1 or len(first) != 2 or 0 in first:
        raise ShapeError(f"{what} has shapes {shapes}; expected [B, S] of one B and S, both at least 1")


def _refuse(bad_B: Tensor, what: str, found: str, expected: str) -> None:
    rows = bad_B.nonzero().flatten().tolist()
    if rows:
        raise DataError(f"{what}: {len(rows)} of {len(bad_B)} rows {found}: rows {rows[:10]}. Expected {expected}.")
