"""Where a domain's mail goes: its MX hosts with their addresses, in the order to try them.

`NextHops.targets` asks the resolver for MX and addresses and leaves out what can't take mail: names that are addresses, loopback,
addresses that lead nowhere, and whatever is as far away as we are where we are an MX host ourselves. `NextHops.smart_hosts` does the
same for hosts that the configuration names. Addresses that gave no connection are remembered for a minute and then tried last.
Connecting and what hosts say is the client's; whether TLS can be had is tlspolicy's.

Failure: `NoTargets` with the Outcome for all recipients: failed for what DNS says for good, deferred for what it could not say.
RFC 5321 sections 5.1 and 2.3.5, RFC 7505 (null MX), RFC 3974 (both families).
"""

from __future__ import annotations

import ipaddress
import random
import socket
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby, zip_longest
from typing import Any, NamedTuple

from gmta.mail.address import AddressError, literal_ip
from gmta.mail.verdict import Outcome, deferred, failed
from gmta.services.dns import Addresses, Answer, Status, is_ip, is_public, name_text, plain_address

MAX_TARGETS = 10  # addresses of one attempt
MAX_EXCHANGERS = 50  # MX records looked at
DEAD_S = 60.0  # how long an address that gave no connection is tried last
MAX_DEAD = 10_000

_UNROUTABLE = [ipaddress.ip_network(text) for text in ("0.0.0.0/8", "169.254.0.0/16", "224.0.0.0/3")]


class Target(NamedTuple):
    """One address to try.

    name: the host's, as MX or configuration has it, without final dot.  canonical: where its CNAMEs led.
    secure: DNSSEC covers the way from the domain to this address.
    """

    name: str
    address: str
    port: int
    canonical: str = ""
    secure: bool = False


