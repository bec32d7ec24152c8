"""Predictions, kept by the configuration they were made for, so that `status` can put them beside what was measured."""

from __future__ import annotations

from typing import Any

from rose_ray.stores.manifest import artefact_key
from rose_ray.stores.versions import utc_now
from rose_ray.stores.workspace import Workspace


def write_plan(workspace: Workspace, config: dict[str, Any], plan: dict[str, Any]) -> str:
    """Keep a prediction and return its path; an earlier one for the same configuration is replaced."""
    path = _path(config)
    workspace.write_json(path, {"created_at": utc_now(), **plan})
    return path


def find_plan(workspace: Workspace, config: dict[str, Any]) -> dict[str, Any] | None:
    """Return the prediction for a dumped configuration, or None where none was made."""
    path = _path(config)
    found: dict[str, Any] | None = workspace.read_json(path) if workspace.exists(path) else None
    return found


def _path(config: dict[str, Any]) -> str:
    return f"plans/{artefact_key({'config': config})}.json"
