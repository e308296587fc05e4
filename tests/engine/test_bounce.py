"""Reports to the sender: their parts parse, say what RFC 3464 wants, carry no more than was asked for, and go by what is ASCII."""

from __future__ import annotations

import email
import email.policy
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gmta import accept, hookimpl, reject
from gmta.deliver import bounce
from gmta.deliver.bounce import Notice
from gmta.mail.address import Address
from gmta.mail.envelope import Envelope, RecipientState
from gmta.mail.message import FileBody, Message
from gmta.mail.reply import Reply
from gmta.mail.verdict import Outcome, deferred, delivered, failed, outcome_of
from gmta.testing import run

ORIGINAL = Message.from_bytes(b"Subject: hello\r\nFrom: a@b.example\r\nMessage-ID: <1@b.example>\r\n\r\nthe body\r\n")
NOW = 1_800_000_000.0
UNKNOWN = outcome_of(Reply(550, "5.1.1", "<x@c.example> unknown user"), remote="mx.c.example[192.0.2.1]:25")
UTF8_SENDER = Address("jürgen", "b.example")


def report(*notices: Notice | Outcome, kind: str = bounce.FAILED, message: Message | None = ORIGINAL, sender: Address | None = None,
           ret: str = "", **options: Any) -> tuple[bytes, email.message.EmailMessage]:
    """The octets of a report, and how Python's parser reads them."""
    envelope = Envelope("0000000000000001", Address("a", "b.example") if sender is None else sender, [], received_at=NOW - 100, ret=ret, envid="QQ+314")
    given = [notice if isinstance(notice, Notice) else Notice(RecipientState(number, Address("x", "c.example"), attempts=1), notice)
             for number, notice in enumerate(notices or (UNKNOWN,))]
    built = bounce.build(kind, envelope, given, message, hostname="mx.example", queue_id="0000000000000002", now=NOW,
                         retry_until=NOW + 400_000, **options)
    raw = b"".join(built.chunks())
    assert b"\n" not in raw.replace(b"\r\n", b"")
    assert max(map(len, raw.split(b"\r\n"))) <= 998
    return raw, email.message_from_bytes(raw, policy=email.policy.default)


def types(parsed: email.message.EmailMessage) -> list[str]:
    return [part.get_content_type() for part in parsed.iter_parts()]


def groups(parsed: email.message.EmailMessage) -> list[dict[str, str]]:
    """The field groups of part two; folds undone."""
    status = list(parsed.iter_parts())[1]
    if status.get_content_type() == "message/delivery-status":
        blocks = [block.as_bytes().decode() for block in status.get_payload()]
    else:
        text = status.get_payload() if isinstance(status.get_payload(), str) else status.get_content()
        blocks = (text.decode() if isinstance(text, bytes) else str(text)).replace("\r\n", "\n").split("\n\n")
    found = []
    for block in blocks:
        lines = re.sub(r"\r?\n[ \t]", " ", block).splitlines()
        found.append({name: value.strip() for name, _, value in (line.partition(":") for line in lines if line)})
    return [block for block in found if block]


def text_of(parsed: email.message.EmailMessage) -> str:
    return " ".join(next(iter(parsed.iter_parts())).get_content().split())


# --- form -----------------------------------------------------------------------------------------------------------


def test_failure_has_three_parts_and_its_fields() -> None:
    raw, parsed = report()
    assert types(parsed) == ["text/plain", "message/delivery-status", "message/rfc822"]
    for field in ("From", "To", "Date", "Message-ID", "Auto-Submitted"):
        assert parsed[field]
    assert parsed["Content-Type"].params["report-type"] == "delivery-status"
    assert parsed["In-Reply-To"] == parsed["References"] == "<1@b.example>"
    message, recipient = groups(parsed)
    assert message["Reporting-MTA"] == "dns; mx.example" and message["Original-Envelope-Id"] == "QQ+314" and message["Arrival-Date"]
    assert recipient["Final-Recipient"] == "rfc822;x@c.example" and recipient["Action"] == "failed" and recipient["Status"] == "5.1.1"
    assert recipient["Remote-MTA"] == "dns; mx.c.example"
    assert recipient["Diagnostic-Code"] == "smtp; 550 5.1.1 <x@c.example> unknown user" and recipient["Last-Attempt-Date"]
    assert not parsed.defects and not any(part.defects for part in parsed.walk())
    assert raw.count(b"the body") == 1


