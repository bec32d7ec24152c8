"""Adam's state as PyTorch lays it out, turned into moments by the adapter's parameter names."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rose_ray.errors import ModelError, NonFiniteError, StoreError

MOMENT_KEYS = ("exp_avg", "exp_avg_sq")
_WRAPPERS = ("module", "_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module")
_ROUNDED = {"state1", "state2", "qmap1", "absmax1", "exp_avg_quantized"}


@dataclass(frozen=True)
class AdamNumbers:
    """The numbers beside the moments; None where the files do not say."""

    learning_rate: float | None = None
    beta1: float | None = None
    beta2: float | None = None
    eps: float | None = None
    max_grad_norm: float | None = None


@dataclass(frozen=True)
class ForeignOptimizer:
    """What another trainer's optimizer held.

    Attributes:
        moments: ``exp_avg`` and ``exp_avg_sq``, each by the parameter's layout name, float32, on the CPU.
        step: Updates taken.
        numbers: Of Adam.
        adapter: Weights by layout name, float32, where the optimizer's own files hold them.
        file: Where it was read, for messages.
    """

    moments: dict[str, dict[str, Tensor]]
    step: int
    numbers: AdamNumbers
    adapter: dict[str, Tensor] | None
    file: str


def layout_name(name: str) -> str:
    """Return a parameter's name as a saved PEFT adapter has it: without wrappers and the adapter's own name."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    if len(parts) > 2 and parts[-3] in ("lora_A", "lora_B") and parts[-1] == "weight":
        del parts[-2]
    return ".".join(parts)


def by_layout_name(tensors: Mapping[str, Any], file: str) -> dict[str, Any]:
    """Rename keys with `layout_name`.

    Raises:
        ModelError: Two of them become one: the file holds several adapters.
    """
    renamed: dict[str, Any] = {}
    for name, value in tensors.items():
        key = layout_name(name)
        if key in renamed:
            raise ModelError(f"{file}: {key} stands for two parameters, the second {name}. Save one adapter alone.")
        renamed[key] = value
    return renamed


def adam_moments(entry: Any, name: str, file: str) -> dict[str, Tensor]:
    """Return a parameter's two moments out of its entry in an optimizer's state, float32.

    Raises:
        ModelError: Another optimizer's state, or one in 8 bits.
    """
    keys = sorted(map(str, entry)) if isinstance(entry, Mapping) else type(entry).__name__
    if isinstance(entry, Mapping) and _ROUNDED & set(entry):
        raise ModelError(
            f"{file}: {name} has the state of a bitsandbytes optimizer {keys}, whose moments are rounded to 8 bits or "
            "packed; expected exp_avg and exp_avg_sq. Train with optim: adamw_torch."
        )
    if isinstance(entry, Mapping) and "max_exp_avg_sq" in entry:
        raise ModelError(f"{file}: {name} has the state of AMSGrad, which takes other steps than Adam. Train without.")
    if not isinstance(entry, Mapping) or not all(torch.is_tensor(entry.get(key)) for key in MOMENT_KEYS):
        raise ModelError(
            f"{file}: {name} has no moments of Adam: expected exp_avg and exp_avg_sq, found {keys}. "
            "Train with AdamW, and save after its first step."
        )
    return {key: entry[key].detach().float() for key in MOMENT_KEYS}


def common_step(entries: Sequence[Mapping[str, Any]], groups: Sequence[Mapping[str, Any]], file: str) -> int:
    """Return the number of updates that all entries, or else all groups, agree on.

    Raises:
        ModelError: None is recorded, or they differ.
    """
    holders = entries if any("step" in entry for entry in entries) else groups
    steps = {int(holder["step"]) for holder in holders if "step" in holder}
    if len(steps) != 1 or min(steps) < 1:
        raise ModelError(f"{file}: expected one number of updates for all parameters, found {sorted(steps) or 'none'}.")
    return steps.pop()


def adam_numbers(groups: Sequence[Mapping[str, Any]], file: str, max_grad_norm: Any = None) -> AdamNumbers:
    """Return what an optimizer's groups of parameters agree on; a learning rate that differs counts as not known.

    Raises:
        ModelError: Betas or epsilon differ between groups.
    """
    used = [group for group in groups if group.get("params", True)]
    found: dict[str, set[Any]] = {
        key: {tuple(group[key]) if key == "betas" else group[key] for group in used if key in group}
        for key in ("lr", "betas", "eps")
    }
    differing = [key for key in ("betas", "eps") if len(found[key]) > 1]
    if differing:
        raise ModelError(f"{file}: {differing[0]} differs between parameters: {sorted(found[differing[0]])}.")
    beta1, beta2 = found["betas"].pop() if found["betas"] else (None, None)
    rate = found["lr"].pop() if len(found["lr"]) == 1 else None
    return AdamNumbers(
        learning_rate=None if rate is None else float(rate),
        beta1=beta1,
        beta2=beta2,
        eps=found["eps"].pop() if found["eps"] else None,
        max_grad_norm=float(max_grad_norm) if max_grad_norm else None,
    )


def state_and_groups(content: Any, file: str) -> tuple[Mapping[Any, Any], list[Mapping[str, Any]]]:
    """Return the two parts of an optimizer's ``state_dict()``.

    Raises:
        StoreError: It is something else.
        ModelError: No parameter has a state.
    """
    state = content.get("state") if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping):
        keys = sorted(map(str, content)) if isinstance(content, Mapping) else type(content).__name__
        raise StoreError(f"{file}: expected an optimizer's state_dict() with state and param_groups, found {keys}.")
    if not state:
        raise ModelError(f"{file}: the optimizer holds no moments: it was saved before its first step.")
    return state, list(content.get("param_groups") or [])


def check_against_adapter(optimizer: ForeignOptimizer, adapter: Mapping[str, Tensor]) -> None:
    """Refuse moments that are not those of the adapter's parameters.

    Raises:
        ModelError: Names or shapes differ, or a second moment is negative.
        NonFiniteError: A number is NaN or infinite.
    """
    for key, tensors in optimizer.moments.items():
        missing, unknown = sorted(adapter.keys() - tensors.keys()), sorted(tensors.keys() - adapter.keys())
        if missing or unknown:
            raise ModelError(
                f"{optimizer.file}: {key} belongs to another adapter: {len(missing)} parameters missing "
                f"{missing[:3]}, {len(unknown)} unknown {unknown[:3]}. Check that both come from one checkpoint."
            )
        for name, tensor in tensors.items():
            check_shape(optimizer.file, f"{key} of {name}", tuple(tensor.shape), tuple(adapter[name].shape))
            if not bool(torch.isfinite(tensor).all()):
                raise NonFiniteError(f"{optimizer.file}: {key} of {name} holds NaN or infinity.")
            if key == "exp_avg_sq" and bool((tensor < 0).any()):
                raise ModelError(f"{optimizer.file}: {key} of {name} is negative somewhere: no mean of squares.")


def check_shape(file: str, what: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Raise ModelError where two shapes differ; ``what`` is that of which they are."""
    if found != expected:
        raise ModelError(
            f"{file}: {what} has shape {found}, the adapter's is {expected} ({math.prod(found):,} and "
            f"{math.prod(expected):,} numbers): another LoRA rank, another base model, or another order of parameters."
        )
