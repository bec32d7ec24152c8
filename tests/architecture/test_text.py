"""Every public thing says what it is, and no file grows beyond reading."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = sorted((ROOT / "rose_ray").rglob("*.py"))
SCRIPTS = sorted((ROOT / "jobs").glob("*.py"))
MAX_LINES = 400

Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def public(node: Documented, name: str) -> Iterator[tuple[str, Documented]]:
    """Yield a module, class or function with its name, and what is public in it; functions hide what is in them."""
    yield name, node
    if isinstance(node, ast.Module | ast.ClassDef):
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and child.name[0] != "_":
                yield from public(child, f"{name}.{child.name}")


@pytest.mark.parametrize("path", [*MODULES, *SCRIPTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_public_things_have_docstrings(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if path.name == "__main__.py":
        assert ast.get_docstring(tree)
        return
    lacking = [name for name, node in public(tree, path.stem) if not ast.get_docstring(node)]
    assert not lacking


@pytest.mark.parametrize("path", [*MODULES, *SCRIPTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_files_stay_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


def test_there_is_no_drawer_for_everything() -> None:
    assert not [path for path in MODULES if path.stem in ("utils", "util", "helpers", "misc", "common")]
