"""The end of a model at labelled positions only: states that no loss reads are not computed.

From the last mixing of positions on, what happens at a position is read by the loss at that position and by nothing
else. In a Llama that is the last layer's queries, what its attention gives, its feed-forward part, and the norms behind
them: at prompts and padding they cost products, forward and backward, for nothing.

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

from rose_ray.errors import ModelError
from rose_ray.model.batch import Batch
from rose_ray.model.core import core_model
from rose_ray.model.memory import is_out_of_memory
from rose_ray.model.values import sample_values

logger = logging.getLogger(__name__)

_LABELLED = ((4, 5, 9), (3, 8, 11))
"""Labelled tokens of the two rows by which modules are tried; what predicts them is no prefix, so that attention over
those positions alone is another."""
_LENGTH = 12


class LabelledPositions:
    """Runs modules that it has found where a loss reads, and gives zeros elsewhere.

    There are none until `find`, and none after it where a model may read their states elsewhere, cannot be tried, or
    has partitioned weights: then everything runs everywhere.

    Attributes:
        names: The modules.
    """

    def __init__(self) -> None:
        self.names: tuple[str, ...] = ()
        self._batch: Batch | None = None
        self._elsewhere = 0.0
        self._hooks: list[RemovableHandle] = []

    def find(self, module: nn.Module) -> None:
        """Try the model on two short made-up rows: once to find modules, twice to make sure of them.

        Args:
            module: The PEFT model, frozen, in evaluation mode, without a cache, its activations not recomputed yet.

        Raises:
            RuntimeError: Not even these rows fit into memory.
        """
        if any(hasattr(parameter, "ds_id") for parameter in module.parameters()):
            return  # all ranks would have to gather the parts
        try:
            said = self._try(module)
        except Exception as error:  # remote code may rely on anything; a real batch will tell what is wrong
            self.remove()
            if is_out_of_memory(error):
                raise
            said = f"it cannot be tried: {error}"
        if said:
            self.remove()
            logger.info(f"states are computed where no loss reads them too: {said}")

    def holds(self, name: str) -> bool:
        """Whether a module gets labelled positions alone [1, T, ...], itself or within another."""
        return any(f"{name}.".startswith(f"{each}.") for each in self.names)

    @contextmanager
    def of(self, batch: Batch) -> Iterator[None]:
        """Run the modules at this batch's labelled positions in both passes; outside they run everywhere."""
        before, self._batch = self._batch, batch
        try:
            yield
        finally:
            self._batch = before

    def remove(self) -> None:
        """Let the modules run everywhere for good."""
        for hook in self._hooks:
            hook.remove()
        self.names, self._hooks = (), []

    def _gather(self, part: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
        if self._batch is None:
            return None
        if args[0].shape[:2] != self._batch.input_ids.shape:
            raise ModelError(
                f"{type(part).__name__} takes {list(args[0].shape)} of a batch of {list(self._batch.input_ids.shape)} "
                "tokens, and took all tokens of short rows at once. Lower model.max_tokens."
            )
        return (args[0].flatten(0, 1).index_select(0, self._batch.labels.flat_T)[None],)

    def _scatter(self, _part: nn.Module, _args: tuple[Tensor], output_1TO: Tensor) -> Tensor | None:
        if self._batch is None:
            return None
        shape = self._batch.input_ids.shape
        everywhere = output_1TO.new_full((shape.numel(), *output_1TO.shape[2:]), self._elsewhere)
        everywhere.index_copy_(0, self._batch.labels.flat_T, output_1TO[0])
        return everywhere.view(*shape, *output_1TO.shape[2:])

    def _try(self, module: nn.Module) -> str | None:
        """Find the modules; return what speaks against them."""
        embedding: Any = core_model(module).get_input_embeddings()  # type: ignore[operator]
        trial = _trial_batch(embedding)
        with _graph_from(embedding):
            sample_values(module, trial, "sum_logps")  # the first time may take several passes
        self.names, values_B, grad_BSH = _silent_elsewhere(module, embedding, trial)
        if not self.names:
            return "gradients reach all of them"
        for name in self.names:
            part = module.get_submodule(name)
            self._hooks += [part.register_forward_pre_hook(self._gather), part.register_forward_hook(self._scatter)]
        with self.of(trial):
            found_B, found_BSH = _values_and_gradient(module, embedding, trial)
            self._elsewhere = torch.nan  # what is read without a gradient shows
            with _graph_from(embedding):
                spoilt_B = sample_values(module, trial, "sum_logps").detach()
            self._elsewhere = 0.0
        pairs = ((found_B, values_B), (spoilt_B, values_B), (found_BSH, grad_BSH))
        # Far above what rounding makes of other shapes, far below the effect of another state where a loss reads.
        share = 1e-3 if all(p.dtype in (torch.float32, torch.float64) for p in module.parameters()) else 0.05
        same = all(bool((found - wanted).norm() <= share * wanted.norm()) for found, wanted in pairs)
        return None if same else "values or gradients are others without them"


def _trial_batch(embedding: nn.Embedding) -> Batch:
    loss_mask = torch.zeros(len(_LABELLED), _LENGTH, dtype=torch.bool)
    for row, places in enumerate(_LABELLED):
        loss_mask[row, list(places)] = True
    ids = (torch.arange(loss_mask.numel()) % embedding.num_embeddings).view(loss_mask.shape)
    device = embedding.weight.device
    return Batch(ids.to(device), torch.ones_like(ids).to(device), loss_mask.to(device))


@contextmanager
def _graph_from(embedding: nn.Module) -> Iterator[list[Tensor]]:
    """Let autograd's graph start at the embedded tokens, which the list gets.

    In every pass of the trial: without a graph, bitsandbytes packs weights anew for good on some CPUs.
    """
    embedded: list[Tensor] = []

    def start(_embedding: nn.Module, _args: Any, states_BSH: Tensor) -> Tensor:
        embedded.append(states_BSH.detach().requires_grad_())
        return embedded[-1]

    hook = embedding.register_forward_hook(start)
    try:
        with torch.enable_grad():
            yield embedded
    finally:
        hook.remove()


def _values_and_gradient(module: nn.Module, embedding: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Values [B] of the samples, and the gradient of their sum in the embedded tokens [B, S, H]."""
    with _graph_from(embedding) as embedded:
        values_B = sample_values(module, batch, "sum_logps")
        (grad_BSH,) = torch.autograd.grad(values_B.sum(), embedded)
    return values_B.detach(), grad_BSH


class _Watch:
    """Notes of a module whether gradients of its input and output are zero where no loss reads, and only there."""

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
            nonzero_N = grad.flatten(0, 1).flatten(1).ne(0).any(1)
            self.silent[name] += bool(nonzero_N[~self._unread].any() and not nonzero_N[self._unread].any())

        states.register_hook(look)
        return states


def _silent_elsewhere(module: nn.Module, embedding: nn.Module, trial: Batch) -> tuple[tuple[str, ...], Tensor, Tensor]:
    """Return the outermost modules where gradients reach positions that a loss reads, and no others.

    Those with weights that run once, take one tensor [B, S, ...] and give one. Of a gradient in its input only what
    comes through the module itself counts: a key's projection reads what a query's does. What no gradient reaches at
    all, such as what picks the keys to attend to, is left alone: it may do in longer rows what it does not in these.

    Returns:
        The modules, and what `_values_and_gradient` does.
    """
    watch = _Watch(trial)
    parts = [(name, part) for name, part in module.named_modules() if any(True for _ in part.parameters())]
    hooks = [hook for name, part in parts for hook in watch.on(name, part)]
    try:
        values_B, grad_BSH = _values_and_gradient(module, embedding, trial)
    finally:
        for hook in hooks:
            hook.remove()
    names = {name for name, count in watch.silent.items() if count == 2 and watch.calls[name] == 1}
    outermost = (name for name in names if not any(name.startswith(f"{other}.") for other in names))
    return tuple(sorted(outermost)), values_B, grad_BSH
