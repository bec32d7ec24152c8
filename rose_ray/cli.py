"""The ``rose-ray`` command. Every subcommand imports what it needs, so that help and mistakes come at once."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Callable
from enum import StrEnum
from functools import wraps
from typing import Annotated, Any

import typer

import rose_ray
from rose_ray.errors import RoseError

app = typer.Typer(
    name="rose-ray",
    help="Choose the instruction-tuning data that most raises a reward margin, on a Ray cluster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_Config = Annotated[str, typer.Argument(help="YAML file; `rose-ray init` writes a commented one.")]
_Set = Annotated[list[str] | None, typer.Option("--set", help="Override a key: a.b=value. Items of lists by number.")]
_NewWarmup = Annotated[
    bool, typer.Option("--new-warmup", help="Choose the warm-up's rows anew from today's pool, and train on them.")
]
_Target = Annotated[str, typer.Argument(help="Name of a target, or training_set.")]
_Version = Annotated[int, typer.Argument(help="Number of a version, as `rose-ray selections` lists them.")]


class _Kind(StrEnum):
    auto = "auto"
    hf_trainer = "hf_trainer"
    less = "less"
    deepspeed = "deepspeed"


def _reported(command: Callable[..., None]) -> Callable[..., None]:
    """Print errors of ours without a traceback, and exit with 1."""

    @wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except RoseError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from error
        except OSError as error:
            typer.echo(f"error: {_describe(error)}", err=True)
            raise typer.Exit(1) from error

    return wrapped


def _describe(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}. What was finished is kept; run again once this is mended."


@app.callback()
def main(
    verbose: Annotated[bool, typer.Option("--verbose", help="Log more, Ray's own messages included.")] = False,
) -> None:
    """Set up logging: plain lines with a time, on standard error."""
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(levelname).1s %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
    )
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # this process never computes; workers are told their own
    if verbose:
        logging.getLogger("rose_ray").setLevel(logging.DEBUG)
    else:
        warnings.filterwarnings("ignore", category=FutureWarning)
        for name in ("transformers", "DeepSpeed", "httpx"):
            logging.getLogger(name).setLevel(logging.WARNING)
        # It says on the CPU that a kernel which nothing here calls cannot be built.
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(rose_ray.__version__)


@app.command()
@_reported
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
@_reported
def validate(config: _Config, overrides: _Set = None) -> None:
    """Check a configuration, its files, pairs, model and template, without computing anything."""
    from rose_ray.config import load_config

    loaded = load_config(config, overrides or [])  # a mistake in it is said before anything heavy is imported
    from rose_ray.distributed.validate import validate_job

    for line in validate_job(loaded):
        typer.echo(line)


@app.command()
@_reported
def plan(
    config: _Config,
    overrides: _Set = None,
    probe: Annotated[int, typer.Option(help="Rows that are scored to learn the rates; 0 for none, and no times.")] = 64,
) -> None:
    """Say what a run will take on this cluster: rows, time, device hours, bytes, memory. Reads the pool, keeps it."""
    from rose_ray.config import load_config

    loaded = load_config(config, overrides or [])
    from rose_ray.distributed.plan import plan_job
    from rose_ray.stages.plan_lines import plan_lines

    made = plan_job(loaded, probe_rows=probe)
    for line in plan_lines(made.tokens, made.work, made.rates, made.plan, made.num_shards):
        typer.echo(line)


@app.command()
@_reported
def run(config: _Config, overrides: _Set = None, new_warmup: _NewWarmup = False) -> None:
    """Run the whole job; what is done already is found and not done again."""
    _run(config, overrides, "select", new_warmup)


@app.command()
@_reported
def ingest(config: _Config, overrides: _Set = None) -> None:
    """Read the pool into shards."""
    _run(config, overrides, "ingest")


@app.command()
@_reported
def warmup(config: _Config, overrides: _Set = None, new_warmup: _NewWarmup = False) -> None:
    """Go as far as the warm-up: train the checkpoints, or find the pinned ones."""
    _run(config, overrides, "warmup", new_warmup)


@app.command()
@_reported
def bank(config: _Config, overrides: _Set = None) -> None:
    """Compute the bank of every target, and what it needs."""
    _run(config, overrides, "bank", only={"ingest", "warmup", "bank"})


@app.command()
@_reported
def features(config: _Config, overrides: _Set = None) -> None:
    """Compute the features of the pool, and what they need."""
    _run(config, overrides, "features", only={"ingest", "warmup", "features"})


@app.command()
@_reported
def score(config: _Config, overrides: _Set = None) -> None:
    """Go as far as the score tables."""
    _run(config, overrides, "score")


@app.command()
@_reported
def select(config: _Config, overrides: _Set = None) -> None:
    """Go as far as the selection; the same as run."""
    _run(config, overrides, "select")


@app.command()
@_reported
def status(config: _Config, overrides: _Set = None) -> None:
    """Show what the workspace holds and what the last run did."""
    from rose_ray.config import load_config
    from rose_ray.stages.report import status_lines
    from rose_ray.stores.workspace import Workspace

    for line in status_lines(Workspace.open(load_config(config, overrides or []).workspace)):
        typer.echo(line)


@app.command()
@_reported
def verify(
    config: Annotated[str, typer.Argument(metavar="CONFIG_OR_WORKSPACE", help="YAML file, or a workspace.")],
    delete: Annotated[bool, typer.Option("--delete-orphans", help="Remove files that no manifest names.")] = False,
) -> None:
    """Read every file of every artefact and say what is altered, missing or orphaned; exit with 1 if anything is."""
    from rose_ray.stages.verify import verify_workspace

    lines, clean = verify_workspace(config, delete_orphans=delete)
    for line in lines:
        typer.echo(line)
    if not clean:
        raise typer.Exit(1)


@app.command()
@_reported
def explain(
    config: _Config,
    row_id: Annotated[str, typer.Argument(help="As in the score table; the first characters are enough.")],
    overrides: _Set = None,
) -> None:
    """Show a row's influence on every pair at every checkpoint."""
    from rose_ray.config import load_config
    from rose_ray.stages.report import explain_lines
    from rose_ray.stores.workspace import Workspace

    loaded = load_config(config, overrides or [])
    for line in explain_lines(Workspace.open(loaded.workspace), loaded, row_id):
        typer.echo(line)


