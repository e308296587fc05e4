"""The resolver: looks names up, remembers the answers, and tells "not there" from "can't tell now".

`Resolver` asks recursive name servers (UDP with EDNS0, TCP where that is too small) over plain sockets, so it yields to the
loop where the process is monkey-patched and blocks where it is not. Answers are kept by their TTL, the negative ones too;
callers that want the same thing at the same time share one query. What an answer means for mail (MX order, null MX, SPF,
DKIM keys) is left to the callers, and so is DNSSEC validation: the AD bit of a server that may be believed is passed on.

Failure: no look-up raises. A name that can't exist is NXDOMAIN with a reason; a server that is silent, refuses, fails or
answers nonsense is passed over for the next one, and when none is left or the deadline is over, the answer is TEMPORARY.
`Resolver.ask` alone speaks to servers; `gmta.testing.zone.Zone` puts a table in its place.

RFC 1034, RFC 1035, RFC 2308 (negative answers), RFC 5452 (forged answers), RFC 6840 section 5.7 (AD), RFC 6891 (EDNS0).
"""

from __future__ import annotations

import enum
import ipaddress
import os
import re
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.opcode
import dns.rcode
import dns.rdata
import dns.rdataclass
import dns.rdatatype
import idna
from dns.rdatatype import RdataType

from gmta.config import Config, name_server

MAX_NAME = 1024  # characters of a name as text; escapes make up to four of one octet (RFC 1035 section 5.1)
MAX_ALIASES = 16  # CNAMEs followed in one look-up
MAX_STRAY = 64  # datagrams that are no answer to our query, before the server is passed over (RFC 5452 section 9.2)
MAX_PTR_NAMES = 10  # RFC 7208 section 5.5
PAYLOAD = 1232  # what passes every path in one piece; RFC 6891 section 6.2.5
TTL_LEAST_S = 1.0  # one transaction may use an answer more than once even at TTL 0 (RFC 1035 section 3.2.1)
TTL_MOST_S = 86400.0  # RFC 8767 section 4 asks for days; a day heals sooner from somebody's mistake
TTL_MOST_NEGATIVE_S = 3600.0  # RFC 2308 section 5: one to three hours
TTL_TEMPORARY_S = 2.0  # RFC 2308 section 7.1: at most five minutes; long enough to spare a dead server, short for a retry
AVOID_S = 30.0  # a server that was silent is asked last for so long
SLOT = 1024  # octets of rdata in one unit of the cache
RESOLV_CONF = "/etc/resolv.conf"

_DOTS = re.compile("[.\u3002\uff0e\uff61]")  # RFC 3490 section 3.1
_IPV4 = re.compile(r"[0-9]+(\.[0-9]+){3}\Z")
_HOST = re.compile(r"[a-z0-9_](?:[a-z0-9_.-]*[a-z0-9_])?\Z")
_UNICAST = ipaddress.IPv6Network("2000::/3")  # RFC 4291 section 2.4: all that is given out
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # RFC 6052 section 2.1: an IPv4 address in the last 32 bits
_WITHOUT_QUESTION = frozenset({dns.rcode.FORMERR, dns.rcode.NOTIMP, dns.rcode.SERVFAIL, dns.rcode.REFUSED})
_NO_EDNS = frozenset({dns.rcode.FORMERR, dns.rcode.NOTIMP, dns.rcode.BADVERS})


class Status(enum.StrEnum):
    """What is known after a look-up."""

    FOUND = "found"
    NODATA = "nodata"  # the name is there, records of that kind are not
    NXDOMAIN = "nxdomain"  # the name is not there, nor can it be where the reason says so
    TEMPORARY = "temporary"  # can't tell now


