"""The relay and lmtp transports against a scripted remote on loopback: outcomes, connection reuse, fail-over, MX answers."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import dns.resolver
import gevent
import pytest
from gevent import socket
from gevent.server import StreamServer

from gmta import Delivery
from gmta.mail.address import Address
from gmta.mail.envelope import Envelope, RecipientState
from gmta.mail.message import Message
from gmta.mail.verdict import Status
from gmta.services.deadlines import Deadlines
from gmta.services.log import NullLog
from gmta_plugins.relay import Lmtp, Relay, split_host

RAW = b"Subject: x\r\n\r\n.dot\r\n..two\r\nbody\r\n"


class Remote:
    """An SMTP server whose answers can be set: `replies` maps a command's start to a reply; None closes."""

    def __init__(self, *, lmtp: bool = False, extensions: tuple[str, ...] = ("PIPELINING", "8BITMIME", "SIZE 100000")) -> None:
        self.lmtp = lmtp
        self.extensions = extensions
        self.replies: dict[str, str | None] = {}
        self.commands: list[str] = []
        self.messages: list[bytes] = []
        self.connections = 0
        self.server = StreamServer(("127.0.0.1", 0), self.talk)
        self.server.start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server.server_port}"

    def talk(self, connection: Any, peer: Any) -> None:
        self.connections += 1
        stream = connection.makefile("rwb", buffering=0)

        def say(text: str) -> None:
            connection.sendall(text.encode() + b"\r\n")

        say(self.replies.get("greeting") or "220 remote")
        accepted = 0
        for raw in stream:
            line = raw.decode().rstrip("\r\n")
            self.commands.append(line)
            found = [reply for start, reply in self.replies.items() if line.startswith(start)]
            if found:
                if found[0] is None:
                    break
                say(found[0])
                continue
            verb = line.upper().split()[0]
            if verb in ("EHLO", "LHLO"):
                lines = ["remote", *self.extensions]
                say("\r\n".join(f"250{' ' if n == len(lines) - 1 else '-'}{text}" for n, text in enumerate(lines)))
            elif verb == "MAIL":
                accepted = 0
                say("250 2.1.0 ok")
            elif verb == "RCPT":
                if "<bad" in line:
                    say("550 5.1.1 unknown user")
                else:
                    accepted += 1
                    say("250 2.1.5 ok")
            elif verb == "DATA":
                if not accepted:
                    say("554 5.5.1 no valid recipients")
                    continue
                say("354 go on")
                data = b""
                while not data.endswith(b"\r\n.\r\n"):
                    data += next(stream)
                self.messages.append(re.sub(rb"(?m)^\.", b"", data[:-3]))
                for n in range(accepted if self.lmtp else 1):
                    say(self.replies.get(f"final{n}") or "250 2.0.0 taken")
            elif verb == "QUIT":
                say("221 bye")
                break
            else:
                say("250 2.0.0 ok")
        connection.close()


@pytest.fixture
def remote() -> Iterator[Remote]:
    made = Remote()
    yield made
    made.server.stop(timeout=0.1)


def services() -> Any:
    return SimpleNamespace(hostname="mx.example", clock=time.time, spawn=gevent.spawn, log=NullLog(), deadlines=Deadlines(),
                           config=SimpleNamespace(dns=SimpleNamespace(servers=["127.0.0.1:9"], timeout=1.0, cache_size=10)))


def relay(*hosts: str, kind: type[Relay] = Relay, **keys: Any) -> Relay:
    return kind("out", kind.Config(host=list(hosts), **keys), services())


def delivery(*names: str, raw: bytes = RAW, next_hop: str = "", **facts: Any) -> Any:
    recipients = [RecipientState(n, Address(name, "c.example")) for n, name in enumerate(names)]
    message = Message.from_bytes(raw)
    envelope = Envelope("0123456789ABCDEF", Address("a", "b.example"), recipients, message.size, **facts)
    return Delivery(envelope, recipients, message, "out", next_hop, True)


