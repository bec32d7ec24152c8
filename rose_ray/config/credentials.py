"""Secrets stay out of configurations: what is configured is written into manifests, records of runs and logs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qsl

from rose_ray.errors import ConfigError

_URI = re.compile(r"\s*([a-z][a-z0-9+.:-]*)://", re.IGNORECASE)
_USER = re.compile(r"([^/@?\s]+|[^@?\s]*:[^@?\s]*)@")
"""A user, or a name and a key, before the host. Keys may hold slashes, as those of AWS do."""

_NAME_AND_KEY = re.compile(r"[^@?\s]*:[^@?\s]*@")
_CONTAINER_SCHEMES = frozenset({"abfs", "abfss"})
"""Before the host stands a container, which is no secret: abfs://container@account.dfs.core.windows.net/path."""

_SECRET_OPTION = re.compile(
    r"secret|password|passwd|token|credential|signature|^sig$|(api|account|access|private|shared)[_-]?key",
    re.IGNORECASE,
)


def refuse_credentials(content: Any, name: str) -> None:
    """Refuse URIs that carry a user or a key, before the host or among their options.

    The message names the configuration's keys and not the values.

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
    elif isinstance(node, str) and _has_credentials(node):
        yield key


def _has_credentials(text: str) -> bool:
    uri = _URI.match(text)
    if uri is None:
        return False
    scheme = uri[1].rpartition(":")[2].lower()
    if (_NAME_AND_KEY if scheme in _CONTAINER_SCHEMES else _USER).match(text, uri.end()):
        return True
    options = parse_qsl(text.partition("?")[2].replace(";", "&"), keep_blank_values=True)
    return any(_SECRET_OPTION.search(option) for option, _ in options)
