"""Permits relaying to those who may: trusted sessions anywhere, strangers to the domains we are a backup MX for.

Hook: permit_rcpt. A session is trusted when it has authenticated or comes from `[domains] relay_from`; `[domains]
relay_to` names the domains that anyone may send to. Gives no refusal itself: what no plugin permits gets 550 5.7.1 from
the core, so leaving this plugin out makes a server that relays nothing.

Local domains are none of its business, even for trusted sessions: an unknown local user is refused by `mailboxes`.
No keys of its own. RFC 5321 section 7.9, RFC 6409 section 6.1.
"""

from __future__ import annotations

from typing import Any

from gmta import PluginConfig, Verdict, accept, hookimpl
from gmta.mail.session import Recipient, Session, Transaction


class Config(PluginConfig):
    """[plugin:access] has no keys of its own."""


class Plugin:
    """Compares a recipient's domain with the lists of [domains]."""

    def __init__(self, config: Config, services: Any) -> None:
        domains = services.config.domains
        self._local = domains.local
        self._relay_to = domains.relay_to

    @hookimpl
    def permit_rcpt(self, session: Session, transaction: Transaction, recipient: Recipient) -> Verdict | None:
        """accept() for trusted sessions and relay_to; None for all else."""
        address = recipient.address
        if not address.domain:
            return None
        host = address.host
        if host in self._local:
            return None
        if session.trusted or host in self._relay_to:
            return accept()
        return None
