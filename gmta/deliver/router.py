"""Routing: which transport and next hop a recipient goes to, asked again at every attempt.

The order is: the transport that permit_rcpt fixed, the first answer of the get_route hook, the sender rules of the [route]
table (from:address, from:domain, from:.domain, from:<>), its other entries (the most specific wins whatever the order: address, domain,
.subdomain, local, *). A target is a transport's name, `fail`, `hold` or `discard`. Connecting, MX look-ups and queueing are left to
transports and lanes. A recipient without a route gets a failed Outcome; a target that names no transport (a plugin's error) a
deferred one, so that nothing is lost.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from gmta.mail.address import Address, domain_key, domains_above
from gmta.mail.envelope import Envelope, RecipientState
from gmta.mail.verdict import Outcome, deferred, delivered, failed

FAIL = "fail"
HOLD = "hold"
DISCARD = "discard"


class Route(NamedTuple):
    """Where a recipient goes: lane key of two parts."""

    transport: str
    next_hop: str


HELD_ROUTE = Route(HOLD, "")

_NO_ROUTE = failed("No route to the recipient's domain", enhanced="5.4.4", code=550)
_ROUTE_FAILS = failed("Mail for this recipient is not delivered (route: fail)", enhanced="5.7.1", code=550)
_DISCARDED = delivered("Discarded (route: discard)", enhanced="2.0.0")


class _Table:
    """Targets by address, domain and domain above."""

    __slots__ = ("addresses", "domains", "suffixes")

    def __init__(self) -> None:
        self.addresses: dict[tuple[str, str], str] = {}
        self.domains: dict[str, str] = {}
        self.suffixes: dict[str, str] = {}

    def add(self, key: str, target: str) -> None:
        """Files one line under its kind."""
        if "@" in key:
            local, _, domain = key.rpartition("@")
            self.addresses[local.lower(), domain_key(domain)] = target
        elif key.startswith("."):
            self.suffixes[domain_key(key[1:])] = target
        else:
            self.domains[domain_key(key)] = target

    def find(self, address: Address) -> str | None:
        """The most specific target for an address."""
        host = address.host
        if self.addresses:
            found = self.addresses.get((address.mailbox.lower(), host))
            if found is not None:
                return found
        found = self.domains.get(host)
        if found is None and self.suffixes:
            return next((self.suffixes[parent] for parent in domains_above(host) if parent in self.suffixes), None)
        return found


class Router:
    """The [route] table as look-ups by address, host and suffix."""

    def __init__(self, config: Any, plugins: Any) -> None:
        self._plugins = plugins
        self._local: frozenset[str] = frozenset(config.domains.local)
        self._transports: dict[str, Any] = plugins.transports
        self._recipients = _Table()
        self._senders: _Table | None = None
        self._null_sender: str | None = None
        self._local_target: str | None = None
        self._default: str | None = None
        for key, target in config.route.items():
            self._add(key.strip(), target.strip())
        # only what plugins.transports says decides whether asking next_hop is worth a call
        self._next_hop = {name: getattr(transport, "next_hop", None) for name, transport in self._transports.items()}

    def _add(self, key: str, target: str) -> None:
        """Files one line of the table."""
        if key == "*":
            self._default = target
        elif key == "local":
            self._local_target = target
        elif not key.startswith("from:"):
            self._recipients.add(key, target)
        elif key[5:].strip() == "<>":
            self._null_sender = target
        else:
            self._senders = self._senders or _Table()
            self._senders.add(key[5:].strip(), target)

    def target(self, address: Address, sender: Address | None = None) -> str | None:
        """The table's answer for a recipient: a transport's name, fail, hold, discard, or None."""
        found = None
        if self._senders is not None and sender:
            found = self._senders.find(sender)
        elif self._null_sender is not None and sender is not None and not sender:
            found = self._null_sender
        if found is None:
            found = self._recipients.find(address)
        if found is not None:
            return found
        host = address.host
        if (not host or host in self._local) and self._local_target is not None:
            return self._local_target  # RFC 5321 section 4.5.1: bare Postmaster is ours
        return self._default

    def route(self, envelope: Envelope, recipient: RecipientState) -> Route | Outcome:
        """(transport, next hop), HELD_ROUTE, or the Outcome of a recipient that needs no transport."""
        if recipient.fixed_transport and recipient.transport:
            target: str | None = recipient.transport
        else:
            target = None
            if self._plugins.has("get_route"):
                for _, value in self._plugins.get("get_route", envelope, recipient):
                    if value is not None:
                        target = value if isinstance(value, str) else str(value[0])
                        break
            if target is None:
                target = self.target(recipient.address, envelope.sender)
        if target is None:
            return _NO_ROUTE
        transport = self._transports.get(target)
        if transport is None:
            if target == FAIL:
                return _ROUTE_FAILS
            if target == DISCARD:
                return _DISCARDED
            if target == HOLD:
                return HELD_ROUTE
            return deferred(f"No transport is named {target}", enhanced="4.3.5")
        next_hop = self._next_hop[target]
        return Route(target, next_hop(recipient.address) if next_hop is not None else "")