def test_three_recipients_are_three_groups_of_one_report() -> None:
    _, parsed = report(UNKNOWN, UNKNOWN, UNKNOWN)
    assert len(groups(parsed)) == 4 and "the 3 recipients below" in text_of(parsed)


def test_people_read_who_said_what_and_what_to_do() -> None:
    full = outcome_of(Reply(552, "5.2.2", "over quota"), remote="192.0.2.9:25")
    text = text_of(report(UNKNOWN, full)[1])
    assert "mx.c.example [192.0.2.1] said: 550 5.1.1 <x@c.example> unknown user" in text
    assert "[192.0.2.9] said: 552 5.2.2 over quota" in text
    assert "typing errors" in text and "mailbox is full" in text and "What to do about <x@c.example>:" in text
    assert "What to do: " in text_of(report()[1])
    assert "Queue id: 0000000000000001" in text and "Your reference: QQ+314" in text


def test_our_own_words_are_not_the_remotes() -> None:
    outcome = failed("Domain c.example does not exist", enhanced="5.1.2")
    _, parsed = report(outcome)
    assert "said" not in text_of(parsed) and groups(parsed)[1]["Diagnostic-Code"] == "X-gmta; Domain c.example does not exist"
    assert "Remote-MTA" not in groups(parsed)[1]
    about = deferred("Timeout while waiting", enhanced="4.4.2", remote="mx.c.example[192.0.2.1]:25")
    group = groups(report(about, kind=bounce.DELAYED)[1])[1]
    assert group["Diagnostic-Code"].startswith("X-gmta;") and group["Remote-MTA"] == "dns; mx.c.example"


def test_a_long_reply_of_many_lines_is_whole_and_folded() -> None:
    said = Reply.parse([b"550-5.7.26 " + b"word " * 30, b"550 5.7.26 last " + b"x" * 3000])
    raw, parsed = report(outcome_of(said, remote="mx"))
    assert "5.7.26 last" in groups(parsed)[1]["Diagnostic-Code"] and "5.7.26 last" in text_of(parsed)
    assert max(map(len, raw.split(b"\r\n"))) <= 998


@pytest.mark.parametrize(("kind", "outcome", "status"), [
    (bounce.FAILED, outcome_of(Reply(550, "5.1.1", "x")), "5.1.1"),
    (bounce.FAILED, outcome_of(Reply(550, None, "x")), "5.0.0"),
    (bounce.FAILED, outcome_of(Reply(451, "4.2.0", "x")), "5.0.0"),
    (bounce.DELAYED, outcome_of(Reply(451, "4.4.1", "x")), "4.4.1"),
    (bounce.DELIVERED, delivered(), "2.1.5"),
    (bounce.EXPANDED, delivered(), "2.1.5"),
])
def test_status_is_of_the_reports_class(kind: str, outcome: Outcome, status: str) -> None:
    assert bounce.status_of(kind, Notice(RecipientState(0, Address("x", "y")), outcome)) == status


def test_expired_keeps_the_last_words() -> None:
    recipient = RecipientState(0, Address("x", "c.example"), attempts=4)
    _, parsed = report(Notice(recipient, outcome_of(Reply(451, None, "later"), remote="mx"), bounce.EXPIRED))
    group = groups(parsed)[1]
    assert group["Action"] == "failed" and group["Status"] == "5.4.7" and group["Diagnostic-Code"] == "smtp; 451 later"
    assert "It was tried for 2 minutes, 4 times. The last result: mx said: 451 later" in text_of(parsed)


def test_what_was_not_tried_now_has_no_date_of_now() -> None:
    recipient = RecipientState(0, Address("x", "c.example"), attempts=2)
    waited = Notice(recipient, deferred("Delivery suspended", enhanced="4.4.1"), tried=False)
    for kind in (bounce.FAILED, bounce.DELAYED):
        assert "Last-Attempt-Date" not in groups(report(waited, kind=kind)[1])[1]  # RFC 3464 section 2.3.7: when is not kept
        assert groups(report(waited._replace(tried=True), kind=kind)[1])[1]["Last-Attempt-Date"]


