"""Transports `relay` (SMTP to a smart host, or to the MX hosts of the recipient's domain) and `lmtp`.

Hooks: get_transports.  Keys of [transport:NAME]: host (one or several ADDRESS:PORT, tried in order; none: MX), port,
allow_loopback, tls, username, password (or password_file), connect_timeout, greeting_timeout, command_timeout, data_timeout,
idle_timeout.  Replies: the remote's own; 550 5.1.2 no such domain, 5.1.10 null MX, 5.4.6 loop to ourselves, 451 4.4.3 DNS,
4.4.1 no connection (deferred).

Which hosts and in what order is here; the conversation is gmta.deliver.client's. The next host is tried where one gives no
conversation at all; what a host says about a recipient stands. RFC 5321 section 5, RFC 7505, RFC 2033.
"""

from __future__ import annotations

import ipaddress
import random
from typing import Any, Literal

import dns.exception
import dns.resolver
from pydantic import Field

import gmta
from gmta import PluginConfig, hookimpl
from gmta.deliver.client import ConnectionFailed, Pool, Settings, SmtpClient, TlsFailed
from gmta.hookspecs import Duration
from gmta.mail.address import Address, AddressError, literal_ip
from gmta.services.tls import client_context

MAX_HOSTS = 10  # addresses tried in one attempt


class Config(PluginConfig):
    """[plugin:relay] has no keys of its own."""


class TransportConfig(PluginConfig):
    """[transport:NAME] of type relay or lmtp."""

    host: list[str] = Field([], description="ADDRESS[:PORT] ..., tried in order; none: the MX hosts of the domain (relay only)")
    port: int = Field(25, ge=1, le=65535, description="port of MX hosts, and of hosts that name none")
    allow_loopback: bool = Field(False, description="deliver to MX hosts on loopback, for tests")
    tls: Literal["opportunistic", "required", "off"] = "opportunistic"
    username: str = ""
    password: str = ""
    connect_timeout: Duration = 30.0
    greeting_timeout: Duration = 300.0
    command_timeout: Duration = 300.0
    data_timeout: Duration = 600.0
    idle_timeout: Duration = 5.0


class NoTargets(Exception):
    """The domain has no host to try; `outcome` says why."""

    def __init__(self, outcome: gmta.Outcome) -> None:
        super().__init__(str(outcome.reply))
        self.outcome = outcome


