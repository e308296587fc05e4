"""Transports `relay` (SMTP to smart hosts, or to the MX hosts of the recipient's domain) and `lmtp`.

Hooks: get_transports.  Keys of [transport:NAME]: host (one or several ADDRESS:PORT, tried in order; none: MX), port,
allow_loopback, tls, ca_file, dane, mta_sts, sts_port, username, password (or password_file), source, helo, chunking,
connect_timeout, greeting_timeout, command_timeout, data_timeout, attempt_timeout, idle_timeout.  Replies: the remote's own; 550
5.1.2 no such domain, 556 5.1.10 null MX, 5.4.4 no usable host, 5.4.6 loop to ourselves, 451 4.4.3 DNS, 4.4.1 no connection, 4.7.5 no
TLS as it has to be, 4.7.10 no TLS at all (the last four are deferred).

Which hosts is gmta.deliver.nexthop's, which TLS gmta.deliver.tlspolicy's, the conversation gmta.deliver.client's. The next host is
tried where one gives no conversation, breaks it off before it can have taken the message, or can't take the sender now; what a host
says about a recipient or the message stands. RFC 5321 section 5, RFC 7505, RFC 2033.
"""

from __future__ import annotations

import ipaddress
from typing import Any, Literal

from pydantic import Field, field_validator

import gmta
from gmta import PluginConfig, hookimpl
from gmta.config import ExistingFile
from gmta.deliver.client import ConnectionFailed, Pool, Settings, SmtpClient, TlsFailed, on_this_machine
from gmta.deliver.mtasts import HttpsFetch, MtaSts
from gmta.deliver.nexthop import NextHops, NoTargets, Target
from gmta.deliver.tlspolicy import Contexts, DomainPolicy, TlsPolicies, TlsRule, Unusable, Validation, is_optional
from gmta.deliver.tlsrpt import TlsReports, leave_in_maildrop, over_https
from gmta.hookspecs import Duration
from gmta.mail.address import Address
from gmta.mail.verdict import Status

HURRY_S = 8.0  # for the TCP connection while there are other addresses to try
MAX_SESSIONS = 20  # connections of one attempt
MAX_REMEMBERED = 1000  # hosts that don't know BDAT


class Config(PluginConfig):
    """[plugin:relay] has no keys of its own."""


