"""Before a run: a configuration, its checks, what it will take."""

from __future__ import annotations

import json
import os
from typing import Annotated

import typer

import rose_ray
from rose_ray.cli.app import Config, Set, app, reported


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(rose_ray.__version__)


@app.command()
@reported
def init(
    path: Annotated[str, typer.Argument(help="File to write; - prints it.")] = "rose-ray.yaml",
    force: Annotated[bool, typer.Option("--force", help="Write over an existing file.")] = False,
) -> None:
    """Write a commented configuration."""
    from rose_ray.config.commented import commented_yaml
    from rose_ray.errors import ConfigError

    text = commented_yaml()
    if path == "-":
        typer.echo(text, nl=False)
        return
    if os.path.exists(path) and not force:
        raise ConfigError(f"{path} exists already. Name another file, or add --force.")
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
    typer.echo(f"wrote {path}. Set model.base, pool and targets, then: rose-ray validate {path}")


@app.command()
def schema() -> None:
    """Print the configuration's JSON Schema, for editors."""
    from rose_ray.config import JobConfig

    typer.echo(json.dumps(JobConfig.model_json_schema(), indent=2))


@app.command()
@reported
def validate(config: Config, overrides: Set = None) -> None:
    """Check a configuration, its files, pairs, model and template, without computing anything."""
    from rose_ray.config import load_config

    loaded = load_config(config, overrides or [])  # a mistake in it is said before anything heavy is imported
    from rose_ray.distributed.validate import validate_job

    for line in validate_job(loaded):
        typer.echo(line)


@app.command()
@reported
def plan(
    config: Config,
    overrides: Set = None,
    probe: Annotated[
        int,
        typer.Option(
            help="Rows that an actor, or each rank of one, scores to learn the rates; 0 for none, and no times."
        ),
    ] = 64,
) -> None:
    """Say what a run will take on this cluster: rows, time, device hours, bytes, memory. Reads the pool, keeps it."""
    from rose_ray.config import load_config

    loaded = load_config(config, overrides or [])
    from rose_ray.distributed.plan import plan_job
    from rose_ray.stages.plan_lines import plan_lines

    made = plan_job(loaded, probe_rows=probe)
    for line in plan_lines(made.tokens, made.work, made.rates, made.plan, made.num_shards, made.others):
        typer.echo(line)
