"""The user's own adapters in ``warmup.adapters``: what came with them, and whether they fit."""

from __future__ import annotations

import torch

from rose_ray.config.job import JobConfig
from rose_ray.errors import ModelError, NonFiniteError
from rose_ray.filesystem import Location, locate
from rose_ray.model.checkpoint import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    MOMENTS_FILE,
    STATE_FILE,
    OptimizerState,
    adapter_digest,
    check_adapter_config,
    has_moments,
    read_checkpoint,
    read_state,
    state_json,
)
from rose_ray.model.layout import ParameterLayout
from rose_ray.stores.manifest import artefact_key


def adapter_files(state: OptimizerState | None) -> tuple[str, ...]:
    """Names of an adapter's files; ``state``: what came with its moments, None where it came without."""
    return (ADAPTER_FILE, ADAPTER_CONFIG_FILE, *((MOMENTS_FILE, STATE_FILE) if state else ()))


def own_digest(folder: Location) -> str:
    """Return what stands for weights, moments and the numbers that go with them."""
    digest = adapter_digest(folder)
    return artefact_key({"adapter": digest, "state": state_json(read_state(folder))}) if has_moments(folder) else digest


def check_moments(config: JobConfig) -> None:
    """Refuse adapters in ``warmup.adapters`` that lack the moments ``gradients.adam`` needs.

    Raises:
        ModelError: A folder holds none.
    """
    mode = config.gradients.adam
    for name in config.warmup.adapters or []:
        if mode != "sgd" and not has_moments(locate(name)):
            raise ModelError(
                f"{name}: no {MOMENTS_FILE}, but gradients.adam: {mode} needs Adam's moments of every adapter. "
                f"Add it and {STATE_FILE}, or set gradients.adam: sgd."
            )


def check_own_adapters(config: JobConfig, layout: ParameterLayout) -> list[OptimizerState | None]:
    """Refuse adapters in ``warmup.adapters`` that were not made for this model and ``lora``.

    Returns:
        What came with each adapter's moments; None where it came without.

    Raises:
        StoreError: A folder holds no PEFT adapter, or moments without their numbers.
        ModelError: It is one of another model, rank, alpha or target, or lacks moments that are needed.
        NonFiniteError: It holds NaN or infinity.
    """
    states = []
    for name in config.warmup.adapters or []:
        folder, lora = locate(name), config.lora
        check_adapter_config(folder, rank=lora.rank, alpha=lora.alpha, target_modules=lora.target_modules)
        checkpoint = read_checkpoint(folder, layout)
        for what in (checkpoint.adapter, checkpoint.exp_avg or {}, checkpoint.exp_avg_sq or {}):
            bad = [parameter for parameter, tensor in what.items() if not bool(torch.isfinite(tensor).all())]
            if bad:
                raise NonFiniteError(
                    f"{name}: {len(bad)} parameters hold NaN or infinity, the first {bad[0]}. Use a sound adapter."
                )
        states.append(checkpoint.state)
    check_moments(config)
    return states


def describe_moments(state: OptimizerState | None) -> str:
    """Say what came with an adapter's moments."""
    if state is None:
        return "without Adam's moments: only gradients.adam: sgd is open"
    return f"with Adam's moments after {state.num_updates:,} updates"
