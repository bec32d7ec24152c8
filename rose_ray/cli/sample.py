"""A model's own answers to a target's labelled rows."""

from __future__ import annotations

from typing import Annotated

import typer

from rose_ray.cli.app import Config, Set, app, reported


@app.command("sample-answers")
@reported
def sample_answers(
    config: Config,
    target: Annotated[str, typer.Argument(help="Name of a target with labelled rows of kind exact_answer.")],
    overrides: Set = None,
    num_samples: Annotated[int, typer.Option("--samples", min=1, help="Answers to a question.")] = 8,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token, for one answer.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws.")] = 0,
) -> None:
    """Ask the base model for answers; wrong ones can stand against the labelled answer."""
    from rose_ray.config import load_config

    loaded = load_config(config, overrides or [])
    from rose_ray.distributed.sample import sample_target
    from rose_ray.stages.sample_answers import SamplingSettings

    settings = SamplingSettings(1 if temperature == 0 else num_samples, temperature, max_new_tokens, seed)
    made, path = sample_target(loaded, target, settings)
    typer.echo(f"{made.counts['answers']:,} answers to {made.counts['questions']:,} questions: {path}")
    typer.echo(f"in the target's `task`, set rejected: samples and samples: [{path}]")