@app.command("import-checkpoint")
@_reported
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


@app.command()
@_reported
def selections(config: _Config, overrides: _Set = None) -> None:
    """List the versions of every target's selection."""
    from rose_ray.stages.drift_lines import version_lines

    for line in version_lines(_workspace(config, overrides)):
        typer.echo(line)


@app.command()
@_reported
def diff(
    config: _Config,
    target: _Target,
    old: Annotated[str, typer.Argument(help="Number of a version, latest, or previous.")] = "previous",
    new: Annotated[str, typer.Argument(help="The same.")] = "latest",
    out: Annotated[str | None, typer.Option(help="Write the report as JSON to this file too.")] = None,
    overrides: _Set = None,
) -> None:
    """Say what changed between two versions of a target's selection."""
    from rose_ray.stages.drift import drift
    from rose_ray.stages.drift_lines import drift_lines
    from rose_ray.stores.history import find_version, read_version

    workspace = _workspace(config, overrides)
    before, after = (find_version(workspace, target, wanted) for wanted in (old, new))
    found = drift(workspace, *(read_version(workspace, target, version) for version in (before, after)))
    for line in drift_lines(target, before, after, found):
        typer.echo(line)
    if out is not None:
        with open(out, "w", encoding="utf-8") as file:
            json.dump(found.as_json(), file, indent=2)
        typer.echo(f"wrote {out}")


@app.command()
@_reported
def restore(config: _Config, target: _Target, version: _Version, overrides: _Set = None) -> None:
    """Make an older version of a target's selection the latest again."""
    from rose_ray.config import load_config
    from rose_ray.stages.restore import restore_version
    from rose_ray.stores.lease import opened

    loaded = load_config(config, overrides or [])
    with opened(loaded.workspace, loaded.lease.term) as workspace:
        now = restore_version(workspace, target, version)
    typer.echo(f"{target}: version {now.number} restores version {now.restores}: {now.folder}")


@app.command()
@_reported
def gc(
    config: _Config,
    keep: Annotated[int, typer.Option(min=1, help="Newest versions of each selection to keep.")] = 5,
    delete: Annotated[bool, typer.Option("--delete", help="Remove; without it, only say what would go.")] = False,
    overrides: _Set = None,
) -> None:
    """Remove what neither the kept selections nor the last finished run need."""
    from rose_ray.config import load_config
    from rose_ray.stages.collect import collect_garbage
    from rose_ray.stores.lease import opened

    loaded = load_config(config, overrides or [])
    # Looking needs no lease.
    with opened(loaded.workspace, loaded.lease.term if delete else None) as workspace:
        for line in collect_garbage(workspace, keep, delete=delete):
            typer.echo(line)


@app.command()
@_reported
def demo(
    directory: Annotated[str, typer.Argument(help="Folder for everything the demo makes.")] = "demo-run",
    seed: Annotated[int, typer.Option(help="Seed of the generated data and model.")] = 0,
) -> None:
    """Generate a pool with a known answer, run the whole job on it, and compare the selection with random rows."""
    from rose_ray.distributed.demo import run_demo

    run_demo(directory, seed)


def _workspace(config: str, overrides: list[str] | None) -> Any:
    from rose_ray.config import load_config
    from rose_ray.stores.workspace import Workspace

    return Workspace.open(load_config(config, overrides or []).workspace)


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


if __name__ == "__main__":
    app()
