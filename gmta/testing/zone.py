"""A DNS zone for tests: a table of records that is a resolver itself, or is served on loopback.

    zone = Zone({"example.org": {"MX": [(10, "mx.example.org")], "TXT": ["v=spf1 mx -all"]},
                 "mx.example.org": {"A": ["192.0.2.1"]},
                 "broken.example.org": {"rcode": "SERVFAIL"}})
    services = make_services(resolver=zone)         # for plugins in memory: no packet is sent
    with zone.serve() as server:                    # for gmta as a process: [dns] servers = {server.address}
        ...
    assert ("example.org", "MX") in zone.asked

At a name stand kinds with one record or a list of them. `A`, `AAAA`, `PTR`, `NS`, `CNAME`: an address or name.  `MX`:
(preference, name), "" for the null MX.  `TXT`: a string (one character is one octet) or bytes, or a list of such where a record
has several, within the list of records.  `TLSA`: (usage, selector, matching type, hex).  Other kinds: as in a zone file. Besides,
`rcode`: "SERVFAIL", "REFUSED", "NXDOMAIN" … for every kind, "TIMEOUT" (or `timeout`: True) for silence; `ad`: True for the AD
bit; `ttl`: seconds. `*.example.org` stands for names below that are not there (RFC 4592). A name that is not in the table is
NXDOMAIN, or has no records where one below it is there. Nothing is cached: a change is seen at once. Failure: a record that
can't be made raises ValueError when it is put in.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdata
import dns.rdataclass
import dns.rdatatype
import dns.rrset
from dns.rdatatype import RdataType

from gmta.services.dns import MAX_ALIASES, Resolver, Server, Unanswered, name_text, wire_name

NOT_KINDS = ("ad", "rcode", "timeout", "ttl")
IN = dns.rdataclass.IN


class Zone(Resolver):
    """The table; `asked` lists (name, kind) of every question in order. ttl, negative_ttl: seconds.  ad: AD on all answers."""

    def __init__(self, records: Mapping[str, Mapping[str, Any]] | None = None, *, ttl: int = 300, negative_ttl: int = 60,
                 ad: bool = False, clock: Callable[[], float] = time.time) -> None:
        super().__init__(["127.0.0.1"], cache_size=0, clock=clock)
        self.ttl = ttl
        self.negative_ttl = negative_ttl
        self.ad = ad
        self.asked: list[tuple[str, str]] = []
        self._table: dict[dns.name.Name, dict[str, Any]] = {}
        for name, entry in (records or {}).items():
            self[name] = entry

    def __setitem__(self, name: str, entry: Mapping[str, Any]) -> None:
        """Puts in all that is at a name, in the place of what was there."""
        made: dict[str, Any] = {key: value for key, value in entry.items() if key in NOT_KINDS}
        for kind, values in entry.items():
            if kind in NOT_KINDS:
                continue
            plural = isinstance(values, list) and not (kind in ("MX", "TLSA") and values and isinstance(values[0], int))
            try:
                made[kind] = [_record(kind, value) for value in (values if plural else [values])]
            except (dns.exception.DNSException, ValueError, TypeError, IndexError) as error:
                raise ValueError(f"{name} {kind} {values!r}: {error}") from None
        self._table[wire_name(name)] = made

    def __delitem__(self, name: str) -> None:
        """Takes out a name; raises KeyError."""
        del self._table[wire_name(name)]

    def ask(self, name: dns.name.Name, rdtype: RdataType, deadline: float) -> tuple[dns.message.Message, Server]:
        """What a server with this table answers."""
        message = self.respond(dns.message.make_query(name, rdtype))
        if message is None:
            raise Unanswered("no answer from the zone", late=True)
        if message.rcode() not in (dns.rcode.NOERROR, dns.rcode.NXDOMAIN):
            raise Unanswered(dns.rcode.to_text(message.rcode()))
        return message, Server("127.0.0.1", 53)

    def respond(self, query: dns.message.Message) -> dns.message.Message | None:
        """The response to a query, None for silence."""
        question = query.question[0]
        name, kind = question.name.canonicalize(), dns.rdatatype.to_text(question.rdtype)
        self.asked.append((name_text(name), kind))
        response = dns.message.make_response(query, recursion_available=True, our_payload=1232)
        if self.ad:
            response.flags |= dns.flags.AD
        for _ in range(MAX_ALIASES):
            entry = self._entry(name)
            if entry is None:
                if not any(other.is_subdomain(name) for other in self._table):
                    response.set_rcode(dns.rcode.NXDOMAIN)
                break
            if entry.get("ad"):
                response.flags |= dns.flags.AD
            rcode = str(entry.get("rcode", "NOERROR")).upper()
            if rcode == "TIMEOUT" or entry.get("timeout"):
                return None
            response.set_rcode(dns.rcode.from_text(rcode))
            records = entry.get(kind, [])
            shown = records or entry.get("CNAME", [])
            if rcode != "NOERROR" or not shown:
                break
            response.answer.append(dns.rrset.from_rdata_list(name, entry.get("ttl", self.ttl), shown))
            if records:
                return response
            name = shown[0].target.canonicalize()
        else:
            response.set_rcode(dns.rcode.SERVFAIL)
        if response.rcode() in (dns.rcode.NOERROR, dns.rcode.NXDOMAIN):
            response.authority.append(dns.rrset.from_text(
                dns.name.root, self.negative_ttl, IN, RdataType.SOA, f". . 1 3600 600 86400 {self.negative_ttl}"))
        return response

    def _entry(self, name: dns.name.Name) -> dict[str, Any] | None:
        """What is at a name, else at the wildcard that stands for it (RFC 4592 section 3.3.1)."""
        entry = self._table.get(name)
        if entry is not None or any(other.is_subdomain(name) for other in self._table):
            return entry
        while len(name) > 1:
            name = name.parent()
            if any(other.is_subdomain(name) for other in self._table):
                return self._table.get(dns.name.Name((b"*", *name.labels)))
        return None

    def serve(self, host: str = "127.0.0.1", port: int = 0) -> NameServer:
        """A server of this zone, running until it is closed; a context manager."""
        return NameServer(self._respond_wire, host, port)

    def _respond_wire(self, data: bytes, over_tcp: bool) -> Iterable[bytes]:
        query = dns.message.from_wire(data)
        response = self.respond(query)
        if response is None:
            return []
        limit = 65535 if over_tcp else max(512, query.payload) if query.edns >= 0 else 512  # RFC 1035 section 4.2.1
        return [response.to_wire(max_size=limit, prefer_truncation=True)]


class NameServer:
    """A DNS server on one port for UDP and TCP, in threads of its own.

    respond(query, over_tcp): the datagrams or messages to send back, in order; none for silence. What it raises for a query
    that can't be read is silence too.
    """

    def __init__(self, respond: Callable[[bytes, bool], Iterable[bytes]], host: str = "127.0.0.1", port: int = 0) -> None:
        self._respond = respond
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._udp, self._tcp = _bind(family, host, port)
        self.host, self.port = self._udp.getsockname()[:2]
        self._closing = False
        self._threads = [threading.Thread(target=loop, daemon=True) for loop in (self._serve_udp, self._serve_tcp)]
        for thread in self._threads:
            thread.start()

    @property
    def address(self) -> str:
        """As `[dns] servers` and Resolver take it."""
        return str(Server(self.host, self.port))

    def close(self) -> None:
        """Stops serving; the port is free afterwards."""
        if self._closing:
            return
        self._closing = True
        with socket.socket(self._udp.family, socket.SOCK_DGRAM) as waker:
            waker.sendto(b"", (self.host, self.port))
        with socket.socket(self._tcp.family, socket.SOCK_STREAM) as waker:
            waker.connect((self.host, self.port))
        for thread in self._threads:
            thread.join()
        self._udp.close()
        self._tcp.close()

    def __enter__(self) -> NameServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answers(self, query: bytes, over_tcp: bool) -> list[bytes]:
        try:
            return list(self._respond(query, over_tcp))
        except (dns.exception.DNSException, ValueError, LookupError):
            return []

    def _serve_udp(self) -> None:
        while True:
            query, peer = self._udp.recvfrom(65535)
            if self._closing:
                return
            for answer in self._answers(query, False):
                self._udp.sendto(answer, peer)

    def _serve_tcp(self) -> None:
        while True:
            peer, _ = self._tcp.accept()
            if self._closing:
                peer.close()
                return
            threading.Thread(target=self._serve_peer, args=(peer,), daemon=True).start()

    def _serve_peer(self, peer: socket.socket) -> None:
        with peer, peer.makefile("rb") as stream:
            try:
                while len(size := stream.read(2)) == 2:
                    query = stream.read(int.from_bytes(size, "big"))
                    for answer in self._answers(query, True):
                        peer.sendall(len(answer).to_bytes(2, "big") + answer)
            except OSError:
                pass  # gone


def _bind(family: socket.AddressFamily, host: str, port: int) -> tuple[socket.socket, socket.socket]:
    """A UDP socket and a listening TCP socket on the same port; raises OSError where there is none."""
    for left in reversed(range(50)):
        udp, tcp = socket.socket(family, socket.SOCK_DGRAM), socket.socket(family, socket.SOCK_STREAM)
        try:
            tcp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            udp.bind((host, port))
            tcp.bind((host, udp.getsockname()[1]))
            tcp.listen(64)
        except OSError:
            udp.close()
            tcp.close()
            if port or not left:
                raise
        else:
            return udp, tcp
    raise OSError("no port that is free for UDP and TCP")


def _record(kind: str, value: Any) -> Any:
    """One record's rdata."""
    if kind == "TXT":
        strings = [part.encode("latin-1") if isinstance(part, str) else part for part in (value if isinstance(value, list | tuple) else [value])]
        pieces = [string[at:at + 255] for string in strings for at in range(0, len(string) or 1, 255)]
        wire = b"".join(bytes([len(piece)]) + piece for piece in pieces)
        return dns.rdata.from_wire(IN, RdataType.TXT, wire, 0, len(wire))
    if kind in ("MX", "TLSA") and not isinstance(value, str):
        value = " ".join([str(part) or "." for part in value])
    elif kind in ("CNAME", "NS", "PTR"):
        value = wire_name(value).to_text() if value not in ("", ".") else "."
    return dns.rdata.from_text(IN, kind, str(value), origin=dns.name.root, relativize=False)