def test_delay_says_until_when() -> None:
    raw, parsed = report(outcome_of(Reply(451, "4.4.1", "later"), remote="mx"), kind=bounce.DELAYED)
    group = groups(parsed)[1]
    assert group["Action"] == "delayed" and group["Status"] == "4.4.1" and group["Will-Retry-Until"]
    assert "only a warning" in text_of(parsed) and b"the body" not in raw


def test_delivered_relayed_and_expanded() -> None:
    relayed = delivered(remote="mx.c.example", relayed=True, reply=Reply(250, None, "ok"))
    _, parsed = report(relayed, kind=bounce.DELIVERED)
    assert groups(parsed)[1]["Action"] == "relayed" and "sends no reports of success" in text_of(parsed)
    assert groups(report(delivered(), kind=bounce.DELIVERED)[1])[1]["Action"] == "delivered"
    assert groups(report(delivered(), kind=bounce.EXPANDED)[1])[1]["Action"] == "expanded"


def test_about_a_message_without_a_sender() -> None:
    _, parsed = report(sender=Address("", ""), to=Address("postmaster", "b.example"))
    assert "postmaster@b.example" in parsed["To"] and "Nobody else is told" in text_of(parsed)


# --- how much goes back ---------------------------------------------------------------------------------------------


def test_ret_hdrs_returns_the_header_alone() -> None:
    raw, parsed = report(ret="HDRS")
    assert types(parsed)[2] == "text/rfc822-headers"
    assert b"Subject: hello" in raw and b"the body" not in raw


def test_strangers_get_the_header_alone_even_with_ret_full() -> None:
    raw, parsed = report(ret="FULL", whole=False)
    assert types(parsed)[2] == "text/rfc822-headers" and b"the body" not in raw


@pytest.mark.parametrize(("facts", "known"), [
    ({}, False), ({"protocol": "ESMTP"}, False), ({"trusted": True}, True), ({"user": "a"}, True), ({"protocol": "local"}, True)])
def test_who_is_trusted(facts: dict[str, Any], known: bool) -> None:
    assert bounce.trusted(Envelope("1", Address("a", "b"), [], facts=facts)) is known


def test_big_message_goes_back_as_its_header() -> None:
    big = Message.from_bytes(b"Subject: big\r\n\r\n" + b"x" * 70 + b"\r\n" * bounce.MAX_RETURNED)
    raw, parsed = report(message=big)
    assert types(parsed)[2] == "text/rfc822-headers"
    assert len(raw) < 10_000


def test_lines_too_long_for_a_report(tmp_path: Any) -> None:
    raw, parsed = report(message=Message.from_bytes(b"Subject: x\r\n\r\n" + b"y" * 2000 + b"\r\n"))
    assert types(parsed)[2] == "text/rfc822-headers" and b"yyyy" not in raw
    raw, parsed = report(message=Message.from_bytes(b"X-Long: " + b"z" * 5000 + b"\r\n\r\nbody\r\n"))
    part = list(parsed.iter_parts())[2]
    assert part.get_content_type() == "text/rfc822-headers" and part["Content-Transfer-Encoding"] == "quoted-printable"
    assert part.get_payload(decode=True).strip() == b"X-Long: " + b"z" * 5000


def test_a_message_that_cannot_be_read_or_is_gone() -> None:
    lost = Message(b"Subject: lost\r\n", b"\r\n", FileBody("/nonexistent", 0, 10))
    assert types(report(message=lost)[1])[2] == "text/rfc822-headers"
    assert types(report(message=None)[1]) == ["text/plain", "message/delivery-status"]


@pytest.mark.parametrize("found", [b"<a b@c>", b"<a@b> <c@d>", "<ü@b>".encode(), b"nonsense", b"<" + b"x" * 300 + b">"])
def test_an_odd_message_id_is_not_referred_to(found: bytes) -> None:
    _, parsed = report(message=Message.from_bytes(b"Message-ID: " + found + b"\r\n\r\nx\r\n"))
    assert parsed["References"] is None


# --- beyond ASCII ---------------------------------------------------------------------------------------------------


