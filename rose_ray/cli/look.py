"""What a workspace holds."""

from __future__ import annotations

from typing import Annotated

import typer

from rose_ray.cli.app import Config, Set, app, open_workspace, reported


@app.command()
@reported
def status(config: Config, overrides: Set = None) -> None:
    """Show what the workspace holds and what the last run did."""
    from rose_ray.stages.report import status_lines

    for line in status_lines(open_workspace(config, overrides)):
        typer.echo(line)


@app.command()
@reported
def verify(
    config: Annotated[str, typer.Argument(metavar="CONFIG_OR_WORKSPACE", help="YAML file, or a workspace.")],
    orphans: Annotated[bool, typer.Option("--delete-orphans", help="Remove files that no manifest names.")] = False,
    damaged: Annotated[
        bool,
        typer.Option(
            "--delete-damaged",
            help="Remove the manifests of artefacts with altered or missing files, so that the next run makes them "
            "anew; warm-ups stay.",
        ),
    ] = False,
) -> None:
    """Read every file of every artefact and say what is altered, missing or orphaned; exit with 1 if anything is."""
    from rose_ray.stages.verify import verify_workspace

    lines, clean = verify_workspace(config, delete_orphans=orphans, delete_damaged=damaged)
    for line in lines:
        typer.echo(line)
    if not clean:
        raise typer.Exit(1)


@app.command()
@reported
def explain(
    config: Config,
    row_id: Annotated[str, typer.Argument(help="As in the score table; the first characters are enough.")],
    overrides: Set = None,
) -> None:
    """Show a row's influence on every pair at every checkpoint."""
    from rose_ray.config import load_config
    from rose_ray.stages.report import explain_lines
    from rose_ray.stores.workspace import Workspace

    loaded = load_config(config, overrides or [])
    for line in explain_lines(Workspace.open(loaded.workspace), loaded, row_id):
        typer.echo(line)
