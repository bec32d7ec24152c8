"""From a method's name, or its path, to the method."""

from __future__ import annotations

import importlib
from dataclasses import fields
from typing import Any

from rose_ray.config.job import JobConfig
from rose_ray.config.method import BUILT_IN, Needs, parse_options
from rose_ray.config.target import TargetConfig
from rose_ray.errors import ConfigError
from rose_ray.methods.interface import Method

_COLUMNS = ("subtasks", "pairs", "one")


def method_of(target: TargetConfig) -> Method[Any]:
    """Return the method that scores a target's rows.

    Raises:
        ConfigError: A path leads to no method, options do not fit, or pairs are missing.
    """
    name = target.method
    kind = _found(BUILT_IN[name].path if name in BUILT_IN else name, target.name)
    try:
        method = kind(parse_options(name, kind.options_model, target.method_options))
    except ValueError as error:
        raise ConfigError(f"target {target.name}: {error}.") from error
    if method.columns not in _COLUMNS:
        raise ConfigError(
            f"target {target.name}: method {name}: columns is {method.columns!r}; expected one of {', '.join(_COLUMNS)}"
        )
    if target.scores_pairs and method.columns != "pairs":
        raise ConfigError(
            f"target {target.name}: selection.method: round_robin_pairs needs a score a pair, and method {name} gives "
            f"{'one' if method.columns == 'one' else 'one a subtask'}: choose another selection.method."
        )
    if method.needs.pairs and not target.pairs:
        raise ConfigError(f"target {target.name}: method {name} needs preference pairs: set `pairs`.")
    return method


def methods_of(config: JobConfig) -> dict[str, Method[Any]]:
    """Return the methods of all targets that have one, by the target's name; raises as `method_of`."""
    return {target.name: method_of(target) for target in config.method_targets}


def needs_of(config: JobConfig) -> Needs:
    """Return what a job needs in all, its gradient targets included; raises as `method_of`."""
    needs = [method.needs for method in methods_of(config).values()]
    if config.gradient_targets:
        needs.append(Needs(pairs=True, model=True, adapter=True, warmup=True))
    if config.row_states:
        needs.append(Needs(model=True))
    return Needs(**{field.name: any(getattr(each, field.name) for each in needs) for field in fields(Needs)})


def _found(path: str, target: str) -> type[Method[Any]]:
    module_name, _, class_name = path.partition(":")
    where = f"target {target}: method {path}"
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        if isinstance(error, ModuleNotFoundError) and package != module_name.partition(".")[0]:
            raise ConfigError(
                f"{where}: {module_name} imports the package {package!r}, which is not installed here. Install it on "
                "every machine of the cluster: pip install, by the name that it has there."
            ) from error
        raise ConfigError(
            f"{where}: cannot import {module_name!r} ({error}). Install it on every machine of the cluster, or add its "
            "folder to PYTHONPATH there."
        ) from error
    kind = getattr(module, class_name, None)
    if not (isinstance(kind, type) and issubclass(kind, Method)):
        found = "nothing of that name" if kind is None else f"{kind!r}"
        raise ConfigError(f"{where}: expected a subclass of rose_ray.methods.interface.Method, found {found}.")
    if not hasattr(kind, "options_model"):
        raise ConfigError(f"{where}: {class_name} has no options_model: set it to a subclass of Strict.")
    return kind
