"""A plugin for servers in memory: takes mail for the local domains, knows one user, keeps what is delivered.

Hooks: permit_rcpt (any recipient of a local domain, any at all for trusted sessions), permit_auth (user@example.test with
the password "secret"), get_transports (type `memory`).  Keys: none.  Replies: 550 5.1.1 for a local part that starts with
"nobody".  It is asked last, so that the plugins under test have the first word.
"""

from __future__ import annotations

from typing import Any

import gmta
from gmta import PluginConfig, accept, delivered, hookimpl, reject

USER = "user@example.test"
SECRET = "secret"


class Memory:
    """The transport: `deliveries` has what it was given."""

    class Config(PluginConfig):
        """[transport:NAME] of type memory."""

    concurrency = 10

    def __init__(self, name: str, config: Config, services: Any) -> None:
        self.name = name
        self.deliveries: list[gmta.Delivery] = []

    def deliver(self, delivery: gmta.Delivery) -> dict[int, gmta.Outcome]:
        """Delivered, for all."""
        self.deliveries.append(delivery)
        return {recipient.number: delivered() for recipient in delivery.recipients}


class Plugin:
    """Answers where the plugins under test have nothing to say."""

    def __init__(self, config: PluginConfig, services: Any) -> None:
        self._local = services.config.domains.local

    @hookimpl
    def permit_rcpt(self, session: gmta.Session, recipient: gmta.Recipient) -> gmta.Verdict | None:
        """Local recipients, and whatever trusted sessions ask for."""
        address = recipient.address
        if address.domain and address.host not in self._local:
            return accept() if session.trusted else None
        if address.mailbox.lower().startswith("nobody") or (not address.domain and address.mailbox.lower() != "postmaster"):
            return reject("No such user", 550, "5.1.1")
        return accept()

    @hookimpl
    def permit_auth(self, credentials: gmta.Credentials) -> gmta.Verdict | None:
        """The one user."""
        return accept() if (credentials.user, credentials.secret) == (USER, SECRET) else None

    @hookimpl
    def get_transports(self) -> dict[str, Any]:
        """{type name: transport class}."""
        return {"memory": Memory}
