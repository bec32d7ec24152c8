"""Checkpoints of transformers' Trainer: ``optimizer.pt`` by the parameters' order, ``optimizer.bin`` by their names.

The Trainer makes two groups, parameters with weight decay and those without, each in the model's order; torch numbers
them through both. Under FSDP it saves a state by name instead, which is what the released code of LESS and ROSE reads.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from rose_ray.errors import ModelError, StoreError
from rose_ray.foreign.optimizer import (
    MOMENT_KEYS,
    ForeignOptimizer,
    adam_moments,
    adam_numbers,
    by_layout_name,
    check_shape,
    common_step,
    layout_name,
    state_and_groups,
)
from rose_ray.foreign.pickles import load_pickled

BY_ORDER_FILE = "optimizer.pt"
BY_NAME_FILE = "optimizer.bin"


def optimizer_file(folder: str, names: Sequence[str]) -> str:
    """Return the path of the first of ``names`` in a checkpoint.

    Raises:
        StoreError: None is there.
    """
    for name in names:
        if os.path.isfile(os.path.join(folder, name)):
            return os.path.join(folder, name)
    sharded = [name for name in sorted(os.listdir(folder)) if name.startswith("optimizer_")]
    hint = f" {sharded[0]} is in shards: save it with FSDP's FULL_STATE_DICT." if sharded else ""
    raise StoreError(f"{folder}: no {' or '.join(names)}, so no moments to import.{hint}")


def read_optimizer(path: str) -> tuple[Mapping[Any, Any], list[Mapping[str, Any]], bool]:
    """Return state, groups, and whether the state goes by name.

    Raises:
        StoreError: The file is not an optimizer's state.
    """
    state, groups = state_and_groups(load_pickled(path), path)
    kinds = {type(key) for key in state}
    if kinds not in ({int}, {str}):
        raise StoreError(f"{path}: expected a state by number or by name, found keys {sorted(map(str, state))[:3]}.")
    return state, groups, kinds == {str}


def named_optimizer(
    state: Mapping[str, Any], groups: list[Mapping[str, Any]], path: str, max_grad_norm: Any = None
) -> ForeignOptimizer:
    """Return an optimizer's state that goes by parameter name; entries without any state are passed over."""
    entries = {name: entry for name, entry in by_layout_name(state, path).items() if entry}
    found = {name: adam_moments(entry, name, path) for name, entry in entries.items()}
    return ForeignOptimizer(
        moments={key: {name: moments[key] for name, moments in found.items()} for key in MOMENT_KEYS},
        step=common_step(list(entries.values()), groups, path),
        numbers=adam_numbers(groups, path, max_grad_norm),
        adapter=None,
        file=path,
    )


def names_by_number(
    groups: list[Mapping[str, Any]],
    expected: Sequence[Sequence[str]],
    path: str,
) -> dict[int, str]:
    """Return the parameter that each number of a state stands for.

    Args:
        groups: Of the optimizer, with their numbers at ``params``.
        expected: Names of each group, in order, as the trainer would have made them.
        path: For messages.

    Raises:
        ModelError: The groups have other sizes, so that the order is not known.
    """
    recorded = [group.get("param_names") for group in groups]
    if groups and all(recorded):
        expected = [[layout_name(name) for name in names or []] for names in recorded]
    sizes, wanted = [[len(part) for part in parts if len(part)] for parts in ([g["params"] for g in groups], expected)]
    if sizes != wanted:
        raise ModelError(
            f"{path}: its groups hold {sizes} parameters; of this adapter the Trainer makes {wanted}. The state goes "
            "by number, and which number is which parameter is not known (LoRA+ or an optimizer of your own?). "
            "Import a checkpoint that was saved by name."
        )
    numbers = [number for group in groups for number in group["params"]]
    return dict(zip(numbers, (name for names in expected for name in names), strict=True))


def ordered_optimizer(
    state: Mapping[int, Any],
    groups: list[Mapping[str, Any]],
    expected: Sequence[Sequence[str]],
    shapes: Mapping[str, tuple[int, ...]],
    path: str,
    max_grad_norm: Any = None,
) -> ForeignOptimizer:
    """Return an optimizer's state that goes by number; ``expected`` as in `names_by_number`, ``shapes`` by name."""
    names = names_by_number(groups, expected, path)
    unknown = sorted(set(state) - set(names))
    if unknown:
        raise ModelError(f"{path}: state of parameters {unknown[:3]}, which stand in no group.")
    for number, entry in state.items():
        for key, tensor in adam_moments(entry, names[number], path).items():
            check_shape(
                path, f"{key} of parameter {number}, {names[number]},", tuple(tensor.shape), shapes[names[number]]
            )
    return named_optimizer({names[number]: entry for number, entry in state.items()}, groups, path, max_grad_norm)


def trainer_groups(model: Any) -> list[list[str]]:
    """Return the names of a model's trained parameters as the Trainer groups them: with weight decay, and without."""
    from transformers import Trainer

    decayed = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]  # it uses nothing of its own
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = ([name for name in trained if name in decayed], [name for name in trained if name not in decayed])
    return [list(by_layout_name(dict.fromkeys(names), "model")) for names in groups]