class Relay:
    """The transport."""

    Config = TransportConfig
    concurrency = 20
    lmtp = False

    def __init__(self, name: str, config: TransportConfig, services: Any) -> None:
        self.name = name
        self._config = config
        self._services = services
        self._hosts = [split_host(text, config.port) for text in config.host]
        if self.lmtp and not self._hosts:
            raise ValueError("host: expected ADDRESS:PORT, lmtp has no MX")
        self._settings = Settings(
            services.hostname, self.lmtp, config.tls, config.username, config.password, config.connect_timeout,
            config.greeting_timeout, config.command_timeout, config.data_timeout, config.idle_timeout)
        self._context = client_context()
        self._pool = Pool(config.idle_timeout, services.clock, services.spawn)
        self._resolver: dns.resolver.Resolver | None = None

    def next_hop(self, address: Address) -> str:
        """The lane: one for a smart host, one a domain for MX."""
        return "" if self._hosts else address.host

    def deliver(self, delivery: Any) -> dict[int, gmta.Outcome]:
        """One transaction, over a kept connection where there is one."""
        client = self._pool.take(delivery.next_hop)
        if client is not None:
            try:
                return self._send(client, delivery)
            except ConnectionFailed as failure:
                if not failure.stale:
                    return _all(delivery, failure.outcome)
        try:
            targets = self._targets(delivery.next_hop)
        except NoTargets as none:
            return _all(delivery, none.outcome)
        outcome = gmta.deferred("No host to try", enhanced="4.4.4", recipient_fault=False)
        for target in targets[:MAX_HOSTS]:
            try:
                client = self._open(target)
                return self._send(client, delivery)
            except ConnectionFailed as failure:
                outcome = failure.outcome
                self._services.log.info("attempt", id=delivery.envelope.id, transport=self.name, remote=outcome.remote,
                                        reply=outcome.reply)
        return _all(delivery, outcome)

    def close(self) -> None:
        """Closes kept connections."""
        self._pool.close()

    def _send(self, client: SmtpClient, delivery: Any) -> dict[int, gmta.Outcome]:
        outcomes = client.send(delivery.envelope, delivery.recipients, delivery.message)
        self._pool.keep(delivery.next_hop, client)
        return outcomes

    def _open(self, target: tuple[str, str, int]) -> SmtpClient:
        """A connection; where opportunistic TLS fails in the handshake, another in clear (RFC 7435)."""
        name, address, port = target
        client = SmtpClient(self._settings, address, port, self._services.deadlines, name=name, context=self._context)
        try:
            client.connect()
        except TlsFailed:
            if self._config.tls == "required":
                raise
            client = SmtpClient(self._settings, address, port, self._services.deadlines, name=name, context=self._context)
            client.connect(clear=True)
        return client

    # --- where to -------------------------------------------------------------------------------------------------

    def _targets(self, domain: str) -> list[tuple[str, str, int]]:
        """(name, address, port) of the hosts to try, in order; raises NoTargets."""
        if self._hosts:
            return [(host, host, port) for host, port in self._hosts]
        port = self._config.port
        if domain.startswith("["):
            try:
                address = literal_ip(domain)
            except AddressError as error:
                raise NoTargets(gmta.failed(f"Bad address literal {domain}", enhanced="5.1.2")) from error
            return self._outside([(address, address, port)], domain)
        targets = []
        trouble: gmta.Outcome | None = None
        for name in self._exchangers(domain):
            try:
                targets += [(name, address, port) for address in self._addresses(name)]
            except NoTargets as none:
                trouble = none.outcome
            if len(targets) >= MAX_HOSTS:
                break
        if not targets:
            raise NoTargets(trouble or gmta.failed(f"No mail host of {domain} has an address", enhanced="5.4.4"))
        return self._outside(targets, domain)

    def _outside(self, targets: list[tuple[str, str, int]], domain: str) -> list[tuple[str, str, int]]:
        """Without those that are this machine: mail to them would come back."""
        if self._config.allow_loopback:
            return targets
        kept = []
        for target in targets:
            address = ipaddress.ip_address(target[1])
            if not (address.is_loopback or address.is_unspecified):
                kept.append(target)
        if not kept:
            raise NoTargets(gmta.failed(f"The mail hosts of {domain} point to loopback", enhanced="5.4.6"))
        return kept

    def _exchangers(self, domain: str) -> list[str]:
        """MX hosts by preference, random among equals (RFC 5321 section 5.1); the domain itself where there is no MX."""
        answer = self._look_up(domain, "MX")
        if not answer:
            return [domain]  # RFC 5321 section 5.1: implicit MX
        records = [(record.preference, record.exchange.to_text(omit_final_dot=True).lower()) for record in answer]
        if all(name in ("", ".") for _, name in records):  # RFC 7505 section 3
            raise NoTargets(gmta.failed(f"{domain} takes no mail (null MX)", code=556, enhanced="5.1.10"))
        ours = [preference for preference, name in records if name == self._services.hostname.lower()]
        if ours:  # RFC 5321 section 5.1: none as far from the destination as we are
            records = [record for record in records if record[0] < min(ours)]
            if not records:
                raise NoTargets(gmta.failed(f"Mail for {domain} loops back to this host", enhanced="5.4.6"))
        random.shuffle(records)
        records.sort(key=lambda record: record[0])
        return [name for _, name in records]

    def _addresses(self, name: str) -> list[str]:
        """IPv4 and IPv6 addresses of a host; none where it has none. Raises NoTargets."""
        return [record.address for kind in ("A", "AAAA") for record in self._look_up(name, kind)]

    def _look_up(self, name: str, kind: str) -> list[Any]:
        """Records, [] where the name has none of that type. Raises NoTargets: 5.1.2 no such name, 4.4.3 no answer."""
        try:
            return list(self._dns().resolve(f"{name}.", kind))
        except dns.resolver.NoAnswer:
            return []
        except dns.resolver.NXDOMAIN as error:
            raise NoTargets(gmta.failed(f"Domain {name} does not exist", enhanced="5.1.2")) from error
        except (dns.exception.DNSException, OSError) as error:
            # the lane stays open: one domain's DNS says nothing about a host
            raise NoTargets(gmta.deferred(f"DNS look-up of {name} {kind} failed: {type(error).__name__}", enhanced="4.4.3")) from error

    def _dns(self) -> dns.resolver.Resolver:
        """The resolver of [dns]; its cache honours TTLs."""
        resolver = self._resolver
        if resolver is None:
            settings = self._services.config.dns
            resolver = dns.resolver.Resolver(configure=not settings.servers)
            if settings.servers:
                servers = [split_host(server, 53) for server in settings.servers]
                resolver.nameservers = [server for server, _ in servers]
                resolver.nameserver_ports = dict(servers)
            resolver.lifetime = settings.timeout
            resolver.cache = dns.resolver.LRUCache(max(1, settings.cache_size))
            self._resolver = resolver
        return resolver


class Lmtp(Relay):
    """LMTP (RFC 2033): the same with a reply a recipient, to fixed hosts."""

    lmtp = True


def split_host(text: str, port: int) -> tuple[str, int]:
    """(host, port) of HOST, HOST:PORT, [IPV6] or [IPV6]:PORT; raises ValueError."""
    if text.startswith("["):
        host, _, rest = text[1:].partition("]")
        rest = rest.removeprefix(":")
    elif text.count(":") > 1:
        host, rest = text, ""
    else:
        host, _, rest = text.partition(":")
    if not host or (rest and not (rest.isdigit() and 0 < int(rest) < 65536)):
        raise ValueError(f"host {text!r}: expected ADDRESS or ADDRESS:PORT")
    return host, int(rest) if rest else port


def _all(delivery: Any, outcome: gmta.Outcome) -> dict[int, gmta.Outcome]:
    return {recipient.number: outcome for recipient in delivery.recipients}


class Plugin:
    """Offers the transport types."""

    def __init__(self, config: Config, services: Any) -> None:
        pass

    @hookimpl
    def get_transports(self, config: Any) -> dict[str, Any]:
        """{type name: transport class}."""
        return {"relay": Relay, "lmtp": Lmtp}
