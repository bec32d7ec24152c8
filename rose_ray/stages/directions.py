"""Batches to directions: one forward and one backward pass, Adam and every projection on the way.

Shapes: B batch, O and I sides of a parameter matrix, P parameters, D numbers of a feature.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rose_ray.config.gradients import AdamMode
from rose_ray.data.batches import DealtBatches
from rose_ray.data.tokenize import Sample
from rose_ray.errors import ResourceError
from rose_ray.failpoints import die_at
from rose_ray.kernels.adam import AdamState
from rose_ray.kernels.direction_sums import DirectionSums, KernelKind
from rose_ray.kernels.projection import Projection
from rose_ray.kernels.quantization import StoredType
from rose_ray.model.batch import Batch
from rose_ray.model.checkpoint import Checkpoint
from rose_ray.model.layout import ParameterLayout
from rose_ray.model.scoring import ScoringModel
from rose_ray.stages.halving import HalvingRunner


@dataclass(frozen=True)
class DirectionSettings:
    """How a gradient becomes a stored feature.

    Attributes:
        adam: Which transform.
        stored_dtype: ``float32``, ``float16``, ``int8`` or ``bit1``.
        max_batch_tokens: Bound on rows times longest row.
        packing: Rows end to end instead of padded.
        kernel: ``torch``, or ``triton`` for one fused pass over the gradients.
    """

    adam: AdamMode
    stored_dtype: StoredType
    max_batch_tokens: int
    packing: bool = False
    kernel: KernelKind = "torch"


@dataclass
class Directions:
    """What one batch gives.

    Attributes:
        features: Per projection [B, D], float32 or float64, not yet divided by length.
        norms_B: Exact lengths, float64.
        momentum_shares_B: Length of the common moment term over that of the first moment, float64.
        losses_B: Token-mean cross-entropy, nats.
    """

    features: list[Tensor]
    norms_B: Tensor
    momentum_shares_B: Tensor
    losses_B: Tensor


@dataclass(frozen=True)
class AdamMoments:
    """What an optimizer knew, by parameter name.

    Attributes:
        exp_avg, exp_avg_sq: First and second moments, shaped like the parameters. Either may be empty where the Adam
            mode does without it.
        state: Its other numbers.
    """

    exp_avg: Mapping[str, Tensor]
    exp_avg_sq: Mapping[str, Tensor]
    state: AdamState

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> AdamMoments:
        """Return a checkpoint's, empty for an adapter that came without an optimizer."""
        state = checkpoint.state
        if state is None:
            return NO_MOMENTS
        numbers = AdamState(state.num_updates, state.adam_beta1, state.adam_beta2, state.adam_eps)
        return cls(checkpoint.exp_avg or {}, checkpoint.exp_avg_sq or {}, numbers)

    def to(self, device: torch.device | str) -> AdamMoments:
        """Return the same with the moments on a device."""
        first, second = (
            {name: tensor.to(device) for name, tensor in tensors.items()} for tensors in (self.exp_avg, self.exp_avg_sq)
        )
        return AdamMoments(first, second, self.state)


NO_MOMENTS = AdamMoments({}, {}, AdamState(0, 0.0, 0.0, 1e-8))
"""Of an adapter without an optimizer: mode ``sgd`` alone is open, and looks at none of it."""


class BatchRunner(HalvingRunner):
    """Runs samples through the model, batch after batch.

    Args:
        model: Base model with an adapter slot.
        layout: Of the adapter.
        settings: Transform, batches, kernel.
    """

    def __init__(self, model: ScoringModel, layout: ParameterLayout, settings: DirectionSettings) -> None:
        super().__init__(model.device, settings.max_batch_tokens, packing=settings.packing)
        self.model, self.layout, self.settings = model, layout, settings

    def run(
        self, samples: Sequence[Sample], checkpoint: Checkpoint, projections: Sequence[Projection]
    ) -> Iterator[tuple[list[int], Directions]]:
        """Yield the numbers of each batch's samples and what it gives. Samples that do not fit alone are left out."""
        yield from self.batches(samples, self._computing(checkpoint, projections))

    def run_dealt(
        self, samples: Sequence[Sample], dealt: DealtBatches, checkpoint: Checkpoint, projections: Sequence[Projection]
    ) -> Iterator[tuple[list[int], Directions]]:
        """Yield as `run` does, for batches that other ranks run theirs beside. None is halved: the others would wait.

        Raises:
            ResourceError: One does not fit into memory.
        """
        compute = self._computing(checkpoint, projections)
        every = [*samples, dealt.filler]
        for indices in dealt.batches:
            rows = indices or [len(samples)]
            directions, error = self.attempt(every, rows, compute)
            longest = max(len(every[i].input_ids) for i in rows)
            if directions is None:
                one, half = len(rows) == 1, len(rows) * longest // 2
                remedy = "lower model.max_tokens" if one else f"set gradients.max_batch_tokens to {half} or so"
                raise ResourceError(
                    f"{len(rows)} row{'' if one else 's'} of {longest} tokens did not fit into a rank's memory "
                    f"({error}). Ranks that share a model cannot halve a batch on their own: {remedy}."
                )
            if indices:
                self.num_positions += len(rows) * longest
                yield indices, directions

    def _computing(self, checkpoint: Checkpoint, projections: Sequence[Projection]) -> Callable[[Batch], Directions]:
        self.model.load_adapter(checkpoint.adapter)
        moments = AdamMoments.of(checkpoint).to(self.model.device)
        return lambda batch: batch_directions(self.model, batch, moments, self.layout, projections, self.settings)


def batch_directions(
    model: ScoringModel,
    batch: Batch,
    moments: AdamMoments,
    layout: ParameterLayout,
    projections: Sequence[Projection],
    settings: DirectionSettings,
) -> Directions:
    """Compute a batch's directions, module by module while the backward pass runs; none is ever held whole.

    Args:
        model: With the checkpoint's adapter in its slot.
        batch: On the model's device.
        moments: Of the checkpoint, on the model's device.
        layout: Of the adapter.
        projections: Each applied to every module's directions as they come.
        settings: Transform and kernel.
    """
    dtype = torch.float64 if next(model.module.parameters()).dtype == torch.float64 else torch.float32
    sums = DirectionSums(
        batch.num_samples,
        projections,
        settings.adam,
        moments.state,
        kernel=settings.kernel,
        device=model.device,
        dtype=dtype,
    )

    def consume(name: str, grads_BOI: Tensor) -> None:
        die_at("mid_batch")
        sums.add(layout.offsets[name], grads_BOI, moments.exp_avg.get(name), moments.exp_avg_sq.get(name))

    losses_B = model.backward_per_sample(batch, "mean_loss", consume)
    ended = sums.ended()
    return Directions(ended.projected, ended.square_B.sqrt(), ended.momentum_shares(), losses_B)
