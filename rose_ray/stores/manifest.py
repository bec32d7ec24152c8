"""Manifests: what went into an artefact, what came out, with which versions, and how long it took.

An artefact is a folder ``<stage>/<key>`` whose ``manifest.json`` is written last: a folder without one is not
finished and counts for nothing. The key is a digest of everything the content depends on.
"""

from __future__ import annotations

import hashlib
import json
import logging
import posixpath
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rose_ray.errors import AlteredFileError
from rose_ray.stores.leftovers import sweep_folder
from rose_ray.stores.versions import package_versions, utc_now
from rose_ray.stores.workspace import FileRecord, Workspace

logger = logging.getLogger(__name__)

MANIFEST_FILE = "manifest.json"
_KEY_LENGTH = 16
_NUM_NAMED = 3


def artefact_key(content: Mapping[str, Any]) -> str:
    """Return 16 hex digits that stand for ``content``: the order of keys does not matter, their values do."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:_KEY_LENGTH]


@dataclass(frozen=True)
class Manifest:
    """One finished artefact.

    Attributes:
        stage: Which stage made it.
        key: ``artefact_key(made_from)``.
        made_from: Everything the content depends on, the stage's numerics version included.
        files: Every file of the artefact.
        counts: Rows in and out, by name.
        facts: What else a reader wants to know: provenance, statistics, identities.
        seconds: Wall time of the stage, in seconds.
        versions: Versions of rose_ray and the packages it computed with.
        created_at: UTC time, ISO 8601.
        fencing_number: Lease of the run that made it; see ``stores/lease.py``.
    """

    stage: str
    key: str
    made_from: dict[str, Any]
    files: list[FileRecord]
    counts: dict[str, int]
    facts: dict[str, Any]
    seconds: float
    versions: dict[str, str]
    created_at: str
    folder: str = field(default="")
    fencing_number: int | None = None

    @property
    def num_bytes(self) -> int:
        """Size of all files together."""
        return sum(record.num_bytes for record in self.files)

    def file(self, name: str) -> FileRecord:
        """Return the record of the file ``name`` in this artefact's folder."""
        path = f"{self.folder}/{name}"
        for record in self.files:
            if record.path == path:
                return record
        raise AlteredFileError(
            f"{self.folder}/{MANIFEST_FILE} does not list {name!r}. Delete the folder and run again."
        )


def commit_manifest(workspace: Workspace, manifest: Manifest) -> Manifest:
    """Write ``manifest`` into its folder: from here on the artefact is there, and nothing that died beside it."""
    workspace.check_fence()  # what lies beside the files may be its successor's, at work
    for folder in {posixpath.dirname(record.path) for record in manifest.files} | {manifest.folder}:
        sweep_folder(workspace, folder)
    workspace.write_json(f"{manifest.folder}/{MANIFEST_FILE}", asdict(manifest))
    return manifest


def commit_artefact(
    workspace: Workspace,
    stage: str,
    made_from: dict[str, Any],
    files: list[FileRecord],
    counts: dict[str, int],
    facts: dict[str, Any],
    *,
    started: float,
    folder: str | None = None,
) -> Manifest:
    """Write the manifest of an artefact whose files are all there.

    Args:
        workspace, stage, made_from, files, counts, facts: As in `Manifest`.
        started: ``time.monotonic()`` when the stage began.
        folder: Where it lies; ``<stage>/<key>`` where not given.
    """
    key = artefact_key(made_from)
    return commit_manifest(
        workspace,
        Manifest(
            stage=stage,
            key=key,
            made_from=made_from,
            files=files,
            counts=counts,
            facts=facts,
            seconds=round(time.monotonic() - started, 3),
            versions=package_versions(),
            created_at=utc_now(),
            folder=folder or f"{stage}/{key}",
            fencing_number=workspace.fencing_number,
        ),
    )


def read_manifest(workspace: Workspace, folder: str) -> Manifest:
    """Return the manifest of a finished artefact.

    Raises:
        StoreError: The folder holds no finished artefact.
        AlteredFileError: The manifest cannot be understood.
    """
    content = workspace.read_json(f"{folder}/{MANIFEST_FILE}")
    try:
        files = [FileRecord(**record) for record in content.pop("files")]
        manifest = Manifest(files=files, **content)
    except (AttributeError, KeyError, TypeError) as error:
        raise AlteredFileError(
            f"{folder}/{MANIFEST_FILE}: not a manifest ({error}). Delete the folder and run again."
        ) from error
    if artefact_key(manifest.made_from) != manifest.key:
        raise AlteredFileError(f"{folder}/{MANIFEST_FILE}: key and content disagree. Delete the folder and run again.")
    return manifest


def find_manifest(workspace: Workspace, folder: str) -> Manifest | None:
    """Return the artefact in ``folder`` if it is finished and its files have their sizes, else None.

    One whose manifest cannot be read, or whose files are missing or cut short, counts as unfinished; a warning says so.
    """
    if not workspace.exists(f"{folder}/{MANIFEST_FILE}"):
        return None
    try:
        manifest = read_manifest(workspace, folder)
    except AlteredFileError:
        logger.warning(f"{folder} counts as unfinished: its {MANIFEST_FILE} was altered or cut short")
        return None
    if damaged := damaged_files(workspace, manifest.files):
        logger.warning(f"{folder} counts as unfinished: missing or cut short: {', '.join(damaged[:_NUM_NAMED])}")
        return None
    return manifest


def damaged_files(workspace: Workspace, files: Sequence[FileRecord]) -> list[str]:
    """Return the paths of files that are missing or have another size than recorded."""
    return [record.path for record in files if not workspace.is_intact(record)]
