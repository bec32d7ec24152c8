"""Numbers as YAML writes them."""

from __future__ import annotations

from typing import Any, get_args, get_origin

from pydantic import BaseModel


def with_floats(content: Any, model: Any) -> Any:
    """Let YAML's ``1`` and ``2e-5`` (text to YAML 1.1) stand for floats where a float is expected.

    Args:
        content: Parsed YAML.
        model: The type that it is to become.
    """
    if isinstance(model, type) and issubclass(model, BaseModel) and isinstance(content, dict):
        fields = model.model_fields
        return {k: with_floats(v, fields[k].annotation) if k in fields else v for k, v in content.items()}
    arguments = get_args(model)
    if isinstance(content, list):
        return [with_floats(item, arguments[0]) if arguments else item for item in content]
    if isinstance(content, dict) and get_origin(model) is dict:
        return {k: with_floats(v, arguments[1]) for k, v in content.items()}
    if isinstance(content, dict) and arguments:
        nested = (a for a in arguments if isinstance(a, type) and issubclass(a, BaseModel))
        return with_floats(content, next(nested, None))
    if "float" in str(model) and isinstance(content, int | str) and not isinstance(content, bool):
        try:
            return float(content)
        except ValueError:
            return content
    return content
