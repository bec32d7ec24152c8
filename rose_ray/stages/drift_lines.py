"""Versions and drift for people."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rose_ray.stages.drift import Drift, Overlap
from rose_ray.stores.history import Version, latest_version, selected_names, versions
from rose_ray.stores.manifest import find_manifest
from rose_ray.stores.workspace import Workspace

_MOST_SOURCES = 8
"""Sources named in a list of gains or losses."""


def version_lines(workspace: Workspace, names: list[str] | None = None) -> Iterator[str]:
    """List the versions of each target's selection, newest last."""
    for name in names or selected_names(workspace):
        latest = latest_version(workspace, name)
        yield f"{name}:"
        previous: Version | None = None
        for version in versions(workspace, name):
            notes = [f"restores {version.restores}"] if version.restores else []
            if previous is not None and version.pool != previous.pool:
                notes.append("another pool")
            if find_manifest(workspace, version.folder) is None:
                notes.append("removed")
            if latest is not None and version.number == latest.number:
                notes.append("latest")
            yield (
                f"  {version.number:>4}  {version.since}  {version.num_rows:>9,} rows  {version.num_tokens:>12,} tokens"
                f"  {version.folder}  {', '.join(notes)}"
            ).rstrip()
            previous = version


def drift_lines(name: str, old: Version, new: Version, found: Drift) -> Iterator[str]:
    """The whole report."""
    yield f"{name}: version {old.number} ({old.since}) to version {new.number} ({new.since})"
    yield f"  {short_drift(found)}"
    share = f"{new_rows_share(found):.1%}"
    yield f"  new rows of the pool: {found.num_new_rows:,}, {share} of the selection; gone from it: {found.num_gone:,}"
    yield f"  tokens of a selected row: {found.mean_tokens_old:,.0f} -> {found.mean_tokens_new:,.0f}"
    yield f"  gained by source: {_sources(found.gained)}"
    yield f"  lost by source: {_sources(found.lost)}"
    width = max((len(column) for column in found.shifts), default=0)
    for column, shift in found.shifts.items():
        low, median, high = shift.quantiles
        rank = "constant" if shift.spearman is None else f"{shift.spearman:+.3f}"
        yield (
            f"  {column:<{width}}  shift {median:+.5f} (5 % {low:+.5f}, 95 % {high:+.5f}), rank correlation {rank}, "
            f"over {shift.num_rows:,} rows in both pools"
        )


def drift_json(found: Drift) -> dict[str, Any]:
    """The same for a file."""
    return {"new_rows_share": new_rows_share(found), **found.as_json()}


def new_rows_share(found: Drift) -> float:
    """Return which part of the newer selection the older pool did not hold, 0 to 1; 0 where nothing is selected."""
    return found.num_new_rows / found.num_new if found.num_new else 0.0


def short_drift(found: Overlap) -> str:
    """Overlap in a line."""
    gained, lost = found.num_new - found.num_common, found.num_old - found.num_common
    return (
        f"{found.num_common:,} rows kept, {gained:,} gained, {lost:,} lost, "
        f"{found.jaccard:.1%} of all in both (Jaccard)"
    )


def _sources(counts: dict[str, int]) -> str:
    named = [f"{source} {count:,}" for source, count in list(counts.items())[:_MOST_SOURCES]]
    more = len(counts) - len(named)
    return (", ".join(named) or "none") + (f", and {more} more sources" if more > 0 else "")
