"""JSON files of a workspace that hold something else than they should."""

from __future__ import annotations

from pathlib import Path

import pytest

from rose_ray.errors import AlteredFileError, StoreError
from rose_ray.stores.manifest import MANIFEST_FILE, read_manifest
from rose_ray.stores.workspace import Workspace


@pytest.mark.parametrize("content", [b"[]", b"null", b"3", b'"text"', b"{}"])
def test_not_a_manifest(tmp_path: Path, content: bytes) -> None:
    workspace = Workspace.open(str(tmp_path / "workspace"), create=True)
    workspace.write(f"demo/0123/{MANIFEST_FILE}", content)
    with pytest.raises(AlteredFileError, match=r"demo/0123/manifest\.json: not a manifest .* Delete the folder"):
        read_manifest(workspace, "demo/0123")


@pytest.mark.parametrize("content", [b"[]", b"null", b'"1"', b'{"format": null}'])
def test_not_a_format_file(tmp_path: Path, content: bytes) -> None:
    Workspace.open(str(tmp_path / "workspace"), create=True).write("rose_ray.json", content)
    with pytest.raises(StoreError, match="expected a whole number at 'format'"):
        Workspace.open(str(tmp_path / "workspace"))
