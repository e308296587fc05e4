"""gmta check, plugins, route: what a configuration means, without a server.

All three make the plugins as a worker would, so what stops a start stops them too, with every error and status 78.
"""

from __future__ import annotations

import sys
from typing import Any

import click

from gmta.cli.options import config_option, plugin_manager
from gmta.config import load


@click.command()
@config_option
def check(path: str | None) -> None:
    """Validate; print the effective settings and each hook's plugins in order."""
    config = load(path)
    manager = plugin_manager(config)
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


@click.command()
@config_option
def plugins(path: str | None) -> None:
    """What is found and enabled (*), with documentation and keys."""
    for found in plugin_manager(load(path)).found():
        click.echo(f"{'*' if found.enabled else ' '} {found.name} ({found.where})")
        for line in found.doc.splitlines():
            click.echo(f"    {line}".rstrip())
        for key, field in found.config.model_fields.items():
            click.echo(f"    key {key} = {_shown(key, field.get_default())}" + (f"  ({field.description})" if field.description else ""))


@click.command()
@click.argument("address")
@config_option
def route(address: str, path: str | None) -> None:
    """How an address would be accepted from a stranger, and where each of its recipients would go."""
    from gmta.deliver.router import Router
    from gmta.mail.address import NULL, Address, AddressError
    from gmta.mail.envelope import Envelope, RecipientState
    from gmta.mail.session import Recipient, Session, Transaction

    config = load(path)
    manager = plugin_manager(config)
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
