"""The exact space of a target: an orthonormal basis of the span of its pairs' gradients, per checkpoint.

Coordinates in the basis keep every inner product with a vector of the span: with ``Q`` the basis, ``<x, g> =
<Q x, Q g>`` for any direction x and any g in the span. So a feature made with Q, and a bank made with Q, give the exact
influence by the same arithmetic as projected ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rose_ray.config.target import TargetConfig
from rose_ray.kernels.aggregation import subtask_order
from rose_ray.kernels.objectives import bank_directions
from rose_ray.kernels.projection import NoProjection
from rose_ray.kernels.span import orthonormal_basis
from rose_ray.model.checkpoint import Checkpoint
from rose_ray.model.layout import ParameterLayout
from rose_ray.model.scoring import ScoringModel
from rose_ray.stages.bank import EncodedPair, pair_gradients

BASIS_VERSION = 1
"""Raised whenever the same input would give another basis."""


@dataclass(frozen=True)
class BasisSettings:
    """How pairs become a basis.

    Attributes:
        per_subtask: One direction a subtask, under the target's objective, instead of both sides of every pair.
        max_batch_tokens: Bound on rows times longest row.
        half_precision_beta: As in `pair_gradients`.
    """

    per_subtask: bool
    max_batch_tokens: int
    half_precision_beta: float | None = None


def pair_basis(
    model: ScoringModel,
    pairs: Sequence[EncodedPair],
    checkpoint: Checkpoint,
    layout: ParameterLayout,
    target: TargetConfig,
    reference_V2: Tensor,
    settings: BasisSettings,
) -> Tensor:
    """Return a target's basis [J, P] at one checkpoint, float32, on the CPU.

    Memory: the gradients of all pairs, or of one subtask's pairs (twice, once in float64), and the basis.

    Args:
        model: Base model with an adapter slot.
        pairs: Encoded pairs, those of a subtask in any places.
        checkpoint: Policy.
        layout: Of the adapter.
        target: Its objective, normalisation and beta matter where ``per_subtask``.
        reference_V2: From `reference_logps`.
        settings: What spans the basis.

    Raises:
        NonFiniteError: A gradient is NaN or infinite; the pairs are listed.
        NumericsError: A direction is zero.
    """

    def gradients(places: Sequence[int]) -> Tensor:
        rows = pair_gradients(
            model,
            [pairs[place] for place in places],
            checkpoint,
            layout,
            NoProjection(layout.num_parameters),
            max_batch_tokens=settings.max_batch_tokens,
            reference_V2=reference_V2[list(places)],
            half_precision_beta=settings.half_precision_beta,
        )
        if not settings.per_subtask:
            return rows.projected_V2D.flatten(0, 1).cpu()
        found = bank_directions(
            target.objective,
            rows.numbers(),
            dpo_beta=target.dpo_beta,
            subtasks=[pairs[place].subtask for place in places],
            normalize=target.normalize,
        )
        return torch.from_numpy(found.vectors_UD.mean(0, keepdims=True)).float()

    if not settings.per_subtask:
        return orthonormal_basis(gradients(range(len(pairs))))
    subtasks = subtask_order([pair.subtask for pair in pairs])
    places = [[place for place, pair in enumerate(pairs) if pair.subtask == name] for name in subtasks]
    return orthonormal_basis(torch.cat([gradients(each) for each in places]))
