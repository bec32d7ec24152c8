"""The adapter and Adam's moments by name, read from and put into training workers, whatever ZeRO stage cut them.

Stage 0 keeps everything whole on every worker. Stages 1 and 2 cut the optimizer's state among the workers, stage 3 the
weights too. Reading is collective: every worker takes part, and every one gets the whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rose_ray.model.layout import adapter_parameters

MOMENT_KEYS = ("exp_avg", "exp_avg_sq")


def read_state(model: nn.Module, optimizer: torch.optim.Optimizer, zero_stage: int) -> dict[str, dict[str, Tensor]]:
    """Return ``adapter``, ``exp_avg`` and ``exp_avg_sq`` by layout name, float32, on the CPU. Needs a step before."""
    found: dict[str, dict[str, Tensor]] = {key: {} for key in ("adapter", *MOMENT_KEYS)}
    for name, parameter in adapter_parameters(model).items():
        parts = [_weight(parameter, zero_stage), *(_moment(parameter, optimizer, zero_stage, k) for k in MOMENT_KEYS)]
        for key, tensor in zip(found, parts, strict=True):
            found[key][name] = tensor.detach().float().cpu().clone()
    return found


def _weight(parameter: nn.Parameter, zero_stage: int) -> Tensor:
    if zero_stage < 3:
        return parameter
    from deepspeed.utils import safe_get_full_fp32_param

    whole: Tensor = safe_get_full_fp32_param(parameter)
    return whole


def _moment(parameter: nn.Parameter, optimizer: torch.optim.Optimizer, zero_stage: int, key: str) -> Tensor:
    if zero_stage == 0:
        own: Tensor = optimizer.state[parameter][key]
        return own
    from deepspeed.utils import safe_get_full_optimizer_state

    whole: Tensor = safe_get_full_optimizer_state(parameter, key)
    return whole


def set_weights(model: nn.Module, adapter: Mapping[str, Tensor]) -> None:
    """Overwrite the adapter of a model that DeepSpeed does not hold yet: it makes its own copies from these."""
    for name, parameter in adapter_parameters(model).items():
        parameter.data.copy_(adapter[name])


def set_moments(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    zero_stage: int,
    moments: Mapping[str, Mapping[str, Tensor]],
    num_updates: int,
) -> None:
    """Overwrite Adam's state with ``exp_avg`` and ``exp_avg_sq`` by layout name. Needs a step before: it makes them."""
    for name, parameter in adapter_parameters(model).items():
        for key in MOMENT_KEYS:
            _set_moment(parameter, optimizer, zero_stage, key, moments[key][name])
    for entry in optimizer.state.values():
        entry["step"].fill_(num_updates)


def _set_moment(parameter: Any, optimizer: torch.optim.Optimizer, zero_stage: int, key: str, value: Tensor) -> None:
    if zero_stage == 0:
        optimizer.state[parameter][key].copy_(value)
        return
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    value = value.to(parameter.device)
    if zero_stage < 3:
        safe_set_full_optimizer_state(parameter, value, key)
        return
    # DeepSpeed's setter of whole values reads beyond the end where the workers do not divide a parameter evenly.
    size = parameter.ds_tensor.numel()
    padded = value.new_zeros(size * torch.distributed.get_world_size())
    padded[: value.numel()] = value.flatten()
    safe_set_local_optimizer_state(parameter, padded[size * torch.distributed.get_rank() :][:size], key)
