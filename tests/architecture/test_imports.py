"""Who may import what: the contracts hold, and help comes without loading a framework."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = sorted((ROOT / "rose_ray").rglob("*.py"))
HEAVY = {"torch", "ray", "transformers", "deepspeed", "peft", "pyarrow", "numpy"}
FRAMEWORKS = {"ray", "deepspeed"}


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def imported(path: Path) -> set[str]:
    """Return the top-level packages that a file imports anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(str(node.module).split(".")[0])
    return found


@pytest.mark.parametrize(
    "statement",
    [
        "import rose_ray, rose_ray.cli, rose_ray.errors",
        "import rose_ray.config",
        "import sys; sys.argv = ['rose-ray', '--help']; from rose_ray.cli import app; app(standalone_mode=False)",
        "import sys; sys.argv = ['rose-ray', 'schema']; from rose_ray.cli import app; app(standalone_mode=False)",
        "import sys; sys.argv = ['rose-ray', 'init', '-']; from rose_ray.cli import app; app(standalone_mode=False)",
    ],
)
def test_the_command_starts_without_loading_a_framework(statement: str) -> None:
    report = "import json, sys; print('\\n' + json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    result = python("-c", f"{statement}\n{report}")
    assert result.returncode == 0, result.stderr
    assert not HEAVY & set(json.loads(result.stdout.splitlines()[-1]))


def test_a_mistake_in_the_yaml_is_said_without_loading_a_framework(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("workspace: 3\n", encoding="utf-8")
    result = python("-X", "importtime", "-m", "rose_ray", "run", str(tmp_path / "job.yaml"))
    lines = result.stderr.splitlines()
    assert result.returncode == 1 and any(line.startswith("error: ") for line in lines)
    loaded = {line.rsplit("|", 1)[1].strip().split(".")[0] for line in lines if line.startswith("import time:")}
    assert "pydantic" in loaded and not loaded & {"ray", "torch", "transformers", "deepspeed"}


def test_import_contracts_hold() -> None:
    command = Path(sys.executable).with_name("lint-imports")
    if not command.exists():
        pytest.skip("import-linter is not installed beside this Python")
    result = subprocess.run(
        [str(command), "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 broken" in result.stdout


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_distributed_imports_ray_and_deepspeed(path: Path) -> None:
    if path.relative_to(ROOT).parts[1] != "distributed":
        assert not imported(path) & FRAMEWORKS


def test_every_room_stands_in_the_contract_on_frameworks() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    rooms = {path.relative_to(ROOT / "rose_ray").parts[0].removesuffix(".py") for path in MODULES}
    rooms -= {"__init__", "__main__", "cli", "distributed"}
    lacking = [room for room in sorted(rooms) if f'    "rose_ray.{room}",' not in text.split("forbidden_modules")[0]]
    assert not lacking


UNPICKLING = {
    "torch": {"load"},
    "pickle": {"load", "loads", "Unpickler"},
    "joblib": {"load"},
    "dill": {"load", "loads"},
}
"""What can run code that a file holds."""


def test_one_place_reads_pickles_and_it_asks_for_tensors_alone() -> None:
    found = []
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            owner = node.value.id if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) else ""
            if isinstance(node, ast.Attribute) and node.attr in UNPICKLING.get(owner, ()):
                found.append(path.relative_to(ROOT / "rose_ray").as_posix())
            if isinstance(node, ast.ImportFrom):
                assert not UNPICKLING.get(str(node.module), set()) & {name.name for name in node.names}, path
    assert found == ["foreign/pickles.py"]
    text = (ROOT / "rose_ray/foreign/pickles.py").read_text(encoding="utf-8")
    assert text.count("weights_only=True") == 1 and "weights_only=False" not in text


def test_one_place_starts_ray() -> None:
    starting = [path.name for path in MODULES if "ray.init(" in path.read_text(encoding="utf-8")]
    assert starting == ["session.py"]