def test_ascii_sender_gets_ascii_whatever_the_others_are() -> None:
    recipient = RecipientState(0, Address("jürgen", "ü.example"), orcpt="utf-8;\\x{FC}ber+x@c.example", attempts=1)
    said = Reply.parse(["550 5.1.1 kein Empfänger".encode()])
    raw, parsed = report(Notice(recipient, outcome_of(said, remote="mx")))
    assert raw.isascii() and types(parsed)[1] == "message/delivery-status"
    group = groups(parsed)[1]
    assert group["Final-Recipient"] == "utf-8;j\\x{FC}rgen@\\x{FC}.example"  # RFC 6533 section 3: utf-8-addr-xtext
    assert group["Original-Recipient"] == "utf-8;\\x{FC}ber\\x{2B}x@c.example"
    assert "<jürgen@ü.example>" in text_of(parsed) and next(parsed.iter_parts()).get_content_charset() == "utf-8"
    assert "Empf\\xe4nger" in text_of(parsed)
    plain = next(report()[1].iter_parts())
    assert plain.get_content_charset() == "us-ascii"


def test_utf8_sender_gets_global_parts() -> None:
    recipient = RecipientState(0, Address("jürgen", "ü.example"), orcpt="utf-8;\\x{FC}ber@c.example")
    message = Message.from_bytes("Subject: Grüße\r\n\r\nbody\r\n".encode())
    raw, parsed = report(Notice(recipient, UNKNOWN), sender=UTF8_SENDER, message=message)
    assert types(parsed) == ["text/plain", "message/global-delivery-status", "message/global"]
    assert "Final-Recipient: utf-8;jürgen@ü.example\r\n".encode() in raw and "Original-Recipient: utf-8;über@c.example\r\n".encode() in raw
    assert "To: <jürgen@b.example>\r\n".encode() in raw
    _, parsed = report(sender=UTF8_SENDER, message=message, ret="HDRS")
    assert types(parsed)[2] == "message/global-headers"


def test_returned_utf8_is_declared() -> None:
    message = Message.from_bytes("Subject: grüße\r\nContent-Transfer-Encoding: 8bit\r\n\r\ngrüße\r\n".encode())
    _, parsed = report(message=message)
    part = list(parsed.iter_parts())[2]
    assert part.get_content_type() == "message/rfc822" and part["Content-Transfer-Encoding"] == "8bit"
    assert parsed["Content-Transfer-Encoding"] == "8bit"  # RFC 2045 section 6.4: what holds eight bits says so itself
    raw, parsed = report(message=message, ret="HDRS")
    part = list(parsed.iter_parts())[2]
    assert raw.isascii() and part["Content-Transfer-Encoding"] == "quoted-printable"
    assert part.get_content().strip().startswith("Subject: grüße")


def test_orcpt_of_type_rfc822() -> None:
    recipient = RecipientState(0, Address("x", "c.example"), "old@c.example", orcpt="rfc822;user+tag@example.org")
    _, parsed = report(Notice(recipient, UNKNOWN))
    assert groups(parsed)[1]["Original-Recipient"] == "rfc822;user+tag@example.org"
    assert "(you wrote to <old@c.example>)" in text_of(parsed)


@pytest.mark.parametrize(("remote", "parts"), [
    ("mx.example[192.0.2.1]:25", ("mx.example", "192.0.2.1")), ("192.0.2.1:25", ("", "192.0.2.1")), ("mx.example:25", ("mx.example", "")),
    ("mx.example", ("mx.example", "")), ("mx.example[2001:db8::1]:25", ("mx.example", "2001:db8::1")), ("2001:db8::1:25", ("", "2001:db8::1")),
    ("", ("", "")), ("a b", ("a b", ""))])
def test_remote_parts(remote: str, parts: tuple[str, str]) -> None:
    assert bounce.remote_parts(remote) == parts


@given(said=st.text(max_size=60), local=st.text("abü\U0001f600+=", min_size=1, max_size=20), orcpt=st.text(max_size=20),
       body=st.binary(max_size=60), utf8=st.booleans())
