"""A warm-up checkpoint: a PEFT adapter, Adam's moments by parameter name, and the numbers that go with them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from rose_ray.errors import ModelError, StoreError
from rose_ray.filesystem import Location, child, read_bytes
from rose_ray.model.layout import ParameterLayout

ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG_FILE = "adapter_config.json"
MOMENTS_FILE = "moments.safetensors"
STATE_FILE = "optimizer_state.json"
UNSUPPORTED_SETTINGS = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save")
"""Of a PEFT adapter; where one of them is set, it is another kind of adapter than the one that is scored."""

_EXP_AVG = "exp_avg."
_EXP_AVG_SQ = "exp_avg_sq."


@dataclass(frozen=True)
class OptimizerState:
    """The numbers of the optimizer that really ran.

    Attributes:
        num_updates: Steps taken when the checkpoint was made.
        mean_learning_rate: Mean over the steps of its epoch.
        adam_beta1, adam_beta2, adam_eps: Of Adam.
        max_grad_norm: Length that gradients were clipped to; None where another trainer did not say.
        epoch: Number of the epoch that it ends, from 1; None likewise.
    """

    num_updates: int
    mean_learning_rate: float
    adam_beta1: float
    adam_beta2: float
    adam_eps: float
    max_grad_norm: float | None
    epoch: int | None


@dataclass(frozen=True)
class Checkpoint:
    """Weights and moments by parameter name, float32, on the CPU.

    ``exp_avg``, ``exp_avg_sq`` and ``state`` are None for an adapter that came without an optimizer.
    """

    name: str
    adapter: dict[str, Tensor]
    exp_avg: dict[str, Tensor] | None
    exp_avg_sq: dict[str, Tensor] | None
    state: OptimizerState | None


def moments_bytes(exp_avg: Mapping[str, Tensor], exp_avg_sq: Mapping[str, Tensor]) -> bytes:
    """Serialise moments by parameter name."""
    tensors = {_EXP_AVG + name: tensor.contiguous() for name, tensor in exp_avg.items()}
    tensors |= {_EXP_AVG_SQ + name: tensor.contiguous() for name, tensor in exp_avg_sq.items()}
    return safetensors.torch.save(tensors)


def state_json(state: OptimizerState) -> dict[str, Any]:
    """The content of ``STATE_FILE``."""
    return asdict(state)


def read_checkpoint(folder: Location, layout: ParameterLayout) -> Checkpoint:
    """Read a checkpoint made by the warm-up, or a PEFT adapter folder without moments.

    Raises:
        StoreError: A file is missing or unreadable.
        ModelError: It belongs to another model or adapter shape.
    """
    adapter = _tensors(child(folder, ADAPTER_FILE))
    layout.check(adapter, folder.name)
    if not has_moments(folder):
        return Checkpoint(folder.name, adapter, None, None, None)
    moments = _tensors(child(folder, MOMENTS_FILE))
    exp_avg = {n.removeprefix(_EXP_AVG): t for n, t in moments.items() if n.startswith(_EXP_AVG)}
    exp_avg_sq = {n.removeprefix(_EXP_AVG_SQ): t for n, t in moments.items() if n.startswith(_EXP_AVG_SQ)}
    layout.check(exp_avg, f"{folder.name}/{MOMENTS_FILE} (first moments)")
    layout.check(exp_avg_sq, f"{folder.name}/{MOMENTS_FILE} (second moments)")
    return Checkpoint(folder.name, adapter, exp_avg, exp_avg_sq, read_state(folder))


def has_moments(folder: Location) -> bool:
    """Whether a checkpoint came with Adam's moments."""
    return bool(folder.filesystem.get_file_info(child(folder, MOMENTS_FILE).path).is_file)


def read_state(folder: Location) -> OptimizerState:
    """Read the numbers that belong to a checkpoint's moments.

    Raises:
        StoreError: The file is missing or unreadable.
    """
    file = child(folder, STATE_FILE)
    if not file.filesystem.get_file_info(file.path).is_file:
        raise StoreError(f"{file.name}: no such file, but {MOMENTS_FILE} beside it needs one. Add it.")
    try:
        return OptimizerState(**json.loads(read_bytes(file)))
    except (ValueError, TypeError) as error:
        raise StoreError(
            f"{file.name}: not the numbers of an optimizer ({error}). Expected what a warm-up writes."
        ) from error


def adapter_digest(folder: Location) -> str:
    """Return 16 hex digits that stand for a folder's adapter weights, and moments where there are some."""
    digest = hashlib.sha256()
    for name in (ADAPTER_FILE, MOMENTS_FILE):
        file = child(folder, name)
        if folder.filesystem.get_file_info(file.path).is_file:
            digest.update(hashlib.sha256(read_bytes(file)).digest())
        elif name == ADAPTER_FILE:
            raise StoreError(f"{file.name}: no such file. Expected a PEFT adapter folder with safetensors weights.")
    return digest.hexdigest()[:16]


def check_adapter_config(folder: Location, *, rank: int, alpha: float, target_modules: list[str]) -> None:
    """Refuse a PEFT adapter whose settings differ from the configured ones: its gradients would be scaled wrongly.

    Raises:
        StoreError: There is no adapter configuration.
        ModelError: Rank, alpha, targets or the kind of adapter differ.
    """
    file = child(folder, ADAPTER_CONFIG_FILE)
    if not folder.filesystem.get_file_info(file.path).is_file:
        raise StoreError(f"{file.name}: no such file. Expected a PEFT adapter folder.")
    try:
        found = json.loads(read_bytes(file))
    except ValueError as error:
        raise StoreError(f"{file.name}: not JSON ({error}). Expected a PEFT adapter folder.") from error
    if not isinstance(found, dict):
        raise StoreError(f"{file.name}: expected keys and values, found {type(found).__name__}.")
    expected = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha}
    differing = {key: (found.get(key), value) for key, value in expected.items() if found.get(key) != value}
    if set(found.get("target_modules") or []) != set(target_modules):
        differing["target_modules"] = (found.get("target_modules"), target_modules)
    for key in UNSUPPORTED_SETTINGS:
        if found.get(key):
            differing[key] = (found[key], None)
    if differing:
        text = "; ".join(f"{key} is {a!r}, expected {b!r}" for key, (a, b) in differing.items())
        raise ModelError(f"{file.name}: {text}. Make `lora` agree with the adapter.")


def _tensors(file: Location) -> dict[str, Tensor]:
    if not file.filesystem.get_file_info(file.path).is_file:
        raise StoreError(f"{file.name}: no such file. Expected a PEFT adapter folder with safetensors weights.")
    try:
        return safetensors.torch.load(read_bytes(file))
    except safetensors.SafetensorError as error:
        raise StoreError(f"{file.name}: not a readable safetensors file ({error}).") from error
