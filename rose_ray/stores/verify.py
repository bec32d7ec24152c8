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
    r"rose_ray\.json|(runs|lease|plans|budgets|warmup/pins)/[^/]+\.json|warmup/[^/]+/(training\.json|resume/.+)"
    r"|features/[^/]+/(space|pool-[^/]+)\.json|selections/[^/]+/latest\.json|selections/[^/]+/history/.+"
    r"|evaluation/(index\.json|report/.+|judges/[^/]+\.json|verdicts/[^/]+/part-[^/]+)"
)


@dataclass
class Findings:
    """What `verify` found.

    Attributes:
        num_artefacts, num_files, num_bytes: Looked at.
        altered: Path to what is wrong with it; manifests that cannot be read among them.
        missing: Paths that a manifest names and that are not there.
        orphans: Paths that no manifest names, with what they are.
    """

    num_artefacts: int = 0
    num_files: int = 0
    num_bytes: int = 0
    altered: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    orphans: dict[str, str] = field(default_factory=dict)

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
            continue
        findings.num_artefacts += 1
        named.update(_check(workspace, manifest, findings, progress, sum(sizes.values())))
    for path in sorted(sizes.keys() - named):
        if not _UNLISTED.fullmatch(path):
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
        findings.num_files += 1
        findings.num_bytes += record.num_bytes
        progress(findings.num_bytes, total)


def _fault(workspace: Workspace, record: FileRecord) -> str | None:
    return visible_fault(workspace, record) or hidden_fault(workspace, record)


def _orphan(path: str, sizes: dict[str, int]) -> str:
    if is_leftover(path):
        return "written beside its place and never renamed"
    manifest = posixpath.join(posixpath.dirname(path), MANIFEST_FILE)
    return "not in its folder's manifest" if manifest in sizes else "of an artefact that was never finished"


def delete_orphans(workspace: Workspace, findings: Findings) -> None:
    """Remove the files that no manifest names. Hold the workspace's lease: a run at work has unfinished ones."""
    for path in findings.orphans:
        workspace.check_fence()
        workspace.root.filesystem.delete_file(workspace.location(path).path)


def verify_lines(workspace: Workspace, findings: Findings, *, deleted: bool) -> Iterator[str]:
    """Say what was found and what to do."""
    size = f"{findings.num_bytes / 1e6:,.1f} MB"
    yield f"{workspace.root.name}: {findings.num_artefacts:,} artefacts, {findings.num_files:,} files, {size} read"
    for path, fault in sorted(findings.altered.items()):
        yield f"altered   {path}: {fault}"
    for path in sorted(findings.missing):
        yield f"missing   {path}"
    for path, what in sorted(findings.orphans.items()):
        yield f"{'deleted' if deleted else 'orphaned':<9} {path}: {what}"
    folders = sorted({posixpath.dirname(path) for path in [*findings.altered, *findings.missing]})
    if folders:
        yield "Delete these folders and run again; the same bytes are made anew. A warm-up: put its files back instead."
        yield from (f"  {_artefact_folder(folder)}" for folder in folders)
    if findings.orphans and not deleted:
        yield "No result depends on orphaned files: run again to finish what was begun, or add --delete-orphans."
    if findings.is_clean:
        yield "whole: nothing altered, missing or orphaned"


def _artefact_folder(folder: str) -> str:
    # A warm-up's files lie one folder deeper than its manifest.
    return folder.rpartition("/checkpoint-")[0] if "/checkpoint-" in folder else folder
