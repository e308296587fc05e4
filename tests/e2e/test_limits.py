"""Limits that workers keep together, and what submission does to a message, against a running server with two workers."""

from __future__ import annotations

import smtplib
from collections.abc import Iterator

import pytest

from tests.e2e.conftest import DEADLINE_S, Gmta, until

CONFIG = """
[gmta]
workers = 2
[domains]
relay_to = backup.test
etrn_from = 127.0.0.0/8
[plugins]
enable = rate_limit, mailboxes, access
[plugin:mailboxes]
accept = listed
mailboxes = user
[plugin:rate_limit]
messages_per_ip = 5/d
new_connections_per_ip = 0
connections_per_ip = 8
unknown_recipients_per_session = 4
unknown_recipients_per_ip = 10/d
[transport:outbound]
type = relay
host = 127.0.0.1:1
[route]
* = outbound
"""


@pytest.fixture
def limited(gmta: Gmta) -> Iterator[Gmta]:
    gmta.serve(gmta.configuration(CONFIG))
    yield gmta


def connect(gmta: Gmta) -> smtplib.SMTP:
    client = smtplib.SMTP("127.0.0.1", gmta.port, timeout=DEADLINE_S)
    client.ehlo("client.example.com")
    return client


def log(gmta: Gmta) -> str:
    file = gmta.directory / "gmta.log"
    return file.read_text() if file.exists() else ""


def both_workers_serve(gmta: Gmta) -> None:
    until(lambda: log(gmta).count("worker started") == 2, "second worker")


def test_messages_of_an_address_are_counted_by_all_workers(limited: Gmta) -> None:
    both_workers_serve(limited)
    codes = []
    for _ in range(8):
        with connect(limited) as client:
            codes.append(client.mail("a@example.com")[0])
    assert codes == [250] * 5 + [450] * 3
    assert limited.stop() == 0
    limited.serve(limited.configuration(CONFIG))
    with connect(limited) as client:
        assert client.mail("a@example.com")[0] == 450  # a restart forgets nothing


def test_connections_are_counted_by_all_workers(limited: Gmta) -> None:
    both_workers_serve(limited)
    clients: list[smtplib.SMTP] = []
    refused = 0
    for _ in range(14):
        try:
            clients.append(connect(limited))
        except smtplib.SMTPConnectError as error:
            assert error.smtp_code == 421
            refused += 1
    # two that a worker has not told of yet may pass
    assert 8 <= len(clients) <= 10 and refused == 14 - len(clients)
    for client in clients:
        client.quit()

    def again() -> bool:
        try:
            connect(limited).quit()
        except smtplib.SMTPConnectError:
            return False
        return True

    until(again, "room for another connection")


def test_who_looks_for_recipients_is_sent_away(limited: Gmta) -> None:
    both_workers_serve(limited)
    with connect(limited) as client:
        client.mail("a@example.com")
        codes = [client.rcpt(f"nobody{number}@example.test")[0] for number in range(6)]
        assert codes == [550] * 4 + [450] * 2
        assert client.rcpt("user@example.test")[0] == 450

    def sent_away() -> bool:
        try:
            with connect(limited) as client:
                client.mail("a@example.com")
                client.rcpt("nobody@example.test")
                client.rcpt("nobody2@example.test")
        except smtplib.SMTPConnectError as error:
            assert b"unknown recipients" in error.smtp_error  # type: ignore[operator]
            return True
        return False

    until(sent_away, "end to the search")


def test_etrn(limited: Gmta) -> None:
    with connect(limited) as client:
        assert client.has_extn("etrn")
        assert client.docmd("ETRN", "backup.test")[0] == 251
        client.sendmail("a@example.com", ["x@backup.test"], b"Subject: x\r\n\r\nx\r\n")
        until(lambda: "info deferred" in log(limited), "attempt")
        until(lambda: client.docmd("ETRN", "backup.test")[0] == 253, "mail that waits")
        until(lambda: log(limited).count("info deferred") >= 2, "attempt that was asked for")
