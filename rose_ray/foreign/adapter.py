"""The adapter beside another trainer's optimizer: its PEFT settings and its weights."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from rose_ray.config.model import ModelConfig
from rose_ray.errors import ModelError, NonFiniteError, StoreError
from rose_ray.foreign.optimizer import by_layout_name
from rose_ray.foreign.pickles import load_pickled
from rose_ray.model.base import load_base
from rose_ray.model.checkpoint import ADAPTER_CONFIG_FILE, ADAPTER_FILE, UNSUPPORTED_SETTINGS

PICKLED_ADAPTER_FILE = "adapter_model.bin"


@dataclass(frozen=True)
class AdapterSettings:
    """A PEFT adapter's settings.

    Attributes:
        folder: Where they were read.
        content: The file's bytes.
        rank: Of every matrix.
        base: What the adapter was trained on, as it says itself; empty where it does not.
    """

    folder: str
    content: bytes
    rank: int
    base: str


def read_settings(folders: list[str]) -> AdapterSettings:
    """Return the settings in the first of ``folders`` that holds some.

    Raises:
        StoreError: None does, or the file cannot be read.
        ModelError: It is no plain LoRA adapter.
    """
    folder = next((each for each in folders if os.path.isfile(os.path.join(each, ADAPTER_CONFIG_FILE))), None)
    if folder is None:
        raise StoreError(
            f"no {ADAPTER_CONFIG_FILE} in {' or '.join(folders)}. Name the folder of the PEFT adapter with --adapter."
        )
    path = os.path.join(folder, ADAPTER_CONFIG_FILE)
    with open(path, "rb") as file:
        content = file.read()
    try:
        settings = json.loads(content)
        rank, kind = int(settings["r"]), settings["peft_type"]
    except (ValueError, TypeError, KeyError) as error:
        raise StoreError(
            f"{path}: not the settings of a PEFT LoRA adapter ({type(error).__name__}: {error})."
        ) from error
    refused = {key: settings[key] for key in UNSUPPORTED_SETTINGS if settings.get(key)}
    if kind != "LORA" or refused:
        raise ModelError(f"{path}: peft_type {kind!r} with {refused}; expected a plain LORA adapter on linear layers.")
    return AdapterSettings(folder, content, rank, settings.get("base_model_name_or_path") or "")


def read_weights(folder: str) -> dict[str, Tensor]:
    """Return an adapter's weights by layout name, float32, from safetensors, else from ``adapter_model.bin``.

    Raises:
        StoreError: Neither is there, or it cannot be read.
    """
    path, pickled = (os.path.join(folder, name) for name in (ADAPTER_FILE, PICKLED_ADAPTER_FILE))
    if os.path.isfile(path):
        try:
            tensors: Any = safetensors.torch.load_file(path)
        except safetensors.SafetensorError as error:
            raise StoreError(f"{path}: not a readable safetensors file ({error}).") from error
    elif os.path.isfile(pickled):
        path, tensors = pickled, load_pickled(pickled)
    else:
        raise StoreError(f"{folder}: no adapter weights; expected {ADAPTER_FILE} or {PICKLED_ADAPTER_FILE}.")
    if not isinstance(tensors, Mapping) or not all(torch.is_tensor(tensor) for tensor in tensors.values()):
        raise StoreError(f"{path}: expected tensors by parameter name, found {type(tensors).__name__}.")
    return {name: tensor.float() for name, tensor in by_layout_name(tensors, path).items()}


def check_weights(adapter: Mapping[str, Tensor], settings: AdapterSettings) -> None:
    """Refuse weights that are not those of a plain LoRA adapter of the rank that the settings name.

    Raises:
        ModelError: Another rank, or parameters besides LoRA's two matrices a layer.
        NonFiniteError: A weight is NaN or infinite.
    """
    where = settings.folder
    foreign = [name for name in adapter if not name.endswith((".lora_A.weight", ".lora_B.weight"))]
    if foreign or not adapter:
        raise ModelError(
            f"{where}: expected LoRA's lora_A and lora_B alone, found {len(foreign)} others {foreign[:3]}."
        )
    for name, tensor in adapter.items():
        rank = tensor.shape[0] if name.endswith(".lora_A.weight") else tensor.shape[-1]
        if tensor.dim() != 2 or rank != settings.rank:
            raise ModelError(
                f"{where}: {name} has shape {tuple(tensor.shape)}, but {ADAPTER_CONFIG_FILE} says r: {settings.rank}."
            )
        if not bool(torch.isfinite(tensor).all()):
            raise NonFiniteError(f"{where}: {name} holds NaN or infinity.")


def adapted_model(settings: AdapterSettings, base: str) -> Any:
    """Return the PEFT model that was trained, without weights: names, shapes and the order of its parameters.

    Args:
        settings: Of the adapter.
        base: Folder or Hugging Face name; what the settings name where empty.

    Raises:
        ModelError: There is no such base model, or it lacks the adapter's target modules.
    """
    from peft import LoraConfig, get_peft_model

    name = base or settings.base
    if not name:
        raise ModelError(
            f"{settings.folder}/{ADAPTER_CONFIG_FILE} does not name the base model, and the optimizer's state goes by "
            "the order of its parameters. Name it with --base."
        )
    try:
        base_model: Any = load_base(ModelConfig(base=name), device="meta")
        lora: Any = LoraConfig.from_pretrained(settings.folder)
        lora.inference_mode = False  # saved as True always; what is trained is asked for here
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The PEFT config's `base_model_name_or_path` was renamed")
            return get_peft_model(base_model, lora)
    except ModelError as error:
        raise ModelError(f"{error} Name the base model that the adapter was trained on with --base.") from error
    except ValueError as error:
        raise ModelError(f"{settings.folder}: the adapter does not fit the base model {name}: {error}") from error


def check_against_model(
    adapter: Mapping[str, Tensor], model: Any, settings: AdapterSettings
) -> dict[str, tuple[int, ...]]:
    """Return the trained parameters' shapes by layout name, in the model's order, once the weights are seen to fit.

    Raises:
        ModelError: They belong to another base model.
    """
    shapes = by_layout_name(
        {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}, settings.folder
    )
    if adapter.keys() != shapes.keys():
        missing, unknown = sorted(shapes.keys() - adapter.keys()), sorted(adapter.keys() - shapes.keys())
        raise ModelError(
            f"{settings.folder}: the adapter belongs to another base model: {len(missing)} parameters missing "
            f"{missing[:3]}, {len(unknown)} unknown {unknown[:3]}. Name the one it was trained on with --base."
        )
    for name, tensor in adapter.items():
        found, expected = tuple(tensor.shape), shapes[name]
        if found != expected:
            raise ModelError(
                f"{settings.folder}: {name} has shape {found}, the base model gives {expected}. "
                "Name the base model that the adapter was trained on with --base."
            )
    return shapes
