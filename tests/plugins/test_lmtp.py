"""The lmtp transport over a socket of this machine: a reply a recipient, the connection kept (RFC 2033)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gevent
import pytest
from gevent import socket

from gmta import Delivery
from gmta.config import Section
from gmta.mail.address import Address
from gmta.mail.envelope import Envelope, RecipientState
from gmta.mail.message import Message
from gmta.mail.verdict import Outcome, Status
from gmta.services.deadlines import Deadlines
from gmta.testing import MemoryLog, make_services
from gmta.testing.zone import Zone
from gmta_plugins.relay import Lmtp

ANSWERS = {"ann": b"250 2.1.5 delivered", "bob": b"552 5.2.2 mailbox full", "carol": b"451 4.2.0 not now", "dave": b"250 2.1.5 delivered"}


class Mailboxes:
    """A scripted LMTP server: ANSWERS after the dot, by local part; `sessions` holds what was said in each."""

    def __init__(self, path: Path) -> None:
        self.sessions: list[list[bytes]] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(5)
        self._greenlets = [gevent.spawn(self._accept)]

    def _accept(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            self._greenlets.append(gevent.spawn(self._serve, connection))

    def _serve(self, connection: Any) -> None:
        said: list[bytes] = []
        self.sessions.append(said)
        accepted: list[str] = []
        with connection, connection.makefile("rb") as lines:
            connection.sendall(b"220 box LMTP\r\n")
            for line in lines:
                said.append(line.rstrip(b"\r\n"))
                verb = line[:4].upper()
                if verb == b"LHLO":
                    connection.sendall(b"250-box\r\n250-PIPELINING\r\n250 ENHANCEDSTATUSCODES\r\n")
                elif verb == b"RCPT":
                    match = re.search(rb"<(\w+)@", line)
                    assert match
                    name = match[1].decode()
                    known = name in ANSWERS
                    accepted += [name] * known
                    connection.sendall(b"250 2.1.5 fine\r\n" if known else b"550 5.1.1 nobody\r\n")
                elif verb == b"DATA":
                    connection.sendall(b"354 go on\r\n")
                    while lines.readline() != b".\r\n":
                        pass
                    connection.sendall(b"".join(ANSWERS[name] + b"\r\n" for name in accepted))
                    accepted.clear()
                else:
                    connection.sendall(b"250 2.0.0 fine\r\n")

    def close(self) -> None:
        """Ends it."""
        gevent.killall(self._greenlets)
        self._listener.close()


@pytest.fixture
def lmtp(tmp_path: Path) -> Iterator[Lmtp]:
    services = make_services("", resolver=Zone({}), log=MemoryLog())
    services._still = Deadlines()
    section = Section("transport:box", values={"host": f"unix:{tmp_path}/s"})
    transport = Lmtp("box", services.config.validate(Lmtp.Config, section), services)
    yield transport
    transport.close()


def deliver(transport: Lmtp, *names: str, facts: dict[str, Any] | None = None) -> list[Outcome]:
    recipients = [RecipientState(n, Address(name, "c.example")) for n, name in enumerate(names)]
    envelope = Envelope("ID", Address("a", "b.example"), recipients, facts=facts or {})
    outcomes = transport.deliver(Delivery(envelope, recipients, Message.from_bytes(b"Subject: x\r\n\r\n.dot\r\n"), "box"))
    return [outcomes[n] for n in range(len(names))]


def test_reply_a_recipient_over_a_local_socket(lmtp: Lmtp, tmp_path: Path) -> None:
    server = Mailboxes(tmp_path / "s")
    try:
        outcomes = deliver(lmtp, "ann", "bob", "nobody", "carol", "dave")
        assert [outcome.status for outcome in outcomes] == [Status.DELIVERED, Status.FAILED, Status.FAILED, Status.DEFERRED, Status.DELIVERED]
        assert [outcome.reply.enhanced for outcome in outcomes] == ["2.1.5", "5.2.2", "5.1.1", "4.2.0", "2.1.5"]
        assert outcomes[1].remote == f"{tmp_path}/s"
        deliver(lmtp, "ann")
        (said,) = server.sessions  # the second message came by the same connection
        assert said[0].startswith(b"LHLO ") and sum(line.startswith(b"MAIL") for line in said) == 2
    finally:
        server.close()


def test_requiretls_is_kept_where_nothing_leaves_the_machine(lmtp: Lmtp, tmp_path: Path) -> None:
    """RFC 8689 is about what goes over a network: mailboxes behind a socket of this machine need promise nothing."""
    boxes = Mailboxes(tmp_path / "s")
    try:
        (outcome,) = deliver(lmtp, "ann", facts={"requiretls": True})
        assert outcome.status is Status.DELIVERED
        assert [line for line in boxes.sessions[0] if line.startswith(b"MAIL")] == [b"MAIL FROM:<a@b.example>"]
    finally:
        boxes.close()


def test_no_socket_there(lmtp: Lmtp) -> None:
    (outcome,) = deliver(lmtp, "ann")
    assert outcome.status is Status.DEFERRED and not outcome.recipient_fault
    assert outcome.reply.enhanced == "4.4.1"