class NoTargets(Exception):
    """There is no host to try; `outcome` says why."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(str(outcome.reply))
        self.outcome = outcome


class NextHops:
    """Finds targets. resolver: services.resolver.  listeners: (address, port) where this server takes mail.

    port: of MX hosts.  allow_loopback: MX hosts may be on loopback.  shuffle: puts equals in random order.
    """

    def __init__(self, resolver: Any, log: Any, clock: Callable[[], float], *, hostname: str, listeners: Iterable[tuple[str, int]] = (),
                 port: int = 25, allow_loopback: bool = False, shuffle: Callable[[list[Any]], None] = random.shuffle) -> None:
        self._resolver = resolver
        self._log = log
        self._clock = clock
        self._hostname = hostname.lower()
        self._listeners = frozenset(listeners)
        self._wildcards = frozenset(port for host, port in self._listeners if host in ("0.0.0.0", "::"))
        self._port = port
        self._allow_loopback = allow_loopback
        self._shuffle = shuffle
        self._dead: dict[tuple[str, int], float] = {}

    # --- what callers ask for ---------------------------------------------------------------------------------------

    def targets(self, domain: str) -> list[Target]:
        """Where mail for a domain (A-labels, or an address literal) goes; raises NoTargets."""
        if domain.startswith("["):
            return self._literal(domain)
        answer = self._resolver.mx(domain)
        if answer.status is Status.NXDOMAIN:
            raise NoTargets(failed(f"Domain {domain} does not exist", enhanced="5.1.2"))
        if answer.status is Status.TEMPORARY:
            raise _dns_trouble(domain, "MX", answer.reason)
        if answer.status is Status.NODATA:  # RFC 5321 section 5.1: the implicit MX
            return self._gather(domain, [(0, domain)], secure=answer.secure, implicit=True)
        records = [(int(record.preference), name_text(record.exchange)) for record in answer.records[:MAX_EXCHANGERS]]
        if all(name == "." for _, name in records):
            raise NoTargets(failed(f"{domain} takes no mail (null MX)", code=556, enhanced="5.1.10"))  # RFC 7505 section 4
        self._shuffle(records)
        records.sort(key=lambda record: record[0])
        return self._gather(domain, records, secure=answer.secure)

    def smart_hosts(self, hosts: Sequence[tuple[str, int]]) -> list[Target]:
        """The addresses of hosts (name or address, port) in their order; raises NoTargets where none has one."""
        targets: list[Target] = []
        trouble: NoTargets | None = None
        for name, port in hosts:
            if name.startswith("/") or is_ip(name):  # a socket of this machine has a path
                targets.append(Target(name, name, port))
                continue
            found = self._resolver.addresses(name)
            if found.status is not Status.FOUND:
                trouble = _dns_trouble(name, "address", found.reason)
            targets += [Target(found.name, address, port, found.canonical, found.secure) for address in self._order(found)]
        if not targets:
            raise trouble or NoTargets(deferred("No host to try", enhanced="4.4.4"))
        return self._living(targets)

    def web_addresses(self, host: str) -> list[str]:
        """Public addresses of a host that we fetch something from, since others name it (RFC 8461); none where DNS has none."""
        found = self._resolver.addresses(host)
        return [address for address in self._order(found)
                if not self._fault(address) and (self._allow_loopback or is_public(address))]

    def failed(self, target: Target) -> None:
        """Notes that an address gave no connection."""
        if len(self._dead) >= MAX_DEAD:
            self._dead.clear()
        self._dead[target.address, target.port] = self._clock() + DEAD_S

    def answered(self, target: Target) -> None:
        """Notes that an address is alive."""
        if self._dead:
            self._dead.pop((target.address, target.port), None)

    # --- finding ----------------------------------------------------------------------------------------------------

    def _literal(self, literal: str) -> list[Target]:
        """[192.0.2.1] (RFC 5321 section 4.1.3)."""
        try:
            address = literal_ip(literal)
        except AddressError:
            raise NoTargets(failed(f"Bad address literal {literal}", enhanced="5.1.2")) from None
        fault = self._fault(address)
        if fault or self._is_own(address, self._port):
            loop = not fault or "loopback" in fault
            raise NoTargets(failed(f"No mail can be sent to {literal}: {fault or 'it is this host'}", enhanced="5.4.6" if loop else "5.4.4"))
        return [Target(address, address, self._port)]

    def _gather(self, domain: str, records: list[tuple[int, str]], *, secure: bool, implicit: bool = False) -> list[Target]:
        """The targets of MX records that are in order; raises NoTargets."""
        targets: list[Target] = []
        unknown: Answer | Addresses | None = None
        loops = loopback = False
        for _, group in groupby(records, key=lambda record: record[0]):
            found_here: list[Target] = []
            for _, name in group:
                if name == self._hostname and not implicit:
                    loops = True
                    break
                if name == "." or is_ip(name):
                    self._log.info("mx skipped", domain=domain, host=name, reason="not a host name")  # RFC 5321 section 5.1
                    continue
                found = self._resolver.addresses(name)
                if found.status is Status.TEMPORARY:
                    unknown = found
                for address in self._order(found):
                    fault = self._fault(address)
                    if fault:
                        loopback = loopback or "loopback" in fault
                        self._log.info("mx skipped", domain=domain, host=name, address=address, reason=fault)
                    elif self._is_own(address, self._port):
                        loops = True
                        break
                    else:
                        found_here.append(Target(found.name, address, self._port, found.canonical, secure and found.secure))
            if loops:
                break  # RFC 5321 section 5.1: nothing that is as far from the destination as we are, or farther
            targets += found_here
            if len(targets) >= MAX_TARGETS:
                break
        if targets:
            return self._living(targets)[:MAX_TARGETS]
        if unknown is not None:
            raise _dns_trouble(unknown.name, "address", unknown.reason)
        if loops:
            raise NoTargets(failed(f"Mail for {domain} loops back to this host", enhanced="5.4.6"))
        if loopback:
            raise NoTargets(failed(f"The mail hosts of {domain} point to loopback", enhanced="5.4.6"))
        text = f"{domain} has neither MX nor address" if implicit else f"No mail host of {domain} has an address that can be used"
        raise NoTargets(failed(text, enhanced="5.4.4"))

    def _order(self, found: Addresses) -> list[str]:
        """A host's addresses: the families in turn, so that a broken one costs one try, and a random order within each."""
        families = [list(found.v6), list(found.v4)]
        for family in families:
            self._shuffle(family)
        return [address for pair in zip_longest(*families) for address in pair if address is not None]

    def _living(self, targets: list[Target]) -> list[Target]:
        """The same, with those last that lately gave no connection."""
        if not self._dead or len(targets) < 2:
            return targets
        now = self._clock()
        return sorted(targets, key=lambda target: self._dead.get((target.address, target.port), 0.0) > now)

    def _fault(self, text: str) -> str:
        """Why an address can't be a mail host's, "" where it can."""
        address = plain_address(text)
        if address.is_loopback:
            return "" if self._allow_loopback else "a loopback address"
        if address.is_unspecified or address.is_multicast or address.is_link_local:
            return "an address that leads nowhere"
        if address.version == 4 and any(address in network for network in _UNROUTABLE):
            return "an address that leads nowhere"
        return ""

    def _is_own(self, address: str, port: int) -> bool:
        """Whether a connection there would come to this server."""
        if (address, port) in self._listeners:
            return True
        return port in self._wildcards and _is_local(address)


def _is_local(address: str) -> bool:
    """Whether an address is one of this machine's."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((address, 0))  # no other can be bound, but with ip_nonlocal_bind
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))  # nothing is sent; to itself the machine speaks from that very address
            source = plain_address(probe.getsockname()[0])
    except OSError:
        return False
    return source == plain_address(address) or source.is_loopback


def _dns_trouble(name: str, kind: str, reason: str) -> NoTargets:
    """DNS could not tell. The lane stays open: one domain's DNS says nothing about a host."""
    return NoTargets(deferred(f"DNS look-up of {name} ({kind}) failed: {reason}"[:400], enhanced="4.4.3"))
