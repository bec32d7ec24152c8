"""The way of the released code of LESS and ROSE: one sample at a time, the flat gradient, Adam, a dense projection.

Shapes: P adapter parameters, D numbers of a feature, G samples projected together, b columns of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from benchmarks.rivals_common import ADAM, FORWARD_BACKWARD, PROJECTION, Clock, Problem, pad

BLOCK_SIZE = 128
GROUP_SIZE = 16
"""Both are fixed in the released code."""

MAX_FLOAT_BYTES = 3 << 30
"""A matrix that would be larger in float32 is held as int8."""


class Projector(Protocol):
    """[G, P] to [G, D]."""

    group_size: int

    def project(self, grads_GP: Tensor) -> Tensor:
        """Project a group."""
        ...


class RegeneratingProjector:
    """As TRAK's ``BasicProjector``: blocks of 128 columns, drawn again for every group of samples."""

    group_size = GROUP_SIZE

    def __init__(self, num_parameters: int, dim: int, seed: int = 0) -> None:
        self.dim = dim
        self.block_Pb = torch.empty(num_parameters, min(BLOCK_SIZE, dim))
        self.generator = torch.Generator()
        self.seeds = [seed + 1000 * number for number in range(-(-dim // BLOCK_SIZE))]

    def draw(self, number: int) -> Tensor:
        """Draw one block of signs [P, b], over the one before."""
        self.generator.manual_seed(self.seeds[number])
        self.block_Pb.bernoulli_(p=0.5, generator=self.generator)
        self.block_Pb *= 2.0
        self.block_Pb -= 1.0
        return self.block_Pb

    def project(self, grads_GP: Tensor) -> Tensor:
        """See ``Projector``. Unscaled, as there."""
        out_GD = torch.zeros(len(grads_GP), self.dim)
        for number in range(len(self.seeds)):
            start, stop = number * BLOCK_SIZE, min(self.dim, (number + 1) * BLOCK_SIZE)
            out_GD[:, start:stop] = grads_GP @ self.draw(number)[:, : stop - start]
        return out_GD


class HeldProjector:
    """The same matrix held in memory: float32, or int8 that is turned to float32 block by block if it is large."""

    def __init__(self, num_parameters: int, dim: int, seed: int = 0) -> None:
        drawn = RegeneratingProjector(num_parameters, dim, seed)
        small = num_parameters * dim * 4 <= MAX_FLOAT_BYTES
        self.dtype = torch.float32 if small else torch.int8
        self.group_size = GROUP_SIZE if small else 4 * GROUP_SIZE
        self.signs_DP = torch.empty(dim, num_parameters, dtype=self.dtype)
        self.block_bP = torch.empty(0 if small else BLOCK_SIZE, num_parameters)
        for number in range(len(drawn.seeds)):
            start = number * BLOCK_SIZE
            rows_bP = self.signs_DP[start : start + BLOCK_SIZE]
            rows_bP.copy_(drawn.draw(number).T[: len(rows_bP)])

    def project(self, grads_GP: Tensor) -> Tensor:
        """See ``Projector``."""
        if self.dtype == torch.float32:
            return grads_GP @ self.signs_DP.T
        parts = []
        for rows_bP in self.signs_DP.split(BLOCK_SIZE):
            block_bP = self.block_bP[: len(rows_bP)].copy_(rows_bP)  # one buffer: fresh memory costs as much again
            parts.append(grads_GP @ block_bP.T)
        return torch.cat(parts, dim=1)

    @property
    def note(self) -> str:
        """How the matrix is held."""
        size = self.signs_DP.numel() * self.signs_DP.element_size() / 2**30
        return f"matrix held as {str(self.dtype).removeprefix('torch.')} ({size:.1f} GiB), groups of {self.group_size}"


class ReleasedPass:
    """One pass of the released way."""

    def __init__(self, problem: Problem, projector: Projector) -> None:
        self.problem, self.projector = problem, projector
        self.inputs = [pad([sample]) for sample in problem.samples]

    def gradient(self, index: int) -> Tensor:
        """Return one sample's flat gradient [P]: transformers' own loss, backward into ``.grad``, one concatenation."""
        one = self.inputs[index]
        loss = self.problem.model(input_ids=one.input_ids, attention_mask=one.attention_mask, labels=one.labels).loss
        loss.backward()
        flat_P = torch.cat([parameter.grad.view(-1) for parameter in self.problem.parameters.values()])  # type: ignore[union-attr]
        self.problem.model.zero_grad()
        return flat_P

    def gradients(self, indices: Sequence[int]) -> Tensor:
        """Return raw gradients [B, P]."""
        return torch.stack([self.gradient(index) for index in indices])

    def __call__(self, clock: Clock) -> Tensor:
        """Return features [N, D]."""
        features, waiting = [], []
        for index in range(len(self.inputs)):
            with clock.part(FORWARD_BACKWARD):
                flat_P = self.gradient(index)
            with clock.part(ADAM):
                waiting.append(released_adam(flat_P, *self.problem.moments))
            if len(waiting) == self.projector.group_size or index + 1 == len(self.inputs):
                with clock.part(PROJECTION):
                    features.append(self.projector.project(torch.stack(waiting)))
                waiting = []
        return torch.cat(features)


def released_adam(grads: Tensor, avg_P: Tensor, avg_sq_P: Tensor) -> Tensor:
    """Return the direction as the released code writes it, for [P] or [B, P]."""
    beta1, beta2, eps = 0.9, 0.999, 1e-08
    updated_avg = beta1 * avg_P + (1 - beta1) * grads
    updated_avg_sq = beta2 * avg_sq_P + (1 - beta2) * grads**2
    return updated_avg / torch.sqrt(updated_avg_sq + eps)