@settings(max_examples=60, deadline=None)
def test_whatever_is_said_a_report_keeps_its_form(said: str, local: str, orcpt: str, body: bytes, utf8: bool) -> None:
    reply = Reply.parse([b"550 5.1.1 " + said.encode("utf-8", "replace").replace(b"\n", b" ")])
    recipient = RecipientState(0, Address(local, "c.example"), orcpt=f"utf-8;{orcpt}")
    message = Message.from_bytes(b"Subject: x\r\n\r\n" + body.replace(b"\r", b"").replace(b"\n", b"\r\n"))
    raw, parsed = report(Notice(recipient, outcome_of(reply, remote="mx")), sender=UTF8_SENDER if utf8 else None, message=message)
    assert len(types(parsed)) == 3
    assert [set(group) >= {"Final-Recipient", "Action", "Status"} for group in groups(parsed)[1:]] == [True]
    assert utf8 or raw.split(b"Content-Type: message/rfc822")[0].isascii()
    assert (parsed["Content-Transfer-Encoding"] == "8bit") is not raw.partition(b"\r\n\r\n")[2].isascii()


# --- who is told ----------------------------------------------------------------------------------------------------


def test_notify() -> None:
    def state(*words: str) -> RecipientState:
        return RecipientState(0, Address("x", "c.example"), notify=frozenset(words))

    assert bounce.wants(state(), "FAILURE") and bounce.wants(state(), "DELAY") and not bounce.wants(state(), "SUCCESS")
    assert not any(bounce.wants(state("NEVER"), what) for what in ("FAILURE", "DELAY", "SUCCESS"))
    assert bounce.wants(state("SUCCESS"), "SUCCESS") and not bounce.wants(state("SUCCESS"), "FAILURE")


def test_the_reports_own_envelope() -> None:
    envelope = Envelope("0000000000000001", Address("a", "b.example"), [])
    born = bounce.envelope_for(envelope, envelope.sender, "0000000000000002", 10, 5.0)
    assert not born.sender and [str(r.address) for r in born.recipients] == ["a@b.example"] and not born.smtputf8
    assert born.recipients[0].notify == {"NEVER"}  # RFC 3461 section 6.1
    assert bounce.envelope_for(envelope, UTF8_SENDER, "0000000000000002", 10, 5.0).smtputf8


# --- what intake notes for reports ----------------------------------------------------------------------------------


class Choosy:
    """A list with two members, and a check of content that one recipient has to himself."""

    @hookimpl
    def permit_rcpt(self, recipient: Any) -> Any:
        if recipient.address.local == "list":
            return accept(replace=[Address("one", "example.test"), Address("two", "example.test")])
        return accept()

    @hookimpl
    def check_message(self, transaction: Any) -> Any:
        return {recipient: reject("no such thing here", 554, "5.6.0") for recipient in transaction.recipients if recipient.address.local == "strict"}


def queued(*rcpt: str, given: str = "") -> Envelope:
    lines = "".join(f"C: RCPT TO:{one}\nS: 250\n" for one in rcpt)
    played = run(Choosy(), f"S: 220\nC: EHLO c.example\nS: 250\nC: MAIL FROM:<a@b.example>\nS: 250\n{lines}C: DATA\nS: 354\nC: Subject: x\nC:\n"
                 "C: body\nC: .\nS: 250\nC: QUIT\nS: 221", given=given, chunkings=["whole"])
    return played.queued[0][0]


def test_a_recipient_that_a_check_refuses_keeps_its_words() -> None:
    easy, strict = queued("<easy@example.test>", "<strict@example.test>").recipients
    assert (easy.refused, easy.transport) == ("", "")
    assert (strict.refused, strict.transport) == ("554 5.6.0 no such thing here", "fail")


def test_an_alias_with_members_takes_success_upon_itself() -> None:
    envelope = queued("<list@example.test> NOTIFY=SUCCESS,FAILURE ORCPT=rfc822;list@example.test", "<me@example.test> NOTIFY=SUCCESS")
    assert [sorted(r.notify) for r in envelope.recipients] == [["FAILURE"], ["FAILURE"], ["SUCCESS"]]
    assert envelope.facts["expanded"] == [["list@example.test", "rfc822;list@example.test"]]
    assert [sorted(r.notify) for r in queued("<list@example.test> NOTIFY=SUCCESS").recipients] == [["NEVER"], ["NEVER"]]
    assert "expanded" not in queued("<list@example.test>").facts


def test_who_sent_it_is_known_later() -> None:
    assert not bounce.trusted(queued("<x@example.test>"))
    assert bounce.trusted(queued("<x@example.test>", given="[domains]\nrelay_from = 192.0.2.0/24\n"))
