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
    schema["properties"]["metadata"] = _METADATA
    return schema


_TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
_METADATA = {
    "type": "object",
    "additionalProperties": False,
    "required": ["name"],
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"},
        "namespace": {"type": "string"},
        "labels": _TEXTS,
        "annotations": _TEXTS,
    },
}
"""What a manifest says of itself; the definitions leave it open."""


def _strict(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a schema of Kubernetes's kind as a JSON Schema that allows no unknown key.

    What is under ``properties`` is a map of names, some of which, like ``format``, are keywords elsewhere.
    """
    made = {key: value for key, value in schema.items() if key not in ("format", "default")}
    if isinstance(made.get("properties"), dict):
        made["properties"] = {name: _strict(each) for name, each in made["properties"].items()}
        if not made.get("x-kubernetes-preserve-unknown-fields"):
            made.setdefault("additionalProperties", False)
    for key in ("items", "additionalProperties", "not"):
        if isinstance(made.get(key), dict):
            made[key] = _strict(made[key])
    for key in ("allOf", "anyOf", "oneOf"):
        if key in made:
            made[key] = [_strict(each) for each in made[key]]
    if made.pop("x-kubernetes-int-or-string", False):
        made.pop("type", None)
        made["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    return made