@pytest.mark.parametrize("pipelining", [True, False])
def test_outcome_per_recipient_and_the_octets(remote: Remote, pipelining: bool) -> None:
    if not pipelining:
        remote.extensions = ("8BITMIME",)
    outcomes = relay(remote.address).deliver(delivery("x", "bad", "y"))
    assert [outcomes[n].status for n in range(3)] == [Status.DELIVERED, Status.FAILED, Status.DELIVERED]
    assert outcomes[1].reply.enhanced == "5.1.1" and remote.address in outcomes[1].remote
    assert outcomes[0].relayed  # it offers no DSN
    assert remote.messages == [RAW]


def test_connection_is_kept_and_a_stale_one_replaced(remote: Remote) -> None:
    transport = relay(remote.address)
    for _ in range(3):
        assert transport.deliver(delivery("x"))[0].status is Status.DELIVERED
    assert remote.connections == 1
    remote.replies["MAIL"] = None  # it closes on us, then recovers
    first = transport.deliver(delivery("x"))
    assert first[0].status is Status.DEFERRED and remote.connections == 2
    del remote.replies["MAIL"]
    assert transport.deliver(delivery("x"))[0].status is Status.DELIVERED


def test_all_refused_leaves_the_connection_usable(remote: Remote) -> None:
    transport = relay(remote.address)
    assert transport.deliver(delivery("bad"))[0].status is Status.FAILED
    assert transport.deliver(delivery("x"))[0].status is Status.DELIVERED
    assert remote.connections == 1 and remote.messages == [RAW]


def test_next_host_where_one_is_dead_or_busy(remote: Remote) -> None:
    busy = Remote()
    busy.replies["greeting"] = "421 4.3.2 busy"
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        dead = f"127.0.0.1:{unused.getsockname()[1]}"
        assert relay(dead, busy.address, remote.address).deliver(delivery("x"))[0].status is Status.DELIVERED
        outcome = relay(dead, busy.address).deliver(delivery("x"))[0]
    busy.server.stop(timeout=0.1)
    assert outcome.status is Status.DEFERRED and not outcome.recipient_fault and outcome.reply.code == 421


def test_silent_remote_times_out(remote: Remote) -> None:
    silent = StreamServer(("127.0.0.1", 0), lambda connection, peer: gevent.sleep(60))
    silent.start()
    outcome = relay(f"127.0.0.1:{silent.server_port}", greeting_timeout="0.05s").deliver(delivery("x"))[0]
    silent.stop(timeout=0.01)
    assert outcome.status is Status.DEFERRED and outcome.reply.enhanced == "4.4.2"


def test_what_the_remote_cannot_take_fails_at_once(remote: Remote) -> None:
    remote.extensions = ("SIZE 10",)
    assert relay(remote.address).deliver(delivery("x"))[0].reply.enhanced == "5.3.4"
    remote.extensions = ("PIPELINING",)
    raw = "Subject: x\r\n\r\nä\r\n".encode()
    assert relay(remote.address).deliver(delivery("x", raw=raw, body="8BITMIME"))[0].reply.enhanced == "5.6.3"
    raw = "Subject: ä\r\n\r\nx\r\n".encode()
    assert relay(remote.address).deliver(delivery("x", raw=raw, smtputf8=True))[0].reply.enhanced == "5.6.7"
    assert not remote.messages


def test_dsn_parameters_go_on(remote: Remote) -> None:
    remote.extensions = ("PIPELINING", "DSN")
    job = delivery("x", ret="HDRS", envid="e1")
    job.recipients[0].notify = frozenset({"SUCCESS", "FAILURE"})
    job.recipients[0].orcpt = "rfc822;o@c.example"
    outcome = relay(remote.address).deliver(job)[0]
    sent = " ".join(remote.commands)
    assert "RET=HDRS" in sent and "ENVID=e1" in sent and "NOTIFY=FAILURE,SUCCESS" in sent and "ORCPT=rfc822;o@c.example" in sent
    assert not outcome.relayed


