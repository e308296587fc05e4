"""Reports to the sender: their parts parse, say what RFC 3464 wants, and carry no more than was asked for."""

from __future__ import annotations

import email
import email.policy

from gmta.deliver import bounce
from gmta.mail.address import Address
from gmta.mail.envelope import Envelope, RecipientState
from gmta.mail.message import Message
from gmta.mail.reply import Reply
from gmta.mail.verdict import Outcome, delivered, failed, outcome_of

ORIGINAL = Message.from_bytes(b"Subject: hello\r\nFrom: a@b.example\r\n\r\nthe body\r\n")


def report(kind: str = bounce.FAILED, outcome: Outcome | None = None, *, ret: str = "", recipient: RecipientState | None = None,
           message: Message | None = ORIGINAL) -> tuple[bytes, email.message.EmailMessage]:
    envelope = Envelope("0000000000000001", Address("a", "b.example"), [], received_at=1_800_000_000.0, ret=ret, envid="env-1")
    pair = (recipient or RecipientState(0, Address("x", "c.example")), outcome or failed("no such user", enhanced="5.1.1"))
    built = bounce.build(kind, envelope, [pair], message, hostname="mx.example", queue_id="0000000000000002",
                         now=1_800_000_100.0, retry_until=1_800_400_000.0)
    raw = b"".join(built.chunks())
    return raw, email.message_from_bytes(raw, policy=email.policy.default)


def parts(parsed: email.message.EmailMessage) -> list[str]:
    return [part.get_content_type() for part in parsed.iter_parts()]


def test_failure_has_three_parts_and_its_fields() -> None:
    raw, parsed = report(outcome=outcome_of(Reply(550, "5.1.1", "unknown"), remote="mx.c.example[192.0.2.1]:25"))
    assert parts(parsed) == ["text/plain", "message/delivery-status", "message/rfc822"]
    for field in ("From", "To", "Date", "Message-ID", "Auto-Submitted"):
        assert parsed[field]
    assert parsed["Content-Type"].params["report-type"] == "delivery-status"
    for line in (b"Original-Envelope-Id: env-1", b"Reporting-MTA: dns; mx.example", b"Final-Recipient: rfc822;x@c.example",
                 b"Action: failed", b"Status: 5.1.1", b"Diagnostic-Code: smtp; 550 5.1.1 unknown"):
        assert line + b"\r\n" in raw
    assert b"the body" in raw
    assert b"\n" not in raw.replace(b"\r\n", b"")


def test_ret_hdrs_returns_the_header_alone() -> None:
    raw, parsed = report(ret="HDRS")
    assert parts(parsed)[2] == "text/rfc822-headers"
    assert b"Subject: hello" in raw and b"the body" not in raw


def test_big_message_goes_back_as_its_header() -> None:
    big = Message.from_bytes(b"Subject: big\r\n\r\n" + b"x" * 70 + b"\r\n" * bounce.MAX_RETURNED)
    raw, parsed = report(message=big)
    assert parts(parsed)[2] == "text/rfc822-headers"
    assert len(raw) < 10_000


def test_delay_says_until_when() -> None:
    raw, _ = report(bounce.DELAYED, outcome_of(Reply(451, "4.4.1", "later")))
    assert b"Action: delayed\r\nStatus: 4.4.1" in raw and b"Will-Retry-Until: " in raw and b"the body" not in raw


def test_relayed_where_the_next_hop_lacks_dsn() -> None:
    raw, _ = report(bounce.DELIVERED, delivered(remote="mx.c.example", relayed=True))
    assert b"Action: relayed" in raw
    raw, _ = report(bounce.DELIVERED, delivered())
    assert b"Action: delivered\r\nStatus: 2.1.5" in raw


def test_orcpt_and_foreign_octets() -> None:
    recipient = RecipientState(0, Address("x", "c.example"), orcpt="rfc822;old@c.example")
    reply = Reply.parse(["550 5.1.1 kein Empf\u00e4nger".encode()])
    raw, _ = report(outcome=outcome_of(reply, remote="mx"), recipient=recipient)
    assert b"Original-Recipient: rfc822;old@c.example" in raw
    assert raw.isascii()


def test_status_follows_the_reports_class() -> None:
    assert bounce.status_of(bounce.FAILED, outcome_of(Reply(451, "4.2.0", "x"))) == "5.0.0"
    assert bounce.status_of(bounce.FAILED, outcome_of(Reply(550, None, "x"))) == "5.0.0"


def test_notify() -> None:
    def state(*words: str) -> RecipientState:
        return RecipientState(0, Address("x", "c.example"), notify=frozenset(words))

    assert bounce.wants(state(), "FAILURE") and bounce.wants(state(), "DELAY") and not bounce.wants(state(), "SUCCESS")
    assert not any(bounce.wants(state("NEVER"), what) for what in ("FAILURE", "DELAY", "SUCCESS"))
    assert bounce.wants(state("SUCCESS"), "SUCCESS") and not bounce.wants(state("SUCCESS"), "FAILURE")


def test_envelope_has_the_null_sender() -> None:
    envelope = Envelope("0000000000000001", Address("a", "b.example"), [])
    born = bounce.envelope_for(envelope, "0000000000000002", 10, 5.0)
    assert not born.sender and [str(r.address) for r in born.recipients] == ["a@b.example"]
