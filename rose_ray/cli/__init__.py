"""The ``rose-ray`` command. Every subcommand imports what it needs, so that help and mistakes come at once."""

from rose_ray.cli import prepare, run, look, history, convert, evaluate  # noqa: I001  (the order of the commands in --help)
from rose_ray.cli.app import app

__all__ = ["app", "convert", "evaluate", "history", "look", "prepare", "run"]
