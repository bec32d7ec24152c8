"""The ``rose-ray`` command. Every subcommand imports what it needs, so that help and mistakes come at once."""

from rose_ray.cli import prepare, sample, run, look, diagnose, evaluate, history, convert  # noqa: I001  (--help's order)
from rose_ray.cli.app import app

__all__ = ["app", "convert", "diagnose", "evaluate", "history", "look", "prepare", "run", "sample"]
