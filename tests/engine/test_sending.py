"""The sending client against any stream of replies: an outcome for each recipient or ConnectionFailed, and never "delivered" unsaid."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from gmta.deliver.client import ConnectionFailed, Settings, SmtpClient
from gmta.mail.verdict import Status
from gmta.services.deadlines import NEVER
from gmta.testing import make_envelope, make_message

KEYWORDS = ("PIPELINING", "CHUNKING", "8BITMIME", "SIZE", "SIZE 5", "DSN", "LIMITS RCPTMAX=1", "LIMITS MAILMAX=1", "SMTPUTF8")
REPLIES = (b"250 ok\r\n", b"250-a\r\n250 b\r\n", b"354 go\r\n", b"421 4.3.2 no\r\n", b"450 later\r\n", b"452 4.5.3 many\r\n", b"550 5.1.1 no\r\n",
           b"552 many\r\n", b"503 sequence\r\n", b"502 unknown\r\n", b"220 hm\r\n", b"334 \r\n", b"nonsense\r\n", b"2", b"250-")


class Deadlines:
    """Nothing is late."""

    def clock(self) -> float:
        return 0.0

    def watch(self, one: Any) -> None:
        pass

    def forget(self, one: Any) -> None:
        pass


class Wire:
    """A socket that hears everything and answers what it was given, a piece at a time; then the other side is gone."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self.pieces = pieces
        self.heard = b""

    def send(self, data: bytes) -> int:
        self.heard += data
        return len(data)

    def recv(self, size: int) -> bytes:
        return next(self.pieces, b"")

    def close(self) -> None:
        pass


@given(st.sets(st.sampled_from(KEYWORDS)), st.lists(st.sampled_from(REPLIES) | st.binary(max_size=20), max_size=14), st.integers(1, 3), st.booleans())
@settings(max_examples=300, deadline=None)
def test_any_replies(keywords: set[str], pieces: list[bytes], recipients: int, lmtp: bool) -> None:
    client = SmtpClient(Settings("mx.example.test", lmtp), "192.0.2.1", 25, Deadlines())  # type: ignore[arg-type]
    protocol = client._protocol
    (protocol.lhlo if lmtp else protocol.ehlo)("mx.example.test")
    protocol.receive_data(b"220 x\r\n250-x\r\n" + b"".join(f"250-{word}\r\n".encode() for word in sorted(keywords)) + b"250 HELP\r\n")
    assert protocol.next_reply() and protocol.next_reply()
    wire = client._socket = Wire(iter([piece for piece in pieces if piece]))
    client.usable = client._speaking = True
    envelope = make_envelope("a@b.example", [f"r{number}@c.example" for number in range(recipients)])
    try:
        outcomes = client.send(envelope, envelope.recipients, make_message())
    except ConnectionFailed as failure:
        outcomes = failure.outcomes
        assert not client.usable and failure.outcome.status is not Status.DELIVERED
    else:
        assert set(outcomes) == set(range(recipients))
    assert set(outcomes) <= set(range(recipients))
    assert client.deadline == NEVER or not client.usable
    delivered = [outcome for outcome in outcomes.values() if outcome.status is Status.DELIVERED]
    said = sum(piece.count(b"250") + piece.count(b"220") for piece in pieces) + sum(piece.count(b"2") for piece in pieces if b"250" not in piece)
    assert not delivered or (said >= 3 and (b"\r\n.\r\n" in wire.heard or b"BDAT" in wire.heard))
