"""gmta queue and gmta trace: the operator's view of the queue and hands on it, with the server up or down.

A list is written as it is read, so a long queue costs no memory. Exit status 1: no such message, or nothing was changed.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

import click

from gmta.cli import output
from gmta.cli.options import config_option, json_option, queue_admin
from gmta.cli.output import clean, on_terminal, print_json, size_text, time_text
from gmta.config import load
from gmta.queue.maildrop import waiting

TABLE_MESSAGES = 500  # a longer list is no table: its columns could only be laid out when all is read


@click.command()
@click.argument("queue_id")
@config_option
@json_option
def trace(queue_id: str, path: str | None, as_json: bool) -> None:
    """A message's history, from connection to last outcome."""
    events = queue_admin(load(path)).trace(queue_id)
    if as_json:
        print_json([{"id": event.queue_id, "at": event.at, "kind": event.kind, "data": event.data} for event in events])
    elif not events:
        click.echo(f"there is no history of {clean(queue_id)}", err=True)
    else:
        rows = [(time_text(event.at, "milliseconds"), event.kind, _facts(event.data)) for event in events]
        if on_terminal():
            output.print_table(("Time", "Event", ""), rows)
        else:
            for row in rows:
                click.echo(" ".join(row))
    sys.exit(0 if events else 1)


def _facts(data: dict[str, Any]) -> str:
    """key=value, those that say something; quotes where a value has blanks."""
    shown = ((key, output.value_text(value)) for key, value in data.items() if value not in ("", None, []) or key in ("sender", "from"))
    return " ".join(f'{key}="{text}"' if " " in text or not text else f"{key}={text}" for key, text in shown)


@click.group()
def queue() -> None:
    """Look at the queue and change it, with the server up or down."""


@queue.command("list")
@click.argument("ids", nargs=-1)
@click.option("--domain", help="messages with a recipient there")
@click.option("--sender", help="messages of this sender; <> for reports")
@click.option("--all", is_flag=True, expose_value=False, help="everything, as without any choice")
@config_option
@json_option
def list_(ids: tuple[str, ...], domain: str | None, sender: str | None, path: str | None, as_json: bool) -> None:
    """What is queued, and why."""
    config = load(path)
    rows = queue_admin(config).list(ids, domain=domain, sender=sender, all=True)
    if as_json:
        output.print_json_list(rows)
        return
    totals = [0, 0]
    counted = _counted(rows, totals)
    if on_terminal():
        first = list(itertools.islice(counted, TABLE_MESSAGES + 1))
        if 0 < len(first) <= TABLE_MESSAGES:
            output.print_table(("ID", "Size", "Received", "Sender", "Recipient", "State"),
                        itertools.chain.from_iterable(map(_table_rows, first)), right=("Size",))
            counted = iter(())
        else:
            counted = itertools.chain(first, counted)
    for row in counted:
        click.echo(f"{row['id']} {row['size']:>9} {time_text(row['received_at'])} {_sender(row)}{' (held)' if row['held'] else ''}")
        for recipient in row["recipients"]:
            click.echo(f"    {clean(recipient['address'])} {_state(recipient)}")
    count, octets = totals
    dropped = waiting(config.gmta.data_dir)
    if dropped:
        click.echo(f"-- {dropped} more in the maildrop, for the server to pick up")
    click.echo(f"-- {size_text(octets)} in {count} message{'' if count == 1 else 's'}" if count else "The queue is empty")


def _counted(rows: Iterable[dict[str, Any]], totals: list[int]) -> Iterator[dict[str, Any]]:
    """The rows as they are; totals become [messages, octets]."""
    for row in rows:
        totals[0] += 1
        totals[1] += row["size"]
        yield row


