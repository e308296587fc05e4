"""gmta node: the nodes of one PostgreSQL, and which of them are to take no mail.

Works from any machine whose configuration names the database. Exit status 1: no such node, no database, or a queue in files.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from gmta.cli import output
from gmta.cli.options import config_option, json_option
from gmta.cli.output import clean, on_terminal, print_json, time_text
from gmta.config import load

if TYPE_CHECKING:
    from gmta.queue.pgadmin import PostgresAdmin


@click.group()
def node() -> None:
    """Look at the nodes of one PostgreSQL, drain them."""


def _admin(path: str | None) -> PostgresAdmin:
    """The database's side; ends the command where the queue is this machine's alone."""
    store = load(path).queue.store
    if store == "sqlite":
        click.echo("the queue is this machine's alone: [queue] store is sqlite", err=True)
        sys.exit(1)
    from gmta.queue.pgadmin import open_database

    return open_database(store)


@node.command("list")
@config_option
@json_option
def list_(path: str | None, as_json: bool) -> None:
    """Every node: up, draining, drained or down; its workers, and recipients that they have at hand."""
    rows = _admin(path).nodes()
    if as_json:
        print_json(rows)
        return
    lines = [(clean(row["node"]), row["state"], str(row["workers"]), str(row["claimed"]), time_text(row["since"]) if row["since"] else "")
             for row in rows]
    if on_terminal():
        output.print_table(("Node", "State", "Workers", "At hand", "Up since"), lines, right=("Workers", "At hand"))
    else:
        for line in lines:
            click.echo(" ".join(line).rstrip())


@node.command("drain")
@click.argument("name")
@config_option
def drain(name: str, path: str | None) -> None:
    """Take no more mail on a node: it refuses intake, takes nothing from the queue, and finishes what it has."""
    _say(name, "drains", _admin(path).drain(name, True))


@node.command("resume")
@click.argument("name")
@config_option
def resume(name: str, path: str | None) -> None:
    """Let a drained node take mail again."""
    _say(name, "takes mail", _admin(path).drain(name, False))


@node.command("forget")
@click.argument("name")
@config_option
def forget(name: str, path: str | None) -> None:
    """Take a node that is down for good off the list."""
    _admin(path).forget(name)
    click.echo(f"{clean(name)} is forgotten")


def _say(name: str, does: str, changed: bool) -> None:
    click.echo(f"{clean(name)} {does}" if changed else f"{clean(name)} {does} already")
