"""A training checkpoint from elsewhere, turned into a folder that ``warmup.adapters`` takes with its Adam moments."""

from __future__ import annotations

import json
import logging
import os
import shutil
import uuid
from dataclasses import dataclass, field, replace
from typing import Literal

import safetensors.torch
from torch import Tensor

from rose_ray.distributed.deepspeed_checkpoint import read_deepspeed, step_folder
from rose_ray.errors import ConfigError, ModelError, StoreError
from rose_ray.filesystem import child, locate, write_bytes
from rose_ray.foreign.adapter import (
    AdapterSettings,
    adapted_model,
    check_against_model,
    check_weights,
    read_settings,
    read_weights,
)
from rose_ray.foreign.history import History, read_history
from rose_ray.foreign.optimizer import AdamNumbers, ForeignOptimizer, check_against_adapter
from rose_ray.foreign.trainer import (
    BY_NAME_FILE,
    BY_ORDER_FILE,
    named_optimizer,
    optimizer_file,
    ordered_optimizer,
    read_optimizer,
    trainer_groups,
)
from rose_ray.model.checkpoint import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    MOMENTS_FILE,
    STATE_FILE,
    OptimizerState,
    moments_bytes,
    state_json,
)

logger = logging.getLogger(__name__)

Kind = Literal["auto", "hf_trainer", "less", "deepspeed"]
_FILES = {"hf_trainer": (BY_ORDER_FILE,), "less": (BY_NAME_FILE,)}


@dataclass(frozen=True)
class Given:
    """What the user says because the checkpoint does not.

    Attributes:
        adapter: Folder of the PEFT adapter where it is not that of the checkpoint.
        base: Folder or name of the base model where the adapter does not name it.
        numbers: Of Adam, where the files hold none.
    """

    adapter: str = ""
    base: str = ""
    numbers: AdamNumbers = field(default_factory=AdamNumbers)


def import_checkpoint(source: str, out: str, *, kind: Kind = "auto", given: Given | None = None) -> list[str]:
    """Convert a checkpoint and return lines that say what it held.

    Args:
        source: Local folder.
        out: Folder to make; it appears when it is whole.
        kind: What wrote the checkpoint; ``auto`` looks at its files.
        given: What the checkpoint does not say.

    Raises:
        ConfigError: ``out`` is there already, or ``given`` contradicts the files.
        StoreError: A file is missing, unreadable or holds code.
        ModelError: The files do not belong together, or the optimizer is not Adam.
        NonFiniteError: A number is NaN or infinite.
    """
    given = given or Given()
    if os.path.exists(out):
        raise ConfigError(f"{out} exists already. Name another folder with --out.")
    if not os.path.isdir(source):
        raise StoreError(f"{source}: no such folder on this machine. Name the checkpoint's folder.")
    kind = found_kind(source) if kind == "auto" else kind
    settings = read_settings(_adapter_folders(source, kind, given.adapter))
    logger.info(f"import: reading {source} as {kind}")
    optimizer, adapter = _read(source, kind, settings, given.base)
    check_weights(adapter, settings)
    check_against_adapter(optimizer, adapter)
    history = read_history(source)
    state, rate_source = _state(optimizer, history, given.numbers)
    _write(out, settings, adapter, optimizer, state)
    return _lines(kind, optimizer, state, rate_source, out)


def _adapter_folders(source: str, kind: Kind, adapter: str) -> list[str]:
    if adapter:
        return [adapter]
    # DeepSpeed's files hold the weights too. Elsewhere the folder above may hold those of a later step.
    return [source, os.path.dirname(os.path.abspath(source))] if kind == "deepspeed" else [source]


def found_kind(source: str) -> Kind:
    """Return what wrote a checkpoint, by its files.

    Raises:
        StoreError: None of the files that hold an optimizer is there.
    """
    if step_folder(source):
        return "deepspeed"
    name = os.path.basename(optimizer_file(source, (BY_ORDER_FILE, BY_NAME_FILE)))
    return "hf_trainer" if name == BY_ORDER_FILE else "less"


