"""Bringing back an older selection."""

from __future__ import annotations

from rose_ray.stores.history import Version, find_version, make_latest, read_version
from rose_ray.stores.workspace import Workspace


def restore_version(workspace: Workspace, name: str, number: int) -> Version:
    """Make version ``number`` of a target's selection the latest again, as a new version, once its files are read.

    Raises:
        StoreError: There is no such version, or its files are gone.
        AlteredFileError: A file differs from its manifest.
    """
    version = find_version(workspace, name, str(number))
    selection = read_version(workspace, name, version)
    for record in selection.files:
        workspace.read(record.path, record)
    return make_latest(workspace, name, selection, version.pool, restores=number)
