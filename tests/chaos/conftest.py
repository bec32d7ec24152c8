"""An undisturbed run to compare with, and clusters of several nodes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.disturbed import copy_without_features, finish, real_cluster, tables, write_config
from tests.distributed.tiny import write_inputs


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `write_inputs`."""
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


@pytest.fixture(scope="session")
def reference(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workspace of a run on one node that nothing disturbed."""
    folder = tmp_path_factory.mktemp("reference")
    finish(write_config(folder, inputs, folder / "workspace"))
    assert tables(folder / "workspace")
    return folder / "workspace"


@pytest.fixture
def workspace(reference: Path, tmp_path: Path) -> Path:
    """A copy of it, up to the features."""
    return copy_without_features(reference, tmp_path / "workspace")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head; tests add the nodes that they need beside it."""
    with real_cluster() as made:
        yield made
