"""Samples through the model without a backward pass: a few numbers each, and why others have none.

Shapes: N samples, U numbers of a sample.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rose_ray.data.tokenize import Sample
from rose_ray.kernels.pooling import Pooling, unit_rows
from rose_ray.model.batch import Batch
from rose_ray.model.hidden import pooled_states
from rose_ray.model.scoring import ScoringModel
from rose_ray.model.values import Reduction
from rose_ray.stages.halving import HalvingRunner

Rejections = dict[int, tuple[str, str]]
"""Place of a row, a short stable reason, and what was found."""


@dataclass(frozen=True)
class RowValues:
    """What a method makes of rows.

    Attributes:
        values_NU: float64; NaN in rows that are rejected.
        rejected: The rows that have no value.
    """

    values_NU: NDArray[np.float64]
    rejected: Rejections = field(default_factory=dict)


def forward_values(
    model: ScoringModel, samples: Sequence[Sample], compute: Callable[[Batch], Tensor], *, max_batch_tokens: int
) -> RowValues:
    """Run samples through the model as it stands, as `model_values`."""
    return model_values(samples, compute, model.device, max_batch_tokens=max_batch_tokens)


def model_values(
    samples: Sequence[Sample], compute: Callable[[Batch], Tensor], device: torch.device, *, max_batch_tokens: int
) -> RowValues:
    """Run samples through a model in batches of like length.

    A batch's make-up changes a value by rounding alone: matrix products of another shape add up in another order.

    Args:
        samples: In any order; results come in it.
        compute: Gives the numbers [B] or [B, U] of a batch, under ``torch.no_grad``.
        device: Of the model.
        max_batch_tokens: Bound on rows times longest row. A batch that does not fit into memory is halved; a sample
            that does not fit alone is rejected as ``out_of_memory``.

    Returns:
        Values in the samples' order. What is not finite stays as it is: the caller knows what to call it.
    """
    runner = HalvingRunner(device, max_batch_tokens)
    values_NU: NDArray[np.float64] | None = None
    with torch.no_grad():
        for indices, found in runner.batches(samples, compute):
            found_BU = found.double().reshape(len(indices), -1).cpu().numpy()
            if values_NU is None:
                values_NU = np.full((len(samples), found_BU.shape[1]), np.nan)
            values_NU[indices] = found_BU
    rejected = {place: ("out_of_memory", detail) for place, detail in runner.too_large.items()}
    return RowValues(np.full((len(samples), 1), np.nan) if values_NU is None else values_NU, rejected)


def sample_logps(
    model: ScoringModel, samples: Sequence[Sample], reduction: Reduction, *, max_batch_tokens: int
) -> RowValues:
    """Return each sample's token-mean cross-entropy or summed log-probability [N, 1], nats.

    Rows whose value is not finite are rejected as ``non_finite_loss``.
    """
    found = forward_values(
        model, samples, lambda batch: model.sample_values(batch, reduction), max_batch_tokens=max_batch_tokens
    )
    return reject_where(found, _not_finite(found), "non_finite_loss", "{value} under the model")


def unit_embeddings(
    model: ScoringModel, samples: Sequence[Sample], pooling: Pooling, *, max_batch_tokens: int
) -> RowValues:
    """Return each sample's pooled hidden states over their length, [N, H].

    Rows are rejected as ``non_finite_embedding`` or ``zero_embedding``.
    """
    found = forward_values(
        model,
        samples,
        lambda batch: unit_rows(pooled_states(model, batch, pooling)),
        max_batch_tokens=max_batch_tokens,
    )
    found = reject_where(found, _not_finite(found), "non_finite_embedding", "hidden states hold NaN or infinity")
    zero_N = (found.values_NU == 0).all(axis=1)
    return reject_where(found, zero_N, "zero_embedding", "all hidden states are zero")


def reject_where(found: RowValues, bad_N: NDArray[Any], reason: str, detail: str) -> RowValues:
    """Set rows aside for one more reason; those that are rejected already keep theirs.

    Args:
        found: Values so far.
        bad_N: Which rows, bool.
        reason: Short stable identifier.
        detail: What was found; ``{value}`` stands for the row's first number.
    """
    places = [int(place) for place in np.flatnonzero(bad_N) if int(place) not in found.rejected]
    if not places:
        return found
    added = {place: (reason, detail.format(value=f"{found.values_NU[place, 0]:.6g}")) for place in places}
    values_NU = found.values_NU.copy()
    values_NU[places] = np.nan
    return RowValues(values_NU, {**found.rejected, **added})


def joined_rejections(*parts: Mapping[int, tuple[str, str]]) -> Rejections:
    """The first reason of every row that some part rejects."""
    joined: Rejections = {}
    for part in parts:
        for place, reason in part.items():
            joined.setdefault(place, reason)
    return joined


def _not_finite(found: RowValues) -> NDArray[Any]:
    finite_N: NDArray[Any] = np.asarray(np.isfinite(found.values_NU).all(axis=1))
    return ~finite_N