@dataclass(frozen=True, slots=True)
class Answer:
    """The outcome of a look-up.

    name, kind: as asked, the name in lower case, A-labels and without final dot (as text, with the escapes of RFC 1035
    section 5.1).  records: dnspython rdata in the order of the answer, those at the end of the CNAMEs.  secure: validated
    by a server that may be believed.  canonical: the last CNAME target, else the name.  expires_at: when it is forgotten,
    by the resolver's clock.  reason: for people, where the status is not FOUND.
    """

    name: str
    kind: str
    status: Status
    records: tuple[Any, ...] = ()
    secure: bool = False
    canonical: str = ""
    expires_at: float = 0.0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Addresses:
    """IP addresses of a name as text, in the order of the answers.

    status: FOUND where there is at least one; else TEMPORARY where either family could not be told, else NXDOMAIN or
    NODATA.  secure: all of it is.  partial: addresses were found, but one of the families could not be told.
    """

    name: str
    status: Status
    v4: tuple[str, ...] = ()
    v6: tuple[str, ...] = ()
    secure: bool = False
    canonical: str = ""
    expires_at: float = 0.0
    reason: str = ""
    partial: bool = False

    @property
    def all(self) -> tuple[str, ...]:
        """IPv6 before IPv4."""
        return self.v6 + self.v4


def wire_name(text: str) -> dns.name.Name:
    """The absolute name that `text` means, in lower case; raises ValueError with a reason for people.

    U-labels become A-labels (RFC 5891), a backslash escapes as in RFC 1035 section 5.1, a final dot may be there or not.
    Underscores and other odd characters are fine in names, if not in host names (RFC 2181 section 11).
    """
    if len(text) > MAX_NAME:
        raise ValueError("name too long")
    if not text.isascii():
        labels = _DOTS.split(text)
        try:
            text = ".".join([label if label.isascii() else idna.encode(label, uts46=True).decode("ascii") for label in labels])
        except (UnicodeError, ValueError, IndexError) as error:
            raise ValueError(f"not an internationalised name: {_shown(str(error))}") from None
    if not text:
        raise ValueError("no name")
    try:
        name = dns.name.from_text("\\@" if text == "@" else text)  # "@" alone is the root to dnspython
    except dns.name.LabelTooLong:
        raise ValueError("label over 63 octets") from None  # RFC 1035 section 2.3.4
    except dns.name.NameTooLong:
        raise ValueError("name over 255 octets") from None
    except dns.name.EmptyLabel:
        raise ValueError("empty label") from None
    except (dns.exception.DNSException, ValueError):
        raise ValueError("bad escape") from None
    return name.canonicalize()


def name_text(name: dns.name.Name) -> str:
    """A name in the form of Answer.name: lower case, no final dot ("." for the root)."""
    return name.canonicalize().to_text(omit_final_dot=True)


def texts(answer: Answer) -> list[bytes]:
    """The strings of each TXT record of an answer, joined without anything between them (RFC 7208 section 3.3)."""
    return [b"".join(record.strings) for record in answer.records]


