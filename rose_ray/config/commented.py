"""A commented YAML made from the models themselves, so that text and checks cannot drift apart."""

from __future__ import annotations

from typing import Any, get_args

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from rose_ray.config.job import JobConfig

_PLACEHOLDERS = {
    "workspace": "rose-workspace",
    "model.base": "path/to/base-model",
    "pool.inputs.files": ["data/pool/*.jsonl.gz"],
    "targets.name": "my-target",
    "targets.pairs.files": ["data/pairs.jsonl"],
}


def commented_yaml() -> str:
    """Return a valid configuration with every key, its default, and what it means.

    Keys without a default hold placeholders; keys that are unset by default are commented out.
    """
    return (
        "\n".join(["# rose-ray configuration. `rose-ray validate FILE` checks it.", *_lines(JobConfig, "", 0)]) + "\n"
    )


def _lines(model: type[BaseModel], path: str, indent: int) -> list[str]:
    lines: list[str] = []
    for name, field in model.model_fields.items():
        lines += _field_lines(name, field, f"{path}.{name}".strip("."), " " * indent)
    return lines


def _field_lines(name: str, field: FieldInfo, path: str, pad: str) -> list[str]:
    comment = f"{pad}# {field.description}"
    if path in _PLACEHOLDERS:
        return [comment, f"{pad}{name}: {_text(_PLACEHOLDERS[path])}"]
    nested = _nested(field.annotation)
    default = None if field.is_required() else field.get_default(call_default_factory=True)
    if nested is not None and (field.is_required() or default is not None):
        inner = _lines(nested, path, len(pad) + 2)
        if _is_list(field.annotation):
            first = next(i for i, line in enumerate(inner) if not line.lstrip().startswith("#"))
            inner[first] = f"{pad}- {inner[first].lstrip()}"
        return [comment, f"{pad}{name}:", *inner]
    if default is None:
        return [comment, f"{pad}# {name}:"]
    return [comment, f"{pad}{name}: {_text(default)}"]


def _nested(annotation: Any) -> type[BaseModel] | None:
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _is_list(annotation: Any) -> bool:
    return getattr(annotation, "__origin__", None) is list


def _text(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()
