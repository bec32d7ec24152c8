"""The ``rose-ray`` command. Every subcommand imports what it needs, so that help and mistakes come at once."""

from rose_ray.cli import prepare, sample, run, look, diagnose, history, convert  # noqa: I001  (the order in --help)
from rose_ray.cli.app import app

__all__ = ["app", "convert", "diagnose", "history", "look", "prepare", "run", "sample"]
