"""Versions of selections: list, compare, restore, and remove what none needs."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from rose_ray.cli.app import Config, Set, Target, app, open_workspace, reported

Version = Annotated[int, typer.Argument(help="Number of a version, as `rose-ray selections` lists them.")]


@app.command()
@reported
def selections(config: Config, overrides: Set = None) -> None:
    """List the versions of every target's selection."""
    from rose_ray.stages.drift_lines import version_lines

    for line in version_lines(open_workspace(config, overrides)):
        typer.echo(line)


@app.command()
@reported
def diff(
    config: Config,
    target: Target,
    old: Annotated[str, typer.Argument(help="Number of a version, latest, or previous.")] = "previous",
    new: Annotated[str, typer.Argument(help="The same.")] = "latest",
    out: Annotated[str | None, typer.Option(help="Write the report as JSON to this file too.")] = None,
    overrides: Set = None,
) -> None:
    """Say what changed between two versions of a target's selection."""
    from rose_ray.stages.drift import drift
    from rose_ray.stages.drift_lines import drift_json, drift_lines
    from rose_ray.stores.history import find_version, read_version

    workspace = open_workspace(config, overrides)
    before, after = (find_version(workspace, target, wanted) for wanted in (old, new))
    found = drift(workspace, *(read_version(workspace, target, version) for version in (before, after)))
    for line in drift_lines(target, before, after, found):
        typer.echo(line)
    if out is not None:
        with open(out, "w", encoding="utf-8") as file:
            json.dump(drift_json(found), file, indent=2)
        typer.echo(f"wrote {out}")


@app.command()
@reported
def restore(config: Config, target: Target, version: Version, overrides: Set = None) -> None:
    """Make an older version of a target's selection the latest again."""
    from rose_ray.config import load_config
    from rose_ray.stages.restore import restore_version
    from rose_ray.stores.lease import opened

    loaded = load_config(config, overrides or [])
    with opened(loaded.workspace, loaded.lease.term) as workspace:
        now = restore_version(workspace, target, version)
    typer.echo(f"{target}: version {now.number} restores version {now.restores}: {now.folder}")


@app.command()
@reported
def gc(
    config: Config,
    keep: Annotated[int, typer.Option(min=1, help="Newest versions of each selection to keep.")] = 5,
    delete: Annotated[bool, typer.Option("--delete", help="Remove; without it, only say what would go.")] = False,
    unfinished: Annotated[
        bool, typer.Option("--unfinished", help="Also what runs since the last finished one left.")
    ] = False,
    overrides: Set = None,
) -> None:
    """Remove what neither the kept selections nor the last finished run need."""
    from rose_ray.config import load_config
    from rose_ray.stages.collect import collect_garbage
    from rose_ray.stores.lease import opened

    loaded = load_config(config, overrides or [])
    # Looking needs no lease.
    with opened(loaded.workspace, loaded.lease.term if delete else None) as workspace:
        for line in collect_garbage(workspace, keep, delete=delete, unfinished=unfinished):
            typer.echo(line)
