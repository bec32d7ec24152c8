"""Pool rows to features: per-sample gradient, Adam direction, projection, at every checkpoint.

Section 4 of LESS (arXiv:2402.04333), as used by ROSE (arXiv:2412.00631).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from torch import Tensor

from rose_ray.data.batches import DealtBatches
from rose_ray.data.tokenize import Sample
from rose_ray.errors import AccountingError
from rose_ray.kernels.projection import Projection
from rose_ray.kernels.quantization import StoredType, quantize
from rose_ray.model.checkpoint import Checkpoint
from rose_ray.model.layout import ParameterLayout
from rose_ray.model.scoring import ScoringModel
from rose_ray.schemas import FEATURE_REJECTED, features_schema
from rose_ray.stages.directions import BatchRunner, Directions, DirectionSettings
from rose_ray.stages.tokens import read_samples

FEATURES_VERSION = 2
"""Raised whenever the same input would give other numbers."""


FeatureSpace = Sequence[Projection]
"""What makes features of directions: one linear map per checkpoint."""


@dataclass(frozen=True)
class ShardFeatures:
    """Features of one shard.

    Attributes:
        tables: By space, then by checkpoint, schema ``features_schema``; the same rows in the same order in each.
        rejected: Rows that could not be scored, schema ``FEATURE_REJECTED``.
        num_positions: Positions that went through the model at one checkpoint, padding included.
        num_halvings: How often a batch had to be halved for memory.
        max_batch_tokens: The bound, as lowered by halvings.
    """

    tables: list[list[pa.Table]]
    rejected: pa.Table
    num_positions: int
    num_halvings: int
    max_batch_tokens: int


def shard_features(
    model: ScoringModel,
    tokens: pa.Table,
    checkpoints: Sequence[Checkpoint],
    layout: ParameterLayout,
    spaces: Sequence[FeatureSpace],
    settings: DirectionSettings,
) -> ShardFeatures:
    """Compute a shard's features at every checkpoint, for several feature spaces in one pass.

    A row whose loss or direction is not finite, whose direction is zero, or that does not fit into memory alone, at any
    checkpoint, is rejected at all.

    Args:
        model: Base model with an adapter slot.
        tokens: Schema ``TOKENS``.
        checkpoints: In order of training; moments are needed by all Adam modes but ``sgd``.
        layout: Of the adapter.
        spaces: From the flat direction [P] to features, each a map per checkpoint.
        settings: Transform, stored type, batches.

    Raises:
        AccountingError: A row got no numbers, or got them twice: a bug, never bad input.
    """
    parts = shard_parts(model, read_samples(tokens), checkpoints, layout, spaces, settings)
    return assemble(parts, tokens, [checkpoint.name for checkpoint in checkpoints], settings.stored_dtype)


def shard_parts(
    model: ScoringModel,
    samples: Sequence[Sample],
    checkpoints: Sequence[Checkpoint],
    layout: ParameterLayout,
    spaces: Sequence[FeatureSpace],
    settings: DirectionSettings,
    dealt: DealtBatches | None = None,
) -> ShardParts:
    """Compute the numbers of a shard's samples, or of a rank's part of them.

    Args:
        model, checkpoints, layout, spaces, settings: As in `shard_features`.
        samples: Of the shard, or of the rank.
        dealt: The rank's batches, by its samples, where several ranks share the model and stay in step.
    """
    runner = BatchRunner(model, layout, settings)
    # A call a checkpoint: what it moved to the device has left before the next one's is moved there.
    columns = [
        _checkpoint_parts(runner, samples, checkpoint, [space[number] for space in spaces], dealt)
        for number, checkpoint in enumerate(checkpoints)
    ]
    num_positions = runner.num_positions // max(1, len(checkpoints))
    return ShardParts(columns, runner.too_large, num_positions, runner.num_halvings, runner.max_batch_tokens)


def _checkpoint_parts(
    runner: BatchRunner,
    samples: Sequence[Sample],
    checkpoint: Checkpoint,
    projections: Sequence[Projection],
    dealt: DealtBatches | None,
) -> list[CheckpointPart]:
    moved = [projection.to(runner.device) for projection in projections]
    parts = [CheckpointPart.empty(len(samples), projection) for projection in moved]
    batches = (
        runner.run(samples, checkpoint, moved) if dealt is None else runner.run_dealt(samples, dealt, checkpoint, moved)
    )
    for indices, directions in batches:
        for part, features_BD in zip(parts, directions.features, strict=True):
            part.fill(indices, directions, features_BD)
    return parts


def assemble(
    parts: ShardParts, tokens: pa.Table, checkpoints: Sequence[str], stored_dtype: StoredType
) -> ShardFeatures:
    """Turn a shard's numbers into tables, unusable rows set aside.

    Args:
        parts: Of all rows of ``tokens``, in their order.
        tokens: Schema ``TOKENS``.
        checkpoints: Names, for reasons.
        stored_dtype: Of the features.

    Raises:
        AccountingError: A row got no numbers, or got them twice: a bug, never bad input.
    """
    samples, row_ids = read_samples(tokens), tokens["row_id"].to_pylist()
    _check_filled(parts, row_ids)
    reasons = _rejections(parts.columns, checkpoints, parts.too_large)
    kept = [i for i in range(len(samples)) if i not in reasons]
    rejected = [{"row_id": row_ids[i], "reason": r, "detail": d} for i, (r, d) in sorted(reasons.items())]
    return ShardFeatures(
        [
            [columns[space].table(kept, row_ids, samples, stored_dtype) for columns in parts.columns]
            for space in range(len(parts.columns[0]) if parts.columns else 0)
        ],
        pa.Table.from_pylist(rejected, schema=FEATURE_REJECTED),
        parts.num_positions,
        parts.num_halvings,
        parts.max_batch_tokens,
    )


@dataclass
class CheckpointPart:
    """A shard's numbers in one space at one checkpoint, in the shard's order. The last ``num_exact`` are exact.

    ``times_filled_N`` counts how often each row got its numbers: once, unless it did not fit into memory.
    """

    features_ND: np.ndarray
    num_exact: int
    norms_N: np.ndarray
    momentum_shares_N: np.ndarray
    losses_N: np.ndarray
    times_filled_N: np.ndarray

    @classmethod
    def empty(cls, num_rows: int, projection: Projection) -> CheckpointPart:
        """Room for so many rows, not a number yet."""
        nan = np.full(num_rows, np.nan)
        features_ND = np.zeros((num_rows, projection.dim), np.float32)
        return cls(features_ND, projection.num_exact, nan, nan.copy(), nan.copy(), np.zeros(num_rows, np.int64))

    @classmethod
    def joined(cls, parts: Sequence[CheckpointPart], places: Sequence[Sequence[int]], num_rows: int) -> CheckpointPart:
        """Put the numbers of several ranks together; ``places`` are those of each one's rows in the shard."""
        nan = np.full(num_rows, np.nan)
        features_ND = np.zeros((num_rows, parts[0].features_ND.shape[1]), np.float32)
        made = cls(features_ND, parts[0].num_exact, nan, nan.copy(), nan.copy(), np.zeros(num_rows, np.int64))
        for part, own in zip(parts, places, strict=True):
            rows = list(own)
            made.features_ND[rows] = part.features_ND
            made.norms_N[rows] = part.norms_N
            made.momentum_shares_N[rows] = part.momentum_shares_N
            made.losses_N[rows] = part.losses_N
            np.add.at(made.times_filled_N, rows, part.times_filled_N)
        return made

    def fill(self, indices: Sequence[int], directions: Directions, features_BD: Tensor) -> None:
        """Enter what a batch gave for the rows at these places."""
        # Divided before it is stored: a unit direction fits float16 whatever the gradient's size.
        unit_BD = features_BD.double() / directions.norms_B[:, None]
        self.features_ND[indices] = unit_BD.float().cpu().numpy()
        self.norms_N[indices] = directions.norms_B.cpu().numpy()
        self.momentum_shares_N[indices] = directions.momentum_shares_B.cpu().numpy()
        self.losses_N[indices] = directions.losses_B.double().cpu().numpy()
        np.add.at(self.times_filled_N, list(indices), 1)

    def table(self, kept: list[int], row_ids: list[str], samples: list[Sample], stored_dtype: StoredType) -> pa.Table:
        """Return the rows that are kept, schema ``features_schema``."""
        dim = self.features_ND.shape[1] - self.num_exact
        columns = [pa.array([row_ids[i] for i in kept], pa.string())]
        if dim:
            codes, scales_N = quantize(self.features_ND[kept, :dim], stored_dtype)
            columns.append(pa.FixedSizeListArray.from_arrays(pa.array(codes.reshape(-1)), codes.shape[1]))
            columns += [] if scales_N is None else [pa.array(scales_N)]
        if self.num_exact:
            exact = np.ascontiguousarray(self.features_ND[kept, dim:])
            columns.append(pa.FixedSizeListArray.from_arrays(pa.array(exact.reshape(-1)), self.num_exact))
        columns += [
            pa.array(self.norms_N[kept]),
            pa.array(self.momentum_shares_N[kept].astype(np.float32)),
            pa.array(self.losses_N[kept].astype(np.float32)),
            pa.array([samples[i].num_labelled_tokens for i in kept], pa.int32()),
            pa.array([len(samples[i].input_ids) for i in kept], pa.int32()),
            pa.array([samples[i].num_tokens_cut for i in kept], pa.int32()),
        ]
        return pa.Table.from_arrays(columns, schema=features_schema(dim, stored_dtype, self.num_exact))


