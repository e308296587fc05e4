"""Looks at the name a client gives itself in EHLO or HELO: strangers that pretend to be this server are sent away.

Hooks: check_helo, check_mail (tags). Its syntax is the protocol's business (501). Sessions that are trusted, or for submission, are
passed over: mail programs say what they like.

Keys of `[plugin:helo]`, each `reject`, `tag` or `ignore`: `own_name = reject` (the name of this server, or a local domain), `own_address =
reject` ([literal] of the address it has connected to), `literal = ignore` ([literal] of another address than the client's), `dotless = tag` (one
word), `unresolvable = ignore` (a name without A, AAAA or MX record; DNS failures count as none). What is tagged has `helo-KEY`
among the tags of each of its transactions.

Reply: 550 5.7.1. RFC 5321 section 4.1.4 forbids to refuse a message because the name does not match the client's address by DNS, so
that is not looked at here.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from gmta import PluginConfig, Verdict, hookimpl, reject
from gmta.mail.address import AddressError, domain_key, literal_ip
from gmta.mail.session import Session, Transaction
from gmta.services.dns import Status

Choice = Literal["reject", "tag", "ignore"]
NAME = "helo"

_TEXTS = {"own_name": "That is the name of this server", "own_address": "That is the address of this server",
          "literal": "That is not the address you come from", "dotless": "A full host name is required",
          "unresolvable": "That host name has no address"}


class Config(PluginConfig):
    """Keys of [plugin:helo]."""

    own_name: Choice = Field("reject", description="this server's name or a local domain")
    own_address: Choice = Field("reject", description="this server's address")
    literal: Choice = Field("ignore", description="an address that is not the client's")
    dotless: Choice = Field("tag", description="one word")
    unresolvable: Choice = Field("ignore", description="no A, AAAA or MX record")


class Plugin:
    """Judges by the session and, for `unresolvable`, by DNS."""

    def __init__(self, config: Config, services: Any) -> None:
        self._config = config
        self._resolver = services.resolver
        self._own = frozenset({domain_key(services.hostname), *services.config.domains.local})

    @hookimpl
    def check_helo(self, session: Session) -> Verdict | None:
        """550 5.7.1 where a key that says `reject` applies; notes the others."""
        if session.trusted or session.role != "mx":
            return None
        session.notes.pop(NAME, None)
        found = self._faults(session)
        for key in found:
            if getattr(self._config, key) == "reject":
                return reject(_TEXTS[key], 550, "5.7.1")
        if found:
            session.notes[NAME] = [f"helo-{key}" for key in found]
        return None

    @hookimpl
    def check_mail(self, session: Session, transaction: Transaction) -> Verdict | None:
        """Tags the transaction."""
        if not session.trusted:
            transaction.tags.update(session.notes.get(NAME, ()))
        return None

    def _faults(self, session: Session) -> list[str]:
        """Which keys apply, of those that do anything."""
        name = session.helo
        found = []
        if name.startswith("["):
            try:
                ip = literal_ip(name)
            except AddressError:  # another kind of literal (RFC 5321 section 4.1.3) is no address of ours
                ip = ""
            if ip != session.peer_ip:
                found.append("own_address" if ip and ip == session.local_ip else "literal")
        else:
            key = domain_key(name)
            if key in self._own:
                found.append("own_name")
            elif "." not in key:
                found.append("dotless")
            elif self._config.unresolvable != "ignore" and not self._resolves(key):
                found.append("unresolvable")
        return [key for key in found if getattr(self._config, key) != "ignore"]

    def _resolves(self, name: str) -> bool:
        """Whether DNS has an address or mail host for the name, or can't tell."""
        for kind in ("A", "AAAA", "MX"):
            answer = self._resolver.look_up(name, kind)
            if answer.status in (Status.FOUND, Status.TEMPORARY):
                return True
        return False
