"""Secrets stay out of configurations: what is configured is written into manifests, records of runs and logs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from rose_ray.errors import ConfigError

_CREDENTIALS = re.compile(r"^\s*[a-z][a-z0-9+.:-]*://([^/@?\s]+|[^@?\s]*:[^@?\s]*)@", re.IGNORECASE)
"""A user, or a name and a key, before the host. Keys may hold slashes, as those of AWS do."""


def refuse_credentials(content: Any, name: str) -> None:
    """Refuse URIs that carry a user or a key, naming the configuration's keys and not the values.

    Raises:
        ConfigError: There are some.
    """
    keys = list(_with_credentials(content, ""))
    if keys:
        raise ConfigError(
            f"{name}: credentials in the URI at {', '.join(keys)}. They would be written into manifests and logs: give "
            "them by the environment (AWS_ACCESS_KEY_ID, ...), a profile or a role, and take them out."
        )


def _with_credentials(node: Any, key: str) -> Iterator[str]:
    if isinstance(node, dict):
        for name, value in node.items():
            yield from _with_credentials(value, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list):
        for number, value in enumerate(node):
            yield from _with_credentials(value, f"{key}.{number}")
    elif isinstance(node, str) and _CREDENTIALS.match(node):
        yield key
