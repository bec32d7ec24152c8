"""Files that a process which was killed while it wrote has left beside their places.

Whoever holds the workspace is alone on it, so such a file of another process is nobody's any more.
"""

from __future__ import annotations

import os
import posixpath
import re

from pyarrow import fs

from rose_ray.stores.workspace import Workspace, lease_path

_LEFTOVER = re.compile(r".+\.[0-9a-f]{32}\.tmp")
_SHARED_FOLDERS = ("", "budgets", "plans", "runs", "warmup/pins")


def is_leftover(path: str) -> bool:
    """Whether a file was written beside its place and never renamed."""
    return _LEFTOVER.fullmatch(posixpath.basename(path)) is not None


def sweep_folder(workspace: Workspace, folder: str, before: str | None = None) -> None:
    """Remove leftovers directly in ``folder``, or those of them whose names sort before ``before``.

    An object store has none among its files: what a broken upload leaves there is no file, and cannot be listed as one.
    """
    path = workspace.location(folder).path
    if not isinstance(workspace.root.filesystem, fs.LocalFileSystem) or not os.path.isdir(path):
        return
    for name in os.listdir(path):
        if is_leftover(name) and (before is None or name < before):
            os.unlink(os.path.join(path, name))


def sweep_shared(workspace: Workspace) -> None:
    """Remove leftovers where the driver alone writes, and those of earlier leases."""
    for folder in _SHARED_FOLDERS:
        sweep_folder(workspace, folder)
    own = lease_path(workspace.fencing_number or 0)
    sweep_folder(workspace, posixpath.dirname(own), before=posixpath.basename(own))