def plain_address(ip: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """An address without its zone, an IPv4-mapped one (RFC 4291 section 2.5.5.2) as IPv4; raises ValueError."""
    address = ipaddress.ip_address(ip.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
        return address.ipv4_mapped
    return address


def is_public(text: str) -> bool:
    """Whether an address is one of the internet's: not private, loopback, link-local, shared (CGNAT), multicast or reserved, nor a
    disguise of such an IPv4 address (mapped, 6to4, Teredo, NAT64)."""
    try:
        ip = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return False
    if "%" in text or not ip.is_global or ip.is_multicast:
        return False
    if isinstance(ip, ipaddress.IPv4Address):
        return not ip.is_reserved
    if ip in _NAT64:
        return is_public(str(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)))
    return ip in _UNICAST and all(is_public(str(one)) for one in (ip.sixtofour, *(ip.teredo or ())) if one is not None)


def is_ip(text: str) -> bool:
    """Whether it is an IP address, not a name."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def reverse_query(ip: str) -> str:
    """The name that the PTR records of an address stand at; raises ValueError."""
    return plain_address(ip).reverse_pointer


class Server(NamedTuple):
    """A name server's address."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def family(self) -> socket.AddressFamily:
        """The socket family."""
        return socket.AF_INET6 if ":" in self.host else socket.AF_INET

    @property
    def loopback(self) -> bool:
        """True where no network lies between."""
        return ipaddress.ip_address(self.host.partition("%")[0]).is_loopback

    def sockaddr(self) -> tuple[Any, ...]:
        """What connect takes, numbers only, so that nothing resolves it; raises OSError for an unknown interface."""
        host, _, zone = self.host.partition("%")
        if not zone:
            return (host, self.port)
        return (host, self.port, 0, int(zone) if zone.isdigit() else socket.if_nametoindex(zone))


class Unanswered(Exception):
    """This server has no use for this query; or, from `Resolver.ask`, none has. `late`: the deadline is over."""

    def __init__(self, reason: str, *, late: bool = False) -> None:
        super().__init__(reason)
        self.late = late


class _Flight:
    """A look-up under way: `done` is set when its owner has ended; without `answer` by then, another has to take over."""

    __slots__ = ("answer", "done")

    def __init__(self) -> None:
        self.done = threading.Event()
        self.answer: Answer | None = None


class Resolver:
    """Asks the servers and keeps the answers; one a worker, shared by its greenlets.

    servers: `ADDRESS`, `ADDRESS:PORT`, `[IPv6]:PORT`; none: those of resolv.conf, read again when it changes.
    timeout_s: for one whole look-up with all its tries, servers and CNAMEs.  cache_size: answers kept (one with more than
    a kilobyte counts for several); 0: none.  validating: whether AD is believed; None: from servers on loopback only.
    Raises ValueError for a bad server address.
    """

    def __init__(self, servers: Sequence[str] = (), *, timeout_s: float = 5.0, cache_size: int = 10000,
                 clock: Callable[[], float] = time.time, validating: bool | None = None, resolv_conf: str = RESOLV_CONF) -> None:
        self.timeout_s = timeout_s
        self.cache_size = cache_size
        self.validating = validating
        self._clock = clock
        self._configured = [Server(*name_server(server)) for server in servers]
        self._resolv_conf = resolv_conf
        self._system: list[Server] = []
        self._system_stamp: tuple[int, ...] | None = None
        self._avoid: dict[Server, float] = {}  # server -> monotonic time until which it is asked last
        self._cache: OrderedDict[tuple[str, str], tuple[Answer, int]] = OrderedDict()
        self._slots = 0
        self._flights: dict[tuple[str, str], _Flight] = {}

    @classmethod
    def configured(cls, config: Config, clock: Callable[[], float] = time.time) -> Resolver:
        """A Resolver as [dns] says."""
        keys = config.dns
        return cls(keys.servers, timeout_s=keys.timeout, cache_size=keys.cache_size, clock=clock, validating=keys.validating)

    # --- what callers ask for ---------------------------------------------------------------------------------

    def look_up(self, name: str, kind: str, *, timeout_s: float | None = None) -> Answer:
        """The records of a kind ("A", "MX", "TXT", …) at a name; never raises.

        timeout_s: for this look-up, where it is to end before the resolver's own deadline.
        """
        key = (name, kind)
        entry = self._cache.get(key)
        if entry is not None and entry[0].expires_at > self._clock():
            try:
                self._cache.move_to_end(key)
            except KeyError:
                pass  # dropped by another thread just now
            return entry[0]
        return self._look_up(name, kind.upper(), timeout_s)

    def addresses(self, name: str, families: Iterable[int] = (4, 6), *, timeout_s: float | None = None) -> Addresses:
        """The IP addresses of a name in the families 4 and 6, under one deadline."""
        end = time.monotonic() + (self.timeout_s if timeout_s is None else timeout_s)
        wanted = set(families)
        answers = [self.look_up(name, kind, timeout_s=max(0.0, end - time.monotonic()))
                   for family, kind in ((4, "A"), (6, "AAAA")) if family in wanted]
        found = [answer for answer in answers if answer.status is Status.FOUND]
        unknown = [answer for answer in answers if answer.status is Status.TEMPORARY]
        first = (found or unknown or answers)[0]
        v4 = tuple([record.address for answer in found if answer.kind == "A" for record in answer.records])
        v6 = tuple([record.address for answer in found if answer.kind == "AAAA" for record in answer.records])
        return Addresses(first.name, first.status, v4, v6, all(answer.secure for answer in found or answers), first.canonical,
                         min([answer.expires_at for answer in answers]), first.reason, bool(found and unknown))

    def mx(self, domain: str, *, timeout_s: float | None = None) -> Answer:
        """The MX records of a domain, the most preferred first (RFC 5321 section 5.1)."""
        answer = self.look_up(domain, "MX", timeout_s=timeout_s)
        if len(answer.records) < 2:
            return answer
        return replace(answer, records=tuple(sorted(answer.records, key=lambda record: int(record.preference))))

    def txt(self, name: str, *, timeout_s: float | None = None) -> Answer:
        """The TXT records of a name; `texts` gives them as octets."""
        return self.look_up(name, "TXT", timeout_s=timeout_s)

    def reverse_name(self, ip: str, *, timeout_s: float | None = None) -> str:
        """The host name of an address, forward-confirmed (RFC 8601 section 3), or "" where there is none or can't be told."""
        return self.iprev(ip, timeout_s=timeout_s)[1]

    def iprev(self, ip: str, *, timeout_s: float | None = None) -> tuple[str, str]:
        """(result, name) for an address (RFC 8601 section 2.7.3): pass and its forward-confirmed name; fail, temperror, or permerror
        where it has no name at all, and ""."""
        try:
            address = plain_address(ip)
        except ValueError:
            return "permerror", ""
        end = time.monotonic() + (self.timeout_s if timeout_s is None else timeout_s)
        kind = "A" if address.version == 4 else "AAAA"
        names = self.look_up(reverse_query(ip), "PTR", timeout_s=timeout_s)
        if not names.records:
            return "temperror" if names.status is Status.TEMPORARY else "permerror", ""
        result = "fail"
        for record in names.records[:MAX_PTR_NAMES]:
            name = name_text(record.target)
            if _HOST.match(name) is None:  # it will stand in header fields and logs
                continue
            answer = self.look_up(name, kind, timeout_s=max(0.0, end - time.monotonic()))
            if any(ipaddress.ip_address(found.address) == address for found in answer.records):
                return "pass", name
            if answer.status is Status.TEMPORARY:
                result = "temperror"
        return result, ""

    # --- the cache ------------------------------------------------------------------------------------------

    def forget(self) -> None:
        """Empties the cache."""
        self._cache.clear()
        self._slots = 0

    def _kept(self, key: tuple[str, str]) -> Answer | None:
        entry = self._cache.get(key)
        return entry[0] if entry is not None and entry[0].expires_at > self._clock() else None

    def _keep(self, key: tuple[str, str], answer: Answer) -> None:
        slots = 1 + sum([_octets(record) for record in answer.records]) // SLOT
        if slots > self.cache_size:
            return
        cache = self._cache
        old = cache.pop(key, None)
        if old is not None:
            self._slots -= old[1]
        while cache and self._slots + slots > self.cache_size:
            self._slots -= cache.popitem(last=False)[1][1]
        cache[key] = (answer, slots)
        self._slots += slots

    # --- one look-up ----------------------------------------------------------------------------------------

    def _look_up(self, text: str, kind: str, timeout_s: float | None) -> Answer:
        now = self._clock()
        try:
            asked = wire_name(text)
        except ValueError as error:
            return Answer(_shown(text.lower()), kind, Status.NXDOMAIN, expires_at=now, reason=str(error))
        name = name_text(asked)
        try:
            rdtype = RdataType.from_text(kind)
        except (dns.exception.DNSException, ValueError):
            return Answer(name, kind, Status.NODATA, canonical=name, expires_at=now, reason="no such kind of record")
        own = _own_answer(name, kind, now)
        if own is not None:
            return own
        key = (name, kind)
        answer = self._kept(key)
        if answer is not None:
            return answer
        limit_s = self.timeout_s if timeout_s is None else min(self.timeout_s, timeout_s)
        deadline = time.monotonic() + limit_s
        while True:
            mine = _Flight()
            flight = self._flights.setdefault(key, mine)
            if flight is mine:
                return self._fly(key, mine, asked, rdtype, deadline, hurried=limit_s < self.timeout_s / 2)
            left_s = deadline - time.monotonic()
            if left_s <= 0 or not flight.done.wait(left_s):
                return self._temporary(name, kind, "no answer in time")
            if flight.answer is not None:
                return flight.answer

    def _fly(self, key: tuple[str, str], flight: _Flight, asked: dns.name.Name, rdtype: RdataType, deadline: float, *,
             hurried: bool) -> Answer:
        """Looks up on behalf of all who wait for the same.

        Whatever ends it (the greenlet killed, a gevent.Timeout of the caller), those who wait are woken: with the answer,
        or, where there is none or it was cut short by this caller's own haste, to try themselves.
        """
        try:
            try:
                answer = self._resolve(key, asked, rdtype, deadline)
            except Unanswered as failure:
                answer = self._temporary(*key, str(failure))
                if failure.late and hurried:
                    return answer
            flight.answer = answer
            self._keep(key, answer)
            return answer
        finally:
            del self._flights[key]
            flight.done.set()

    def _temporary(self, name: str, kind: str, reason: str) -> Answer:
        return Answer(name, kind, Status.TEMPORARY, canonical=name, expires_at=self._clock() + TTL_TEMPORARY_S, reason=reason)

    def _resolve(self, key: tuple[str, str], asked: dns.name.Name, rdtype: RdataType, deadline: float) -> Answer:
        """Asks, and asks again for CNAME targets that the server left out; raises Unanswered."""
        target = asked
        seen = {asked}
        ttl_s = TTL_MOST_S
        secure = True
        while True:
            message, server = self.ask(target, rdtype, deadline)
            believed = server.loopback if self.validating is None else self.validating
            secure = secure and believed and bool(message.flags & dns.flags.AD)
            sets = {(rrset.name, rrset.rdtype): rrset for rrset in message.answer if rrset.rdclass == dns.rdataclass.IN}
            started = target
            found = sets.get((target, rdtype))
            while found is None and rdtype != RdataType.CNAME:
                alias = sets.get((target, RdataType.CNAME))
                if alias is None:
                    break
                ttl_s = min(ttl_s, alias.ttl)
                target = alias[0].target.canonicalize()
                if target in seen:
                    raise Unanswered("CNAME loop")
                if len(seen) > MAX_ALIASES:
                    raise Unanswered("too many CNAMEs")
                seen.add(target)
                found = sets.get((target, rdtype))
            canonical = name_text(target)
            if found is not None:
                expires_at = self._clock() + max(TTL_LEAST_S, min(ttl_s, found.ttl))
                return Answer(*key, Status.FOUND, tuple(found), secure, canonical, expires_at)
            negative_s = _negative_ttl_s(message, target)
            missing = message.rcode() == dns.rcode.NXDOMAIN  # it is the last name that it speaks of: RFC 6604 section 3
            if missing or negative_s is not None or target == started:
                ttl_s = max(TTL_LEAST_S, min(ttl_s, TTL_MOST_NEGATIVE_S, negative_s or 0.0))
                status, reason = (Status.NXDOMAIN, "no such name") if missing else (Status.NODATA, f"no {key[1]} record")
                if canonical != key[0]:
                    reason += f" at {canonical}, where {key[0]} points"
                return Answer(*key, status, (), secure, canonical, self._clock() + ttl_s, reason)

    # --- the servers ----------------------------------------------------------------------------------------

    def ask(self, name: dns.name.Name, rdtype: RdataType, deadline: float) -> tuple[dns.message.Message, Server]:
        """A usable answer, and the server that gave it; raises Unanswered when there is no server or time left.

        A silent server is asked again after the others, with more patience; one that fails is not.
        """
        exchanges: list[_Exchange] = []
        try:
            for server in self._servers():
                exchanges.append(_Exchange(server, name, rdtype, want_dnssec=bool(self.validating)))
            left = list(exchanges)
            wait_s = self.timeout_s / 5
            reason = "no name server"
            while left:
                for exchange in tuple(left):
                    now = time.monotonic()
                    if now >= deadline:
                        raise Unanswered(reason if reason != "no name server" else "no time left", late=True)
                    try:
                        message = exchange.ask(min(deadline, now + wait_s), min(deadline, now + 2 * wait_s))
                    except TimeoutError:
                        reason = f"no answer from {exchange.server}"
                        self._avoid[exchange.server] = time.monotonic() + AVOID_S
                    except (Unanswered, OSError) as error:
                        reason = f"{exchange.server}: {getattr(error, 'strerror', None) or error}"
                        left.remove(exchange)
                    else:
                        self._avoid.pop(exchange.server, None)
                        return message, exchange.server
                wait_s *= 2
            raise Unanswered(reason)
        finally:
            for exchange in exchanges:
                exchange.close()

    def _servers(self) -> list[Server]:
        """The servers in the order to ask them."""
        servers = self._configured or self._system_servers()
        if self._avoid and len(servers) > 1:
            now = time.monotonic()
            return sorted(servers, key=lambda server: self._avoid.get(server, 0.0) > now)
        return servers

    def _system_servers(self) -> list[Server]:
        """The servers of resolv.conf, read when it is another file or was written since."""
        try:
            stat = os.stat(self._resolv_conf)
            stamp: tuple[int, ...] = (stat.st_dev, stat.st_ino, stat.st_mtime_ns, stat.st_size)
        except OSError:
            stamp = ()
        if stamp != self._system_stamp:
            self._system = _read_resolv_conf(self._resolv_conf) or [Server("127.0.0.1", 53)]  # as resolv.conf(5) says
            self._system_stamp = stamp
            self._avoid.clear()
        return self._system


class _Exchange:
    """One query with one server: the socket stays open between tries, so that a late answer still counts."""

    __slots__ = ("_edns", "_ident", "_name", "_rdtype", "_socket", "_want_dnssec", "_wire", "server")

    def __init__(self, server: Server, name: dns.name.Name, rdtype: RdataType, *, want_dnssec: bool) -> None:
        self.server = server
        self._name = name
        self._rdtype = rdtype
        self._want_dnssec = want_dnssec
        self._edns = True
        self._socket: socket.socket | None = None
        self._ident = 0
        self._wire = b""

    def ask(self, until: float, until_tcp: float) -> dns.message.Message:
        """Sends the query and gives the answer; raises TimeoutError, Unanswered or OSError.

        until, until_tcp: when to stop waiting, by time.monotonic, over UDP and over TCP.
        """
        message = self._ask_udp(until)
        if message.rcode() in _NO_EDNS and self._edns:  # RFC 6891 section 7: one that does not know EDNS
            self.close()
            self._edns = False
            self._wire = b""
            message = self._ask_udp(until)
        if message.flags & dns.flags.TC:
            message = self._ask_tcp(until_tcp)  # RFC 7766 section 5
        rcode = message.rcode()
        if rcode not in (dns.rcode.NOERROR, dns.rcode.NXDOMAIN):
            raise Unanswered(dns.rcode.to_text(rcode))
        if _is_referral(message):
            raise Unanswered("lame: refers to other servers")
        return message

    def close(self) -> None:
        """Closes the socket."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _ask_udp(self, until: float) -> dns.message.Message:
        if not self._wire:
            self._make_query()
        sock = self._socket
        if sock is None:
            # A socket of its own each time gives a port that nobody can guess (RFC 5452 section 9.2), and a connected
            # one takes datagrams from that server alone and hears at once when nobody is there.
            sock = self._socket = socket.socket(self.server.family, socket.SOCK_DGRAM)
            sock.connect(self.server.sockaddr())
        sock.settimeout(_left_s(until))
        sock.send(self._wire)
        for _ in range(MAX_STRAY):
            sock.settimeout(_left_s(until))
            message = self._read(sock.recv(65535))
            if message is not None:
                return message
        raise Unanswered("too many answers to other questions")

    def _ask_tcp(self, until: float) -> dns.message.Message:
        with socket.socket(self.server.family, socket.SOCK_STREAM) as sock:
            sock.settimeout(_left_s(until))
            sock.connect(self.server.sockaddr())
            sock.sendall(len(self._wire).to_bytes(2, "big") + self._wire)
            message = self._read(_exactly(sock, int.from_bytes(_exactly(sock, 2, until), "big"), until))
        if message is None or message.flags & dns.flags.TC:
            raise Unanswered("a wrong answer over TCP")
        return message

    def _make_query(self) -> None:
        self._ident = int.from_bytes(os.urandom(2), "big")
        flags = dns.flags.RD | dns.flags.AD  # RFC 6840 section 5.7: AD in a query asks for AD in the answer
        edns: dict[str, Any] = {"use_edns": 0, "payload": PAYLOAD, "want_dnssec": self._want_dnssec} if self._edns else {}
        self._wire = dns.message.make_query(self._name, self._rdtype, id=self._ident, flags=flags, **edns).to_wire()

    def _read(self, data: bytes) -> dns.message.Message | None:
        """The message, None where it does not answer our query; raises Unanswered where it does but can't be read."""
        if len(data) < 12 or int.from_bytes(data[:2], "big") != self._ident or not data[2] & 0x80:
            return None
        try:
            message = dns.message.from_wire(data, ignore_trailing=True, question_only=bool(data[2] & 2))  # TC: cut anywhere
        except (dns.exception.DNSException, ValueError, IndexError, KeyError, AttributeError) as error:
            raise Unanswered(f"unreadable answer ({type(error).__name__})") from None
        if message.opcode() != dns.opcode.QUERY:
            return None
        if not message.question and message.rcode() in _WITHOUT_QUESTION:
            return message
        if len(message.question) != 1:
            return None
        question = message.question[0]
        same = question.name == self._name and question.rdtype == self._rdtype and question.rdclass == dns.rdataclass.IN
        return message if same else None  # RFC 5452 section 9.1


def _own_answer(name: str, kind: str, now: float) -> Answer | None:
    """What needs no server: the loopback name (RFC 6761 section 6.3), and addresses that somebody took for names."""
    if kind in ("A", "AAAA") and (name == "localhost" or name.endswith(".localhost")):
        loopback = dns.rdata.from_text("IN", kind, "127.0.0.1" if kind == "A" else "::1")
        return Answer(name, kind, Status.FOUND, (loopback,), False, name, now + TTL_MOST_S)
    if _IPV4.match(name) or (":" in name and is_ip(name)):
        return Answer(name, kind, Status.NXDOMAIN, canonical=name, expires_at=now, reason="an IP address is not a name")
    return None


def _is_referral(message: dns.message.Message) -> bool:
    """True for an answer that only points elsewhere: the server neither knows nor looks for us."""
    if message.answer or message.flags & (dns.flags.RA | dns.flags.AA) or message.rcode() != dns.rcode.NOERROR:
        return False
    kinds = {rrset.rdtype for rrset in message.authority}
    return RdataType.NS in kinds and RdataType.SOA not in kinds


def _negative_ttl_s(message: dns.message.Message, name: dns.name.Name) -> float | None:
    """How long a negative answer may be kept (RFC 2308 section 5); None where it has no SOA record."""
    for rrset in message.authority:
        if rrset.rdtype == RdataType.SOA and name.is_subdomain(rrset.name):
            return float(min(rrset.ttl, rrset[0].minimum))
    return None


def _octets(record: Any) -> int:
    """About how much a record takes."""
    strings = getattr(record, "strings", None)
    return sum(map(len, strings)) + 32 if strings is not None else 64


def _left_s(until: float) -> float:
    """Seconds until then; raises TimeoutError when that is over."""
    left_s = until - time.monotonic()
    if left_s <= 0:
        raise TimeoutError
    return left_s


def _exactly(sock: socket.socket, count: int, until: float) -> bytes:
    """So many octets; raises TimeoutError or OSError."""
    data = bytearray()
    while len(data) < count:
        sock.settimeout(_left_s(until))
        more = sock.recv(count - len(data))
        if not more:
            raise ConnectionError("connection closed in the answer")
        data += more
    return bytes(data)


def _read_resolv_conf(path: str) -> list[Server]:
    """The name servers of a resolv.conf; what can't be used is passed over."""
    servers: list[Server] = []
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                words = line.split()
                if len(words) >= 2 and words[0] == "nameserver":
                    try:
                        servers.append(Server(*name_server(words[1])))
                    except ValueError:
                        continue
    except OSError:
        pass
    return servers


def _shown(text: str) -> str:
    """Text that came from outside, for a name or reason that is logged."""
    return ascii(text)[1:-1][:255]