def _table_rows(row: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """A message's lines in the table: one a recipient, the message's own facts in the first."""
    first = (row["id"], size_text(row["size"]), time_text(row["received_at"]), _sender(row))
    for recipient in row["recipients"]:
        yield (*first, clean(recipient["address"]), _state(recipient))
        first = ("", "", "", "")


def _sender(row: dict[str, Any]) -> str:
    return f"<{clean(row['sender'])}>"


def _state(recipient: dict[str, Any]) -> str:
    """How a recipient stands, in words."""
    parts = [recipient["status"]]
    if recipient["attempts"]:
        parts.append(f"attempts={recipient['attempts']}")
    if recipient["status"] == "queued" and recipient["attempts"]:
        parts.append(f"next={time_text(at) if (at := recipient['next_attempt_at']) else 'now'}")  # 0: an operator made it due
    if recipient["transport"]:
        parts.append(f"via={recipient['transport']}" + (f":{recipient['next_hop']}" if recipient["next_hop"] else ""))
    if recipient.get("node"):
        parts.append(f"on={recipient['node']}")
    if recipient["last_reply"]:
        parts.append(f"({recipient['last_reply']})")
    return clean(" ".join(parts))


@queue.command("show")
@click.argument("queue_id")
@config_option
@json_option
def show(queue_id: str, path: str | None, as_json: bool) -> None:
    """One message's envelope."""
    row = queue_admin(load(path)).show(queue_id)
    if row is None:
        _not_queued(queue_id)
    if as_json:
        print_json(row)
        return
    recipients = row.pop("recipients")
    facts = row.pop("facts", {})
    row["received_at"] = time_text(row["received_at"])
    row["sender"] = f"<{row['sender']}>"
    for key, value in (row | facts).items():
        click.echo(f"{key}: {output.value_text(value)}")
    for recipient in recipients:
        click.echo(f"recipient: {clean(recipient['address'])} {_state(recipient)}")


@queue.command("cat")
@click.argument("queue_id")
@config_option
def cat(queue_id: str, path: str | None) -> None:
    """The octets of a queued message."""
    pieces = queue_admin(load(path)).cat(queue_id)
    if pieces is None:
        _not_queued(queue_id)
    out = sys.stdout.buffer
    try:
        for piece in pieces:
            out.write(piece)
    except FileNotFoundError:  # delivered while we read
        _not_queued(queue_id)


def _not_queued(queue_id: str) -> NoReturn:
    click.echo(f"{clean(queue_id)} is not queued", err=True)
    sys.exit(1)


@queue.command("stats")
@config_option
@json_option
def stats(path: str | None, as_json: bool) -> None:
    """Counts: messages, octets, recipients by state and by lane, what waits in the maildrop; attempts in flight with their age."""
    config = load(path)
    counts = queue_admin(config).stats() | {"maildrop": waiting(config.gmta.data_dir)}
    if as_json:
        print_json(counts)
        return
    now = time.time()
    oldest = counts["oldest"]
    rows = [("messages", str(counts["messages"])), ("size", output.size_text(counts["octets"]))]
    if counts["maildrop"]:
        rows.append(("maildrop", f"{counts['maildrop']} to pick up"))
    if oldest is not None:
        rows.append(("oldest", f"{time_text(oldest)} ({output.age_text(now - oldest)} ago)"))
    rows += [(status, f"{count} recipient{'' if count == 1 else 's'}") for status, count in sorted(counts["recipients"].items())]
    lanes = sorted(counts["lanes"].items(), key=lambda pair: (-pair[1], pair[0]))
    rows += [(f"lane {clean(lane) or '(not tried yet)'}", f"{count} waiting") for lane, count in lanes]
    rows += [(f"closed {clean(lane['lane'])}", f"until {time_text(lane['until'])} ({clean(lane['reason'])})") for lane in counts["closed"]]
    rows += [(f"node {clean(name)}", f"{node['workers']} worker{'' if node['workers'] == 1 else 's'}, {node['under_way']} in flight"
              f"{', draining' if node['draining'] else ''}") for name, node in counts.get("nodes", {}).items()]
    if counts["under_way"]:
        rows.append(("in flight", str(counts["under_way"])))
    rows += [(f"attempt {attempt['id']}", f"for {output.age_text(now - attempt['since'])} to {clean(', '.join(attempt['to']))} via "
              f"{clean(attempt['transport'])}:{clean(attempt['next_hop'])}{clean(' on ' + attempt['node']) if 'node' in attempt else ''}") for attempt in counts["attempts"]]
    if on_terminal():
        output.print_table(("What", "How many"), rows)
    else:
        for row in rows:
            click.echo(": ".join(row))


def _changer(name: str, summary: str) -> None:
    @queue.command(name, help=summary)
    @click.argument("ids", nargs=-1)
    @click.option("--domain", help="messages with a recipient there")
    @click.option("--sender", help="messages of this sender; <> for reports")
    @click.option("--all", "everything", is_flag=True, help="every message")
    @config_option
    @json_option
    def change(ids: tuple[str, ...], domain: str | None, sender: str | None, everything: bool, path: str | None, as_json: bool) -> None:
        if not (ids or domain or sender is not None or everything):
            raise click.UsageError("name IDs, --domain, --sender or --all")
        count = getattr(queue_admin(load(path)), name)(ids, domain=domain, sender=sender, all=everything)
        if as_json:
            print_json({"changed": count})
        else:
            click.echo(f"{count} changed")
        sys.exit(0 if count or everything else 1)


for _name, _summary in (("retry", "Try again now."), ("hold", "Keep from delivery."), ("release", "Let held ones go."),
                        ("delete", "Remove; nobody is told."), ("bounce", "Give up; the sender is told.")):
    _changer(_name, _summary)
