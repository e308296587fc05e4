"""The gmta command: serve, check, plugins, queue, trace. Exit status 0 fine, 1 a check failed, 2 usage, 78 bad configuration."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import click

import gmta
from gmta.config import EX_CONFIG, Config, ConfigError, load
from gmta.queue.admin import QueueAdmin

config_option = click.option("-c", "--config", "path", metavar="FILE", help="configuration; default $GMTA_CONFIG, ./config.ini, /etc/gmta/config.ini")
json_option = click.option("--json", "as_json", is_flag=True, help="print JSON")


def _load(path: str | None) -> Config:
    try:
        return load(path)
    except ConfigError as error:
        click.echo("\n".join(error.errors), err=True)
        sys.exit(EX_CONFIG)


def _admin(path: str | None) -> QueueAdmin:
    return QueueAdmin(os.path.join(_load(path).gmta.data_dir, "queue"))


@click.group()
@click.version_option(gmta.__version__, prog_name="gmta", message="%(prog)s %(version)s")
def main() -> None:
    """gmta, a mail transfer agent."""


@main.command()
@config_option
def serve(path: str | None) -> None:
    """Run in the foreground."""
    from gmta.supervisor import Supervisor

    try:
        supervisor = Supervisor(path)
    except ConfigError as error:
        click.echo("\n".join(error.errors), err=True)
        sys.exit(EX_CONFIG)
    sys.exit(supervisor.run())


def _plugins(config: Config) -> Any:
    from gmta.plugins import PluginManager
    from gmta.services import Services
    from gmta.services.log import NullLog
    from gmta.services.metrics import Metrics

    log, metrics = NullLog(), Metrics()
    try:
        return PluginManager(config, Services(config, log, metrics), log, metrics)
    except ConfigError as error:
        click.echo("\n".join(error.errors), err=True)
        sys.exit(EX_CONFIG)


@main.command()
@config_option
def check(path: str | None) -> None:
    """Validate; print the effective settings and each hook's plugins in order."""
    config = _load(path)
    manager = _plugins(config)
    sections: dict[str, Any] = {name: getattr(config, name).model_dump() for name in ("gmta", "tls", "domains", "limits", "queue",
                                                                                        "plugins", "dns", "metrics")}
    sections |= {f"listener:{name}": listener.model_dump() for name, listener in config.listeners.items()}
    sections |= {f"tls:{name}": tls.model_dump() for name, tls in config.tls_names.items()}
    for name in config.plugins.enable:
        settings = manager.settings(name)
        sections[f"plugin:{name}"] = settings.model_dump() if settings is not None else {}
    sections |= {f"transport:{name}": section for name, section in config.transports.items()}
    sections["route"] = config.route
    for name, keys in sections.items():
        click.echo(f"[{name}]")
        for key, value in keys.items():
            click.echo(f"{key} = {_shown(key, value)}")
    for hook, names in manager.explain().items():
        click.echo(f"{hook}: {', '.join(names)}")


def _shown(key: str, value: Any) -> str:
    """A setting's value for people; secrets stay hidden."""
    if value and ("password" in key or "secret" in key):
        return "(hidden)"
    if isinstance(value, (list, tuple, set, frozenset)):
        return ", ".join(sorted(map(str, value)) if isinstance(value, (set, frozenset)) else map(str, value))
    return "" if value is None else str(value)


@main.command()
@config_option
def plugins(path: str | None) -> None:
    """What is found and enabled (*), with documentation and keys."""
    for found in _plugins(_load(path)).found():
        click.echo(f"{'*' if found.enabled else ' '} {found.name} ({found.where})")
        for line in found.doc.splitlines():
            click.echo(f"    {line}".rstrip())
        for key, field in found.config.model_fields.items():
            click.echo(f"    key {key} = {_shown(key, field.get_default())}" + (f"  ({field.description})" if field.description else ""))


@main.command()
@click.argument("queue_id")
@config_option
@json_option
def trace(queue_id: str, path: str | None, as_json: bool) -> None:
    """A message's history."""
    events = _admin(path).trace(queue_id)
    if as_json:
        click.echo(json.dumps([{"id": event.queue_id, "at": event.at, "kind": event.kind, "data": event.data} for event in events]))
    else:
        for event in events:
            click.echo(f"{event.at:.3f} {event.kind} " + " ".join(f"{key}={value}" for key, value in event.data.items()))
    sys.exit(0 if events else 1)


@main.command()
@click.argument("address")
@config_option
def route(address: str, path: str | None) -> None:
    """How an address would be accepted from a stranger, and where each of its recipients would go."""
    from gmta.deliver.router import Router
    from gmta.mail.address import NULL, Address, AddressError
    from gmta.mail.envelope import Envelope, RecipientState
    from gmta.mail.session import Recipient, Session, Transaction

    config = _load(path)
    manager = _plugins(config)
    try:
        target = Address.parse(address)
    except AddressError as error:
        raise click.UsageError(str(error)) from error
    verdict = manager.permit("permit_rcpt", Session("route", peer_ip="192.0.2.1"), Transaction("route", NULL), Recipient(target))
    click.echo(f"accepted: {verdict.reply if verdict is not None else '550 5.7.1 no plugin permits it'}")
    targets = verdict.replace if verdict is not None and verdict.replace is not None else (target,)
    router = Router(config, manager)
    for one in targets:
        transport = (verdict.transport or "") if verdict is not None else ""
        state = RecipientState(0, one, transport=transport, fixed_transport=bool(transport))
        click.echo(f"{one}: {router.route(Envelope('route', NULL, [state]), state)}")
    sys.exit(0 if verdict is not None and verdict.reply.code < 300 else 1)


@main.group()
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
    rows = list(_admin(path).list(ids, domain=domain, sender=sender))
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
    row = _admin(path).show(queue_id)
    if row is None:
        click.echo(f"{queue_id} is not queued", err=True)
        sys.exit(1)
    click.echo(json.dumps(row, indent=2))


@queue.command("cat")
@click.argument("queue_id")
@config_option
def queue_cat(queue_id: str, path: str | None) -> None:
    """The octets of a queued message."""
    pieces = _admin(path).cat(queue_id)
    if pieces is None:
        click.echo(f"{queue_id} is not queued", err=True)
        sys.exit(1)
    for piece in pieces:
        sys.stdout.buffer.write(piece)


@queue.command("stats")
@config_option
def queue_stats(path: str | None) -> None:
    """Counts, as JSON."""
    click.echo(json.dumps(_admin(path).stats(), indent=2))


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
        count = getattr(_admin(path), name)(ids, domain=domain, sender=sender, all=everything)
        click.echo(f"{count} changed")
        sys.exit(0 if count or everything else 1)


for _name, _summary in (("retry", "Try again now."), ("hold", "Keep from delivery."), ("release", "Let held ones go."),
                        ("delete", "Remove; nobody is told."), ("bounce", "Give up; the sender is told.")):
    _changer(_name, _summary)
