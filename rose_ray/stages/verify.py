"""The ``verify`` command: a workspace, or that of a configuration, read from end to end."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import nullcontext

from rose_ray.config import load_config
from rose_ray.config.lease import LeaseConfig
from rose_ray.stores.lease import held
from rose_ray.stores.verify import delete_orphans as delete_found
from rose_ray.stores.verify import verify, verify_lines
from rose_ray.stores.workspace import Workspace

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 5.0


def verify_workspace(name: str, *, delete_orphans: bool) -> tuple[list[str], bool]:
    """Verify, and return lines for people and whether all is well afterwards.

    Args:
        name: A YAML file, or a workspace.
        delete_orphans: Remove files that no manifest names; the workspace is held meanwhile.

    Raises:
        StoreError: There is no workspace.
        LeaseError: Orphans are to be removed and a run is at work.
    """
    is_config = name.endswith((".yaml", ".yml"))
    config = load_config(name, []) if is_config else None
    workspace = Workspace.open(config.workspace if config else name)
    lease = config.lease if config else LeaseConfig()
    holding = held(workspace, lease.term_seconds) if delete_orphans and lease.enabled else nullcontext(workspace)
    with holding as opened:
        findings = verify(opened, _progress())
        if delete_orphans:
            delete_found(opened, findings)
    damaged = bool(findings.altered or findings.missing)
    clean = not damaged if delete_orphans else findings.is_clean
    return list(verify_lines(workspace, findings, deleted=delete_orphans)), clean


def _progress() -> Callable[[int, int], None]:
    last = time.monotonic()

    def say(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _SECONDS_BETWEEN_LINES:
            last = now
            logger.info(f"verify: {done / 1e6:,.0f} of {total / 1e6:,.0f} MB")

    return say
