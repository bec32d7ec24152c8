"""What selections are worth: trainings on them, measured and judged."""

from __future__ import annotations

from typing import Annotated

import typer

from rose_ray.cli.app import Config, Set, Target, app, reported


@app.command()
@reported
def evaluate(
    config: Config,
    overrides: Set = None,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Train and judge nothing: make the table from what is there.")
    ] = False,
) -> None:
    """Train a model on the selections of every budget and seed, measure and judge it; what is done is found."""
    from rose_ray.config import load_config
    from rose_ray.errors import RoseError

    loaded = load_config(config, overrides or [])
    from rose_ray.distributed.evaluate import report_lines, run_evaluation

    failed = [] if report_only else run_evaluation(loaded)[1]
    for line in report_lines(loaded):
        typer.echo(line)
    if failed:
        raise RoseError("not all was done; the table holds the rest:\n  " + "\n  ".join(failed))


@app.command()
@reported
def correlate(config: Config, overrides: Set = None) -> None:
    """Say which loss follows margin and win rate across the models that `evaluate` trained."""
    from rose_ray.config import load_config

    loaded = load_config(config, overrides or [])
    from rose_ray.distributed.evaluate import correlate_lines

    for line in correlate_lines(loaded):
        typer.echo(line)


@app.command()
@reported
def lds(config: Config, target: Target, overrides: Set = None) -> None:
    """Train on random subsets and say how well the sums of a target's scores rank what they gained."""
    from rose_ray.config import load_config

    loaded = load_config(config, overrides or [])
    from rose_ray.distributed.lds import run_lds

    for line in run_lds(loaded, target):
        typer.echo(line)
