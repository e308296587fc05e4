"""What senders are told: gmta as a process relays to scripted hosts, and its reports are read in the senders' Maildirs."""

from __future__ import annotations

import email
import email.policy
import json
import re
import smtplib
from collections.abc import Callable, Iterator
from email.message import EmailMessage
from typing import Any

import pytest

from gmta.testing.peer import Peer
from gmta.testing.zone import Zone
from tests.e2e.conftest import Gmta, until

pytestmark = pytest.mark.e2e

Send = Callable[..., str]
UNKNOWN = "550 5.1.1 <rcpt@example.org> unknown user"
TEXT = "From: a@example.test\r\nSubject: hello\r\n\r\nbody of the case\r\n"


@pytest.fixture
def remote() -> Iterator[Peer]:
    with Peer() as peer:
        yield peer


@pytest.fixture
def send(gmta: Gmta, remote: Peer) -> Iterator[Send]:
    """Serves, relaying to `remote`, the one MX host of example.org; sends from sender@example.test and returns the queue id."""
    zone = Zone({"example.org": {"MX": (10, "mx1.example.org")}, "mx1.example.org": {"A": remote.host}})
    with zone.serve() as server:
        gmta.serve(gmta.configuration(f"""
[domains]
relay_from = 127.0.0.1/32
relay_to = example.org
[transport:outbound]
type = relay
port = {remote.port}
allow_loopback = yes
[route]
* = outbound
[queue]
retry = 1s 2s 4s
[queue:late.example.org]
lifetime = 2s
[dns]
servers = {server.address}
"""))
        zone["late.example.org"] = {"MX": (10, "mx1.example.org")}

        def client(*to: str, text: str | bytes = TEXT, mail: tuple[str, ...] = (), rcpt: tuple[str, ...] = (), source: str = "127.0.0.1") -> str:
            with smtplib.SMTP("127.0.0.1", gmta.port, source_address=(source, 0)) as smtp:
                smtp.ehlo("client.example.test")
                code, said = smtp.mail("sender@example.test", ["BODY=8BITMIME", *mail])
                assert code == 250, said
                for address in to or ("rcpt@example.org",):
                    code, said = smtp.rcpt(address, list(rcpt))
                    assert code == 250, said
                code, said = smtp.data(text.encode() if isinstance(text, str) else text)
                assert code == 250, said
                return said.decode().split()[-1]

        yield client


def report(gmta: Gmta) -> tuple[bytes, EmailMessage, dict[str, str], list[dict[str, str]]]:
    """The one report that has come: octets, parsed, the fields about the message, those about each recipient."""
    (path,) = gmta.arrived("sender")
    raw = path.read_bytes()
    parsed = email.message_from_bytes(raw, policy=email.policy.default)
    assert isinstance(parsed, EmailMessage)
    assert parsed.get_content_type() == "multipart/report" and parsed["Content-Type"].params["report-type"] == "delivery-status"
    assert parsed["Return-Path"] == "<>" and parsed["Auto-Submitted"] == "auto-replied" and parsed["Message-ID"] and parsed["Date"]
    assert "sender@example.test" in parsed["To"]
    human, machine, *_ = parsed.iter_parts()
    assert human.get_content_charset() and machine.get_content_type() == "message/delivery-status"
    message, *recipients = [{name: " ".join(str(value).split()) for name, value in block.items()} for block in machine.get_payload()]
    assert message["Reporting-MTA"] == "dns; mx.example.test"
    return raw, parsed, message, recipients


def queued(gmta: Gmta) -> list[dict[str, Any]]:
    return json.loads(gmta.command("queue", "list", "--json").stdout)


def gone(gmta: Gmta) -> None:
    until(lambda: not queued(gmta), "empty queue")


def test_an_unknown_user(gmta: Gmta, send: Send, remote: Peer) -> None:
    remote.replies["RCPT"] = UNKNOWN
    send()
    raw, parsed, _, (group,) = report(gmta)
    assert group["Final-Recipient"] == "rfc822;rcpt@example.org" and group["Action"] == "failed" and group["Status"] == "5.1.1"
    assert group["Remote-MTA"] == "dns; mx1.example.org" and group["Diagnostic-Code"] == f"smtp; {UNKNOWN}"
    human, _, returned = parsed.iter_parts()
    assert UNKNOWN in " ".join(human.get_content().split()) and "What to do:" in human.get_content()
    assert returned.get_content_type() == "message/rfc822" and b"body of the case" in raw
    gone(gmta)


def test_three_recipients_are_one_report(gmta: Gmta, send: Send, remote: Peer) -> None:
    remote.replies["RCPT"] = "550 5.1.1 no"
    send("a@example.org", "b@example.org", "c@example.org")
    _, _, _, groups = report(gmta)
    assert [group["Final-Recipient"] for group in groups] == [f"rfc822;{name}@example.org" for name in "abc"]
    gone(gmta)


