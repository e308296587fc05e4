"""What TLS with a next hop must be: [tls_policy], DANE, MTA-STS, else what the transport says; and whether it was that.

`TlsPolicies.of_domain` says what a domain asks for, `rule` what that comes to for one of its hosts: a `TlsRule`, by which the client
starts TLS and judges the certificate. A line of [tls_policy] for the domain decides alone. Without one, DANE goes before MTA-STS, and
neither is ever weakened by a failure: a host whose TLSA records can't be looked up is no host to use now.

Failure: `Unusable` for a host that can't be used now, `TlsRejected` for a session that is not what was asked for.
RFC 7435 (opportunistic), RFC 7672 (DANE), RFC 8461 (MTA-STS), RFC 9525 (names).
"""

from __future__ import annotations

import _ssl
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from gmta.config import TlsDemand
from gmta.deliver import dane
from gmta.deliver.mtasts import MtaSts, Policy
from gmta.deliver.nexthop import Target
from gmta.mail.address import domains_above
from gmta.mail.message import Message
from gmta.mail.verdict import Outcome, deferred, failed
from gmta.services.dns import Status
from gmta.services.tls import client_context

Level = Literal["none", "may", "encrypt", "verify", "dane"]

PROBE_AGAIN_S = 60.0

_LEVELS: dict[str, Level] = {"off": "none", "opportunistic": "may", "required": "encrypt"}  # [transport:…] tls


@dataclass(frozen=True, slots=True)
class TlsRule:
    """What TLS with one host must be.

    level: none, may (clear text where it is not offered), encrypt (whatever the certificate), verify (chain, and one of `names`),
    dane (`tlsa`, and one of `names` where it asks for that).  server_name: SNI, "" for an address.  source: who asks for it:
    tls_policy, transport, mta-sts, dane.  otherwise: the rule to go on with where this one can't be had, None: do not go on.
    noted: what is wrong with the host by a policy that is only on trial, as a TLS report has it.
    """

    level: Level = "may"
    names: tuple[str, ...] = ()
    tlsa: tuple[dane.Tlsa, ...] = ()
    server_name: str = ""
    source: str = "transport"
    otherwise: TlsRule | None = None
    noted: str = ""

    @property
    def required(self) -> bool:
        """Whether this rule itself forbids clear text."""
        return self.level not in ("none", "may")

    @property
    def clear_allowed(self) -> bool:
        """Whether it may come to clear text in the end."""
        return not self.required or (self.otherwise is not None and self.otherwise.clear_allowed)


class TlsRejected(Exception):
    """The session is not what the rule asks for. result: as in a TLS report (RFC 8460 section 4.3)."""

    def __init__(self, text: str, result: str) -> None:
        super().__init__(text)
        self.result = result


class Unusable(Exception):
    """A host that can't be used now, by `rule`, or never for this message. result: as in a TLS report, "" for none."""

    def __init__(self, text: str, rule: TlsRule, result: str, outcome: Outcome | None = None) -> None:
        super().__init__(text)
        self.outcome: Outcome = outcome or deferred(text[:400], enhanced="4.7.5", recipient_fault=False)
        self.rule = rule
        self.result = result


@dataclass(frozen=True, slots=True)
class DomainPolicy:
    """What a domain asks for. demand: its line of [tls_policy]; sts: its MTA-STS policy."""

    domain: str
    demand: TlsDemand | None = None
    sts: Policy | None = None


class Contexts:
    """The TLS contexts of a transport, made when they are first used. ca_file: authorities in the place of the system's."""

    def __init__(self, ca_file: str = "") -> None:
        self._ca_file = ca_file
        self._any: ssl.SSLContext | None = None
        self._verifying: ssl.SSLContext | None = None
        self._https: ssl.SSLContext | None = None

    def of(self, rule: TlsRule) -> ssl.SSLContext:
        """The context for a rule; raises TlsError."""
        if rule.level != "verify":
            if self._any is None:
                self._any = client_context()
            return self._any
        if self._verifying is None:
            self._verifying = self._make()
        return self._verifying

    def https(self) -> ssl.SSLContext:
        """One that urllib3 may change; raises TlsError."""
        if self._https is None:
            self._https = self._make()
        return self._https

    def _make(self) -> ssl.SSLContext:
        return client_context(verify=True, match_name=False, ca_file=self._ca_file or None)