class TransportConfig(PluginConfig):
    """[transport:NAME] of type relay or lmtp."""

    host: list[str] = Field([], description="ADDRESS[:PORT] or unix:PATH ..., tried in order; none: the MX hosts of the domain (relay only)")
    port: int = Field(25, ge=1, le=65535, description="port of MX hosts, and of hosts that name none")
    allow_loopback: bool = Field(False, description="deliver to MX hosts on loopback, for tests")
    tls: Literal["opportunistic", "required", "off"] = Field("opportunistic", description="where [tls_policy] says nothing")
    ca_file: ExistingFile = Field("", description="authorities that verified hosts are judged by; default: the system's")
    dane: bool = Field(True, description="heed TLSA records of MX hosts, where the resolver validates")
    mta_sts: bool = Field(True, description="heed the MTA-STS policies of domains")
    sts_port: int = Field(443, ge=1, le=65535, description="port of policy hosts, for tests")
    username: str = ""
    password: str = ""
    source: list[str] = Field([], description="our addresses, at most one a family; default: the system's choice")
    helo: str = Field("", description="our name in EHLO; default: hostname of [gmta]")
    chunking: bool = Field(True, description="use BDAT where it is offered")
    connect_timeout: Duration = Field(30.0, description="for the last address; earlier ones get 8s at most")
    greeting_timeout: Duration = 300.0
    command_timeout: Duration = 300.0
    data_timeout: Duration = 600.0
    attempt_timeout: Duration = Field(1800.0, description="for a message with one host, and for going on to others")
    idle_timeout: Duration = 5.0

    @field_validator("source")
    @classmethod
    def _sources(cls, value: list[str]) -> list[str]:
        expected = "IP addresses of this machine, at most one of each family"
        try:
            families = [ipaddress.ip_address(one).version for one in value]
        except ValueError:
            raise ValueError(expected) from None
        if len(set(families)) != len(families):
            raise ValueError(expected)
        return value


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
        if config.username and not self._hosts:
            raise ValueError("host: expected where username is, credentials are not for whatever MX records name")
        core, hostname = services.config, services.hostname
        self._settings = Settings(
            config.helo or hostname, self.lmtp, config.username, config.password, config.connect_timeout, config.greeting_timeout,
            config.command_timeout, config.data_timeout, config.attempt_timeout, tuple(config.source))
        self._hops = NextHops(
            services.resolver, services.log, services.clock, hostname=hostname, port=config.port, allow_loopback=config.allow_loopback,
            listeners=[address for listener in core.listeners.values() for address in listener.addresses])
        self._contexts = Contexts(config.ca_file)
        self._reports = self._make_reports(core)
        self._policies = self._make_policies(core)
        self._pool = Pool(config.idle_timeout, services.clock, services.spawn)
        self._no_bdat: set[str] = set()

    def _make_policies(self, core: Any) -> TlsPolicies:
        """What decides about TLS: for hosts that the configuration names neither DANE nor MTA-STS."""
        config, services = self._config, self._services
        resolver, log, clock = services.resolver, services.log, services.clock
        if self._hosts or config.tls == "off":
            return TlsPolicies(core.tls_policy, config.tls, resolver, smart=bool(self._hosts))
        validation = Validation(resolver, log, clock, signed=core.dns.probe_signed, bogus=core.dns.probe_bogus) if config.dane else None
        sts = None
        if config.mta_sts:
            fetch = HttpsFetch(self._hops.web_addresses, self._contexts.https, port=config.sts_port)
            sts = MtaSts(resolver, services.state, log, clock, fetch, self._reports.fetch_failed if self._reports else None)
        return TlsPolicies(core.tls_policy, config.tls, resolver, sts=sts, validation=validation)

    def _make_reports(self, core: Any) -> TlsReports | None:
        """Who counts sessions for TLS reports, where they are on."""
        if self._hosts or not core.tlsrpt.send:
            return None
        services = self._services
        post = over_https(services.resolver, services.clock, allow_private=core.tlsrpt.allow_private, ca_file=self._config.ca_file)
        return TlsReports(core.tlsrpt, services.hostname, services.resolver, services.state, services.log, services.clock,
                          leave_in_maildrop(core.gmta.data_dir, services.clock), post, services.spawn)

    def next_hop(self, address: Address) -> str:
        """The lane: one for smart hosts, one a domain for MX."""
        return "" if self._hosts else address.host

    def deliver(self, delivery: Any) -> dict[int, gmta.Outcome]:
        """One message, over a kept connection where there is one, else to the first host that has a conversation with us."""
        outcomes: dict[int, gmta.Outcome] = {}
        client = self._pool.take(_pool_key(delivery))
        if client is not None and delivery.recipients[0].attempts and delivery.envelope.id in client.deferred:
            client.quit()  # what was deferred is tried again in another session
            client = None
        if client is not None:
            try:
                return self._send(client, delivery)
            except ConnectionFailed as failure:
                outcomes = failure.outcomes
                if not failure.certain or len(outcomes) == len(delivery.recipients):
                    return _rest(delivery, outcomes, failure.outcome)
                if not failure.outcome.own:
                    delivery.tried(failure.outcome)
        try:
            targets = self._hops.smart_hosts(self._hosts) if self._hosts else self._hops.targets(delivery.next_hop)
        except NoTargets as none:
            return _rest(delivery, outcomes, none.outcome)
        return self._try(delivery, targets, outcomes)

    def _try(self, delivery: Any, targets: list[Target], outcomes: dict[int, gmta.Outcome]) -> dict[int, gmta.Outcome]:
        """One host after the other, until there is nothing left to say."""
        verdict: gmta.Outcome | None = None
        clock = self._services.deadlines.clock
        until = clock() + self._config.attempt_timeout
        for _ in range(MAX_SESSIONS):
            target = targets.pop(0)
            try:
                client = self._open(target, delivery, hurry=bool(targets))
                found = self._send(client, delivery, outcomes)
                if not client.sender_deferred or not (targets := [other for other in targets if other.name != target.name]):
                    return outcomes | found
                outcome = next(iter(found.values()))
            except ConnectionFailed as failure:
                outcomes |= failure.outcomes
                outcome = failure.outcome
                if not failure.certain or len(outcomes) == len(delivery.recipients):
                    return _rest(delivery, outcomes, outcome)
                if failure.again:
                    targets.insert(0, target)
            except Unusable as unusable:
                outcome = unusable.outcome
            if verdict is None or outcome.status is Status.DEFERRED:  # for good only where all hosts say so
                verdict = outcome
            if not targets or clock() >= until:
                break
            delivery.tried(outcome)
        if self._hosts and verdict is not None and verdict.status is Status.FAILED and not verdict.own:
            # a smart host that does not want us is the postmaster's to mend, not the sender's
            verdict = gmta.deferred(f"{verdict.remote} refused: {verdict.reply}"[:300], enhanced="4.4.0", remote=verdict.remote,
                                    recipient_fault=False)
        return _rest(delivery, outcomes, verdict)

    def let_go(self, next_hop: str) -> None:
        """Closes the kept connections of a lane."""
        for key in ((next_hop, True), next_hop):
            self._pool.let_go(key)

    def close(self) -> None:
        """Closes kept connections."""
        self._pool.close()
        if self._reports is not None:
            self._reports.close()

    def _send(self, client: SmtpClient, delivery: Any, answered: dict[int, gmta.Outcome] | None = None) -> dict[int, gmta.Outcome]:
        """The message to the recipients that have no answer yet."""
        recipients = delivery.recipients
        if answered:
            recipients = [recipient for recipient in recipients if recipient.number not in answered]
        try:
            outcomes = client.send(delivery.envelope, recipients, delivery.message)
        except ConnectionFailed as failure:
            if failure.no_bdat and len(self._no_bdat) < MAX_REMEMBERED:
                self._no_bdat.add(client.host)
            raise
        if any(outcome.status is Status.DEFERRED for outcome in outcomes.values()):
            client.deferred += (delivery.envelope.id,)
        self._pool.keep(_pool_key(delivery), client)
        return outcomes

    def _open(self, target: Target, delivery: Any, *, hurry: bool) -> SmtpClient:
        """A connection, with TLS by the strictest rule first that may be had otherwise; raises ConnectionFailed, Unusable."""
        config, services, hops = self._config, self._services, self._hops
        policy = self._policies.of_domain(target.name if self._hosts else delivery.next_hop)
        strict = "requiretls" in delivery.envelope.facts and not (self.lmtp and on_this_machine(target.address))
        optional = not strict and is_optional(delivery.message)  # RFC 8689 section 4.1: REQUIRETLS goes before it
        try:
            if strict:
                rule = self._policies.strict_rule(policy, target)
            elif optional:
                rule = self._policies.optional_rule(policy, target)
            else:
                rule = self._policies.rule(policy, target)
        except Unusable as unusable:
            if unusable.result:
                self._note(policy, unusable.rule, target, unusable.result, str(unusable))
            raise
        counted = None if optional else rule  # RFC 8460 section 3: the session of a report is in no report
        while True:
            client = SmtpClient(self._settings, target.address, target.port, services.deadlines, name=target.name, rule=rule,
                                contexts=self._contexts, clock=services.clock,
                                chunking=config.chunking and target.address not in self._no_bdat)
            try:
                client.connect(min(HURRY_S, config.connect_timeout) if hurry else None)
            except TlsFailed as failure:
                reason = failure.outcome.reply.text
                if rule is counted:
                    self._note(policy, rule, target, failure.result, reason, client.source)
                if rule.otherwise is None:
                    raise
                services.log.info("tls failed", remote=client.remote, reason=reason, policy=rule.source)
                rule = rule.otherwise
            except ConnectionFailed as failure:
                if not failure.connected:
                    hops.failed(target)
                raise
            else:
                hops.answered(target)
                client.single = optional  # others want more of a connection
                if rule is counted and rule.level != "none":
                    result, reason = client.trouble or (rule.noted, "the host is none of the policy's" if rule.noted else "")
                    self._note(policy, rule, target, result, reason, client.source)
                return client

    def _note(self, policy: DomainPolicy, rule: TlsRule, target: Target, result: str, reason: str = "", source: str = "") -> None:
        """Counts a session for the TLS report."""
        if self._reports is not None:
            self._reports.note(policy, rule, target, result, reason, source)


