"""plugins/auth_guard.py: failures counted, addresses locked out, users not."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any

import gevent
import pytest

from gmta import Reply, hookimpl
from gmta.hookspecs import Credentials
from gmta.mail.reply import AUTH_FAILED, AUTH_SYNTAX
from gmta.mail.session import Session
from gmta.testing import FakeClock, MemoryServer, load_plugin, make_services, make_session, make_transaction, run

USER = "user@example.test"


class Guarded:
    """A guard, and what happens before and behind it."""

    def __init__(self, **keys: Any) -> None:
        self.services = make_services(clock=FakeClock())
        self.serial = count()
        self.plugin = load_plugin("auth_guard", self.services, delay="0", **keys)

    def ask(self, ip: str, user: str = USER) -> tuple[Reply | None, Session]:
        session = make_session(role="submission", peer_ip=ip, tls=True)
        session.id = f"s{next(self.serial)}"
        verdict = self.plugin.permit_auth(session, Credentials("PLAIN", user, "x"))
        return (None if verdict is None else verdict.reply), session

    def fail(self, ip: str, user: str = USER, reply: Reply = AUTH_FAILED) -> Reply | None:
        said, session = self.ask(ip, user)
        self.plugin.on_refused(session, None, "auth", said or reply)
        return said

    def succeed(self, ip: str, user: str = USER) -> None:
        said, session = self.ask(ip, user)
        assert said is None
        session.user = user
        self.plugin.check_mail(session, make_transaction())

    def welcome(self, ip: str, role: str = "submission") -> bool:
        return self.plugin.check_connect(make_session(role=role, peer_ip=ip)) is None


@pytest.fixture
def guard() -> Iterator[Guarded]:
    made = Guarded(address_failures=3, user_failures=5)
    yield made
    made.services.close()


def test_an_address_is_locked_out_and_let_in_again(guard: Guarded) -> None:
    for number in range(3):
        assert guard.welcome("192.0.2.1") and guard.fail("192.0.2.1", f"u{number}@example.test") is None
    said = guard.ask("192.0.2.1", "other@example.test")[0]
    assert said is not None and (said.code, said.enhanced) == (454, "4.7.0")
    assert not guard.welcome("192.0.2.1") and guard.welcome("192.0.2.1", "mx") and guard.welcome("192.0.2.2")
    assert guard.ask("192.0.2.2")[0] is None
    assert guard.services.log.of("locked out")[0]["ip"] == "192.0.2.1"
    guard.services.clock.advance(16 * 60)
    assert guard.welcome("192.0.2.1") and guard.ask("192.0.2.1")[0] is None


def test_failures_are_forgotten_after_the_window(guard: Guarded) -> None:
    guard.fail("192.0.2.1")
    guard.fail("192.0.2.1")
    guard.services.clock.advance(16 * 60)
    guard.fail("192.0.2.1")
    assert guard.ask("192.0.2.1")[0] is None


def test_ipv6_counts_by_network(guard: Guarded) -> None:
    for number in range(3):
        guard.fail(f"2001:db8::{number}", f"u{number}@example.test")
    assert guard.ask("2001:db8::99")[0] is not None and guard.ask("2001:db8:0:1::99")[0] is None


def test_many_addresses_at_one_user(guard: Guarded) -> None:
    """The user gets in, from an address that is known and from a new one; each guesser has one try."""
    guard.succeed("198.51.100.1")
    for number in range(5):
        guard.fail(f"192.0.2.{number}", "USER@EXAMPLE.TEST.")
    for number in range(5, 9):
        assert guard.fail(f"192.0.2.{number}") is None
        assert guard.ask(f"192.0.2.{number}")[0] is not None
    assert guard.ask("198.51.100.1")[0] is None and guard.ask("203.0.113.1")[0] is None
    assert guard.ask("192.0.2.7", "second@example.test")[0] is None


def test_a_known_user_behind_a_locked_address(guard: Guarded) -> None:
    guard.succeed("192.0.2.1")
    for number in range(9):
        guard.fail("192.0.2.1", f"u{number}@example.test")
    assert guard.welcome("192.0.2.1") and guard.ask("192.0.2.1")[0] is None and guard.ask("192.0.2.1", "u1@example.test")[0] is not None
    for _ in range(15):
        guard.fail("192.0.2.1")
    assert guard.ask("192.0.2.1")[0] is not None


def test_only_wrong_passwords_count(guard: Guarded) -> None:
    for _ in range(9):
        guard.fail("192.0.2.1", reply=AUTH_SYNTAX)
    assert guard.ask("192.0.2.1")[0] is None


def test_in_the_whole_server() -> None:
    server = MemoryServer("auth_guard", keys={"address_failures": 2, "delay": "0s"})
    try:
        log_in = r"""
