"""Per-sample gradients, features and exact scores of a PEFT model in memory: the library, without a job around it.

Shapes: B batch, P parameters of the adapter, D numbers of a feature, V pairs, U directions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rose_ray.errors import ConfigError, ModelError, NonFiniteError, NumericsError, ShapeError
from rose_ray.kernels.adam import AdamMode, AdamState
from rose_ray.kernels.objectives import Objective, bank_directions
from rose_ray.kernels.projection import NoProjection, Projection, ProjectionKind, make_projection
from rose_ray.kernels.span import SpanProjection
from rose_ray.model.checkpoint import Checkpoint
from rose_ray.model.collated import collated_batch, collated_samples
from rose_ray.model.layout import ParameterLayout, adapter_parameters, layout_of
from rose_ray.model.scoring import ScoringModel
from rose_ray.stages.bank import EncodedPair, pair_gradients
from rose_ray.stages.directions import NO_MOMENTS, AdamMoments, DirectionSettings, batch_directions

__all__ = ["AdamMoments", "AdamState", "Features", "GradientEngine"]


@dataclass(frozen=True, eq=False)
class Features:
    """What a batch's directions leave.

    Attributes:
        projected_BD: Projected directions, float32 (float64 where the model is), not divided by any length.
        norms_B: Exact lengths of the unprojected directions, float64.
        momentum_shares_B: Length of the common moment term over that of the first moment, float64; 0 without momentum.
        losses_B: Token-mean cross-entropy, nats.
    """

    projected_BD: Tensor
    norms_B: Tensor
    momentum_shares_B: Tensor
    losses_B: Tensor

    @property
    def unit_BD(self) -> Tensor:
        """Projected directions over their exact lengths, float64: what a job stores as features.

        Raises:
            NumericsError: A direction is zero; the message has the row numbers.
        """
        if rows := _rows(self.norms_B == 0):
            raise NumericsError(
                f"directions are zero in rows {rows[:10]}; they have no unit vector: leave the rows out"
            )
        return self.projected_BD.double() / self.norms_B[:, None]


class GradientEngine:
    """Takes a PEFT model and gives what each sample alone would do to its LoRA weights.

    While it is open the model is frozen, in evaluation mode, and its LoRA layers run our forward pass (the same
    output). Closing, best by ``with``, gives the model back as it was. Weights stay in place and are never changed.

    A batch is what a collator makes: ``input_ids``, ``attention_mask`` and ``labels``, each [B, S], padded on the
    right, labels -100 where a token carries no loss. It goes through the model at once, moved to its device.

    Every method raises DataError or ShapeError for a batch that is not of this form, NonFiniteError where a loss or
    gradient is NaN or infinite, each with row numbers, and ModelError once the engine is closed.

    Args:
        model: A causal language model with one plain LoRA adapter, whole on one device.

    Attributes:
        layout: Names, shapes and offsets of the adapter's parameters in the flat vector [P].

    Raises:
        ModelError: The adapter is no plain LoRA, not in use or merged, other parameters are trainable too, the model
            lies on several devices, or another engine has it.
    """

    def __init__(self, model: PeftModel) -> None:
        device = _check_model(model)
        self.layout: ParameterLayout = layout_of(model)
        self._config: Any = model.get_base_model().config
        self._use_cache = getattr(self._config, "use_cache", None)
        self._set_cache(False)
        try:
            self._scoring: ScoringModel | None = ScoringModel(model, device)
        except BaseException:
            self._set_cache(self._use_cache)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the model back as it came. Closing again does nothing."""
        if self._scoring is None:
            return
        self._scoring.close()
        self._scoring = None
        self._set_cache(self._use_cache)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The adapter's parameters by their layout names: what to look moments up by in an optimizer's state."""
        return adapter_parameters(self._model.module)

    def projection(self, kind: ProjectionKind = "sketch", *, dim: int = 16384, seed: int = 0) -> Projection:
        """Return a projection from P to D numbers, the same for a seed everywhere: see `make_projection`.

        Raises:
            ConfigError: A value is unknown or out of its range.
        """
        shapes = [(shape[0], shape[1]) for _, shape in self.layout.shapes]
        return make_projection(kind, dim, seed, self.layout.num_parameters, shapes=shapes)

    def gradients(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the gradient of each sample's token-mean loss: [B, P], float32 (float64 where the model is).

        The one method that makes this matrix: B x P x 4 bytes on the model's device.
        """
        return self.features(batch, NoProjection(self.layout.num_parameters)).projected_BD

    def features(
        self,
        batch: Mapping[str, Tensor],
        projection: Projection,
        *,
        adam: AdamMoments | None = None,
        mode: AdamMode | None = None,
    ) -> Features:
        """Project each sample's direction, layer by layer while the backward pass runs.

        Args:
            batch: See above.
            projection: From P to D numbers, as `projection` makes it.
            adam: Moments by the layout's names, of the optimizer whose step is taken. None: the gradient itself.
                Copied to the model's device at each call unless they are there.
            mode: Adam mode, see `adam_direction`; ``torch`` unless given, ``sgd`` without moments.

        Raises:
            ConfigError: The mode is unknown, or needs moments that are not there.
            ModelError: The moments are not of this adapter.
            ShapeError: The projection does not read P numbers.
        """
        model = self._model
        moments, chosen = self._moments(adam, mode)
        if projection.num_parameters != self.layout.num_parameters:
            raise ShapeError(
                f"projection reads {projection.num_parameters} numbers, and the adapter has "
                f"{self.layout.num_parameters} parameters; expected one number of both"
            )
        rows = collated_batch(batch, model.device)
        settings = DirectionSettings(chosen, "float32", rows.input_ids.numel())
        with torch.enable_grad():
            found = batch_directions(model, rows, moments, self.layout, [projection.to(model.device)], settings)
        if bad := _rows(~torch.isfinite(found.losses_B + found.norms_B)):
            raise NonFiniteError(
                f"loss or gradient is not finite in rows {bad[:10]}; look at their tokens and the model"
            )
        return Features(found.features[0], found.norms_B, found.momentum_shares_B, found.losses_B)

    def pair_directions(
        self,
        chosen: Mapping[str, Tensor],
        rejected: Mapping[str, Tensor],
        *,
        objective: Objective = "rose",
        dpo_beta: float = 0.1,
    ) -> Tensor:
        """Return the unit direction of each preference pair: [U, P], float32, U = V.

        Args:
            chosen, rejected: Batches of V rows each; labels mark the answers. Row v of either is pair v.
            objective: See `bank_directions`. ``dpo_weighted`` makes one direction of all pairs (U = 1), with the model
                without its adapter as the reference.
            dpo_beta: For ``dpo_weighted`` alone.

        Memory: both sides go through the model as one batch, and some 40 bytes per pair and parameter are held. Call it
        for a few pairs at a time and join the results.

        Raises:
            ConfigError: The objective is unknown, or ``dpo_beta`` out of range.
            ShapeError: The sides differ in their number of rows.
            NumericsError: Both sides are the same, or a direction is zero; the pairs are listed by their rows.
        """
        model = self._model
        sides = [
            collated_samples(collated_batch(side, model.device, what))
            for side, what in ((chosen, "chosen"), (rejected, "rejected"))
        ]
        if len(sides[0]) != len(sides[1]):
            raise ShapeError(f"{len(sides[0])} chosen and {len(sides[1])} rejected rows; expected one of each a pair")
        equal = [n for n, (one, other) in enumerate(zip(*sides, strict=True)) if one == other]
        if equal:
            # Two passes over the same tokens may differ in their last bits: looked for here, not in the gradients.
            raise NumericsError(f"chosen and rejected are the same in rows {equal}; such a pair has no direction")
        pairs = [EncodedPair(f"row {n}", "pairs", *both) for n, both in enumerate(zip(*sides, strict=True))]
        unused_V2 = torch.zeros(len(pairs), 2, dtype=torch.float64, device=model.device)
        with torch.enable_grad():
            gradients = pair_gradients(
                model,
                pairs,
                Checkpoint("this adapter", model.weights, None, None, None),
                self.layout,
                NoProjection(self.layout.num_parameters),
                max_batch_tokens=2 * len(pairs) * max(len(sample.input_ids) for side in sides for sample in side),
                reference_V2=None if objective == "dpo_weighted" else unused_V2,
            )
        found = bank_directions(objective, gradients.numbers(), dpo_beta=dpo_beta, subtasks=["pairs"] * len(pairs))
        return torch.from_numpy(found.vectors_UD).float().to(model.device)

    def scores(
        self,
        batch: Mapping[str, Tensor],
        directions_UP: Tensor,
        *,
        adam: AdamMoments | None = None,
        mode: AdamMode | None = None,
    ) -> Tensor:
        """Return the exact influence of each sample on each direction: [B, U], float64, on the model's device.

        The cosine of the sample's direction and the pair's where the latter has length 1; positive where training on
        the sample helps. Means over pairs and weights of checkpoints are the caller's.

        Args:
            batch: See above.
            directions_UP: From `pair_directions`, or any vectors, float32 or float64. Copied to the device if need be.
            adam, mode: As in `features`.

        Raises:
            NumericsError: A sample's direction is zero, or the directions are of another type.
            ShapeError: The directions are not [U, P].
        """
        # No basis is needed where inner products with the rows are all that is asked for.
        products = SpanProjection(directions_UP.to(self._model.device), "directions")
        return self.features(batch, products, adam=adam, mode=mode).unit_BD

    def _set_cache(self, value: bool | None) -> None:
        if self._use_cache is not None:
            self._config.use_cache = value

    @property
    def _model(self) -> ScoringModel:
        if self._scoring is None:
            raise ModelError("the engine is closed and its model given back; make another GradientEngine")
        return self._scoring

    def _moments(self, adam: AdamMoments | None, mode: AdamMode | None) -> tuple[AdamMoments, AdamMode]:
        if adam is None:
            if mode not in (None, "sgd"):
                raise ConfigError(
                    f"Adam mode {mode!r} needs moments, and adam is None; give them, or leave out the mode"
                )
            return NO_MOMENTS, "sgd"
        for name, tensors in (("exp_avg", adam.exp_avg), ("exp_avg_sq", adam.exp_avg_sq)):
            if tensors:
                self.layout.check(tensors, name)
        return adam.to(self._model.device), mode or "torch"