def judge(rule: TlsRule, tls_socket: Any, now: float) -> str:
    """How a finished handshake is verified: "dane-ee", "dane-ta", "pki", or "" where nothing asked; raises TlsRejected."""
    if rule.level == "verify":  # the chain is right, the context saw to that
        certificate = tls_socket.getpeercert() or {}
        presented = [value for kind, value in certificate.get("subjectAltName", ()) if kind in ("DNS", "IP Address")]
        if not any(dane.covers(one, name) for one in presented for name in rule.names):
            shown = ", ".join(presented[:5]) or "nobody"
            raise TlsRejected(f"the certificate is for {shown}, not for {' or '.join(rule.names[:5])}"[:300], "certificate-host-mismatch")
        return "pki"
    if rule.level == "dane" and rule.tlsa:
        try:
            return dane.match(_chain(tls_socket), rule.tlsa, rule.names, now)
        except dane.Mismatch as mismatch:
            raise TlsRejected(f"DANE: {mismatch}", "validation-failure") from mismatch
    return ""


def is_optional(message: Message) -> bool:
    """Whether a message says `TLS-Required: No` (RFC 8689 section 3)."""
    return [value.strip().lower() for value in message.values("TLS-Required")] == [b"no"]


def _chain(tls_socket: Any) -> list[bytes]:
    """The certificates that the host showed, its own first."""
    shown = tls_socket._sslobj.get_unverified_chain() or ()  # its public name came with Python 3.13
    return [one.public_bytes(_ssl.ENCODING_DER) for one in shown]


def failure_result(error: Exception) -> str:
    """The result type of a TLS report for a failed handshake (RFC 8460 section 4.3.2)."""
    code = getattr(error, "verify_code", None)
    if code is None:
        return "validation-failure"
    if code == 10:
        return "certificate-expired"
    return "certificate-host-mismatch" if code == 62 else "certificate-not-trusted"