def test_success_where_the_next_hop_knows_no_dsn(gmta: Gmta, send: Send, remote: Peer) -> None:
    send(mail=("RET=FULL", "ENVID=x"), rcpt=("NOTIFY=SUCCESS,FAILURE", "ORCPT=rfc822;rcpt@example.org"))
    _, _, _, (group,) = report(gmta)
    assert group["Action"] == "relayed" and group["Status"].startswith("2.")
    assert not any(re.search("NOTIFY|ORCPT|RET=|ENVID", line) for line in remote.commands())


def test_dsn_goes_on_to_a_next_hop_that_knows_it(gmta: Gmta, send: Send, remote: Peer) -> None:
    remote.keywords.append("DSN")
    send(mail=("RET=HDRS", "ENVID=QQ+2B314"), rcpt=("NOTIFY=SUCCESS,FAILURE", "ORCPT=rfc822;user+2Btag@example.org"))
    gone(gmta)
    mail, rcpt = (next(line for line in remote.commands() if line.startswith(verb)) for verb in ("MAIL", "RCPT"))
    assert "RET=HDRS" in mail and "ENVID=QQ+2B314" in mail
    assert "NOTIFY=FAILURE,SUCCESS" in rcpt and "ORCPT=rfc822;user+2Btag@example.org" in rcpt
    assert not (gmta.mail / "example.test/sender/new").exists()  # success is the next hop's to report


def test_header_only_and_xtext_decoded(gmta: Gmta, send: Send, remote: Peer) -> None:
    remote.replies["RCPT"] = UNKNOWN
    send(mail=("RET=HDRS", "ENVID=QQ+2B314"), rcpt=("ORCPT=rfc822;user+2Btag@example.org",))
    raw, parsed, message, (group,) = report(gmta)
    assert message["Original-Envelope-Id"] == "QQ+314" and group["Original-Recipient"] == "rfc822;user+tag@example.org"
    assert list(parsed.iter_parts())[2].get_content_type() == "text/rfc822-headers" and b"body of the case" not in raw


def test_strangers_get_their_header_back(gmta: Gmta, send: Send, remote: Peer) -> None:
    remote.replies["RCPT"] = UNKNOWN
    send(mail=("RET=FULL",), source="127.0.0.9")
    raw, parsed, _, _ = report(gmta)
    assert list(parsed.iter_parts())[2].get_content_type() == "text/rfc822-headers" and b"body of the case" not in raw


def test_utf8_that_goes_back_is_declared(gmta: Gmta, send: Send, remote: Peer) -> None:
    remote.replies["RCPT"] = UNKNOWN
    send(text="Subject: grüße\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Transfer-Encoding: 8bit\r\n\r\ngrüße\r\n")
    raw, parsed, _, _ = report(gmta)
    returned = list(parsed.iter_parts())[2]
    assert returned["Content-Transfer-Encoding"] == "8bit" and raw.split(b"Content-Type: message/rfc822")[0].isascii()


def test_never_means_never(gmta: Gmta, send: Send, remote: Peer) -> None:
    remote.replies["RCPT"] = UNKNOWN
    send(rcpt=("NOTIFY=NEVER",))
    gone(gmta)
    assert not (gmta.mail / "example.test/sender/new").exists()


def test_too_late(gmta: Gmta, send: Send, remote: Peer) -> None:
    remote.replies["MAIL"] = "451 later"
    queue_id = send("rcpt@late.example.org")
    _, _, _, (group,) = report(gmta)
    assert group["Action"] == "failed" and group["Status"] == "5.4.7" and group["Diagnostic-Code"] == "smtp; 451 later"
    gone(gmta)
    assert gmta.command("trace", queue_id).stdout.count(b"451 later") >= 2


def test_odd_codes_go_by_their_first_digit(gmta: Gmta, send: Send, remote: Peer) -> None:
    remote.replies["RCPT TO:<wait"] = "422 4.2.2 greylisted"
    remote.replies["RCPT TO:<never"] = "599 gone"
    send("wait@example.org", "never@example.org")
    _, _, _, (group,) = report(gmta)
    assert group["Final-Recipient"] == "rfc822;never@example.org"
    states = {recipient["address"]: recipient for recipient in queued(gmta)[0]["recipients"]}
    assert states["wait@example.org"]["status"] == "queued" and states["wait@example.org"]["attempts"] >= 1
    assert states["wait@example.org"]["last_reply"] == "422 4.2.2 greylisted"


def test_a_loop_is_not_sent_on(gmta: Gmta, send: Send, remote: Peer) -> None:
    send(text="Received: x\r\n" * 101 + "Subject: loop\r\n\r\nbody\r\n")
    _, _, _, (group,) = report(gmta)
    assert group["Status"] == "5.4.6" and remote.connections == 0


def test_a_deferred_message_is_sent_again_as_it_was(gmta: Gmta, send: Send, remote: Peer) -> None:
    remote.replies["final"] = "450 grey"
    send()
    until(lambda: len(remote.messages) >= 2, "second attempt")
    assert len(set(remote.messages)) == 1
    assert [len(session.messages) for session in remote.sessions[:2]] == [1, 1]  # each attempt in a session of its own
    (message,) = queued(gmta)
    assert message["recipients"][0]["attempts"] >= 1 and message["recipients"][0]["next_attempt_at"] > message["received_at"]
    assert message["recipients"][0]["last_reply"] == "450 grey"
