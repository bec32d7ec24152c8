"""A batch's directions, never held whole: what each module adds to squares and projections.

Shapes: B batch, D numbers of a projection, n parameters of one module.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from rose_ray.errors import ConfigError
from rose_ray.kernels.adam import LESS_CODE_BETA1, AdamMode, AdamState, adam_direction
from rose_ray.kernels.deflated import DeflatedProjection
from rose_ray.kernels.fused import Along, SketchKeys, fused_direction, fused_direction_sketch, make_sketch_keys
from rose_ray.kernels.projection import Projection
from rose_ray.kernels.sketch import SketchProjection

KernelKind = Literal["torch", "triton"]
"""torch's own operators, or one fused Triton kernel a module."""


class EndedSums(NamedTuple):
    """What a batch's directions come to.

    Attributes:
        projected: Per projection [B, D], not divided by any length.
        square_B: Squared length of the direction, float64.
        total_square_B: ``||b1 m + (1 - b1) g||**2``, float64; 0 where the mode has no momentum.
        momentum_square: ``||b1 m||**2``, float64 scalar.
    """

    projected: list[Tensor]
    square_B: Tensor
    total_square_B: Tensor
    momentum_square: Tensor

    def momentum_shares(self) -> Tensor:
        """Return ``||b1 m|| / ||b1 m + (1 - b1) g||`` of each sample, float64 [B]; 0 without momentum."""
        tiny = torch.finfo(torch.float64).tiny
        shares_B = (self.momentum_square / self.total_square_B.clamp_min(tiny)).sqrt()
        return torch.where(self.momentum_square > 0, shares_B, torch.zeros_like(shares_B))


