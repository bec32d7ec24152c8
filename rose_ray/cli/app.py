"""The command itself: its options, its log, and how its errors are told."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rose_ray.errors import RoseError

if TYPE_CHECKING:
    from rose_ray.stores.workspace import Workspace

app = typer.Typer(
    name="rose-ray",
    help="Choose the instruction-tuning data that most raises a reward margin, on a Ray cluster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Config = Annotated[str, typer.Argument(help="YAML file; `rose-ray init` writes a commented one.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Override a key: a.b=value. Items of lists by number.")]
Target = Annotated[str, typer.Argument(help="Name of a target, or training_set.")]


def reported(command: Callable[..., None]) -> Callable[..., None]:
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


def open_workspace(config: str, overrides: list[str] | None) -> Workspace:
    """Return the workspace that a configuration names.

    Raises:
        RoseError: The configuration is wrong, or there is no such workspace.
    """
    from rose_ray.config import load_config
    from rose_ray.stores.workspace import Workspace

    return Workspace.open(load_config(config, overrides or []).workspace)
