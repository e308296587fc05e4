"""What remotes do, one behaviour a case: scripted hosts found through MX, and what it has to come to for each recipient.

A case's hosts are one a line of `hosts`: name, then the script of each connection. A host without a script is a trap: nobody may connect.
Most are from reports about other senders; `seen` says where.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import gevent
import pytest

from gmta.testing.authority import Authority
from gmta.testing.peer import Peer, Session
from gmta_plugins.relay import Lmtp, Relay
from tests.sending import GREET, RAW, Out

ENVELOPE = GREET + "C: ^MAIL FROM:<\nS: 250 ok\nC: ^RCPT TO:<\nS: 250 ok\nC: ^DATA$\n"
TAKES = ENVELOPE + "S: 354 go\nMESSAGE\nS: 250 queued\nEND"
ADDRESSES = {"mx1": "127.0.0.21", "mx2": "127.0.0.22", "mx3": "127.0.0.23", "domain": "127.0.0.24", "self": "127.0.0.25", "six": "::1"}
SIX = ("six",)


@dataclass
class Case:
    """What a case needs and what it must come to. dns: more names, or others; says: in the words about the first recipient."""

    seen: str
    hosts: dict[str, tuple[str, ...]]
    wanted: tuple[str, ...]
    says: str = ""
    dns: dict[str, Any] = field(default_factory=dict)
    to: tuple[str, ...] = ("rcpt@example.org",)
    raw: bytes = RAW
    keys: dict[str, Any] = field(default_factory=dict)
    lmtp: bool = False
    never: str = ""  # a regular expression that no command line matches
    connections: int = 1


MX1 = {"example.org": {"MX": (10, "mx1.example.org")}, "mx1.example.org": {"A": "mx1"}}
FAILED, DEFERRED, DELIVERED = ("failed",), ("deferred",), ("delivered",)

CASES = {
    "554 greeting": Case("zone-eu/zone-mta#447", {"mx1": ("S: 554 5.7.1 blocked\nC: ^QUIT$\nS: 221 bye",)}, FAILED, "554 5.7.1 blocked"),
    "421 to DATA": Case("python/cpython#132796", {"mx1": (ENVELOPE + "S: 421 4.3.2 going down\nEND",)}, DEFERRED, "421 4.3.2 going down"),
    "452 after some recipients": Case("emersion/go-smtp#195", {"mx1": (GREET + """
        C: ^MAIL
        S: 250 ok
        C: ^RCPT TO:<one
        S: 250 ok
        C: ^RCPT TO:<two
        S: 452 4.5.3 too many recipients
        C: ^DATA
        S: 354 go
        MESSAGE
        S: 250 ok
        C: ^MAIL
        S: 250 ok
        C: ^RCPT TO:<two
        S: 250 ok
        C: ^DATA
        S: 354 go
        MESSAGE
        S: 250 queued
        END""",)}, ("delivered", "delivered"), to=("one@example.org", "two@example.org")),
    "a reply without a code": Case("", {"mx1": (ENVELOPE + "S: 4.7.0 [IPTS04] deferred due to complaints\nHANG",)}, DEFERRED,
                                   "[IPTS04] deferred due to complaints"),
    "lines of different codes": Case("", {"mx1": ("S: 220-some.example.org ESMTP\nS: 521 5.7.1 client blocked\nDROP",)}, FAILED,
                                     "521", never="^(EHLO|HELO)"),
    "octets that are no UTF-8": Case("", {"mx1": (GREET + "C: ^MAIL\n" + r"S: 535 Error: \xC7\xEB\xCA\xB9" + "\nPLAY",)}, FAILED, "535 Error:"),
    "a reply of 3000 octets": Case("", {"mx1": (GREET + f"C: ^MAIL\nS: 550 {'x' * 3000}\nPLAY",)}, FAILED, "550 xxxxxxxxxx"),
    "a reply without end": Case("", {"mx1": (GREET + "C: ^MAIL\n" + "S: 550-" + "x" * 70_000 + "\nHANG",)}, DEFERRED, "Timeout",
                                keys={"command_timeout": "0.1s"}),
    "neither EHLO nor HELO": Case("haraka/Haraka#2296", {"mx1": (
        "S: 220 x\nC: ^EHLO\nS: 500 unrecognized\nC: ^HELO\nS: 500 unrecognized\nC: ^QUIT$",)}, FAILED, "500 unrecognized"),
    "HELO alone": Case("", {"mx1": (
        "S: 220 x\nC: ^EHLO\nS: 502 what?\nC: ^HELO mx.example.test$\nS: 250 x\nC: ^MAIL FROM:<a@b.example>$\nS: 250 ok\nC: ^RCPT\nS: 250 ok\n"
        "C: ^DATA\nS: 354 go\nMESSAGE\nS: 250 ok\nEND",)}, DELIVERED),
    "handshake fails": Case("stalwartlabs/stalwart#61", {"mx1": (
        "S: 220 x\nC: ^EHLO\nS: 250-x\nS: 250 STARTTLS\nC: ^STARTTLS$\nS: 220 go\nSTARTTLS close", TAKES)}, DELIVERED, connections=2),
    "handshake fails where TLS must be": Case("suitenumerique/messages#687", {"mx1": (
        "S: 220 x\nC: ^EHLO\nS: 250-x\nS: 250 STARTTLS\nC: ^STARTTLS$\nS: 220 go\nSTARTTLS garbage",)}, DEFERRED, "4.7.5", never="^MAIL",
        keys={"tls": "required"}),
    "text behind the 220 of STARTTLS": Case("nodemailer/nodemailer#1835", {"mx1": (
        "S: 220 x\nC: ^EHLO\nS: 250-x\nS: 250-SIZE 10\nS: 250 STARTTLS\nC: ^STARTTLS$\n" + r"S: 220 go\x0D\x0A250-INJECTED" + "\nSTARTTLS\nEND",)},
        DEFERRED, never="^MAIL"),
    "8-bit text without 8BITMIME": Case("javaee/javamail#100", {"mx1": ("S: 220 x\nC: ^EHLO\nS: 250-x\nS: 250 SIZE 0\nEND",)}, FAILED, "5.6.3",
                                        raw="Subject: x\r\n\r\ngrüße\r\n".encode()),
    "null MX": Case("", {"domain": ()}, FAILED, "556 5.1.10", dns={"example.org": {"MX": (0, ""), "A": "domain"}}),
    "MX is localhost": Case("", {}, FAILED, "5.4.6", dns={"example.org": {"MX": (10, "localhost")}}, keys={"allow_loopback": "no"}),
    "we are the second MX": Case("", {"mx1": (TAKES,), "mx3": (), "self": ()}, DELIVERED, dns={
        "example.org": {"MX": [(10, "mx1.example.org"), (20, "mx.example.test"), (30, "mx3.example.org")]}, "mx.example.test": {"A": "self"},
        "mx3.example.org": {"A": "mx3"}}),
    "we are the best MX": Case("", {"self": ()}, FAILED, "5.4.6", dns={
        "example.org": {"MX": (10, "mx.example.test")}, "mx.example.test": {"A": "self"}}),
    "no MX": Case("", {"domain": (TAKES,)}, DELIVERED, dns={"example.org": {"A": "domain"}}),
    "MX without address": Case("", {"domain": ()}, FAILED, "5.4.4", dns={"example.org": {"MX": (10, "gone.example.org"), "A": "domain"}}),
    "MX is an alias": Case("", {"mx1": (TAKES,)}, DELIVERED, dns={
        "example.org": {"MX": (10, "alias.example.org")}, "alias.example.org": {"CNAME": "mx1.example.org"}}),
    "unusable IPv6, good IPv4": Case("", {"six": ("REFUSE",), "mx1": (TAKES,)}, DELIVERED, dns={"mx1.example.org": {"AAAA": "six", "A": "mx1"}}),
    "IPv6 alone": Case("", {"six": (TAKES,)}, DELIVERED, dns={"mx1.example.org": {"AAAA": "six"}}),
    "SERVFAIL for MX": Case("", {}, DEFERRED, "4.4.3", dns={"example.org": {"rcode": "SERVFAIL"}}),
    "SERVFAIL for the address": Case("", {}, DEFERRED, "4.4.3", dns={"mx1.example.org": {"rcode": "SERVFAIL"}}),
    "NXDOMAIN": Case("", {}, FAILED, "5.1.2", dns={"example.org": {"rcode": "NXDOMAIN"}}),
    "a host that says nothing": Case("slimta/python-slimta#49", {"mx1": ("HANG",)}, DEFERRED, "4.4.2", keys={"greeting_timeout": "0.1s"}),
    "no final reply": Case("", {"mx1": (ENVELOPE + "S: 354 go\nMESSAGE\nDROP",), "mx2": ()}, DEFERRED, "4.4.2", dns={
        "example.org": {"MX": [(10, "mx1.example.org"), (20, "mx2.example.org")]}, "mx2.example.org": {"A": "mx2"}}),
    "gone after the final reply": Case("", {"mx1": (ENVELOPE + "S: 354 go\nMESSAGE\nS: 250 queued\nDROP",)}, DELIVERED),
    "lines of dots": Case("", {"mx1": (TAKES,)}, DELIVERED, raw=b".first: x\r\nFrom: a@example.test\r\n\r\nhello\r\n.\r\n..\r\nhello\r\n"),
    "no CRLF at the end": Case("", {"mx1": (TAKES,)}, DELIVERED, raw=b"Subject: x\r\n\r\n.no end"),
    "a bracket in a quoted local part": Case("", {"mx1": (GREET + """
        C: ^MAIL
        S: 250 ok
        C: ^RCPT TO:<"a> ORCPT=x b"@example.org>( |$)
        S: 250 ok
        C: ^DATA
        S: 354 go
        MESSAGE
        S: 250 queued
        END""",)}, DELIVERED, to=('"a> ORCPT=x b"@example.org',)),
    "keywords in small letters": Case("", {"mx1": (
        "S: 220 x\nC: ^EHLO\nS: 250-x\nS: 250-auth=plain login\nS: 250-size 1000\nS: 250 starttls\nC: ^STARTTLS$\nS: 454 4.7.0 not now\n"
        "C: ^MAIL FROM:.* SIZE=\nS: 250 ok\nC: ^RCPT\nS: 250 ok\nC: ^DATA$\nS: 354 go\nMESSAGE\nS: 250 ok\nEND",)}, DELIVERED),
    "LMTP with a reply of two lines": Case("haraka/Haraka#2509", {"mx1": ("""
        S: 220 lmtp
        C: ^LHLO
        S: 250 lmtp
        C: ^MAIL
        S: 250 ok
        C: ^RCPT
        S: 250 ok
        C: ^RCPT
        S: 250 ok
        C: ^DATA
        S: 354 go
        MESSAGE
        S: 550-5.1.1 first line
        S: 550 5.1.1 second line
        S: 250 ok
        END""",)}, ("failed", "delivered"), "first line 5.1.1 second line", to=("a@example.org", "b@example.org"), lmtp=True),
    "LMTP that ends between two replies": Case("", {"mx1": ("""
        S: 220 lmtp
        C: ^LHLO
        S: 250-lmtp
        S: 250 PIPELINING
        C: ^MAIL
        C: ^RCPT
        C: ^RCPT
        C: ^DATA
        S: 250 ok
        S: 250 ok
        S: 250 ok
        S: 354 go
        MESSAGE
        S: 250 ok
        DROP""",)}, ("delivered", "deferred"), to=("a@example.org", "b@example.org"), lmtp=True),
    "421 of eight lines": Case("zone-eu/zone-mta#437", {"mx1": (
        ENVELOPE + "S: 354 go\nMESSAGE\n" + "".join(f"S: 421-4.7.26 line {n}\n" for n in range(7)) + "S: 421 4.7.26 last\nDROP",)}, DEFERRED,
        "4.7.26 last"),
    "354 to DATA for nobody": Case("", {"mx1": (GREET + """
        C: ^MAIL
        C: ^RCPT
        C: ^DATA
        S: 250 ok
        S: 550 5.1.1 unknown
        S: 354 go
        C: ^\\.$
        S: 554 5.5.1 no valid recipients
        C: ^(RSET|QUIT)$""",)}, FAILED, "550 5.1.1 unknown"),
    "a 421 nobody asked for": Case("", {"mx1": (GREET + "C: ^MAIL\nC: ^RCPT\nC: ^DATA\nS: 250 ok\nS: 421 4.3.2 shutting down\nEND",)}, DEFERRED, "421 4.3.2"),
    "more replies than commands": Case("", {"mx1": (ENVELOPE + "S: 354 go\nMESSAGE\nS: 250 queued\nS: 250 and again\nPLAY",)}, DELIVERED),
    "text before the greeting ends": Case("", {"mx1": ("S: 220-wait\nS: 220-for\nS: 220 it\n" + TAKES.partition("\n")[2].partition("\n")[2],)}, DELIVERED),
}


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture
def peers() -> Iterator[list[Peer]]:
    made: list[Peer] = []
    yield made
    for peer in made:
        peer.close()


def zone_of(case: Case) -> dict[str, Any]:
    """The case's DNS with its hosts' addresses in it."""
    return {name: {kind: ADDRESSES.get(value, value) if isinstance(value, str) else value for kind, value in entry.items()}
            for name, entry in (MX1 | case.dns).items()}


@pytest.mark.parametrize("name", CASES)
def test_what_remotes_do(name: str, authority: Authority, peers: list[Peer]) -> None:
    case = CASES[name]
    certificate = authority.issue("mx1.example.org")
    port = 0
    for number, host in enumerate(case.hosts):
        peers.append(Peer(*case.hosts[host], host=ADDRESSES[host], port=port, tls=certificate))
        port = peers[number].port
    keys = {"allow_loopback": "yes", "port": port or 25, "mta_sts": "no"} | case.keys
    if case.lmtp:
        keys = {"host": peers[0].address}
    out = Out(kind=Lmtp if case.lmtp else Relay, zone=zone_of(case), **keys)
    outcomes = out.send(*case.to, raw=case.raw, next_hop="" if case.lmtp else "example.org")
    out.transport.close()
    assert tuple(outcome.status.value for outcome in outcomes) == case.wanted
    assert case.says in outcomes[0].words or case.says in str(outcomes[0].reply)
    sessions: list[Session] = [session for peer in peers for session in peer.sessions]
    with gevent.Timeout(10):
        while not all(session.ended for session in sessions):
            gevent.sleep(0.001)
    for peer, scripts in zip(peers, case.hosts.values(), strict=True):
        assert scripts or not peer.sessions, "a host that nobody may connect to"
        peer.check()
    assert len(sessions) == (case.connections if any(scripts and scripts[0] != "REFUSE" for scripts in case.hosts.values()) else 0)
    if case.never:
        assert not [line for session in sessions for line in session.commands if re.search(case.never, line)]
    if "delivered" in case.wanted:
        end = b"" if case.raw.endswith(b"\r\n") else b"\r\n"  # RFC 5321 section 4.1.1.4
        assert {message for peer in peers for message in peer.messages} == {case.raw + end}


def test_temporary_and_final_codes(peers: list[Peer]) -> None:
    """Any 4xx waits and any 5xx is final, unusual ones too."""
    for code, wanted in ((422, "deferred"), (499, "deferred"), (521, "failed"), (599, "failed")):
        peers.append(Peer(replies={"RCPT": f"{code} odd"}))
        out = Out(peers[-1].address)
        assert out.send()[0].status.value == wanted
        out.transport.close()
