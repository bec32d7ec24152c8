"""What no kept selection needs: found by following manifests from what is kept, removed a manifest at a time.

Kept are the newest versions of every target's selection, what is latest, what the last finished run and later ones made
or found, and whatever those were made from. So is what was written after the last finished run: a run that was killed
left it and goes on from it. Only folders that a run makes are looked at; anything else in a workspace stays.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime

from pyarrow import fs

from rose_ray.stores.history import SELECTIONS, latest_version, selected_names, versions
from rose_ray.stores.manifest import MANIFEST_FILE, Manifest, read_manifest
from rose_ray.stores.runs import finished_runs, since_last_finished
from rose_ray.stores.shards import FEATURES, LENGTHS, SHARD_SCORES, SURVEYS
from rose_ray.stores.workspace import Workspace

NAMED = (SELECTIONS, "scores")
"""Kinds whose artefacts lie at ``KIND/TARGET/KEY``."""

FLAT = ("states", "bank", "basis", "warmup", "pool", "ingest")
"""Kinds whose artefacts lie at ``KIND/KEY``. Each kind is made from later ones, the features between both lists."""

SHARDED = (SHARD_SCORES, SURVEYS, LENGTHS, FEATURES)
"""Kinds whose shards lie at ``KIND/KEY/SHARD``, each an artefact."""

_NOT_KEYS = frozenset({"pins", "history"})


@dataclass(frozen=True)
class Garbage:
    """One folder that can go.

    Attributes:
        kind: Of artefact.
        folder: Relative to the workspace.
        num_bytes: Of all files in it.
        unfinished: Written after the last finished run, so it stays unless asked for.
    """

    kind: str
    folder: str
    num_bytes: int
    unfinished: bool = False


def find_garbage(workspace: Workspace, keep: int) -> list[Garbage]:
    """Return the folders that nothing kept needs, what is made from others before them.

    Args:
        workspace: Where.
        keep: Newest versions of each target that are kept, at least 1.

    Raises:
        StoreError: A manifest that something kept needs is missing or altered: nothing should be removed before that
            is understood.
    """
    needed = _needed(workspace, keep)
    shards = _needed_shards(workspace, needed)
    finished_at, _ = since_last_finished(workspace)
    return [
        _garbage(workspace, kind, folder, finished_at)
        for kind, folder in _artefacts(workspace, needed)
        if folder not in needed and folder not in shards
    ]


def remove(workspace: Workspace, garbage: Iterable[Garbage]) -> Iterator[Garbage]:
    """Remove folders, yielding each when it is gone.

    A folder's manifest goes first, and readers look for every file that a manifest lists: whatever interrupts this, no
    artefact is left that counts as whole and is not.
    """
    for each in garbage:
        workspace.delete_file(f"{each.folder}/{MANIFEST_FILE}")
        workspace.delete_folder(each.folder)
        _drop_pins(workspace, each.folder)
        yield each


def _drop_pins(workspace: Workspace, folder: str) -> None:
    for pin in workspace.list_folder("warmup/pins") if folder.startswith("warmup/") else []:
        if workspace.read_json(pin)["folder"] == folder:
            workspace.delete_file(pin)


def _artefacts(workspace: Workspace, needed: set[str]) -> Iterator[tuple[str, str]]:
    for kind in NAMED:
        for target in _folders(workspace, kind):
            yield from ((kind, folder) for folder in _folders(workspace, target))
    for kind in SHARDED:
        for space in _folders(workspace, kind):
            # Of a key that is needed, the shards that no kept pool holds.
            yield from ((kind, folder) for folder in (_folders(workspace, space) if space in needed else [space]))
    for kind in FLAT:
        yield from ((kind, folder) for folder in _folders(workspace, kind))


def _folders(workspace: Workspace, path: str) -> list[str]:
    return [folder for folder in workspace.list_subfolders(path) if posixpath.basename(folder) not in _NOT_KEYS]


def _needed(workspace: Workspace, keep: int) -> set[str]:
    """Return the folders of everything kept, and of what it was made from; of shards, their key's folder."""
    waiting = [folder for name in selected_names(workspace) for folder in _kept_versions(workspace, name, keep)]
    waiting += [stage["folder"] for run in finished_runs(workspace)[-1:] for stage in run["stages"]]
    later = (stage["folder"] for run in since_last_finished(workspace)[1] for stage in run["stages"])
    waiting += [folder for folder in later if _is_there(workspace, folder)]
    needed: set[str] = set()
    while waiting:
        folder = waiting.pop()
        if folder in needed:
            continue
        needed.add(folder)
        if not _is_of_shards(folder):
            waiting += _made_from(read_manifest(workspace, folder))
    return needed


def _kept_versions(workspace: Workspace, name: str, keep: int) -> set[str]:
    latest = latest_version(workspace, name)
    kept = versions(workspace, name)[-max(1, keep) :] + ([latest] if latest else [])
    # One whose files were removed before has nothing left to keep.
    return {each.folder for each in kept if _is_there(workspace, each.folder)}


def _is_there(workspace: Workspace, folder: str) -> bool:
    return _is_of_shards(folder) or workspace.exists(f"{folder}/{MANIFEST_FILE}")


def _is_of_shards(folder: str) -> bool:
    return folder.partition("/")[0] in SHARDED


def _made_from(manifest: Manifest) -> list[str]:
    facts = manifest.facts
    if manifest.stage == "select":
        return [*facts["scores"], *facts.get("made_of", ())]
    if manifest.stage == "score" and "method" in facts:
        return [*facts["made_of"], facts["pool"]["folder"]]
    if manifest.stage == "score":
        features = facts["features"]
        projection = features["space"]["projection"]
        basis = [f"basis/{projection.rpartition('=')[2]}"] if projection.startswith("exact/") else []
        return [
            f"{FEATURES}/{features['key']}",
            features["warmup"],
            facts["pool"]["folder"],
            facts["bank"]["folder"],
            *basis,
        ]
    if manifest.stage == "pool":
        return [f"ingest/{file['ingest_key']}" for file in facts["files"]]
    return []


def _needed_shards(workspace: Workspace, needed: set[str]) -> set[str]:
    pools = [read_manifest(workspace, folder) for folder in needed if folder.startswith("pool/")]
    names = {entry["shard"] for pool in pools for entry in pool.facts["shards"]}
    return {f"{folder}/{name}" for folder in needed if _is_of_shards(folder) for name in names}


def _garbage(workspace: Workspace, kind: str, folder: str, finished_at: datetime | None) -> Garbage:
    selector = fs.FileSelector(workspace.location(folder).path, recursive=True)
    files = [info for info in workspace.root.filesystem.get_file_info(selector) if info.is_file]
    # Storage that keeps no times cannot tell, so nothing there counts as old.
    unfinished = finished_at is None or any(info.mtime is None or info.mtime > finished_at for info in files)
    return Garbage(kind, folder, sum(info.size or 0 for info in files), unfinished)
