"""gmta webhook: what would be posted of a queued message, whether a request that came is ours, and a message posted again.

Works on the queue itself, with the server up or down, and changes nothing there. A transport takes part that can say what it would
send (`requests`, `headers`), whichever plugin it is of. Exit status 1: no such message, nothing to post, a signature that does not
hold, or an endpoint that did not take it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

import click

from gmta.cli.options import config_option, json_option, plugin_manager, queue_admin
from gmta.cli.output import clean, print_json
from gmta.config import Config, load

if TYPE_CHECKING:
    from gmta.hookspecs import Delivery

BLOCK = 64 * 1024


@click.group()
def webhook() -> None:
    """Look at what webhooks post, verify it, post it again."""


@webhook.command()
@click.argument("queue_id", required=False, metavar="[ID]")
@click.option("--transport", metavar="NAME", help="default: the one that the message goes by")
@click.option("--body", "show_body", is_flag=True, help="print the body too")
@click.option("--file", type=click.File("rb"), help="instead of ID: the body of a request that came, - for standard input")
@click.option("--id", "given_id", metavar="TEXT", help="its webhook-id")
@click.option("--timestamp", metavar="TEXT", help="its webhook-timestamp")
@click.option("--signature", metavar="TEXT", help="its webhook-signature")
@click.option("--secret", multiple=True, metavar="whsec_…", help="a secret that it may be signed with")
@click.option("--now", type=float, metavar="UNIXTIME", help="judge as if it were this time")
@config_option
def verify(queue_id: str | None, transport: str | None, show_body: bool, file: BinaryIO | None, given_id: str | None, timestamp: str | None,
           signature: str | None, secret: tuple[str, ...], now: float | None, path: str | None) -> None:
    """What would be posted of the queued message ID; or with --file, whether a request was signed by one of our secrets."""
    if file is not None:
        if queue_id is not None or not secret or None in (given_id, timestamp, signature):
            raise click.UsageError("--file needs --id, --timestamp, --signature and --secret, and no ID")
        _judge(file, str(given_id), str(timestamp), str(signature), secret, time.time() if now is None else now)
    if queue_id is None:
        raise click.UsageError("an ID or --file is needed")
    shown = 0
    for made, delivery in _deliveries(load(path), queue_id, transport):
        for _, request in made.requests(delivery):
            shown += 1
            for name, value in made.headers(request).items():
                click.echo(clean(f"{name}: {'(hidden)' if name == 'Authorization' else value}"))
            click.echo("")
            if show_body:
                for piece in request.body.pieces():
                    sys.stdout.buffer.write(piece)
                click.echo("\n")
    sys.exit(0 if shown else 1)


def _judge(file: BinaryIO, given_id: str, timestamp: str, signature: str, secrets: tuple[str, ...], now: float) -> NoReturn:
    """Says whether the signature holds."""
    from gmta.services.webhooks import Secrets

    try:
        keys = Secrets(secrets)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    reason = keys.verify(given_id, timestamp, signature, iter(lambda: file.read(BLOCK), b""), now)
    click.echo(reason or "the signature holds")
    sys.exit(1 if reason else 0)


@webhook.command()
@click.argument("queue_id", metavar="ID")
@click.option("--transport", metavar="NAME", help="default: the one that the message goes by")
@config_option
@json_option
def replay(queue_id: str, transport: str | None, path: str | None, as_json: bool) -> None:
    """Post the queued message ID now, marked as a retry; the queue stays as it is."""
    rows: list[dict[str, Any]] = []
    for made, delivery in _deliveries(load(path), queue_id, transport):
        outcomes = made.deliver(delivery)
        for recipient in delivery.recipients:
            outcome = outcomes.get(recipient.number)
            rows.append({"recipient": str(recipient.address), "transport": delivery.transport, "outcome": outcome.status.value if outcome else "deferred",
                         "reply": str(outcome.reply) if outcome else "", "remote": outcome.remote if outcome else ""})
    if as_json:
        print_json(rows)
    else:
        for row in rows:
            click.echo(clean(f"{row['recipient']} {row['outcome']}: {row['reply']}"))
    sys.exit(0 if rows and all(row["outcome"] == "delivered" for row in rows) else 1)


def _deliveries(config: Config, queue_id: str, name: str | None) -> Iterator[tuple[Any, Delivery]]:
    """(transport, delivery) of a queued message; ends the command where there is none."""
    from gmta.hookspecs import Delivery

    loaded = queue_admin(config).load(queue_id)
    if loaded is None:
        click.echo(f"{clean(queue_id)} is not in the queue", err=True)
        sys.exit(1)
    envelope, message = loaded
    transports = plugin_manager(config).transports
    able = {one: transport for one, transport in transports.items() if hasattr(transport, "requests")}
    if name is not None and name not in able:
        raise click.UsageError(f"{clean(name)} is no [transport:NAME] that posts")
    found = False
    for one, transport in able.items():
        recipients = [recipient for recipient in envelope.recipients if name == one or (name is None and recipient.transport == one)]
        if recipients:
            found = True
            yield transport, Delivery(envelope, recipients, message, one, "", first_attempt=False)
    if not found:
        click.echo(f"{clean(queue_id)} goes by no webhook; --transport NAME chooses one", err=True)
