"""Strict JSON Schemas out of KubeRay's custom resource definitions."""

from __future__ import annotations

import gzip
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

FOLDER = Path(__file__).parents[3] / "shared" / "crds"
"""KubeRay's definitions lie beside the checkout, if at all."""


@cache
def crd_schema(kind: str) -> dict[str, Any]:
    """Return the schema of a kind of ``ray.io/v1`` in which an unknown key is an error; skip where there is none."""
    path = FOLDER / f"ray.io_{kind.lower()}s.yaml.gz"
    if not path.exists():
        pytest.skip(f"{path} is not there: {kind} is not checked against KubeRay's schema")
    definition = yaml.safe_load(gzip.decompress(path.read_bytes()))
    (version,) = (each for each in definition["spec"]["versions"] if each["name"] == "v1")
    schema = _strict(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    return schema


def _strict(node: Any) -> Any:
    if isinstance(node, list):
        return [_strict(each) for each in node]
    if not isinstance(node, dict):
        return node
    made = {key: _strict(value) for key, value in node.items() if key not in ("format", "default")}
    if made.pop("x-kubernetes-int-or-string", False):
        made.pop("type", None)
        made["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    if isinstance(made.get("properties"), dict) and not made.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    return made
