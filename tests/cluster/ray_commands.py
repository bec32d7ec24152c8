"""Whether a command line of ``ray`` exists in the Ray that is installed."""

from __future__ import annotations

from collections.abc import Sequence

import click
from ray.scripts.scripts import cli


def complaint(words: Sequence[str]) -> str | None:
    """Return what Ray's own parser has against a command line, or None; nothing is run.

    Args:
        words: What stands behind ``ray``, split as a shell does; what stands behind ``--`` is the command's own.
    """
    command: click.Command = cli
    context, rest = click.Context(cli, info_name="ray"), list(words)
    while isinstance(command, click.Group):
        if not rest:
            return f"{context.command_path}: a subcommand is missing"
        name = rest.pop(0)
        found = command.get_command(context, name)
        if found is None:
            return f"{context.command_path}: no command {name!r}"
        command, context = found, click.Context(found, info_name=name, parent=context)
    try:
        command.make_parser(context).parse_args(rest)
    except click.UsageError as error:
        return f"{context.command_path}: {error.format_message()}"
    return None
