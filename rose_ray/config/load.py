"""From YAML text to a checked configuration, with errors that name the key, the value and the near miss."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from rose_ray.config.credentials import refuse_credentials
from rose_ray.config.job import JobConfig
from rose_ray.config.method import GRADIENT_METHODS
from rose_ray.config.numbers import with_floats
from rose_ray.config.presets import PRESETS
from rose_ray.errors import ConfigError


def load_config(path: str, overrides: Sequence[str] = ()) -> JobConfig:
    """Read and check a YAML file.

    Args:
        path: Local file.
        overrides: ``a.b=value`` each; the value is YAML. List items by number: ``targets.0.shots=5``.

    Raises:
        ConfigError: The file is missing, is not YAML, or does not fit; every problem is listed.
    """
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.load(file, _StrictLoader)
    except OSError as error:
        raise ConfigError(
            f"cannot read {path!r}: {error.strerror}. `rose-ray init` writes a commented example."
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML: {error}") from error
    return parse_config(content, overrides, name=path)


class _StrictLoader(yaml.SafeLoader):
    """YAML's own loader keeps the last of two equal keys; this one refuses them."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Read a mapping whose keys differ."""
        node = super().compose_mapping_node(anchor)
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for number, key in enumerate(keys):
            if key.value in [earlier.value for earlier in keys[:number]]:
                raise yaml.composer.ComposerError(None, None, f"the key {key.value!r} stands twice", key.start_mark)
        return node


def parse_config(content: Any, overrides: Sequence[str] = (), *, name: str = "configuration") -> JobConfig:
    """Check parsed YAML. ``name`` is what messages call it."""
    if not isinstance(content, dict):
        raise ConfigError(f"{name}: expected keys and values, found {type(content).__name__}.")
    for override in overrides:
        _apply_override(content, override)
    refuse_credentials(content, name)
    preset = content.get("preset")
    if isinstance(preset, str) and preset in PRESETS:
        content = _under(PRESETS[preset], content)
    try:
        return JobConfig.model_validate(with_floats(content, JobConfig))
    except ValidationError as error:
        lines = [_explain(problem) for problem in error.errors()]
        raise ConfigError(f"{name}: {len(lines)} problem(s)\n" + "\n".join(f"  {line}" for line in lines)) from error


def _apply_override(content: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override!r}: expected a.b=value.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override!r}: the value is not YAML: {error}") from error
    node: Any = content
    *parents, last = key.split(".")
    for part in parents:
        if isinstance(node, list):
            node = node[_list_index(node, part, override)]
        elif isinstance(node, dict):
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
        else:
            raise ConfigError(f"--set {override!r}: {part!r} is below a plain value.")
    if isinstance(node, list):
        node[_list_index(node, last, override)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise ConfigError(f"--set {override!r}: {last!r} is below a plain value.")


def _list_index(node: list[Any], part: str, override: str) -> int:
    if not part.isdigit() or int(part) >= len(node):
        raise ConfigError(f"--set {override!r}: expected an item number from 0 to {len(node) - 1}, found {part!r}.")
    return int(part)


def _under(preset: Mapping[str, Any], content: Mapping[str, Any]) -> dict[str, Any]:
    # A preset's entry for `targets` is a mapping that goes under every target that it can be said of.
    merged: dict[str, Any] = dict(content)
    for key, value in preset.items():
        given = content.get(key)
        if key == "targets" and isinstance(given, list):
            merged[key] = [_under(value, item) if _is_of_gradients(item) else item for item in given]
        elif isinstance(value, Mapping):
            merged[key] = _under(value, given if isinstance(given, dict) else {})
        elif key not in content:
            merged[key] = value
    return merged


def _is_of_gradients(target: Any) -> bool:
    return isinstance(target, dict) and target.get("method", "rose") in GRADIENT_METHODS


def _explain(problem: Any) -> str:
    location = list(problem["loc"])
    key = ".".join(str(part) for part in location)
    value = problem.get("input")
    if problem["type"] == "extra_forbidden":
        known = _known_keys(location[:-1])
        near = difflib.get_close_matches(str(location[-1]), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        return f"{key}: unknown key (value {value!r}); {hint}"
    if problem["type"] == "missing":
        return f"{key}: required, but not set"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{key}: {message}" if key else message
    if problem["type"] == "literal_error" and isinstance(value, str):
        near = difflib.get_close_matches(
            value, problem["ctx"]["expected"].replace("'", "").replace(" or ", ", ").split(", "), n=1
        )
        message += f"; did you mean {near[0]!r}?" if near else ""
    return f"{key}: {message}; found {value!r}"


def _known_keys(location: Sequence[Any]) -> list[str]:
    model: Any = JobConfig
    for part in location:
        if isinstance(part, int) or not hasattr(model, "model_fields"):
            continue
        annotation = model.model_fields[part].annotation
        candidates = [annotation, *get_args(annotation)]
        model = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), model)
    return list(model.model_fields)