class DirectionSums:
    """Running sums of one batch.

    Args:
        num_samples: B.
        projections: Applied to every module's directions as they come, on the device of the gradients.
        mode: Adam transform.
        state: Number of updates, betas and eps of the optimizer that ran.
        kernel: What does the work.
        device: Where.
        dtype: Of the projections' sums, float32 or float64.

    What a module adds to lengths, and what a deflated projection takes out, waits for `ended`: one operation then,
    instead of several a module.

    Raises:
        ConfigError: The kernel is unknown.
    """

    def __init__(
        self,
        num_samples: int,
        projections: Sequence[Projection],
        mode: AdamMode,
        state: AdamState,
        *,
        kernel: KernelKind = "torch",
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if kernel not in get_args(KernelKind):
            raise ConfigError(f"kernel is {kernel!r}; expected one of {', '.join(get_args(KernelKind))}")
        self.projections, self.mode, self.state, self.kernel = projections, mode, state, kernel
        self._projected = [torch.zeros(num_samples, each.dim, dtype=dtype, device=device) for each in projections]
        self._along_B: list[list[Tensor]] = [[] for _ in projections]
        self._norms_B, self._total_norms_B, self._momentum_norms = list[Tensor](), list[Tensor](), list[Tensor]()
        # Of the fused kernel, which adds to them in place.
        self._square_B = torch.zeros(num_samples, dtype=torch.float64, device=device)
        self._total_square_B = torch.zeros_like(self._square_B)

    def add(self, offset: int, grads_BOI: Tensor, exp_avg: Tensor | None, exp_avg_sq: Tensor | None) -> None:
        """Add one module.

        Args:
            offset: Place of the module in the flat parameter vector.
            grads_BOI: Its gradients, float32 or float64. May be overwritten.
            exp_avg, exp_avg_sq: Its moments, as `adam_direction` takes them.
        """
        if self.kernel == "triton":
            self._add_fused(offset, grads_BOI.flatten(1), exp_avg, exp_avg_sq)
            return
        adam = adam_direction(grads_BOI, exp_avg, exp_avg_sq, self.state, self.mode)
        self.add_direction(offset, adam.direction_B.flatten(1), adam.total_norm_B, adam.momentum_norm)

    def add_direction(self, offset: int, direction_Bn: Tensor, total_norm_B: Tensor, momentum_norm: Tensor) -> None:
        """Add one module's directions, with the lengths of `AdamDirection`."""
        self._norms_B.append(torch.linalg.vector_norm(direction_Bn, dim=1))
        self._total_norms_B.append(total_norm_B)
        self._momentum_norms.append(momentum_norm)
        self._project(range(len(self.projections)), offset, direction_Bn)

    def _project(self, numbers: Iterable[int], offset: int, direction_Bn: Tensor) -> None:
        for number in numbers:
            projection, out_BD = self.projections[number], self._projected[number]
            if isinstance(projection, DeflatedProjection):
                self._along_B[number].append(projection.add_all(out_BD, offset, direction_Bn))
            else:
                projection.add(out_BD, offset, direction_Bn)

    def ended(self) -> EndedSums:
        """Return the sums of all modules; called once, after the last."""
        for projection, out_BD, along_B in zip(self.projections, self._projected, self._along_B, strict=True):
            if isinstance(projection, DeflatedProjection) and along_B:
                projection.take_out(out_BD, torch.stack(along_B).sum(0))
        momentum_square = _sum_of_squares(self._momentum_norms, self._square_B.new_zeros(()))
        total_square_B = _sum_of_squares(self._total_norms_B, self._total_square_B)
        return EndedSums(
            self._projected, _sum_of_squares(self._norms_B, self._square_B), total_square_B, momentum_square
        )

    def _add_fused(self, offset: int, grads_Bn: Tensor, exp_avg: Tensor | None, exp_avg_sq: Tensor | None) -> None:
        """Sketch, deflated or not, in the pass that reads the gradients; others read the directions it leaves there."""
        if self.mode in ("torch", "less_code") and exp_avg is not None:
            beta1 = LESS_CODE_BETA1 if self.mode == "less_code" else self.state.adam_beta1
            self._momentum_norms.append(beta1 * torch.linalg.vector_norm(exp_avg))
        exp_avg_n, exp_avg_sq_n = (None if each is None else each.flatten() for each in (exp_avg, exp_avg_sq))
        sketched = [number for number, each in enumerate(self.projections) if _sketch_of(each) is not None][:1]
        for number in sketched:
            sketch = _sketch_of(first := self.projections[number])
            assert sketch is not None
            out_BD = grads_Bn.new_zeros(len(grads_Bn), sketch.dim)
            along = None
            if isinstance(first, DeflatedProjection):
                unit_n = first.unit(offset, grads_Bn.shape[1]).to(torch.float32)
                along = Along(unit_n, torch.zeros_like(self._square_B))
            fused_direction_sketch(
                grads_Bn,
                exp_avg_n,
                exp_avg_sq_n,
                self.state,
                self.mode,
                offset=offset,
                dim=sketch.dim,
                sketch_keys=_keys(sketch, grads_Bn.device),
                out_BD=out_BD,
                square_B=self._square_B,
                total_square_B=self._total_square_B,
                along=along,
                direction_out_BP=grads_Bn if len(self.projections) > 1 else None,
            )
            self._projected[number][:, : sketch.dim] += out_BD
            if along is not None:
                self._along_B[number].append(along.sum_B.to(out_BD.dtype))
        if not sketched:
            fused_direction(
                grads_Bn,
                exp_avg_n,
                exp_avg_sq_n,
                self.state,
                self.mode,
                square_B=self._square_B,
                total_square_B=self._total_square_B,
                direction_out_BP=grads_Bn,
            )
        self._project([number for number in range(len(self.projections)) if number not in sketched], offset, grads_Bn)


def _sum_of_squares(norms: Sequence[Tensor], start: Tensor) -> Tensor:
    """Of each row over all modules, float64; squared there, where no square overflows."""
    return start + torch.stack(list(norms)).double().square().sum(0) if norms else start


def _sketch_of(projection: Projection) -> SketchProjection | None:
    inner = projection.inner if isinstance(projection, DeflatedProjection) else projection
    return inner if isinstance(inner, SketchProjection) else None


_KEYS: dict[tuple[str, str], SketchKeys] = {}


def _keys(sketch: SketchProjection, device: torch.device) -> SketchKeys:
    # a table of one number a block of D parameters; the same for every batch
    key = (f"{sketch.identity()}/{sketch.num_parameters}", str(device))
    if key not in _KEYS:
        _KEYS[key] = make_sketch_keys(sketch.seed, sketch.dim, sketch.num_parameters, device)
    return _KEYS[key]
