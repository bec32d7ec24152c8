"""Which software made an artefact, and when."""

from __future__ import annotations

import datetime
import functools
import platform
from importlib.metadata import version

import rose_ray

_PACKAGES = ("torch", "transformers", "peft", "deepspeed", "ray", "pyarrow", "numpy")


@functools.cache
def _versions() -> tuple[tuple[str, str], ...]:
    own = ("rose_ray", rose_ray.__version__)
    return ("python", platform.python_version()), own, *((name, version(name)) for name in _PACKAGES)


def package_versions() -> dict[str, str]:
    """Versions of Python, rose_ray and the packages it computes with."""
    return dict(_versions())


def utc_now() -> str:
    """The time, UTC, ISO 8601, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
