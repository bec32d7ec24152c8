"""Checkpoints of other trainers."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from rose_ray.cli.app import app, reported


class _Kind(StrEnum):
    auto = "auto"
    hf_trainer = "hf_trainer"
    less = "less"
    deepspeed = "deepspeed"


@app.command("import-checkpoint")
@reported
def import_checkpoint(
    source: Annotated[str, typer.Argument(help="Folder of the checkpoint.")],
    out: Annotated[str, typer.Option(help="Folder to make, for warmup.adapters.")],
    kind: Annotated[_Kind, typer.Option(help="What wrote it; auto looks at its files.")] = _Kind.auto,
    adapter: Annotated[str, typer.Option(help="Folder of the PEFT adapter, where it is another.")] = "",
    base: Annotated[str, typer.Option(help="Base model, where the adapter does not name it.")] = "",
    learning_rate: Annotated[float | None, typer.Option(help="The epoch's mean, where none is recorded.")] = None,
    beta1: Annotated[float | None, typer.Option(help="Adam's, where it is not recorded.")] = None,
    beta2: Annotated[float | None, typer.Option(help="Adam's, where it is not recorded.")] = None,
    eps: Annotated[float | None, typer.Option(help="Adam's, where it is not recorded.")] = None,
) -> None:
    """Turn a checkpoint of another trainer into an adapter with Adam's moments, for warmup.adapters."""
    from rose_ray.distributed.import_checkpoint import Given
    from rose_ray.distributed.import_checkpoint import import_checkpoint as convert
    from rose_ray.foreign.optimizer import AdamNumbers

    given = Given(adapter, base, AdamNumbers(learning_rate, beta1, beta2, eps))
    for line in convert(source, out, kind=kind.value, given=given):
        typer.echo(line)
