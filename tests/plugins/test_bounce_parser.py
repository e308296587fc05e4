"""Reports and complaints read: what they say, whom they are about by our own address, and that odd ones do nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gmta.deliver import bounce
from gmta.mail.address import Address
from gmta.mail.message import Message
from gmta.mail.session import Recipient
from gmta.mail.verdict import Outcome, deferred, failed
from gmta.testing.fakes import (
    START_AT,
    make_envelope,
    make_file_message,
    make_message,
    make_services,
    make_session,
    make_transaction,
)
from gmta_plugins import bounce_parser
from gmta_plugins.bounce_parser import Config, Plugin, verp_recipient

ADDRESS = "bounces+joe=far.example@example.test"


def report(*blocks: str, kind: str = "message/delivery-status", whole: str = "Reporting-MTA: dns; mx.far.example\nOriginal-Envelope-Id: E1\n\n") -> str:
    return (f"From: MAILER-DAEMON@far.example\nContent-Type: multipart/report; report-type=x; boundary=b\n\n--b\n\nwords\n--b\nContent-Type: {kind}\n\n"
            + whole + "\n".join(blocks) + "\n--b\nContent-Type: text/rfc822-headers\n\nMessage-ID: <1@example.test>\nSubject: hi\n--b--\n")


FAILED = "Final-Recipient: rfc822; joe@far.example\nAction: failed\nStatus: 5.1.1 (no such user)\nDiagnostic-Code: smtp; 550 5.1.1 unknown\nRemote-MTA: dns; mx.far.example\n"
DELAYED = "Original-Recipient: rfc822;joe@far.example\nFinal-Recipient: rfc822; j@inner.example\nAction: delayed\nStatus: 4.4.1\n"
COMPLAINT = "Feedback-Type: abuse\nUser-Agent: Far/1\nVersion: 1\nOriginal-Rcpt-To: <joe@far.example>\nSource-IP: 192.0.2.1\n"


@pytest.fixture
def plugin() -> Plugin:
    return Plugin(Config(addresses=["bounces@example.test"]), make_services())


def events_of(plugin: Plugin, message: Message, *recipients: str) -> list[dict[str, Any]]:
    transaction = make_transaction("", recipients=recipients or (ADDRESS,))
    plugin.check_message(make_session(), transaction, message)
    found: list[dict[str, Any]] = transaction.notes.get("report", [])
    return found


def test_failure_is_an_event(plugin: Plugin) -> None:
    (event,) = events_of(plugin, make_message(report(FAILED)))
    assert event == {"event": "bounced", "source": "report", "recipient": "joe@far.example", "address": ADDRESS, "reported": "joe@far.example",
                     "final_recipient": "joe@far.example", "action": "failed", "status": "5.1.1", "reply": "550 5.1.1 unknown", "remote": "mx.far.example",
                     "reporter": "mx.far.example", "envid": "E1", "message_id": "<1@example.test>", "subject": "hi"}


def test_report_to_many_addresses_is_read_once(plugin: Plugin, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Message] = []
    monkeypatch.setattr(bounce_parser, "read_report", lambda message: read.append(message) or [])
    events_of(plugin, make_message(report(FAILED)), *(f"bounces+n{number}=far.example@example.test" for number in range(5)))
    assert len(read) == 1


def test_delay_and_complaint_are_events(plugin: Plugin) -> None:
    (event,) = events_of(plugin, make_message(report(DELAYED)))
    assert event["event"] == "deferred" and event["final_recipient"] == "j@inner.example" and event["status"] == "4.4.1"
    (event,) = events_of(plugin, make_message(report(COMPLAINT, kind="message/feedback-report", whole="")))
    assert event["event"] == "complained" and event["feedback_type"] == "abuse" and event["recipient"] == "joe@far.example"
    assert not events_of(plugin, make_message(report(COMPLAINT.replace("abuse", "not-spam"), kind="message/feedback-report", whole="")))


def test_address_says_whom_it_is_about(plugin: Plugin) -> None:
    other = FAILED.replace("joe@far.example", "inner@hidden.example")
    assert events_of(plugin, make_message(report(other)))[0]["recipient"] == "joe@far.example"
    (event,) = events_of(plugin, make_message(report(other, FAILED)))
    assert event["reported"] == "joe@far.example"
    assert not events_of(plugin, make_message(report(FAILED)), "joe@example.test")
    assert not events_of(plugin, make_message(report(FAILED)), "bounces@example.test")


@pytest.mark.parametrize(("kind", "outcome", "event"), [(bounce.FAILED, failed("no such user", enhanced="5.1.1"), "bounced"), (bounce.DELAYED, deferred("later"), "deferred")])
def test_what_gmta_writes_is_what_it_reads(plugin: Plugin, kind: str, outcome: Outcome, event: str) -> None:
    envelope = make_envelope(ADDRESS, recipients=("joe@far.example",))
    made = bounce.build(kind, envelope, [bounce.Notice(envelope.recipients[0], outcome)], make_message(), hostname="mx.example.test", queue_id="Q2", now=START_AT)
    (found,) = events_of(plugin, made)
    assert found["event"] == event and found["status"] == outcome.reply.enhanced and found["reported"] == "joe@far.example"


@pytest.mark.parametrize("text", [
    "Subject: x\n\nhello\n", report(), report("Action: failed\n"), report("Final-Recipient: rfc822; a@b\n"), report(FAILED.replace("failed", "exploded")),
    report("\n\n\n", whole=""), report("\x00\xff", whole=""), "Content-Type: multipart/report; boundary=b\n\n--b\nContent-Type: message/delivery-status\n--b--\n",
    "Content-Type: multipart/report\n\nx\n", report("x" * 10, kind="message/feedback-report", whole="")])
def test_what_is_no_report_does_nothing(plugin: Plugin, text: str) -> None:
    assert events_of(plugin, make_message(text)) == []


def test_report_in_a_file(plugin: Plugin, tmp_path: Path) -> None:
    raw = report(FAILED).replace("\n", "\r\n").encode()
    assert events_of(plugin, make_file_message(tmp_path / "m", raw))[0]["event"] == "bounced"
    message = make_file_message(tmp_path / "gone", raw)
    (tmp_path / "gone").unlink()
    assert events_of(plugin, message) == []


@pytest.mark.parametrize(("detail", "recipient"), [
    ("joe=far.example", "joe@far.example"), ("a=b=far.example", "a=b@far.example"), ("token", "token"), ("=", "="), ("a b=far.example", '"a b"@far.example')])
def test_verp(detail: str, recipient: str) -> None:
    assert verp_recipient(detail) == recipient


def test_recipients_are_permitted_for_the_transport() -> None:
    services = make_services({"transport:reports": {"type": "discard"}})

    def permit(address: str, **keys: Any) -> Any:
        plugin = Plugin(Config(addresses=["bounces@example.test"], **keys), services)
        return plugin.permit_rcpt(make_session(), make_transaction(), Recipient(Address.parse(address)))

    assert permit(ADDRESS).transport is None
    assert permit("BOUNCES+x@EXAMPLE.test", transport="reports").transport == "reports"
    assert permit(ADDRESS, accept=False) is None
    assert permit("bounces@example.test") is permit("bounces+@example.test") is permit("bounces+x@other.example") is None
    with pytest.raises(ValueError, match="transport"):
        Plugin(Config(transport="nowhere"), services)