def test_lmtp_answers_each_recipient() -> None:
    remote = Remote(lmtp=True)
    remote.replies["final1"] = "452 4.2.2 full"
    outcomes = relay(remote.address, kind=Lmtp).deliver(delivery("x", "y", "z"))
    remote.server.stop(timeout=0.1)
    assert [outcomes[n].status for n in range(3)] == [Status.DELIVERED, Status.DEFERRED, Status.DELIVERED]
    assert remote.commands[0] == "LHLO mx.example"


def test_tls_required_and_not_offered(remote: Remote) -> None:
    outcome = relay(remote.address, tls="required").deliver(delivery("x"))[0]
    assert outcome.status is Status.DEFERRED and not remote.messages


class Zone:
    """Answers by (name, type); a missing one is NXDOMAIN, an empty one NoAnswer."""

    def __init__(self, records: dict[tuple[str, str], list[Any]]) -> None:
        self.records = records

    def resolve(self, name: str, kind: str) -> list[Any]:
        found = self.records.get((name.rstrip("."), kind))
        if found is None:
            raise dns.resolver.NXDOMAIN
        if not found:
            raise dns.resolver.NoAnswer
        return found


def mx(preference: int, name: str) -> Any:
    return SimpleNamespace(preference=preference, exchange=SimpleNamespace(to_text=lambda omit_final_dot: name))


def a(address: str) -> Any:
    return SimpleNamespace(address=address)


def through(records: dict[tuple[str, str], list[Any]], **keys: Any) -> Relay:
    transport = relay(**keys)
    transport._resolver = Zone(records)  # type: ignore[assignment]
    return transport


def test_mx_order_and_implicit_mx() -> None:
    transport = through({("c.example", "MX"): [mx(20, "two"), mx(10, "one")], ("one", "A"): [a("192.0.2.1")], ("one", "AAAA"): [],
                         ("two", "A"): [a("192.0.2.2")], ("two", "AAAA"): [a("2001:db8::2")]})
    assert [target[:2] for target in transport._targets("c.example")] == [
        ("one", "192.0.2.1"), ("two", "192.0.2.2"), ("two", "2001:db8::2")]
    transport = through({("c.example", "MX"): [], ("c.example", "A"): [a("192.0.2.3")], ("c.example", "AAAA"): []})
    assert transport._targets("c.example") == [("c.example", "192.0.2.3", 25)]


@pytest.mark.parametrize(("records", "enhanced"), [
    ({}, "5.1.2"),
    ({("c.example", "MX"): [mx(0, ".")]}, "5.1.10"),
    ({("c.example", "MX"): [mx(10, "mx.example")]}, "5.4.6"),
    ({("c.example", "MX"): [], ("c.example", "A"): [a("127.0.0.1")], ("c.example", "AAAA"): []}, "5.4.6"),
    ({("c.example", "MX"): [], ("c.example", "A"): [], ("c.example", "AAAA"): []}, "5.4.4"),
])
def test_domains_that_take_no_mail(records: dict[tuple[str, str], list[Any]], enhanced: str) -> None:
    outcome = through(records).deliver(delivery("x", next_hop="c.example"))[0]
    assert outcome.status is Status.FAILED and outcome.reply.enhanced == enhanced


def test_lanes() -> None:
    assert relay().next_hop(Address("x", "C.example")) == "c.example"
    assert relay("127.0.0.1:25").next_hop(Address("x", "C.example")) == ""


@pytest.mark.parametrize(("text", "parts"), [("h", ("h", 25)), ("h:26", ("h", 26)), ("[::1]:26", ("::1", 26)), ("::1", ("::1", 25))])
def test_split_host(text: str, parts: tuple[str, int]) -> None:
    assert split_host(text, 25) == parts
