"""gmta queue and gmta trace: the operator's view of the queue and hands on it, with the server up or down."""

from __future__ import annotations

import json
import sys

import click

from gmta.cli.options import config_option, json_option, queue_admin


@click.command()
@click.argument("queue_id")
@config_option
@json_option
def trace(queue_id: str, path: str | None, as_json: bool) -> None:
    """A message's history."""
    events = queue_admin(path).trace(queue_id)
    if as_json:
        click.echo(json.dumps([{"id": event.queue_id, "at": event.at, "kind": event.kind, "data": event.data} for event in events]))
    else:
        for event in events:
            click.echo(f"{event.at:.3f} {event.kind} " + " ".join(f"{key}={value}" for key, value in event.data.items()))
    sys.exit(0 if events else 1)


@click.group()
def queue() -> None:
    """Look at the queue and change it, with the server up or down."""


@queue.command("list")
@click.argument("ids", nargs=-1)
@click.option("--domain")
@click.option("--sender")
@config_option
@json_option
def queue_list(ids: tuple[str, ...], domain: str | None, sender: str | None, path: str | None, as_json: bool) -> None:
    """What is queued."""
    rows = list(queue_admin(path).list(ids, domain=domain, sender=sender))
    if as_json:
        click.echo(json.dumps(rows))
        return
    for row in rows:
        click.echo(f"{row['id']} {row['size']} <{row['sender']}>{' held' if row['held'] else ''}")
        for recipient in row["recipients"]:
            click.echo(f"    {recipient['status']} {recipient['address']} attempts={recipient['attempts']} {recipient['last_reply']}")


@queue.command("show")
@click.argument("queue_id")
@config_option
def queue_show(queue_id: str, path: str | None) -> None:
    """One message's envelope, as JSON."""
    row = queue_admin(path).show(queue_id)
    if row is None:
        click.echo(f"{queue_id} is not queued", err=True)
        sys.exit(1)
    click.echo(json.dumps(row, indent=2))


@queue.command("cat")
@click.argument("queue_id")
@config_option
def queue_cat(queue_id: str, path: str | None) -> None:
    """The octets of a queued message."""
    pieces = queue_admin(path).cat(queue_id)
    if pieces is None:
        click.echo(f"{queue_id} is not queued", err=True)
        sys.exit(1)
    for piece in pieces:
        sys.stdout.buffer.write(piece)


@queue.command("stats")
@config_option
def queue_stats(path: str | None) -> None:
    """Counts, as JSON."""
    click.echo(json.dumps(queue_admin(path).stats(), indent=2))


def _changer(name: str, summary: str) -> None:
    @queue.command(name, help=summary)
    @click.argument("ids", nargs=-1)
    @click.option("--domain")
    @click.option("--sender")
    @click.option("--all", "everything", is_flag=True)
    @config_option
    def change(ids: tuple[str, ...], domain: str | None, sender: str | None, everything: bool, path: str | None) -> None:
        if not (ids or domain or sender is not None or everything):
            raise click.UsageError("name IDs, --domain, --sender or --all")
        count = getattr(queue_admin(path), name)(ids, domain=domain, sender=sender, all=everything)
        click.echo(f"{count} changed")
        sys.exit(0 if count or everything else 1)


for _name, _summary in (("retry", "Try again now."), ("hold", "Keep from delivery."), ("release", "Let held ones go."),
                        ("delete", "Remove; nobody is told."), ("bounce", "Give up; the sender is told.")):
    _changer(_name, _summary)
