"""One forward and one backward pass over a batch, per sample: what features and bank are both made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rose_ray.kernels.per_sample import GradientConsumer
from rose_ray.model.batch import Batch
from rose_ray.model.labelled_positions import LabelledPositions
from rose_ray.model.layout import adapter_parameters
from rose_ray.model.recompute import recompute_in_evaluation
from rose_ray.model.taps import Taps
from rose_ray.model.values import Reduction, forget_logit_shape, sample_values


class ScoringModel:
    """A PEFT model with one adapter slot, ready to give per-sample gradients.

    Every parameter is frozen: autograd carries activation gradients only, no further down than the lowest adapter, and
    taps on the adapter's layers form the weight gradients per sample.

    Args:
        module: What is called: the PEFT model, as whoever holds it wants it called.
        device: Where batches go.
        checkpointed: Activations are recomputed, as the module was told; without dropout all the same.
        merge_adapter: An adapter that `load_adapter` brings is added to copies of the weights: see `Taps.merge`.
        skip_unread: States that no loss reads are not computed: see `LabelledPositions`. To measure what that saves.

    Raises:
        ModelError: Its activations are to be recomputed, and no layer knows how; or see `Taps`.
    """

    def __init__(
        self,
        module: nn.Module,
        device: torch.device | str,
        *,
        checkpointed: bool = False,
        merge_adapter: bool = False,
        skip_unread: bool = True,
    ) -> None:
        self.module = module
        self._merge_adapter = merge_adapter
        self.device = torch.device(device)
        self.weights = self._slot()
        self.taps = Taps(module, self.weights)
        self._trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self._training = [(part, part.training) for part in module.modules()]
        self._recomputing: dict[Any, Callable[..., Any]] = {}
        self.labelled_positions = LabelledPositions()
        module.requires_grad_(False)
        module.eval()
        try:
            if skip_unread:
                self.labelled_positions.find(module)
            if checkpointed:
                self._recomputing = recompute_in_evaluation(module)
        except BaseException:
            self.close()
            raise
        self._labelled_only = frozenset(filter(self.labelled_positions.holds, self.taps.names))

    def close(self) -> None:
        """Give the module back as it came: what was trainable, in training mode, its layers' own forward passes.

        Once, after which this is of no use.
        """
        self.labelled_positions.remove()
        self.taps.remove()
        for parameter in self._trainable:
            parameter.requires_grad_(True)
        for part, training in self._training:
            part.training = training
        for layer, recompute in self._recomputing.items():
            layer._gradient_checkpointing_func = recompute
        forget_logit_shape(self.module)

    def load_adapter(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy an adapter's weights into the slot, by parameter name.

        The one way to change them: where the adapter is merged, writing to `weights` changes no output.
        """
        for name, weight in self.weights.items():
            weight.copy_(tensors[name])
        if self._merge_adapter:
            self.taps.merge()

    def _slot(self) -> dict[str, Tensor]:
        """The adapter's weights by layout name; here those of the model itself."""
        return dict(adapter_parameters(self.module))  # not their data, which others may set anew

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """The untouched base model: the reference of DPO."""
        try:
            with self.module.disable_adapter():  # type: ignore[operator]
                yield
        finally:
            self.module.requires_grad_(False)  # PEFT makes an adapter trainable when it comes back

    def sample_values(self, batch: Batch, reduction: Reduction) -> Tensor:
        """Return each sample's value: see ``sample_values``."""
        with self.labelled_positions.of(batch):
            return sample_values(self.module, batch, reduction)

    def backward_per_sample(
        self,
        batch: Batch,
        reduction: Reduction,
        consume: GradientConsumer,
        before_backward: Callable[[Tensor], None] = lambda values_B: None,
    ) -> Tensor:
        """Run one forward and one backward pass.

        Args:
            batch: What goes through.
            reduction: The value whose gradient is taken, per sample.
            consume: Gets each adapter parameter's name and gradients [B, O, I] while backward runs.
            before_backward: Gets the values [B] in between.

        Returns:
            The values [B], detached.
        """
        with self.labelled_positions.of(batch), self.taps.sending_to(consume, batch, self._labelled_only):
            values_B = sample_values(self.module, batch, reduction)
            before_backward(values_B.detach())
            values_B.sum().backward()
        return values_B.detach()
