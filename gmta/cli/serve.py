"""gmta serve: the supervisor in the foreground."""

from __future__ import annotations

import sys

import click

from gmta.cli.options import config_option


@click.command()
@config_option
def serve(path: str | None) -> None:
    """Run in the foreground."""
    from gmta.supervisor import Supervisor

    sys.exit(Supervisor(path).run())
