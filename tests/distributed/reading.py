"""Looking into a workspace."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from rose_ray.stores.manifest import Manifest, read_manifest
from rose_ray.stores.workspace import Workspace

_RECORDS = {"runs", "lease", "history", "latest.json"}


def read_file(workspace: Path, manifest: Manifest, name: str) -> pa.Table:
    """Return a table of an artefact, checked against its manifest."""
    record = manifest.file(name)
    return opened(workspace).read_table(record.path, record)


def opened(workspace: Path) -> Workspace:
    """Open a workspace by its path."""
    return Workspace.open(str(workspace))


def manifests(workspace: Path, stage: str) -> Iterator[Manifest]:
    """Yield every manifest below a stage's folder."""
    for path in sorted((workspace / stage).rglob("manifest.json")):
        yield read_manifest(opened(workspace), str(path.parent.relative_to(workspace)))


def digests(workspace: Path, below: str = "") -> dict[str, str]:
    """Return the digest of every file by its path, but for records of runs, leases and what is latest."""
    return {
        path.relative_to(workspace).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted((workspace / below).rglob("*"))
        if path.is_file() and not _RECORDS & {*path.relative_to(workspace).parts}
    }


def made_stages(stages: list[Any]) -> list[str]:
    """Return the names of the stages that were not found done."""
    return [stage.stage for stage in stages if not stage.reused]
