"""Pool rows to features: per-sample gradient, Adam direction, projection, at every checkpoint.

Section 4 of LESS (arXiv:2402.04333), as used by ROSE (arXiv:2412.00631).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from rose_ray.config.models import AdamMode
from rose_ray.data.batches import length_batches
from rose_ray.data.conversation import parse_conversation
from rose_ray.data.tokenize import Sample, Tokeniser
from rose_ray.errors import AccountingError, RowError
from rose_ray.kernels.adam import AdamState, adam_direction
from rose_ray.kernels.projection import Projection
from rose_ray.model.checkpoint import Checkpoint
from rose_ray.model.layout import ParameterLayout
from rose_ray.model.scoring import Batch, ScoringModel, pad_batch
from rose_ray.schemas import FEATURE_REJECTED, TOKENS, features_schema

FEATURES_VERSION = 1
"""Raised whenever the same input would give other numbers."""


@dataclass(frozen=True)
class DirectionSettings:
    """How a gradient becomes a stored feature.

    Attributes:
        adam: Which transform.
        stored_dtype: ``float16`` or ``float32``.
        max_batch_tokens: Bound on rows times longest row.
    """

    adam: AdamMode
    stored_dtype: str
    max_batch_tokens: int


@dataclass(frozen=True)
class ShardFeatures:
    """Features of one shard.

    Attributes:
        tables: One per checkpoint, schema ``features_schema``; the same rows in the same order in each.
        rejected: Rows that could not be scored, schema ``FEATURE_REJECTED``.
    """

    tables: list[pa.Table]
    rejected: pa.Table


def tokenize_shard(shard: pa.Table, tokeniser: Tokeniser) -> tuple[pa.Table, pa.Table]:
    """Tokenise the rows of a shard.

    Args:
        shard: Columns ``row_id`` and ``conversation`` of schema ``SHARD``.
        tokeniser: Of the base model.

    Returns:
        Samples (schema ``TOKENS``) and rows that make none (schema ``FEATURE_REJECTED``), both in the shard's order.
    """
    samples: list[dict[str, object]] = []
    rejected: list[dict[str, str]] = []
    for row_id, text in zip(shard["row_id"].to_pylist(), shard["conversation"].to_pylist(), strict=True):
        try:
            sample = tokeniser.encode(parse_conversation(text))
        except RowError as error:
            rejected.append({"row_id": row_id, "reason": error.reason, "detail": error.detail})
        else:
            samples.append({"row_id": row_id, **sample.__dict__})
    return pa.Table.from_pylist(samples, schema=TOKENS), pa.Table.from_pylist(rejected, schema=FEATURE_REJECTED)


def shard_features(
    model: ScoringModel,
    tokens: pa.Table,
    checkpoints: Sequence[Checkpoint],
    layout: ParameterLayout,
    projection: Projection,
    settings: DirectionSettings,
) -> ShardFeatures:
    """Compute a shard's features at every checkpoint.

    A row whose loss or direction is not finite, or whose direction is zero, at any checkpoint is rejected at all.

    Args:
        model: Base model with an adapter slot.
        tokens: Schema ``TOKENS``.
        checkpoints: In order of training; moments are needed by all Adam modes but ``sgd``.
        layout: Of the adapter.
        projection: From the flat direction [P] to [D].
        settings: Transform, stored type, batch bound.

    Raises:
        AccountingError: Rows got lost: a bug, never bad input.
    """
    samples = read_samples(tokens)
    row_ids = tokens["row_id"].to_pylist()
    lengths = [len(sample.input_ids) for sample in samples]
    batches = length_batches(lengths, settings.max_batch_tokens)
    parts: list[_CheckpointPart] = []
    for checkpoint in checkpoints:
        model.load_adapter(checkpoint.adapter)
        moments = _DeviceMoments(checkpoint, model.device, layout)
        part = _CheckpointPart.empty(len(samples), projection.dim)
        for indices in batches:
            batch = pad_batch([samples[i] for i in indices], device=model.device)
            part.fill(indices, _batch_directions(model, batch, moments, layout, projection, settings.adam))
        parts.append(part)
    reasons = _rejections(parts, checkpoints)
    kept = [i for i in range(len(samples)) if i not in reasons]
    if len(kept) + len(reasons) != tokens.num_rows:
        raise AccountingError(f"{tokens.num_rows} rows in, {len(kept)} scored and {len(reasons)} rejected.")
    rejected = [{"row_id": row_ids[i], "reason": r, "detail": d} for i, (r, d) in sorted(reasons.items())]
    return ShardFeatures(
        [part.table(kept, row_ids, samples, settings.stored_dtype) for part in parts],
        pa.Table.from_pylist(rejected, schema=FEATURE_REJECTED),
    )


def read_samples(tokens: pa.Table) -> list[Sample]:
    """Return the samples of a ``TOKENS`` table."""
    columns = (tokens[name].to_pylist() for name in ("input_ids", "loss_mask", "num_tokens_cut"))
    return [Sample(ids, mask, cut) for ids, mask, cut in zip(*columns, strict=True)]


class _DeviceMoments:
    """A checkpoint's moments where the gradients are, in the type of the adapter."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device, layout: ParameterLayout) -> None:
        self.exp_avg = self._moved(checkpoint.exp_avg, device)
        self.exp_avg_sq = self._moved(checkpoint.exp_avg_sq, device)
        state = checkpoint.state
        self.state = AdamState(
            num_updates=state.num_updates if state else 0,
            adam_beta1=state.adam_beta1 if state else 0.0,
            adam_beta2=state.adam_beta2 if state else 0.0,
            adam_eps=state.adam_eps if state else 1e-8,
        )

    @staticmethod
    def _moved(moments: dict[str, Tensor] | None, device: torch.device) -> dict[str, Tensor]:
        return {name: tensor.to(device) for name, tensor in (moments or {}).items()}


