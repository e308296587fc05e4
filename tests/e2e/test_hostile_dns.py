"""A name server that never answers holds up the mail that asks it, and nobody else's; that mail is settled within its bound."""

from __future__ import annotations

import select
import smtplib
import socket
from contextlib import ExitStack

import pytest

from gmta.testing.zone import Zone
from tests.e2e.conftest import DEADLINE_S, Gmta, until
from tests.engine.test_verify_dkim import RSA, signed

pytestmark = pytest.mark.e2e

STALLED = 10


def records() -> dict[str, dict[str, object]]:
    """example.com answers; dead.example is silent, with every name under it."""
    return {
        "example.com": {"TXT": ["v=spf1 ip4:127.0.0.1 -all"]}, "_dmarc.example.com": {"TXT": ["v=DMARC1; p=reject"]},
        RSA.record_name: {"TXT": [[RSA.record()[:200], RSA.record()[200:]]]},
        "dead.example": {"timeout": True}, "*.dead.example": {"timeout": True}, "_dmarc.dead.example": {"timeout": True},
    }


def serve(gmta: Gmta, dns: str, timeout: str) -> None:
    gmta.serve(gmta.configuration(f"""
[domains]
relay_from = 192.0.2.0/24
[plugins]
enable = mailboxes, access, spf, dkim_verify, dmarc
[dns]
servers = {dns}
timeout = {timeout}
"""))


def test_others_are_served_while_a_name_server_is_silent(gmta: Gmta) -> None:
    zone = Zone(records())
    with zone.serve() as names, ExitStack() as stack:
        serve(gmta, names.address, "20s")
        stalled = []
        for number in range(STALLED):
            link = stack.enter_context(socket.create_connection(("127.0.0.1", gmta.port), DEADLINE_S))
            link.recv(1000)
            link.sendall(b"EHLO helo.dead.example\r\n")
            link.recv(1000)
            link.sendall(b"MAIL FROM:<alice@n%d.dead.example>\r\n" % number)
            stalled.append(link)
        until(lambda: len({name for name, kind in tuple(zone.asked) if kind == "TXT" and name.endswith(".dead.example")}) == STALLED, "questions of all")
        with smtplib.SMTP("127.0.0.1", gmta.port, timeout=DEADLINE_S) as client:
            client.sendmail("alice@example.com", ["bob@example.test"], signed())
        assert not select.select(stalled, [], [], 0)[0]
        (file,) = gmta.arrived("bob")
        assert {b"spf=pass", b"dkim=pass", b"dmarc=pass"} <= set(file.read_bytes().replace(b";", b" ").split())


def test_mail_whose_names_are_silent_is_settled(gmta: Gmta) -> None:
    with Zone(records()).serve() as names:
        serve(gmta, names.address, "100ms")
        raw = signed().replace(b"\r\nFrom: Alice <alice@example.com>", b"\r\nFrom: Alice <alice@n.dead.example>")
        with smtplib.SMTP("127.0.0.1", gmta.port, "helo.dead.example", timeout=DEADLINE_S) as client:
            with pytest.raises(smtplib.SMTPDataError, match=r"451.*DMARC can't be judged now"):
                client.sendmail("a@n.dead.example", ["bob@example.test"], raw)
            client.sendmail("alice@example.com", ["bob@example.test"], signed())
        (file,) = gmta.arrived("bob")
        assert b"dmarc=pass" in file.read_bytes()