def _check_model(model: PeftModel) -> torch.device:
    """Return the model's device. Whether each layer is a plain LoRA is checked with the taps."""
    if not isinstance(model, PeftModel):
        raise ModelError(f"model is {type(model).__name__}; expected what peft.get_peft_model makes of one with LoRA")
    layers: dict[str, Any] = {name: layer for name, layer in model.named_modules() if hasattr(layer, "lora_A")}
    if not layers:
        raise ModelError("the model has no LoRA layer; expected a plain LoRA adapter on linear layers")
    for name, layer in layers.items():
        kind = type(layer.base_layer)
        if not issubclass(kind, nn.Linear | Conv1D):
            raise ModelError(f"{name} adapts {kind.__name__}; expected LoRA on linear layers only")
        if layer.merged or layer.disable_adapters:
            raise ModelError(f"{name}: the adapter is merged or disabled; expected it in use: unmerge or enable it")
        if "forward" in vars(layer):
            raise ModelError(f"{name} has a forward pass of somebody else's; close the other engine, or take out hooks")
    others = [name for name, parameter in model.named_parameters() if parameter.requires_grad and ".lora_" not in name]
    if others:
        raise ModelError(
            f"{len(others)} parameters besides the LoRA weights are trainable, such as {others[0]}; gradients here are "
            "of the LoRA weights alone. Freeze the others."
        )
    devices = {str(parameter.device): parameter.device for parameter in model.parameters()}
    if len(devices) > 1 or "meta" in devices:
        raise ModelError(f"the model lies on {sorted(devices)}; expected all of it on one device")
    return next(iter(devices.values()))


def _rows(bad_B: Tensor) -> list[int]:
    rows: list[int] = bad_B.nonzero().flatten().tolist()
    return rows
