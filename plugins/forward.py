"""Sends on what aliases and the like send outside, under a sender of ours (SRS), so that SPF holds and reports find their way back.

Hooks: get_route, check_message, permit_rcpt, get_transports, on_worker_started.  Keys of [plugin:forward]: secret, domain, max_age.
Keys of [transport:NAME] of type forward, which has to be there: via, the transport that delivers, by default the one that [route] has for `*`.

A recipient is forwarded whose address is another than the one given in RCPT, in a domain that is neither local nor in relay_to; where
[route] names its domain, that stands. At delivery the sender becomes SRS0=… at `domain` (SRS1 where it is another forwarder's SRS0
already), but the null sender and those of local domains stay as they are; the queue keeps the true sender, who gets gmta's own reports.
Where that would be longer than a local part may be (RFC 5321 section 4.5.3.1.1), it is SRSK=… and services.state remembers whom it stands for.
`Delivered-To` goes on top with the address forwarded from (RFC 9228): mail that comes back with it is in a loop. Sealing is the
plugin arc's, which seals what goes on to other domains. Enable `forward` in front of what judges names in local domains.

Replies: for SRS addresses of ours 550 5.7.1 to mail that is no report (the sender is not null), 550 5.1.1 where hash or age are not
right; else the original address takes its place.  554 5.4.6 for a recipient whose mail goes round.  451 4.3.5 (deferred) where `via` is
no transport.  SRS: Meng Weng Wong and Shevek, "The Sender Rewriting Scheme"; RFC 5321 section 4.5.5.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
from dataclasses import replace
from typing import Any

from pydantic import Field, field_validator

import gmta
from gmta import Delivery, Duration, PluginConfig, Verdict, accept, hookimpl, reject
from gmta.mail.address import Address, AddressError, domain_key, domains_above
from gmta.mail.message import Message
from gmta.mail.session import Recipient, Session, Transaction
from gmta.mail.trace import delivered_to

TYPE = "forward"
HASH = 8  # characters
DAY_S = 86400
SLOTS = 1024  # days before a time stamp means another day
MIN_SECRET = 16
_ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"
_KEPT = re.compile(r"SRSK=([A-Z2-7]{16})\Z", re.I)
_SRS = re.compile(r"SRS([01])[=+-](.+)\Z", re.I | re.S)


class Config(PluginConfig):
    """Keys of [plugin:forward]."""

    secret: list[str] = Field([], description="what addresses are hashed with; the first for new ones, the others still hold")
    domain: str = Field("", description="of rewritten senders; default: the host name")
    max_age: Duration = Field(21 * 86400.0, gt=0, le=1000 * 86400.0, description="how long reports are taken for a rewritten sender")

    @field_validator("secret")
    @classmethod
    def _long(cls, value: list[str]) -> list[str]:
        if any(len(one) < MIN_SECRET for one in value):
            raise ValueError(f"secrets of {MIN_SECRET} characters or more")
        return value


class BadSrs(Exception):
    """No address of ours, or no more; the text says why."""


class Srs:
    """Rewrites senders to addresses at `domain` and back. secrets: the first makes hashes, all are taken. max_age_days: of an address."""

    def __init__(self, secrets: list[str], domain: str, max_age_days: int) -> None:
        self._secrets = [one.encode("utf-8") for one in secrets]
        self.domain = domain
        self._max_age_days = max_age_days

    def forward(self, sender: Address, now: float) -> Address:
        """The address of ours that stands for a sender; raises AddressError where it can't be written."""
        match = _SRS.match(sender.mailbox)
        if match is not None and match[1] == "0":
            return self._first(sender.domain, sender.mailbox[4:])
        if match is not None:
            _, host, rest = _split(match[2], 3)
            if host and rest.startswith(("=", "+", "-")):
                return self._first(host, rest)
        stamp = _stamp(int(now // DAY_S))
        digest = self._hashes(stamp, sender.domain, sender.mailbox)[0]
        return Address.make(f"SRS0={digest}={stamp}={sender.domain}={sender.mailbox}", self.domain)

    def reverse(self, address: Address, now: float) -> Address:
        """Whom an address of ours stands for; raises BadSrs."""
        match = _SRS.match(address.mailbox)
        if match is None:
            raise BadSrs("not a rewritten address")
        try:
            if match[1] == "1":
                digest, host, rest = _split(match[2], 3)
                self._check(digest, host, rest)
                if not rest.startswith(("=", "+", "-")):
                    raise BadSrs("not a rewritten address")
                return Address.make(f"SRS0{rest}", host)
            digest, stamp, domain, local = _split(match[2], 4)
            self._check(digest, stamp, domain, local)
            if (int(now // DAY_S) - _day(stamp)) % SLOTS > self._max_age_days:
                raise BadSrs("too old")
            return Address.make(local, domain)
        except AddressError as error:
            raise BadSrs("no address") from error

    def _first(self, host: str, rest: str) -> Address:
        """SRS1: the first forwarder's address as it is, behind its host; later forwarders only change the hash."""
        return Address.make(f"SRS1={self._hashes(host, rest)[0]}={host}={rest}", self.domain)

    def _hashes(self, *parts: str) -> list[str]:
        """One a secret; of lower case, since some hosts change it on the way."""
        octets = "=".join(parts).lower().encode("utf-8", "surrogateescape")
        return [base64.b32encode(hmac.new(secret, octets, hashlib.sha1).digest())[:HASH].decode("ascii") for secret in self._secrets]

    def token(self, sender: Address) -> str:
        """What stands for a sender that is too long to be written in full."""
        return base64.b32encode(hmac.new(self._secrets[0], str(sender).encode("utf-8", "surrogateescape"), hashlib.sha1).digest()[:10]).decode("ascii")

    def _check(self, digest: str, *parts: str) -> None:
        given = digest.upper().encode("utf-8", "surrogateescape")
        if not any(hmac.compare_digest(given, one.encode("ascii")) for one in self._hashes(*parts)):
            raise BadSrs("not made here")


def _split(text: str, count: int) -> list[str]:
    parts = text.split("=", count - 1)
    return parts + [""] * (count - len(parts))


def _stamp(day: int) -> str:
    return _ALPHABET[day >> 5 & 31] + _ALPHABET[day & 31]


def _day(stamp: str) -> int:
    places = [_ALPHABET.find(char) for char in stamp.upper()]
    if len(places) != 2 or min(places) < 0:
        raise BadSrs("not a rewritten address")
    return places[0] << 5 | places[1]


class Factory:
    """Makes the transport, for the plugin that it belongs to."""

    class Config(PluginConfig):
        """[transport:NAME] of type forward."""

        via: str = Field("", description="transport that delivers; default: that of `*` in [route]")

    def __init__(self, plugin: Plugin) -> None:
        self._plugin = plugin

    def __call__(self, name: str, config: Any, services: Any) -> Forward:
        """The transport of a section; raises ValueError where the plugin is not enabled or there is nothing to deliver by."""
        if TYPE not in services.config.plugins.enable:
            raise ValueError("expected forward in [plugins] enable")
        via = config.via or services.config.route.get("*", "")
        if via == name or via not in services.config.transports:
            raise ValueError(f"via: expected another transport, not {via!r}")
        return Forward(self._plugin, via)


class Forward:
    """The transport: another one with the sender rewritten."""

    concurrency = 20

    def __init__(self, plugin: Plugin, via: str) -> None:
        self._plugin = plugin
        self._via = via

    def next_hop(self, address: Address) -> str:
        """The lane that the other transport would have."""
        next_hop = getattr(self._plugin.transports.get(self._via), "next_hop", None)
        return "" if next_hop is None else next_hop(address)

    def deliver(self, delivery: Delivery) -> dict[int, gmta.Outcome]:
        """Hands on to the other transport, for each address that was forwarded from: they need not know of one another."""
        transport = self._plugin.transports.get(self._via)
        if transport is None:
            later = gmta.deferred(f"No transport is named {self._via}", enhanced="4.3.5", recipient_fault=False)
            return {recipient.number: later for recipient in delivery.recipients}
        envelope = replace(delivery.envelope, sender=self._plugin.sender(delivery.envelope.sender))
        outcomes: dict[int, gmta.Outcome] = {}
        groups: dict[str, list[Any]] = {}
        for recipient in delivery.recipients:
            groups.setdefault(recipient.original, []).append(recipient)
        for original, recipients in groups.items():
            message = Message(delivery.message.header, delivery.message.separator, delivery.message.body)
            if original:
                message.prepend("Delivered-To", original)
            outcomes |= transport.deliver(Delivery(envelope, recipients, message, self._via, delivery.next_hop, delivery.first_attempt,
                                                   delivery.attempts))
        return outcomes


class Plugin:
    """Decides what is forwarded, and takes reports back."""

    def __init__(self, config: Config, services: Any) -> None:
        core = services.config
        self._services = services
        self._ours = core.domains.local | core.domains.relay_to
        self._local = core.domains.local
        self._routed = frozenset(_route_key(key) for key in core.route if key not in ("*", "local") and not key.startswith("from:"))
        self._srs = Srs(config.secret, domain_key(config.domain or services.hostname), int(config.max_age // DAY_S))
        self._max_age_s = config.max_age
        self._section = next((name for name, section in core.transports.items() if section.get("type") == TYPE), "")
        self.transports: dict[str, Any] = {}
        if TYPE in core.plugins.enable:
            if not config.secret:
                raise ValueError("secret: expected one or several of 16 characters or more")
            if not self._section:
                raise ValueError("expected a [transport:NAME] with type = forward")

    @hookimpl
    def get_transports(self, config: Any) -> dict[str, Any]:
        """{type name: what makes the transport}."""
        return {TYPE: Factory(self)}

    @hookimpl
    def on_worker_started(self, worker: Any) -> None:
        """The transports are there now."""
        self.transports = worker.plugins.transports

    @hookimpl
    def get_route(self, envelope: Any, recipient: Any) -> str | None:
        """The transport of forwarded recipients."""
        address = recipient.address
        if not recipient.original or not self._is_forwarded(address, recipient.original) or self._is_routed(address):
            return None
        return self._section

    @hookimpl
    def permit_rcpt(self, session: Session, transaction: Transaction, recipient: Recipient) -> Verdict | None:
        """Reports to rewritten senders go to the senders."""
        address = recipient.address
        kept = _KEPT.match(address.mailbox)
        if address.host != self._srs.domain or (kept is None and _SRS.match(address.mailbox) is None):
            return None
        if transaction.sender:  # or anybody could have mail sent on by us
            return reject("Only reports are taken for this address", 550, "5.7.1")
        try:
            if kept is None:
                return accept(replace=[self._srs.reverse(address, self._services.clock())])
            sender = self._services.state.get(f"srs:{kept[1].upper()}")
            if not isinstance(sender, str):
                raise BadSrs("not known, or no more")
            return accept(replace=[Address.parse(sender)])
        except (BadSrs, AddressError) as error:
            return reject(f"This address is {error}", 550, "5.1.1")

    @hookimpl
    def check_message(self, session: Session, transaction: Transaction, message: Message) -> dict[Recipient, Verdict] | None:
        """Refuses what was forwarded from here before."""
        found = [one for one in transaction.recipients if one.original is not one.address and self._is_forwarded(one.address, str(one.original))]
        if not found:
            return None
        seen = delivered_to(message)
        looping = [one for one in found if one.original.key in seen]
        loop = reject("The message goes round in circles: it was forwarded from here before", 554, "5.4.6")
        return dict.fromkeys(looping, loop) or None

    def sender(self, sender: Address) -> Address:
        """The sender that forwarded mail goes out under."""
        if not sender or sender.host in self._local or sender.host == self._srs.domain:
            return sender
        try:
            return self._srs.forward(sender, self._services.clock())
        except AddressError:
            token = self._srs.token(sender)
            self._services.state.set(f"srs:{token}", str(sender), self._max_age_s)
            return Address(f"SRSK={token}", self._srs.domain)

    def _is_forwarded(self, address: Address, original: str) -> bool:
        if not address.domain or address.host in self._ours or str(address) == original:
            return False
        return domain_key(original.rpartition("@")[2]) in self._ours or "@" not in original

    def _is_routed(self, address: Address) -> bool:
        """Whether [route] names the address, its domain or one above it."""
        routed = self._routed
        if not routed:
            return False
        host = address.host
        if host in routed or f"{address.mailbox.lower()}@{host}" in routed:
            return True
        return any(f".{parent}" in routed for parent in domains_above(host))


def _route_key(key: str) -> str:
    """A key of [route] to compare by."""
    local, at, domain = key.strip().rpartition("@")
    dot = "." if domain.startswith(".") else ""
    return f"{local.lower()}{at}{dot}{domain_key(domain.removeprefix('.'))}"