class TlsPolicies:
    """The policies of one transport.

    demands: [tls_policy].  tls: the transport's key (opportunistic, required, off).  smart: hosts are named by the configuration, so
    neither DANE nor MTA-STS has a say.
    """

    def __init__(self, demands: Mapping[str, TlsDemand], tls: str, resolver: Any, *,
                 sts: MtaSts | None = None, validation: Validation | None = None, smart: bool = False) -> None:
        self._demands = demands
        self._base = _LEVELS[tls]
        self._resolver = resolver
        self._sts = None if smart or self._base == "none" else sts
        self._smart = smart
        self._validation = None if smart or self._base == "none" else validation

    def of_domain(self, domain: str) -> DomainPolicy:
        """What a domain (or smart host) asks for."""
        demand = self._demand(domain)
        if self._sts is None or domain.startswith("[") or (demand is not None and not demand.default):
            return DomainPolicy(domain, demand)
        policy = self._sts.policy(domain)
        return DomainPolicy(domain, demand, policy if policy is not None and policy.mode != "none" else None)

    def _demand(self, domain: str) -> TlsDemand | None:
        """The line of [tls_policy] that is most about a domain: its own, that of a domain above, `*`."""
        demands = self._demands
        if not demands:
            return None
        above = (f".{parent}" for parent in domains_above(domain))
        return next((demands[name] for name in (domain, *above, "*") if name in demands), None)

    def rule(self, policy: DomainPolicy, target: Target) -> TlsRule:
        """What TLS with one host must be; raises Unusable."""
        server_name = "" if target.name == target.address else target.name
        base = self._base_rule(policy, target, server_name)
        if base.level == "none" or (policy.demand is not None and not policy.demand.default):
            return base
        found = self._tlsa(target)
        if found is not None:
            name, records = found
            # RFC 7672 section 3.2.3: the names that a certificate under a trust anchor may have
            secured = TlsRule("dane", _distinct(name, target.name, policy.domain), records, name, "dane")
            if records:
                return secured
            if base.level != "verify":  # RFC 7672 section 2.2: nothing that can be used asks for TLS, whatever the certificate
                base = secured
        sts = policy.sts
        if sts is None:
            return base
        strict = TlsRule("verify", (target.name,), (), server_name, "mta-sts")
        allowed = sts.allows(target.name)
        if sts.mode == "enforce":
            if not allowed:  # RFC 8461 section 5
                raise Unusable(f"{target.name} is no mail host of {policy.domain} by its MTA-STS policy", strict, "validation-failure")
            return strict
        if not allowed:
            return replace(base, noted="validation-failure")
        return replace(strict, otherwise=base)

    def strict_rule(self, policy: DomainPolicy, target: Target) -> TlsRule:
        """The rule for a message that asks for REQUIRETLS: verified, at a host that nobody could slip in; raises Unusable."""
        rule = self.rule(policy, target)
        if rule.level == "dane" and rule.tlsa:
            return rule
        named = self._smart or policy.domain.startswith("[") or (policy.sts is not None and policy.sts.allows(target.name))
        if not named and not (target.secure and self._validation is not None and self._validation.proven()):  # RFC 8689 section 4.2.1
            text = f"REQUIRETLS: neither DNSSEC nor MTA-STS vouches for the mail hosts of {policy.domain}"
            raise Unusable(text, rule, "", failed(text, enhanced="5.7.30"))
        if rule.level == "verify":
            return replace(rule, otherwise=None)
        return TlsRule("verify", (target.name,), (), rule.server_name, rule.source)

    def optional_rule(self, policy: DomainPolicy, target: Target) -> TlsRule:
        """The rule for a message with `TLS-Required: No`: what the recipient's domain asks for does not hold (RFC 8689 section 4.2.2)."""
        return self._base_rule(policy, target, "" if target.name == target.address else target.name)

    def _base_rule(self, policy: DomainPolicy, target: Target, server_name: str) -> TlsRule:
        """What configuration alone asks for."""
        demand = policy.demand
        level: Level = self._base if demand is None else demand.level
        source = "transport" if demand is None else "tls_policy"
        names: tuple[str, ...] = ()
        if level == "verify":
            names = (demand.names if demand is not None else ()) or _distinct(target.name, policy.domain)
        otherwise = TlsRule("none", source=source) if level == "may" else None  # RFC 7435 section 3
        return TlsRule(level, names, (), server_name, source, otherwise)

    def _tlsa(self, target: Target) -> tuple[str, tuple[dane.Tlsa, ...]] | None:
        """(the name that they stand at, usable TLSA records) of a host that has some; raises Unusable where that can't be said."""
        if self._validation is None or not self._validation.proven() or not target.secure:
            return None  # RFC 7672 section 2.2.2: without a secure way to the host its records prove nothing
        for name in _distinct(target.canonical or target.name, target.name):
            answer = self._resolver.look_up(dane.record_name(name, target.port), "TLSA")
            if answer.status is Status.TEMPORARY:  # RFC 7672 section 2.1.2: perhaps somebody hides them
                raise Unusable(f"DNS look-up of TLSA for {name} failed: {answer.reason}", TlsRule("dane", (), (), name, "dane"), "dnssec-invalid")
            if answer.status is Status.FOUND and answer.secure:
                return name, dane.usable(answer.records)
        return None


class Validation:
    """Whether the resolver that says "secure" validates: it must vouch for a signed name and must not give a bogus one.

    signed, bogus: the names to try, "" for none. Until one of them has shown that it does not, it is believed: what "secure" leads to
    only makes TLS stricter.
    """

    def __init__(self, resolver: Any, log: Any, clock: Callable[[], float], *, signed: str = ".", bogus: str = "") -> None:
        self._resolver = resolver
        self._log = log
        self._clock = clock
        self._signed = signed
        self._bogus = bogus
        self._verdict: bool | None = None
        self._again_at = 0.0

    def proven(self) -> bool:
        """False where the resolver was seen not to validate."""
        if self._verdict is None and self._clock() >= self._again_at:
            self._again_at = self._clock() + PROBE_AGAIN_S
            self._probe()
        return self._verdict is not False

    def _probe(self) -> None:
        if self._signed:
            answer = self._resolver.look_up(self._signed, "SOA")
            if answer.status is Status.TEMPORARY:
                return
            if not answer.secure:
                self._fail(f"the answer about the signed name {self._signed} is not validated")
                return
        if self._bogus:
            answer = self._resolver.look_up(self._bogus, "A")
            if answer.status in (Status.FOUND, Status.NODATA):
                self._fail(f"it answers about {self._bogus}, whose signatures are wrong")
                return
        self._verdict = True
        self._log.info("dnssec validation works", signed=self._signed or None, bogus=self._bogus or None)

    def _fail(self, reason: str) -> None:
        self._verdict = False
        tell = self._log.warning if self._resolver.validating else self._log.info  # the postmaster has said that it does
        tell("dane is off, the resolver does not validate", reason=reason)


def _distinct(*names: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for name in names if name))
