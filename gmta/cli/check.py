"""gmta check, plugins, route: what a configuration means, without a server.

All three make the plugins as a worker would, so what stops a start stops them too, with every error and status 78.
"""

from __future__ import annotations

import inspect
import re
import sys
from typing import Any

import click
from pydantic import BaseModel

from gmta.cli.options import config_option, json_option, plugin_manager
from gmta.cli.output import clean, on_terminal, print_json, print_table, value_text
from gmta.config import Config, host_port_text, load
from gmta.mail.verdict import Outcome

HIDDEN = "(hidden)"
_NAMED = {"listeners": "listener", "tls_names": "tls"}  # attributes of Config that hold several sections


@click.command()
@config_option
@json_option
def check(path: str | None, as_json: bool) -> None:
    """Validate; print the effective settings and each hook's plugins in order."""
    config = load(path)
    manager = plugin_manager(config)
    settings = _settings(config, manager)
    hooks = manager.explain()
    if as_json:
        print_json({"file": config.file, "settings": settings, "hooks": hooks})
        return
    for name, keys in settings.items():
        click.echo(f"[{name}]")
        for key, value in keys.items():
            click.echo(f"{key} = {value_text(value)}".rstrip())
        click.echo()
    if on_terminal():
        print_table(("Hook", "Plugins, in order"), [(hook, ", ".join(names)) for hook, names in hooks.items()])
    else:
        for hook, names in hooks.items():
            click.echo(f"{hook}: {', '.join(names)}")


def _settings(config: Config, manager: Any) -> dict[str, dict[str, Any]]:
    """Section -> key -> value in force; secrets hidden. Sections that their owners read are shown as they stand in the file."""
    found: dict[str, BaseModel | dict[str, Any]] = {}
    for attribute in sorted(Config.__slots__, key=lambda name: name != "gmta"):
        value = getattr(config, attribute, None)
        if isinstance(value, BaseModel):
            found[attribute] = value
        elif attribute in _NAMED and value:
            found |= {f"{_NAMED[attribute]}:{name}": section for name, section in value.items()}
    for name in config.plugins.enable:
        settings = manager.settings(name)
        if settings is not None:
            found[f"plugin:{name}"] = settings
    for name, section in config.sections.items():
        found.setdefault(name, dict(section))
    found["route"] = dict(config.route)
    return {name: {key: _open(key, value) for key, value in (_values(keys) if isinstance(keys, BaseModel) else keys).items()}
            for name, keys in found.items()}


def _values(settings: BaseModel) -> dict[str, Any]:
    """A section's values by the names that its keys have in the file, as JSON has them."""
    return settings.model_dump(mode="json", by_alias=True)


def _open(key: str, value: Any) -> Any:
    """A setting's value; a secret's stays hidden."""
    if value and ("password" in key or "secret" in key or key == "authorization") and not key.endswith("_file"):
        return HIDDEN
    if isinstance(value, str) and "://" in value:  # a password may be part of a URL
        return re.sub(r"(://[^/@:]*:)[^/@]*(?=@)|([?&]password=)[^&]*", rf"\1\2{HIDDEN}", value)
    if key == "address" and isinstance(value, list) and value:
        return [host_port_text(*one) for one in value] if value and isinstance(value[0], list) else host_port_text(*value)
    return sorted(value) if isinstance(value, set | frozenset) else value


@click.command()
@config_option
@json_option
def plugins(path: str | None, as_json: bool) -> None:
    """What is found and enabled (*), with documentation and keys."""
    found: list[dict[str, Any]] = [{"name": one.name, "where": one.where, "enabled": one.enabled, "doc": inspect.cleandoc(one.doc),
                                    "keys": _keys(one)} for one in plugin_manager(load(path)).found()]
    if as_json:
        print_json(found)
        return
    for plugin in found:
        click.secho(f"{'*' if plugin['enabled'] else ' '} {plugin['name']} ({plugin['where']})", bold=True)
        for line in plugin["doc"].splitlines():
            click.echo(f"    {line}".rstrip())
        for key in plugin["keys"]:
            text = f"    key {key['name']} = {value_text(key['default'])}".rstrip()
            click.echo(text + (f"  ({key['description']})" if key["description"] else ""))


def _keys(found: Any) -> list[dict[str, Any]]:
    """A plugin's keys with their defaults; none where its file can't be imported (its documentation says why)."""
    try:
        model = found.config
    except Exception:  # whatever the import of a stranger's file raises
        return []
    return [{"name": name, "default": "" if field.is_required() else _open(name, field.get_default(call_default_factory=True)),
             "description": field.description or ""} for name, field in model.model_fields.items()]


@click.command()
@click.argument("address")
@click.option("--sender", default="someone@elsewhere.invalid", help="whose mail it is; <> for reports")
@config_option
@json_option
def route(address: str, sender: str, path: str | None, as_json: bool) -> None:
    """How an address would be accepted from a stranger, and where each of its recipients would go."""
    from gmta.deliver.router import Router
    from gmta.mail.address import Address, AddressError
    from gmta.mail.envelope import Envelope, RecipientState
    from gmta.mail.reply import NOT_PERMITTED
    from gmta.mail.session import Recipient, Session, Transaction

    config = load(path)
    manager = plugin_manager(config)
    try:
        target = Address.parse(address.removeprefix("<").removesuffix(">"))
    except AddressError as error:
        raise click.UsageError(f"{clean(address)}: {error}") from error
    try:
        whose = Address.parse(sender.removeprefix("<").removesuffix(">"))
    except AddressError as error:
        raise click.UsageError(f"{clean(sender)}: {error}") from error
    verdict = manager.permit("permit_rcpt", Session("route", peer_ip="192.0.2.1"), Transaction("route", whose), Recipient(target))
    reply = NOT_PERMITTED if verdict is None else verdict.reply
    accepted = reply.code < 300
    targets = verdict.replace if verdict is not None and verdict.replace is not None else (target,)
    transport = (verdict.transport or "") if verdict is not None else ""
    router = Router(config, manager)
    ways = []
    for one in targets:
        state = RecipientState(0, one, transport=transport, fixed_transport=bool(transport))
        way = router.route(Envelope("route", whose, [state]), state)
        if isinstance(way, Outcome):
            ways.append({"address": str(one), "transport": "", "next_hop": "", "outcome": way.status.value, "reply": str(way.reply)})
        else:
            ways.append({"address": str(one), "transport": way.transport, "next_hop": way.next_hop})
    if as_json:
        print_json({"address": str(target), "accepted": accepted, "reply": str(reply), "recipients": ways})
    else:
        click.echo(f"{'accepted' if accepted else 'refused'}: {clean(str(reply))}")
        for found in ways:
            if found.get("outcome"):
                told = f"{found['outcome']}: {found['reply']}"
            else:
                told = f"transport {found['transport']}" + (f", next hop {found['next_hop']}" if found["next_hop"] else "")
            click.echo(clean(f"{found['address']}: {told}"))
    sys.exit(0 if accepted else 1)
