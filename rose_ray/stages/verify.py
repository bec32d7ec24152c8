"""The ``verify`` command: a workspace, or that of a configuration, read from end to end."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import nullcontext

from rose_ray.config import load_config
from rose_ray.config.lease import LeaseConfig
from rose_ray.stores.lease import held
from rose_ray.stores.verify import delete_damaged as delete_found_damage
from rose_ray.stores.verify import delete_orphans as delete_found_orphans
from rose_ray.stores.verify import is_warmup, verify, verify_lines
from rose_ray.stores.workspace import Workspace

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 5.0


def verify_workspace(name: str, *, delete_orphans: bool, delete_damaged: bool) -> tuple[list[str], bool]:
    """Verify, and return lines for people and whether everything found was dealt with.

    Args:
        name: A YAML file, or a workspace.
        delete_orphans: Remove files that no manifest names; the workspace is held meanwhile.
        delete_damaged: Remove the manifests of what is altered or cut short, but for warm-ups; held as well.

    Raises:
        StoreError: There is no workspace.
        LeaseError: Something is to be removed and a run is at work.
    """
    is_config = name.endswith((".yaml", ".yml"))
    config = load_config(name, []) if is_config else None
    workspace = Workspace.open(config.workspace if config else name)
    lease = config.lease if config else LeaseConfig()
    deletes = delete_orphans or delete_damaged
    with held(workspace, lease.term_seconds) if deletes and lease.enabled else nullcontext(workspace) as opened:
        findings = verify(opened, _progress())
        if delete_orphans:
            delete_found_orphans(opened, findings)
        if delete_damaged:
            delete_found_damage(opened, findings)
    damage_stays = any(is_warmup(folder) or not delete_damaged for folder in findings.damaged)
    orphans_stay = bool(findings.orphans) and not delete_orphans
    lines = verify_lines(workspace, findings, deleted_orphans=delete_orphans, deleted_damaged=delete_damaged)
    return list(lines), not damage_stays and not orphans_stay


def _progress() -> Callable[[int, int], None]:
    last = time.monotonic()

    def say(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _SECONDS_BETWEEN_LINES:
            last = now
            logger.info(f"verify: {done / 1e6:,.0f} of {total / 1e6:,.0f} MB")

    return say
