"""torch.func: vmap over grad of one sample's loss, then Adam and a dense projection for the whole batch.

Shapes: B batch, S tokens, P adapter parameters, D numbers of a feature.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy

from benchmarks.released import Projector, released_adam
from benchmarks.rivals_common import (
    ADAM,
    FORWARD_BACKWARD,
    IGNORED,
    PROJECTION,
    Clock,
    Padded,
    Problem,
    pad,
    with_eager_attention,
)


class VmappedPass:
    """One pass with ``vmap(grad)``. Padding lies on the right and attention is causal, so no mask is given."""

    def __init__(self, problem: Problem, projector: Projector) -> None:
        self.problem, self.projector = problem, projector
        self.model = with_eager_attention(problem.model)
        self.weights = {f"{name}.weight": parameter.detach() for name, parameter in problem.parameters.items()}
        self.per_sample = vmap(grad(self._loss), in_dims=(None, 0, 0))

    def _loss(self, weights: dict[str, Tensor], ids_S: Tensor, labels_S: Tensor) -> Tensor:
        logits_1SV = functional_call(self.model, weights, kwargs={"input_ids": ids_S.unsqueeze(0)}).logits
        return cross_entropy(logits_1SV[0, :-1], labels_S[1:], ignore_index=IGNORED, reduction="mean")

    def _flat(self, batch: Padded) -> Tensor:
        grads = self.per_sample(self.weights, batch.input_ids, batch.labels)
        return torch.cat([each.flatten(1) for each in grads.values()], dim=1)

    def gradients(self, indices: Sequence[int]) -> Tensor:
        """Return raw gradients [B, P]."""
        return self._flat(pad([self.problem.samples[i] for i in indices]))

    def __call__(self, clock: Clock) -> Tensor:
        """Return features [N, D]."""
        out_ND = torch.zeros(len(self.problem.samples), self.problem.dim)
        for indices, batch in zip(self.problem.indices, self.problem.batches, strict=True):
            with clock.part(FORWARD_BACKWARD):
                grads_BP = self._flat(batch)
            with clock.part(ADAM):
                directions_BP = released_adam(grads_BP, *self.problem.moments)
            with clock.part(PROJECTION):
                out_ND[indices] = self.projector.project(directions_BP)
        return out_ND