@dataclass
class ShardParts:
    """What one pass over a shard's samples gives, before any row is set aside.

    Attributes:
        columns: By checkpoint, then by space.
        too_large: Samples that did not fit into memory alone, and the error.
        num_positions, num_halvings, max_batch_tokens: As in `ShardFeatures`.
    """

    columns: list[list[CheckpointPart]]
    too_large: dict[int, str]
    num_positions: int
    num_halvings: int
    max_batch_tokens: int

    @classmethod
    def joined(cls, ranks: Sequence[ShardParts], places: Sequence[Sequence[int]], num_rows: int) -> ShardParts:
        """Put the parts of several ranks together.

        Args:
            ranks: What each rank computed.
            places: Of each rank's samples in the shard.
            num_rows: Of the shard.
        """
        columns = [
            [
                CheckpointPart.joined([rank.columns[c][s] for rank in ranks], places, num_rows)
                for s in range(len(spaces))
            ]
            for c, spaces in enumerate(ranks[0].columns)
        ]
        positions = sum(rank.num_positions for rank in ranks)
        return cls(columns, {}, positions, 0, min(rank.max_batch_tokens for rank in ranks))


def _check_filled(parts: ShardParts, row_ids: Sequence[str]) -> None:
    for number, columns in enumerate(parts.columns):
        for part in columns:
            wrong = [int(i) for i in np.flatnonzero(part.times_filled_N != 1) if i not in parts.too_large]
            if wrong:
                times = part.times_filled_N[wrong[0]]
                raise AccountingError(
                    f"{len(wrong)} of {len(row_ids)} rows, such as {row_ids[wrong[0]]}, got their numbers at "
                    f"checkpoint {number + 1} of {len(parts.columns)} not once but {times} times."
                )


def _rejections(
    parts: Sequence[Sequence[CheckpointPart]], checkpoints: Sequence[str], too_large: Mapping[int, str]
) -> dict[int, tuple[str, str]]:
    reasons = {i: ("out_of_memory", detail) for i, detail in too_large.items()}
    for columns, checkpoint in zip(parts, checkpoints, strict=True):
        losses_N, norms_N = columns[0].losses_N, columns[0].norms_N
        for i in np.flatnonzero(~np.isfinite(losses_N)):
            reasons.setdefault(int(i), ("non_finite_loss", f"loss {losses_N[i]} at {checkpoint}"))
        for i in np.flatnonzero(~np.isfinite(norms_N)):
            reasons.setdefault(int(i), ("non_finite_gradient", f"length {norms_N[i]} at {checkpoint}"))
        for i in np.flatnonzero(norms_N == 0):
            reasons.setdefault(int(i), ("zero_direction", f"the direction is zero at {checkpoint}"))
        for part in columns:
            for i in np.flatnonzero(~np.isfinite(part.features_ND).all(1)):
                reasons.setdefault(int(i), ("non_finite_feature", f"projected direction at {checkpoint}"))
    return reasons
