"""The end of a model at labelled positions only: states that no loss reads are not computed.

Behind the last layer that mixes positions, what happens at a position is read by the loss at that position and by
nothing else. In a Llama that is the last layer's queries, the output of its attention and its feed-forward part, and
the norms behind them: at prompts and padding they cost products, forward and backward, for nothing.

Which modules these are is found by trying, not by name: see `_silent_elsewhere`.

Shapes: B batch, S tokens, T labelled positions of the batch, H hidden.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rose_ray.model.batch import Batch
from rose_ray.model.core import core_model
from rose_ray.model.values import sample_values

logger = logging.getLogger(__name__)

_LABELLED = ((4, 5, 9), (3, 8, 11))
"""Labelled tokens of the two rows by which modules are tried; what predicts them is no prefix, so that attention over
those positions alone is another."""
_LENGTH = 12


class LabelledPositions:
    """Runs the modules behind the last mixing of positions where a loss reads, and gives zeros elsewhere.

    There are none where a model may read their states elsewhere after all, where it has no embedding to start from, or
    where its weights are partitioned: then everything runs everywhere.

    Args:
        module: The PEFT model, frozen, in evaluation mode, its activations not recomputed yet.

    Attributes:
        names: The modules.
    """

    def __init__(self, module: nn.Module) -> None:
        self.names: tuple[str, ...] = ()
        self._batch: Batch | None = None
        self._elsewhere = 0.0
        self._hooks: list[RemovableHandle] = []
        trial = _trial_batch(module)
        if trial is None:
            return
        self.names, values_B, grad_BSH = _silent_elsewhere(module, trial)
        for name in self.names:
            part = module.get_submodule(name)
            self._hooks += [part.register_forward_pre_hook(self._gather), part.register_forward_hook(self._scatter)]
        if self.names and not self._confirmed(module, trial, values_B, grad_BSH):
            logger.info("this model may read states where no label is: all of them are computed")
            self.remove()

    def holds(self, name: str) -> bool:
        """Whether a module gets labelled positions alone [1, T, ...], itself or within another."""
        return any(f"{name}.".startswith(f"{each}.") for each in self.names)

    @contextmanager
    def of(self, batch: Batch) -> Iterator[None]:
        """Run the modules at this batch's labelled positions in both passes; outside they run everywhere."""
        self._batch = batch
        try:
            yield
        finally:
            self._batch = None

    def remove(self) -> None:
        """Let the modules run everywhere for good."""
        for hook in self._hooks:
            hook.remove()
        self.names, self._hooks = (), []

    def _gather(self, _module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
        if self._batch is None:
            return None
        return (args[0].flatten(0, 1).index_select(0, self._batch.labels.flat_T)[None],)

    def _scatter(self, _module: nn.Module, _args: tuple[Tensor], output_1TO: Tensor) -> Tensor | None:
        if self._batch is None:
            return None
        shape = self._batch.input_ids.shape
        everywhere = output_1TO.new_full((shape.numel(), *output_1TO.shape[2:]), self._elsewhere)
        output_BSO: Tensor = everywhere.index_copy(0, self._batch.labels.flat_T, output_1TO[0]).unflatten(0, shape)
        return output_BSO

    def _confirmed(self, module: nn.Module, trial: Batch, values_B: Tensor, grad_BSH: Tensor) -> bool:
        """Whether values and gradients are the same as with everything everywhere."""
        # Far above what rounding makes of other shapes, far below the effect of another state where a loss reads.
        share = 1e-3 if values_B.dtype == torch.float64 or grad_BSH.dtype == torch.float32 else 0.05
        with self.of(trial):
            found_B, found_BSH = _values_and_gradient(module, trial)
            self._elsewhere = torch.nan  # what is read without a gradient shows
            with torch.no_grad():
                spoilt_B = sample_values(module, trial, "sum_logps")
            self._elsewhere = 0.0
        pairs = ((found_B, values_B), (spoilt_B, values_B), (found_BSH, grad_BSH))
        return all(bool((found - wanted).norm() <= share * wanted.norm()) for found, wanted in pairs)


def _trial_batch(module: nn.Module) -> Batch | None:
    embedding = _embedding(module)
    partitioned = any(hasattr(parameter, "ds_id") for parameter in module.parameters())
    if embedding is None or partitioned:  # whose parts all ranks would have to gather
        return None
    loss_mask = torch.zeros(len(_LABELLED), _LENGTH, dtype=torch.bool)
    for row, places in enumerate(_LABELLED):
        loss_mask[row, list(places)] = True
    ids = (torch.arange(loss_mask.numel()) % embedding.num_embeddings).view(loss_mask.shape)
    device = embedding.weight.device
    return Batch(ids.to(device), torch.ones_like(ids).to(device), loss_mask.to(device))


def _embedding(module: nn.Module) -> nn.Embedding | None:
    core: Any = core_model(module)
    embedding = core.get_input_embeddings() if hasattr(core, "get_input_embeddings") else None
    return embedding if isinstance(embedding, nn.Embedding) else None


def _values_and_gradient(module: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Values [B] of the samples, and the gradient of their sum in the embedded tokens [B, S, H]."""
    embedding, embedded = _embedding(module), []
    assert embedding is not None

    def start(_embedding: nn.Module, _args: Any, states_BSH: Tensor) -> Tensor:
        embedded.append(states_BSH.detach().requires_grad_())
        return embedded[-1]

    hook = embedding.register_forward_hook(start)
    try:
        with torch.enable_grad():
            values_B = sample_values(module, batch, "sum_logps")
            (grad_BSH,) = torch.autograd.grad(values_B.sum(), embedded[-1])
    finally:
        hook.remove()
    return values_B.detach(), grad_BSH


class _Watch:
    """Notes of a module whether gradients of its input and output are zero at all places where no loss reads."""

    def __init__(self, batch: Batch) -> None:
        self.calls: Counter[str] = Counter()
        self.silent: Counter[str] = Counter()
        self._shape = batch.input_ids.shape
        read = torch.zeros(self._shape.numel(), dtype=torch.bool, device=batch.input_ids.device)
        read[batch.labels.flat_T] = True
        self._unread = ~read

    def on(self, name: str, part: nn.Module) -> list[RemovableHandle]:
        def before(_part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            self.calls[name] += 1
            return ((self._tensor(name, args[0]),), kwargs) if len(args) == 1 and not kwargs else None

        def behind(_part: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
            return self._tensor(name, output)

        return [part.register_forward_pre_hook(before, with_kwargs=True), part.register_forward_hook(behind)]

    def _tensor(self, name: str, states: Any) -> Any:
        if not isinstance(states, Tensor) or states.shape[:2] != self._shape or not states.requires_grad:
            return states
        states = states.clone()  # others read the same tensor, or change it in place

        def look(grad: Tensor) -> None:
            self.silent[name] += not grad.flatten(0, 1)[self._unread].any()

        states.register_hook(look)
        return states


def _silent_elsewhere(module: nn.Module, trial: Batch) -> tuple[tuple[str, ...], Tensor, Tensor]:
    """Return the outermost modules where no gradient reaches a position that no loss reads; values, and gradient.

    Those with weights that run once, take one tensor [B, S, ...] and give one. Of a gradient in its input only what
    comes through the module itself counts: a key's projection reads what a query's does.
    """
    with torch.no_grad():
        sample_values(module, trial, "sum_logps")  # the first time may take several passes
    watch = _Watch(trial)
    parts = [(name, part) for name, part in module.named_modules() if any(True for _ in part.parameters())]
    hooks = [hook for name, part in parts for hook in watch.on(name, part)]
    try:
        values_B, grad_BSH = _values_and_gradient(module, trial)
    finally:
        for hook in hooks:
            hook.remove()
    names = {name for name, count in watch.silent.items() if count == 2 and watch.calls[name] == 1}
    outermost = (name for name in names if not any(name.startswith(f"{other}.") for other in names))
    return tuple(sorted(outermost)), values_B, grad_BSH