def _read(source: str, kind: Kind, settings: AdapterSettings, base: str) -> tuple[ForeignOptimizer, dict[str, Tensor]]:
    if kind == "deepspeed":
        folder = step_folder(source)
        if folder is None:
            raise StoreError(f"{source}: no DeepSpeed checkpoint: neither *_model_states.pt nor a file `latest`.")
        optimizer = read_deepspeed(folder)
        assert optimizer.adapter is not None
        _check_model(optimizer.adapter, settings, base)
        return optimizer, optimizer.adapter
    adapter = read_weights(settings.folder)
    check_weights(adapter, settings)
    path = optimizer_file(source, _FILES[kind])
    state, groups, by_name = read_optimizer(path)
    if by_name:
        _check_model(adapter, settings, base)
        return named_optimizer(state, groups, path), adapter
    model = adapted_model(settings, base)
    shapes = check_against_model(adapter, model, settings)
    return ordered_optimizer(state, groups, trainer_groups(model), shapes, path), adapter


def _check_model(adapter: dict[str, Tensor], settings: AdapterSettings, base: str) -> None:
    # A state by name needs no model; one that is named is looked at all the same.
    if base:
        check_against_model(adapter, adapted_model(settings, base), settings)


def _state(optimizer: ForeignOptimizer, history: History | None, given: AdamNumbers) -> tuple[OptimizerState, str]:
    numbers, where = optimizer.numbers, "the optimizer's own"
    if history is not None and history.step < optimizer.step:
        raise ModelError(
            f"{optimizer.file}: the optimizer took {optimizer.step:,} steps, the trainer_state.json beside it says "
            f"{history.step:,}. Take both from one checkpoint."
        )
    if history is not None and history.mean_learning_rate:
        numbers, where = replace(numbers, learning_rate=history.mean_learning_rate), history.where
    beta1, beta2, eps = (
        _agreed(option, getattr(numbers, option), getattr(given, option), optimizer.file)
        for option in ("beta1", "beta2", "eps")
    )
    rate, where = (given.learning_rate, "given") if given.learning_rate else (numbers.learning_rate, where)
    if not rate:  # a schedule that has ended leaves 0, which says nothing
        raise ModelError(
            f"{optimizer.file}: no learning rate above 0 is recorded. Give the epoch's mean with --learning-rate."
        )
    epoch = history.epoch if history is not None else None
    return OptimizerState(optimizer.step, rate, beta1, beta2, eps, numbers.max_grad_norm, epoch), where


def _agreed(option: str, found: float | None, given: float | None, file: str) -> float:
    if found is None and given is None:
        raise ModelError(f"{file}: does not say Adam's {option}. Give it with --{option}.")
    if found is not None and given is not None and found != given:
        raise ConfigError(f"--{option} {given:g}, but {file} says {found:g}. Leave the option out.")
    return float(found if found is not None else given)  # type: ignore[arg-type]  # one of them is there


def _write(
    out: str,
    settings: AdapterSettings,
    adapter: dict[str, Tensor],
    optimizer: ForeignOptimizer,
    state: OptimizerState,
) -> None:
    target = os.path.abspath(out)
    aside = locate(f"{target}.{uuid.uuid4().hex}.tmp")
    try:
        tensors = {name: adapter[name].contiguous() for name in sorted(adapter)}
        write_bytes(child(aside, ADAPTER_FILE), safetensors.torch.save(tensors, {"format": "pt"}))
        write_bytes(child(aside, ADAPTER_CONFIG_FILE), settings.content)
        write_bytes(
            child(aside, MOMENTS_FILE), moments_bytes(*(optimizer.moments[k] for k in ("exp_avg", "exp_avg_sq")))
        )
        write_bytes(child(aside, STATE_FILE), (json.dumps(state_json(state), indent=2) + "\n").encode())
        os.rename(aside.path, target)
    finally:
        shutil.rmtree(aside.path, ignore_errors=True)


def _lines(kind: Kind, optimizer: ForeignOptimizer, state: OptimizerState, rate_source: str, out: str) -> list[str]:
    numbers = sum(tensor.numel() for tensor in optimizer.moments["exp_avg"].values())
    return [
        f"{kind}: {optimizer.file}",
        f"{len(optimizer.moments['exp_avg'])} parameters of {numbers:,} numbers, after {state.num_updates:,} updates",
        f"learning rate {state.mean_learning_rate:g} ({rate_source}), betas {state.adam_beta1:g} and "
        f"{state.adam_beta2:g}, eps {state.adam_eps:g}",
        f"wrote {out}: name it in warmup.adapters, and {state.mean_learning_rate:g} in warmup.adapter_weights",
    ]
