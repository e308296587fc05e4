"""Forwarding, automatic replies and reports that come back, in a running gmta beside another one."""

from __future__ import annotations

import email
import re
import smtplib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import Gmta, until

pytestmark = pytest.mark.e2e

MAIL = b"From: ann@sender.example\r\nTo: list@example.test\r\nSubject: hello\r\nMessage-ID: <1@sender.example>\r\n\r\nhi\r\n"


@pytest.fixture
def far(directory: Path) -> Iterator[Gmta]:
    """The host of far.example and of sender.example."""
    (directory / "far").mkdir()
    server = Gmta(directory / "far")
    server.serve(server.configuration("""
[gmta]
hostname = mx.far.example
[domains]
local = far.example sender.example
[plugins]
enable = mailboxes
[route]
* = mailbox
"""))
    yield server
    server.stop()


def serve(gmta: Gmta, far: Gmta) -> None:
    (gmta.directory / "aliases").write_text("list: joe@far.example, here\nout: joe@far.example\n")
    (gmta.directory / "replies").mkdir()
    (gmta.directory / "replies/away@example.test").write_text("Subject: Away\n\nBack on Monday.\n")
    gmta.serve(gmta.configuration(f"""
[domains]
relay_from =
[plugins]
enable = bounce_parser forward autoreply mailboxes access
[plugin:bounce_parser]
addresses = bounces@example.test
[plugin:forward]
secret = a-secret-of-good-length
[plugin:autoreply]
directory = replies
[plugin:mailboxes]
aliases_file = aliases
[transport:forwarded]
type = forward
[transport:outbound]
type = relay
host = 127.0.0.1:{far.port}
[route]
* = outbound
"""))


def send(gmta: Gmta, sender: str, to: str, message: bytes = MAIL) -> None:
    with smtplib.SMTP("127.0.0.1", gmta.port, timeout=30) as client:
        client.ehlo("client.example")
        client.sendmail(sender, [to], message)


def arrived(server: Gmta, domain: str, local: str) -> bytes:
    new = server.mail / domain / local / "new"
    until(lambda: new.is_dir() and any(new.iterdir()), f"message for {local}@{domain}")
    return next(iter(new.iterdir())).read_bytes()


def test_forwarded_mail_has_a_sender_of_ours_and_its_report_comes_back(gmta: Gmta, far: Gmta) -> None:
    serve(gmta, far)
    send(gmta, "ann@sender.example", "list@example.test")
    assert arrived(gmta, "example.test", "here").startswith(b"Return-Path: <ann@sender.example>\n")  # the copy that stays keeps its sender
    forwarded = arrived(far, "far.example", "joe")
    match = re.match(rb"Return-Path: <(SRS0=\w+=\w+=sender\.example=ann@mx\.example\.test)>\n", forwarded)
    assert match is not None, forwarded[:200]
    assert b"\nDelivered-To: list@example.test\n" in forwarded
    rewritten = match[1].decode()
    with pytest.raises(smtplib.SMTPRecipientsRefused):
        send(gmta, "spammer@far.example", rewritten)
    with pytest.raises(smtplib.SMTPRecipientsRefused):
        send(gmta, "", rewritten.replace("=ann@", "=victim@"))
    send(gmta, "", rewritten, b"From: <>\r\nSubject: report\r\n\r\nit bounced\r\n")
    assert b"it bounced" in arrived(far, "sender.example", "ann")


def test_mail_that_goes_round_is_refused(gmta: Gmta, far: Gmta) -> None:
    serve(gmta, far)
    with pytest.raises(smtplib.SMTPDataError) as loop:
        send(gmta, "ann@sender.example", "out@example.test", b"Delivered-To: out@example.test\r\n" + MAIL)
    assert loop.value.smtp_code == 554 and b"5.4.6" in loop.value.smtp_error


def test_somebody_away_answers_once(gmta: Gmta, far: Gmta) -> None:
    serve(gmta, far)
    mail = MAIL.replace(b"list@", b"away@")
    send(gmta, "ann@sender.example", "away@example.test", mail)
    answer = arrived(far, "sender.example", "ann")
    message = email.message_from_bytes(answer)
    assert answer.startswith(b"Return-Path: <>\n")
    assert message["Subject"] == "Away" and message["In-Reply-To"] == "<1@sender.example>" and message["Auto-Submitted"] == "auto-replied"
    send(gmta, "ann@sender.example", "away@example.test", mail)
    gmta.arrived("away", 2)
    log = gmta.directory / "gmta.log"
    until(lambda: log.read_text().count(" queued ") >= 3, "three messages queued")  # two mails, one answer
    assert log.read_text().count("automatic reply") == 1


def test_report_to_an_address_of_ours_is_read(gmta: Gmta, far: Gmta) -> None:
    serve(gmta, far)
    report = (b"From: MAILER-DAEMON@far.example\r\nContent-Type: multipart/report; report-type=delivery-status; boundary=b\r\n\r\n--b\r\n\r\nno\r\n--b\r\n"
              b"Content-Type: message/delivery-status\r\n\r\nReporting-MTA: dns; mx.far.example\r\n\r\nFinal-Recipient: rfc822; joe@far.example\r\nAction: failed\r\nStatus: 5.1.1\r\n--b--\r\n")
    send(gmta, "", "bounces+joe=far.example@example.test", report)
    log = gmta.directory / "gmta.log"
    until(lambda: "report read" in log.read_text(), "a line in the log")
    assert "recipient=joe@far.example" in log.read_text()
