"""Whether a workspace is whole: every file of every artefact against its manifest, and files that belong to none."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from pyarrow import fs

from rose_ray.errors import AlteredFileError
from rose_ray.stores.inspect import hidden_fault, visible_fault
from rose_ray.stores.leftovers import is_leftover
from rose_ray.stores.manifest import MANIFEST_FILE, Manifest, read_manifest
from rose_ray.stores.workspace import FileRecord, Workspace

# Files that no manifest names and that belong there all the same; how often each is written is its room's affair.
_UNLISTED = re.compile(
    r"rose_ray\.json|(runs|lease|plans|budgets|warmup/pins)/[^/]+\.json|warmup/[^/]+/training\.json"
    r"|features/[^/]+/(space|pool-[^/]+)\.json|selections/[^/]+/latest\.json|selections/[^/]+/history/.+"
    r"|evaluation/(index\.json|report/.+|judges/[^/]+\.json|verdicts/[^/]+/part-[^/]+)"
)


_STATE = re.compile(r"(warmup/[^/]+)/resume/.+")  # of a training: belongs there until it has ended


@dataclass
class Findings:
    """What `verify` found.

    Attributes:
        num_artefacts, num_files, num_bytes: Looked at.
        altered: Path to what is wrong with it; manifests that cannot be read among them.
        missing: Paths that a manifest names and that are not there.
        orphans: Paths that no manifest names, with what they are.
        damaged: Folders of the artefacts to which what is altered or missing belongs.
    """

    num_artefacts: int = 0
    num_files: int = 0
    num_bytes: int = 0
    altered: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    orphans: dict[str, str] = field(default_factory=dict)
    damaged: set[str] = field(default_factory=set)

    @property
    def is_clean(self) -> bool:
        """Whether nothing was found."""
        return not (self.altered or self.missing or self.orphans)


def verify(workspace: Workspace, progress: Callable[[int, int], None] = lambda done, total: None) -> Findings:
    """Read every file of every artefact and compare it with its manifest.

    Args:
        workspace: Nothing in it is changed.
        progress: Told after each file how many bytes are done, and of how many.
    """
    sizes = _files(workspace)
    findings, named = Findings(), set[str]()
    for path in sorted(path for path in sizes if posixpath.basename(path) == MANIFEST_FILE):
        named.add(path)
        try:
            manifest = read_manifest(workspace, posixpath.dirname(path))
        except AlteredFileError as error:
            findings.altered[path] = str(error)
            findings.damaged.add(posixpath.dirname(path))
            continue
        findings.num_artefacts += 1
        named.update(_check(workspace, manifest, findings, progress, sum(sizes.values())))
    for path in sorted(sizes.keys() - named):
        if not _UNLISTED.fullmatch(path) and not _is_of_unfinished_training(path, sizes):
            findings.orphans[path] = _orphan(path, sizes)
    return findings


def _files(workspace: Workspace) -> dict[str, int]:
    selector = fs.FileSelector(workspace.root.path, recursive=True)
    infos = workspace.root.filesystem.get_file_info(selector)
    return {posixpath.relpath(info.path, workspace.root.path): info.size for info in infos if info.is_file}


def _check(
    workspace: Workspace, manifest: Manifest, findings: Findings, progress: Callable[[int, int], None], total: int
) -> Iterator[str]:
    for record in manifest.files:
        yield record.path
        fault = _fault(workspace, record)
        if fault == "missing":
            findings.missing.append(record.path)
        elif fault is not None:
            findings.altered[record.path] = fault
        if fault is not None:
            findings.damaged.add(manifest.folder)
        findings.num_files += 1
        findings.num_bytes += record.num_bytes
        progress(findings.num_bytes, total)


def _fault(workspace: Workspace, record: FileRecord) -> str | None:
    return visible_fault(workspace, record) or hidden_fault(workspace, record)


def _is_of_unfinished_training(path: str, sizes: dict[str, int]) -> bool:
    state = _STATE.fullmatch(path)
    return state is not None and posixpath.join(state[1], MANIFEST_FILE) not in sizes


def _orphan(path: str, sizes: dict[str, int]) -> str:
    if is_leftover(path):
        return "written beside its place and never renamed"
    if _STATE.fullmatch(path):
        return "the state of a training that has ended"
    manifest = posixpath.join(posixpath.dirname(path), MANIFEST_FILE)
    return "not in its folder's manifest" if manifest in sizes else "of an artefact that was never finished"


def delete_orphans(workspace: Workspace, findings: Findings) -> None:
    """Remove the files that no manifest names. Hold the workspace's lease: a run at work has unfinished ones."""
    for path in findings.orphans:
        workspace.check_fence()
        workspace.root.filesystem.delete_file(workspace.location(path).path)


def delete_damaged(workspace: Workspace, findings: Findings) -> None:
    """Let damaged artefacts count as unfinished, so that the next run makes them anew; warm-ups stay as they are.

    Hold the workspace's lease: a run at work may be reading them.
    """
    for folder in sorted(findings.damaged):
        if not is_warmup(folder):
            workspace.delete_file(f"{folder}/{MANIFEST_FILE}")


def is_warmup(folder: str) -> bool:
    """Whether an artefact is a warm-up, which is not made again with the same bytes on any machine."""
    return folder.startswith("warmup/")


def verify_lines(
    workspace: Workspace, findings: Findings, *, deleted_orphans: bool, deleted_damaged: bool
) -> Iterator[str]:
    """Say what was found and what to do."""
    size = f"{findings.num_bytes / 1e6:,.1f} MB"
    yield f"{workspace.root.name}: {findings.num_artefacts:,} artefacts, {findings.num_files:,} files, {size} read"
    for path, fault in sorted(findings.altered.items()):
        yield f"altered   {path}: {fault}"
    for path in sorted(findings.missing):
        yield f"missing   {path}"
    for path, what in sorted(findings.orphans.items()):
        yield f"{'deleted' if deleted_orphans else 'orphaned':<9} {path}: {what}"
    yield from _damage_lines(findings, deleted=deleted_damaged)
    if findings.orphans and not deleted_orphans:
        yield "No result depends on orphaned files: run again to finish what was begun, or add --delete-orphans."
    if findings.is_clean:
        yield "whole: nothing altered, missing or orphaned"


def _damage_lines(findings: Findings, *, deleted: bool) -> Iterator[str]:
    warmups = sorted(filter(is_warmup, findings.damaged))
    others = sorted(findings.damaged - set(warmups))
    if others and deleted:
        yield "Deleted the manifests of these, so that the next run makes them anew:"
    elif others:
        yield "Add --delete-damaged and run again: these are made anew, with the same bytes."
    yield from (f"  {folder}" for folder in others)
    if warmups:
        yield "Put the files of these warm-ups back, or make another, and with it all features, with --new-warmup:"
    yield from (f"  {folder}" for folder in warmups)
