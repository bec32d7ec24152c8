"""The job, whole or as far as a stage, and the demo."""

from __future__ import annotations

from typing import Annotated

import typer

from rose_ray.cli.app import Config, Set, app, reported

NewWarmup = Annotated[
    bool,
    typer.Option(
        "--new-warmup",
        help="Choose the warm-up's rows anew from today's pool, and train on them; kept by later runs once this one is "
        "through with it.",
    ),
]


@app.command()
@reported
def run(config: Config, overrides: Set = None, new_warmup: NewWarmup = False) -> None:
    """Run the whole job; what is done already is found and not done again."""
    _run(config, overrides, "select", new_warmup)


@app.command()
@reported
def ingest(config: Config, overrides: Set = None) -> None:
    """Read the pool into shards."""
    _run(config, overrides, "ingest")


@app.command()
@reported
def warmup(config: Config, overrides: Set = None, new_warmup: NewWarmup = False) -> None:
    """Go as far as the warm-up: train the checkpoints, or find the pinned ones."""
    _run(config, overrides, "warmup", new_warmup)


@app.command()
@reported
def bank(config: Config, overrides: Set = None) -> None:
    """Compute the bank of every target, and what it needs."""
    _run(config, overrides, "bank", only={"ingest", "warmup", "bank"})


@app.command()
@reported
def features(config: Config, overrides: Set = None) -> None:
    """Compute the features of the pool, and what they need."""
    _run(config, overrides, "features", only={"ingest", "warmup", "features"})


@app.command()
@reported
def score(config: Config, overrides: Set = None) -> None:
    """Go as far as the score tables."""
    _run(config, overrides, "score")


@app.command()
@reported
def select(config: Config, overrides: Set = None) -> None:
    """Go as far as the selection; the same as run."""
    _run(config, overrides, "select")


@app.command()
@reported
def demo(
    directory: Annotated[str, typer.Argument(help="Folder for everything the demo makes.")] = "demo-run",
    seed: Annotated[int, typer.Option(help="Seed of the generated data and model.")] = 0,
) -> None:
    """Generate a pool with a known answer, run the whole job on it, and compare the selection with random rows."""
    from rose_ray.distributed.demo import run_demo

    run_demo(directory, seed)


def _run(
    config: str,
    overrides: list[str] | None,
    last_stage: str,
    new_warmup: bool = False,
    only: set[str] | None = None,
) -> None:
    from rose_ray.config import load_config

    loaded = load_config(config, overrides or [])
    from rose_ray.distributed.run import STAGES, run_job
    from rose_ray.stages.report import result_lines

    stages = only or set(STAGES[: STAGES.index(last_stage) + 1])
    result = run_job(loaded, stages=stages, new_warmup=new_warmup)
    for line in result_lines(result.stages, result.selections, result.events):
        typer.echo(line)