@dataclass
class _Directions:
    """What one batch gives: projections [B, D], exact lengths [B], momentum shares [B], losses [B]."""

    projected_BD: Tensor
    norms_B: Tensor
    momentum_shares_B: Tensor
    losses_B: Tensor


def _batch_directions(
    model: ScoringModel,
    batch: Batch,
    moments: _DeviceMoments,
    layout: ParameterLayout,
    projection: Projection,
    mode: AdamMode,
) -> _Directions:
    num_rows = batch.input_ids.shape[0]
    dtype = torch.float64 if next(model.module.parameters()).dtype == torch.float64 else torch.float32
    projected_BD = torch.zeros(num_rows, projection.dim, dtype=dtype, device=model.device)
    square_B = torch.zeros(num_rows, dtype=torch.float64, device=model.device)
    total_square_B = torch.zeros(num_rows, dtype=torch.float64, device=model.device)
    momentum_square = 0.0

    def consume(name: str, grads_BOI: Tensor) -> None:
        nonlocal momentum_square
        adam = adam_direction(grads_BOI, moments.exp_avg.get(name), moments.exp_avg_sq.get(name), moments.state, mode)
        direction_BP = adam.direction_B.flatten(1)
        square_B.add_(torch.linalg.vector_norm(direction_BP, dim=1).double().square())
        total_square_B.add_(adam.total_square_B)
        momentum_square += float(adam.momentum_square)
        projection.add(projected_BD, layout.offsets[name], direction_BP)

    losses_B = model.backward_per_sample(batch, "mean_loss", consume)
    shares_B = (momentum_square / total_square_B.clamp_min(torch.finfo(torch.float64).tiny)).sqrt()
    return _Directions(projected_BD, square_B.sqrt(), shares_B if momentum_square else shares_B * 0, losses_B)


@dataclass
class _CheckpointPart:
    """A shard's numbers at one checkpoint, in the shard's order."""

    projected_ND: np.ndarray
    norms_N: np.ndarray
    momentum_shares_N: np.ndarray
    losses_N: np.ndarray

    @classmethod
    def empty(cls, num_rows: int, dim: int) -> _CheckpointPart:
        nan = np.full(num_rows, np.nan)
        return cls(np.zeros((num_rows, dim), np.float32), nan, nan.copy(), nan.copy())

    def fill(self, indices: Sequence[int], directions: _Directions) -> None:
        # Divided before it is stored: a unit direction fits float16 whatever the gradient's size.
        norms_B1 = directions.norms_B[:, None]
        unit_BD = directions.projected_BD.double() / norms_B1
        self.projected_ND[indices] = unit_BD.float().cpu().numpy()
        self.norms_N[indices] = directions.norms_B.cpu().numpy()
        self.momentum_shares_N[indices] = directions.momentum_shares_B.cpu().numpy()
        self.losses_N[indices] = directions.losses_B.double().cpu().numpy()

    def table(self, kept: list[int], row_ids: list[str], samples: list[Sample], stored_dtype: str) -> pa.Table:
        feature = self.projected_ND[kept].astype(np.dtype(stored_dtype))
        dim = feature.shape[1]
        schema = features_schema(dim, pa.from_numpy_dtype(feature.dtype))
        columns = [
            pa.array([row_ids[i] for i in kept], pa.string()),
            pa.FixedSizeListArray.from_arrays(pa.array(feature.reshape(-1)), dim),
            pa.array(self.norms_N[kept]),
            pa.array(self.momentum_shares_N[kept].astype(np.float32)),
            pa.array(self.losses_N[kept].astype(np.float32)),
            pa.array([samples[i].num_labelled_tokens for i in kept], pa.int32()),
            pa.array([len(samples[i].input_ids) for i in kept], pa.int32()),
            pa.array([samples[i].num_tokens_cut for i in kept], pa.int32()),
        ]
        return pa.Table.from_arrays(columns, schema=schema)


def _rejections(parts: Sequence[_CheckpointPart], checkpoints: Sequence[Checkpoint]) -> dict[int, tuple[str, str]]:
    reasons: dict[int, tuple[str, str]] = {}
    for part, checkpoint in zip(parts, checkpoints, strict=True):
        for i in np.flatnonzero(~np.isfinite(part.losses_N)):
            reasons.setdefault(int(i), ("non_finite_loss", f"loss {part.losses_N[i]} at {checkpoint.name}"))
        for i in np.flatnonzero(~np.isfinite(part.norms_N)):
            reasons.setdefault(int(i), ("non_finite_gradient", f"length {part.norms_N[i]} at {checkpoint.name}"))
        for i in np.flatnonzero(part.norms_N == 0):
            reasons.setdefault(int(i), ("zero_direction", f"the direction is zero at {checkpoint.name}"))
        for i in np.flatnonzero(~np.isfinite(part.projected_ND).all(1)):
            reasons.setdefault(int(i), ("non_finite_feature", f"projected direction at {checkpoint.name}"))
    return reasons
