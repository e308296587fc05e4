"""The gmta command: finds the module of a command group when one of its commands is invoked, and says what went wrong.

One file per group in this package; each command is a click.Command in the file that `COMMANDS` names, so that
`gmta queue list` imports nothing that only `gmta serve` needs. Exit status: 0 fine, 1 a check failed (or the queue can't be
read), 2 usage, 78 bad configuration, with every error of it on standard error.
"""

from __future__ import annotations

import io
import sqlite3
import sys
from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType
from typing import Any

import click

import gmta

COMMANDS: Mapping[str, str] = MappingProxyType({
    "serve": "gmta.cli.serve",
    "check": "gmta.cli.check",
    "plugins": "gmta.cli.check",
    "route": "gmta.cli.check",
    "queue": "gmta.cli.queue",
    "trace": "gmta.cli.queue",
    "node": "gmta.cli.node",
    "auth": "gmta.cli.auth",
    "dmarc": "gmta.cli.auth",
    "dkim": "gmta.cli.dkim",
    "webhook": "gmta.cli.webhook",
    "user": "gmta.cli.user",
})


class LazyGroup(click.Group):
    """A group whose commands lie in other modules, under their own names; a `-` in a command's name is a `_` there."""

    def __init__(self, *args: Any, homes: Mapping[str, str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._homes = homes

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names, in the table's order."""
        return list(self._homes)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name, its module imported, or None."""
        home = self._homes.get(cmd_name)
        if home is None:
            return None
        command: click.Command = getattr(import_module(home), cmd_name.replace("-", "_"))
        return command

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command; a bad configuration ends with status 78, a queue that can't be read with 1."""
        from gmta.config import EX_CONFIG, ConfigError
        from gmta.queue.store import StoreError

        try:
            return super().invoke(ctx)
        except ConfigError as error:
            click.echo("\n".join(error.errors), err=True)
            ctx.exit(EX_CONFIG)
        except (sqlite3.Error, StoreError) as error:
            click.echo(f"the queue can't be read or changed: {error}", err=True)
            ctx.exit(1)
        except PermissionError as error:
            click.echo(f"{error.filename}: {error.strerror}", err=True)
            ctx.exit(1)


@click.group(cls=LazyGroup, homes=COMMANDS)
@click.version_option(gmta.__version__, prog_name="gmta", message="%(prog)s %(version)s")
def main() -> None:
    """gmta, a mail transfer agent."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # an address in UTF-8 on a Latin-1 terminal
