"""Which selection of a target was the latest when: an entry each time that changes, and ``latest.json``.

Entries are added and never changed. The newest names what ``latest.json`` names, except for the moment between writing
the one and the other.
"""

from __future__ import annotations

import posixpath
from dataclasses import asdict, dataclass

from rose_ray.errors import StoreError
from rose_ray.stores.manifest import Manifest, find_manifest
from rose_ray.stores.versions import utc_now
from rose_ray.stores.workspace import Workspace

SELECTIONS = "selections"
TRAINING_SET = "training_set"


@dataclass(frozen=True)
class Version:
    """A selection that is, or was, the latest.

    Attributes:
        number: From 1.
        folder: Of the selection, relative to the workspace.
        pool: Key of the pool that it was chosen from.
        num_rows, num_tokens: Selected.
        since: UTC time at which it became the latest.
        restores: Number of the version that it brought back, if it did.
    """

    number: int
    folder: str
    pool: str
    num_rows: int
    num_tokens: int
    since: str
    restores: int | None = None


def selected_names(workspace: Workspace) -> list[str]:
    """Return the targets, and ``training_set``, that have selections."""
    return [posixpath.basename(path) for path in workspace.list_folder(SELECTIONS)]


def versions(workspace: Workspace, name: str) -> list[Version]:
    """Return a target's versions, oldest first."""
    paths = [path for path in workspace.list_folder(_folder(name)) if path.endswith(".json")]
    return [Version(**workspace.read_json(path)) for path in paths]


def latest_version(workspace: Workspace, name: str) -> Version | None:
    """Return the version that ``latest.json`` names, or None where nothing was selected yet."""
    if not workspace.exists(_latest(name)):
        return None
    number = workspace.read_json(_latest(name))["number"]
    return next(version for version in versions(workspace, name) if version.number == number)


def find_version(workspace: Workspace, name: str, wanted: str) -> Version:
    """Return a version by its number, or ``latest``, or ``previous`` (the one before it).

    Raises:
        StoreError: There is none.
    """
    known = versions(workspace, name)
    latest = latest_version(workspace, name)
    numbers = {str(version.number): version for version in known}
    if latest is not None:
        numbers["latest"] = latest
        if latest.number > 1:
            numbers["previous"] = numbers[str(latest.number - 1)]
    if wanted not in numbers:
        have = f"versions 1 to {len(known)}" if known else f"selections of {selected_names(workspace) or 'nothing'}"
        raise StoreError(f"{name}: no version {wanted!r}; the workspace has {have}. See `rose-ray selections`.")
    return numbers[wanted]


def make_latest(
    workspace: Workspace, name: str, selection: Manifest, pool: str, restores: int | None = None
) -> Version:
    """Let a finished selection be the latest; nothing happens where it is already.

    Args:
        workspace: Where.
        name: Of the target.
        selection: All that it names must be there.
        pool: Key of its pool.
        restores: Number of the version that is brought back.
    """
    latest = latest_version(workspace, name)
    if latest is not None and latest.folder == selection.folder:
        return latest
    known = versions(workspace, name)
    if known and known[-1].folder == selection.folder and known[-1] != latest:
        version = known[-1]  # written by a run that died before it could say so
    else:
        counts = selection.counts
        number = len(known) + 1
        version = Version(number, selection.folder, pool, counts["selected"], counts["tokens"], utc_now(), restores)
        workspace.write_json(f"{_folder(name)}/{number:05d}.json", asdict(version))
    workspace.write_json(_latest(name), {"folder": version.folder, "number": version.number})
    return version


def read_version(workspace: Workspace, name: str, version: Version) -> Manifest:
    """Return a version's selection.

    Raises:
        StoreError: Its files are gone or cut short.
    """
    found = find_manifest(workspace, version.folder)
    if found is None:
        raise StoreError(
            f"{name}: version {version.number} is not there any more: {version.folder} was removed or cut short."
        )
    return found


def _folder(name: str) -> str:
    return f"{SELECTIONS}/{name}/history"


def _latest(name: str) -> str:
    return f"{SELECTIONS}/{name}/latest.json"