listener: submission
S: 220
C: EHLO client.example.com
S: 250
C: STARTTLS
S: 220
STARTTLS
C: EHLO client.example.com
S: 250
HAS: AUTH PLAIN LOGIN
"""
        wrong = "C: AUTH PLAIN \\{base64 \\0user@example.test\\0wrong}\nS: 535 5.7.8\n"
        server.play(log_in + wrong + wrong + "C: AUTH PLAIN \\{base64 \\0user@example.test\\0secret}\nS: 454 4.7.0\n"
                    "C: AUTH PLAIN \\{base64 \\0user@example.test\\0secret}\nS: 421 4.7.0\nEOF\n")
        server.play("listener: submission\nS: 421 4.7.0 Too many failed logins*\nEOF\n")
        server.clock.advance(16 * 60)
        server.play(log_in + "C: AUTH PLAIN \\{base64 \\0user@example.test\\0secret}\nS: 235\nC: QUIT\nS: 221\n")
    finally:
        server.close()


def test_a_user_whom_the_back_end_names_otherwise_is_known_as_typed(guard: Guarded) -> None:
    said, session = guard.ask("192.0.2.1", "alice")
    assert said is None
    session.user = "alice@example.test"
    guard.plugin.check_mail(session, make_transaction())
    for number in range(3):
        guard.fail("192.0.2.1", f"u{number}@example.test")
    assert guard.ask("192.0.2.1", "alice")[0] is None and guard.ask("192.0.2.1", "alice@example.test")[0] is None
    assert guard.ask("192.0.2.1", "")[0] is not None


def test_who_is_locked_out_does_not_stay_connected(guard: Guarded) -> None:
    for number in range(3):
        guard.fail("192.0.2.1", f"u{number}@example.test")
    session = make_session(role="submission", peer_ip="192.0.2.1", tls=True)
    codes = [guard.plugin.permit_auth(session, Credentials("PLAIN", USER, "x")).reply.code for _ in range(2)]
    assert codes == [454, 421]


def test_no_more_tries_at_a_time_than_are_left(guard: Guarded) -> None:
    """Who asks with a hundred passwords at once has no more of them than one after the other."""
    asked = [gevent.spawn(guard.ask, "192.0.2.1", f"u{number}@example.test") for number in range(6)]
    gevent.sleep(0)
    assert [one.ready() for one in asked] == [True] * 3 + [False] * 3
    asked[0].value[1].user = "u0@example.test"  # this one was right
    gevent.joinall(asked[3:4], timeout=5)
    assert asked[3].value[0] is None and not asked[4].ready()
    for one in (asked[1], asked[2], asked[3]):
        guard.plugin.on_refused(one.value[1], None, "auth", AUTH_FAILED)
    gevent.joinall(asked, timeout=5)
    assert [one.value[0].code for one in asked[4:]] == [454, 454]
    for one in asked:
        guard.plugin.on_session_closed(one.value[1])
    assert guard.plugin._trying == guard.plugin._address == {}


def test_a_client_that_breaks_off_gives_its_try_back(guard: Guarded) -> None:
    for _ in range(9):
        said, session = guard.ask("192.0.2.1")
        assert said is None
        guard.plugin.on_refused(session, None, "auth", AUTH_SYNTAX)
    for _ in range(9):
        said, session = guard.ask("192.0.2.1")
        assert said is None
        guard.plugin.on_session_closed(session)


class Noting:
    """Notes the first client of a session."""

    @hookimpl
    def check_helo(self, session: Session) -> None:
        session.notes.setdefault("first", session.peer_ip)


def test_what_plugins_noted_of_a_proxy_is_not_its_clients() -> None:
    played = run(Noting(), """
S: 220
C: EHLO proxy.example
S: 250
C: XCLIENT ADDR=198.51.100.7
S: 220
C: EHLO client.example.com
S: 250
C: QUIT
S: 221
""", given="[listener:mx]\naddress = 127.0.0.1:2525\nxclient_from = 192.0.2.1\n")
    assert played.session.notes["first"] == "198.51.100.7"
