"""Write ``docs/cli.md`` from the commands' own help: ``python docs/generate.py``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from cp_convert.cli import cli

TARGET = Path(__file__).with_name("cli.md")


def _context(
    command: click.Command, name: str, parent: click.Context | None = None
) -> click.Context:
    settings = {**command.context_settings, "terminal_width": 100}
    return click.Context(command, info_name=name, parent=parent, **settings)


def reference() -> str:
    """The help of every command, as it is shown on a terminal of 100 columns."""
    parts = ["# Command reference\n\nGenerated from `--help` by `python docs/generate.py`.\n"]
    root = _context(cli, "cp-convert")
    parts.append(f"```\n{cli.get_help(root).rstrip()}\n```\n")
    parts += _commands(cli, root, "")
    return "\n".join(parts)


def _commands(group: click.Group, parent: click.Context, before: str) -> Iterator[str]:
    """A section for each command of a group, and for each of its own commands if it is one."""
    for name, command in sorted(group.commands.items()):
        context = _context(command, name, parent)
        help_text = command.get_help(context).rstrip()
        yield f"## {before}{name}\n\n```\n{help_text}\n```\n"
        if isinstance(command, click.Group):
            yield from _commands(command, context, f"{before}{name} ")


if __name__ == "__main__":
    TARGET.write_text(reference())
