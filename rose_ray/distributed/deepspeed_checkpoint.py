"""DeepSpeed's checkpoint folders: Adam's moments and the adapter by name, out of the shards of every ZeRO stage.

Stage 0 keeps the optimizer's state by number beside the module. Stages 1 and 2 cut one flat vector a group of
parameters among the ranks and record where each piece lies. Stage 3 cuts every parameter, which DeepSpeed's own
converter undoes.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from rose_ray.distributed.engine import import_deepspeed
from rose_ray.errors import ModelError, RoseError, StoreError
from rose_ray.foreign.optimizer import (
    MOMENT_KEYS,
    AdamNumbers,
    ForeignOptimizer,
    adam_moments,
    adam_numbers,
    by_layout_name,
    common_step,
    state_and_groups,
)
from rose_ray.foreign.pickles import load_pickled
from rose_ray.foreign.trainer import ordered_optimizer

LATEST_FILE = "latest"
_MODEL_STATES, _OPTIM_STATES = "_model_states.pt", "_optim_states.pt"
_RANK = re.compile(r"zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt$")


def step_folder(source: str) -> str | None:
    """Return the folder with a DeepSpeed checkpoint's files: ``source``, or the one its ``latest`` names; else None.

    Raises:
        StoreError: ``latest`` names a folder that is not there.
    """
    if any(name.endswith(_MODEL_STATES) for name in os.listdir(source)):
        return source
    latest = os.path.join(source, LATEST_FILE)
    if not os.path.isfile(latest):
        return None
    with open(latest, encoding="utf-8") as file:
        folder = os.path.join(source, file.read().strip())
    if not os.path.isdir(folder):
        raise StoreError(f"{latest}: names {folder}, which is not there. Copy the whole checkpoint.")
    return folder


def read_deepspeed(folder: str) -> ForeignOptimizer:
    """Read the optimizer and the adapter of a checkpoint that any ZeRO stage and number of ranks wrote.

    Raises:
        StoreError: A file is missing, unreadable or holds code.
        ModelError: The model was cut by tensor or pipeline parallelism, or the optimizer is not Adam.
    """
    names = sorted(os.listdir(folder))
    if any(name.startswith("layer_") or "_mp_rank_01_" in f"_{name}" for name in names):
        raise ModelError(f"{folder}: the model is cut by tensor or pipeline parallelism; only ZeRO's shards are read.")
    models = [os.path.join(folder, name) for name in names if name.endswith(_MODEL_STATES)]
    if not models:
        raise StoreError(
            f"{folder}: no *{_MODEL_STATES} file. Expected a folder that DeepSpeed's save_checkpoint wrote."
        )
    import_deepspeed("cpu")
    try:
        return _read(folder, models[0], names)
    except RoseError:
        raise
    except (KeyError, IndexError, TypeError, AttributeError, RuntimeError) as error:
        raise StoreError(
            f"{folder}: not laid out as DeepSpeed 0.19 does it ({type(error).__name__}: {error})."
        ) from error


def _read(folder: str, model_file: str, names: Sequence[str]) -> ForeignOptimizer:
    model = _load(model_file)
    shards = _shards(folder, names)
    if not shards:
        return _stage_0(model, model_file)
    contents = [_load(shard).get("optimizer_state_dict") for shard in shards]
    _check_shards(contents, shards, folder)
    merged = _stage_3 if int(contents[0].get("zero_stage", 1)) == 3 else _stages_1_and_2
    return merged(contents, model, shards[0], _clipping(model))


def _load(path: str) -> Any:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    content = load_pickled(path, [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address])
    if not isinstance(content, Mapping):
        raise StoreError(f"{path}: expected the states that DeepSpeed saves, found {type(content).__name__}.")
    return content


def _shards(folder: str, names: Sequence[str]) -> list[str]:
    ranks = {int(found[1]): name for name in names if (found := _RANK.search(name))}
    others = [name for name in names if name.endswith(_OPTIM_STATES) and name not in ranks.values()]
    if others or len(ranks) != sum(name.endswith(_OPTIM_STATES) for name in names):
        raise ModelError(f"{folder}: {others[:3] or names} are no shards of ZeRO over data-parallel ranks alone.")
    return [os.path.join(folder, ranks[rank]) for rank in sorted(ranks)]


def _check_shards(contents: Sequence[Any], shards: Sequence[str], folder: str) -> None:
    for content, shard in zip(contents, shards, strict=True):
        if not isinstance(content, Mapping) or "partition_count" not in content:
            raise StoreError(f"{shard}: no ZeRO shard of an optimizer's state.")
    counts = contents[0]["partition_count"]
    num_ranks = max(counts) if isinstance(counts, list) else int(counts)
    if num_ranks != len(shards):
        raise StoreError(f"{folder}: {len(shards)} of {num_ranks} *{_OPTIM_STATES} files. Copy those of all ranks.")


def _clipping(model: Mapping[str, Any]) -> Any:
    settings = model.get("ds_config")
    return settings.get("gradient_clipping") if isinstance(settings, Mapping) else None


def _stage_0(model: Mapping[str, Any], path: str) -> ForeignOptimizer:
    optimizer = model.get("optimizer") or {}
    inner = optimizer.get("optimizer_state_dict", optimizer)  # around it where DeepSpeed keeps float32 copies
    state, groups = state_and_groups(inner, path)
    adapter = {name: weight for name, weight in model["module"].items() if "lora_" in name}
    copies = [weight for group in optimizer.get("fp32_groups") or [] for weight in group]
    if len(copies) == len(adapter):
        adapter = dict(zip(adapter, copies, strict=True))
    weights = {name: weight.detach().float() for name, weight in by_layout_name(adapter, path).items()}
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    found = ordered_optimizer(state, groups, [list(shapes)], shapes, path, _clipping(model))
    return ForeignOptimizer(found.moments, found.step, found.numbers, weights, path)


def _stages_1_and_2(
    contents: Sequence[Mapping[str, Any]], model: Mapping[str, Any], file: str, clipping: Any
) -> ForeignOptimizer:
    if any("param_slice_mappings" not in content for content in contents):
        raise ModelError(
            f"{file}: an older DeepSpeed wrote it, without the places of its pieces (param_slice_mappings)."
        )
    shapes = _shapes(model, file)
    pieces: dict[str, dict[str, list[Tensor]]] = {key: {} for key in (*MOMENT_KEYS, "weight")}
    entries = []
    for content in contents:
        state, groups = state_and_groups(content["base_optimizer_state"], file)
        flat_weights = content["single_partition_of_fp32_groups"]
        for number, mapping in enumerate(content["param_slice_mappings"]):
            flat = adam_moments(state.get(number), f"group {number}", file) | {"weight": flat_weights[number]}
            entries.append(state[number])
            for name, place in mapping.items():
                for key, vector in flat.items():
                    pieces[key].setdefault(name, []).append(vector.narrow(0, place.start, place.numel))
    whole = {
        key: by_layout_name({name: _joined(parts, shapes.get(name), name, file) for name, parts in named.items()}, file)
        for key, named in pieces.items()
    }
    adapter = {name: tensor.detach().float() for name, tensor in whole.pop("weight").items()}
    return ForeignOptimizer(
        whole, common_step(entries, groups, file), adam_numbers(groups, file, clipping), adapter, file
    )


def _joined(parts: Sequence[Tensor], shape: tuple[int, ...] | None, name: str, file: str) -> Tensor:
    flat = torch.cat(list(parts))
    if shape is None or flat.numel() != torch.Size(shape).numel():
        raise ModelError(f"{file}: the ranks hold {flat.numel():,} numbers of {name}, whose shape is {shape}.")
    return flat.view(shape)


def _shapes(model: Mapping[str, Any], file: str) -> dict[str, tuple[int, ...]]:
    groups = model.get("param_shapes")
    if not isinstance(groups, list):
        raise StoreError(f"{file}: the *{_MODEL_STATES} beside it does not list the parameters' shapes.")
    return {name: tuple(shape) for group in groups for name, shape in group.items()}


def _stage_3(
    contents: Sequence[Mapping[str, Any]], model: Mapping[str, Any], file: str, clipping: Any
) -> ForeignOptimizer:
    states, groups = [], list[Mapping[str, Any]]()
    for content in contents:
        state, groups = state_and_groups(content["optimizer_state_dict"], file)
        states.append([state[number] for number in sorted(state)])
    shapes = {name: torch.Size(shape) for name, shape in _shapes(model, file).items()}
    flat = {
        key: [[adam_moments(entry, "a group", file)[key] for entry in entries] for entries in states]
        for key in MOMENT_KEYS
    }
    moments = {key: _gathered(vectors, shapes, file) for key, vectors in flat.items()}
    adapter = _gathered([content["fp32_flat_groups"] for content in contents], shapes, file)
    numbers: AdamNumbers = adam_numbers(groups, file, clipping)
    return ForeignOptimizer(
        moments, common_step([e for es in states for e in es], groups, file), numbers, adapter, file
    )


def _gathered(vectors: Sequence[Sequence[Tensor]], shapes: Mapping[str, torch.Size], file: str) -> dict[str, Tensor]:
    """Put the ranks' flat vectors together with DeepSpeed's own converter of weights: moments lie as they do."""
    from deepspeed.utils.zero_to_fp32 import _zero3_merge_trainable_params

    gathered: dict[str, Any] = {}
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            _zero3_merge_trainable_params(gathered, len(vectors), vectors, [SimpleNamespace(param_shapes=[shapes])])
            whole = {name: tensor.contiguous().detach().float() for name, tensor in gathered.items()}
    except (ValueError, RuntimeError, TypeError) as error:
        raise ModelError(f"{file}: the ranks' pieces do not make up the parameters listed ({error}).") from error
    return by_layout_name(whole, file)