class Lmtp(Relay):
    """LMTP (RFC 2033): the same with a reply a recipient, to fixed hosts."""

    lmtp = True


def split_host(text: str, port: int) -> tuple[str, int]:
    """(host, port) of HOST, HOST:PORT, [IPV6] or [IPV6]:PORT, (path, 0) of unix:PATH; raises ValueError."""
    if text.startswith("unix:/"):
        return text[5:], 0
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


def _pool_key(delivery: Any) -> Any:
    """Whose connections a message may use: one that asks for REQUIRETLS has its own."""
    return (delivery.next_hop, True) if "requiretls" in delivery.envelope.facts else delivery.next_hop


def _rest(delivery: Any, outcomes: dict[int, gmta.Outcome], outcome: gmta.Outcome | None) -> dict[int, gmta.Outcome]:
    """The outcomes, with `outcome` for everybody who has none."""
    outcome = outcome or gmta.deferred("No host to try", enhanced="4.4.4", recipient_fault=False)
    return {recipient.number: outcome for recipient in delivery.recipients} | outcomes


class Plugin:
    """Offers the transport types."""

    def __init__(self, config: Config, services: Any) -> None:
        pass

    @hookimpl
    def get_transports(self, config: Any) -> dict[str, Any]:
        """{type name: transport class}."""
        return {"relay": Relay, "lmtp": Lmtp}
