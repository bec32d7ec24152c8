"""Garbage collection, said as it goes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rose_ray.stores.garbage import Garbage, find_garbage, remove
from rose_ray.stores.workspace import Workspace


def collect_garbage(workspace: Workspace, keep: int, *, delete: bool, unfinished: bool = False) -> Iterator[str]:
    """Say what nothing kept needs, and remove it if asked to.

    Args:
        workspace: Held by the caller where ``delete``.
        keep: Newest versions of each selection that are kept.
        delete: Remove.
        unfinished: Also what runs since the last finished one left.
    """
    found = find_garbage(workspace, keep)
    garbage = [each for each in found if unfinished or not each.unfinished]
    for kind in dict.fromkeys(each.kind for each in garbage):
        yield _total(kind, [each for each in garbage if each.kind == kind])
    if len(found) > len(garbage):
        left = [each for each in found if each.unfinished]
        yield f"{_total('kept for a run that did not finish', left)}; run it again, or add --unfinished"
    if not garbage:
        yield f"nothing to remove: the newest {keep} versions of each selection and the last run need the rest"
    elif not delete:
        yield f"{_total('in all', garbage)}; nothing was removed: add --delete"
    else:
        yield f"{_total('removed', list(remove(workspace, garbage)))}"


def _total(what: str, garbage: Sequence[Garbage]) -> str:
    return f"{what}: {len(garbage):,} folders, {sum(each.num_bytes for each in garbage) / 1e6:,.1f} MB"
