"""plugins/rate_limit.py: each bound, and that workers count together."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gmta.config import ConfigError
from gmta.mail.reply import Reply
from gmta.mail.session import Session
from gmta.services.state import MemoryState
from gmta.testing import FakeClock, load_plugin, make_message, make_services, make_session, make_transaction, run
from gmta_plugins.rate_limit import LAST, Allowance, Ledger


class Workers:
    """Plugins of several workers that share their state; greenlets are kept, not run."""

    def __init__(self, count: int = 1, given: Any = "", **keys: Any) -> None:
        self.clock = FakeClock(1767607200.0)
        state = MemoryState(self.clock)
        self.plugins = []
        self._number = 0
        self.calls = 0
        add_all = state.add_all

        def counted(amounts: Any) -> list[float]:
            self.calls += 1
            return add_all(amounts)

        state.add_all = counted  # type: ignore[method-assign]
        for _ in range(count):
            services = make_services(given, clock=self.clock)
            services._state = state
            services.spawn = lambda *_: None  # type: ignore[method-assign]
            self.plugins.append(load_plugin("rate_limit", services, **keys))

    def session(self, ip: str = "192.0.2.1", **facts: Any) -> Session:
        session = make_session(peer_ip=ip, **facts)
        self._number += 1
        session.id = f"s{self._number}"
        return session

    def flush(self) -> None:
        for plugin in self.plugins:
            plugin.on_worker_stopping()
        for plugin in self.plugins:
            plugin._presence.exchange()


def mail(plugin: Any, session: Session) -> str:
    verdict = plugin.check_mail(session, make_transaction())
    return "" if verdict is None else str(verdict.reply)[:9]


def test_messages_of_an_address_end_at_the_bound_whoever_counts() -> None:
    workers = Workers(2, messages_per_ip="5/h")
    session = workers.session()
    assert [mail(workers.plugins[number % 2], session) for number in range(7)] == [""] * 5 + ["450 4.7.1"] * 2
    workers.clock.advance(3600)
    assert mail(workers.plugins[0], session) == ""


def test_sessions_that_come_at_one_moment_count_together() -> None:
    """While one waits for what the state has of their address, another asks too."""
    workers = Workers(1, messages_per_ip="100/h")
    plugin = workers.plugins[0]
    state = plugin._ledger._state
    scan, inside = state.scan, False

    def slow(*args: Any) -> Any:
        nonlocal inside
        if not inside:
            inside = True
            assert mail(plugin, workers.session()) == ""
        return scan(*args)

    state.scan = slow
    assert mail(plugin, workers.session()) == ""
    workers.flush()
    assert [value for key, value in scan("rate:192.0.2.1:messages")] == [2]


def test_others_are_not_concerned() -> None:
    workers = Workers(1, {"domains": {"relay_from": "192.0.2.3"}}, messages_per_ip="1/h", messages_per_user="2/h", exempt="192.0.2.4")
    plugin = workers.plugins[0]
    first = workers.session()
    assert [mail(plugin, first), mail(plugin, first), mail(plugin, workers.session("192.0.2.2"))] == ["", "450 4.7.1", ""]
    known = workers.session("192.0.2.3", trusted=True)
    assert [mail(plugin, known) for _ in range(3)] == [mail(plugin, workers.session("192.0.2.4")) for _ in range(3)] == [""] * 3
    user = workers.session(user="Alice@example.test")
    again = workers.session("198.51.100.7", user="alice@example.test")
    assert [mail(plugin, user), mail(plugin, again), mail(plugin, user)] == ["", "", "450 4.7.1"]


def test_ipv6_counts_by_its_64() -> None:
    plugin = (workers := Workers(1, messages_per_ip="1/h")).plugins[0]
    assert mail(plugin, workers.session("2001:db8::1")) == ""
    assert mail(plugin, workers.session("2001:db8::2:1")) == "450 4.7.1"
    assert mail(plugin, workers.session("2001:db8:0:1::1")) == ""


def test_recipients_and_octets() -> None:
    workers = Workers(2, recipients_per_user="3/h", octets_per_user="1KB/d")
    session, transaction = workers.session(user="alice"), make_transaction()
    answers = [workers.plugins[number % 2].check_rcpt(session, transaction, transaction.recipients[0]) for number in range(4)]
    assert [verdict and verdict.reply.code for verdict in answers] == [None] * 3 + [450]
    message = make_message("From: a@b.test\n\n" + "x" * 600 + "\n")
    assert workers.plugins[0].check_message(session, transaction, message) is None
    assert workers.plugins[1].check_message(session, transaction, message).reply.code == 450
    assert workers.plugins[1].check_message(workers.session(), transaction, message) is None  # only users are counted
    small = make_message("From: a@b.test\n\n" + "x" * 300 + "\n")
    assert workers.plugins[1].check_message(session, transaction, small) is None  # what was refused has not been counted


def test_new_connections_of_a_minute() -> None:
    workers = Workers(2, new_connections_per_ip="3/m")
    answers = [workers.plugins[number % 2].check_connect(workers.session()) for number in range(4)]
    assert [verdict and str(verdict.reply)[:9] for verdict in answers] == [None] * 3 + ["421 4.7.0"]
    workers.clock.advance(60)
    assert workers.plugins[0].check_connect(workers.session()) is None


def test_connections_at_a_time() -> None:
    workers = Workers(2, {"gmta": {"workers": 2}}, connections_per_ip=4, connections_per_subnet=6)
    sessions = [workers.session() for _ in range(4)]
    for number, session in enumerate(sessions):
        assert workers.plugins[number % 2].check_connect(session) is None
    workers.flush()
    fifth = workers.session()
    assert workers.plugins[0].check_connect(fifth).reply.code == 421
    workers.plugins[0].on_session_closed(fifth)  # was not counted
    assert workers.plugins[0].check_connect(workers.session("192.0.2.9")) is None
    assert workers.plugins[0].check_connect(workers.session("192.0.2.9")) is None
    assert workers.plugins[0].check_connect(workers.session("192.0.2.10")).reply.code == 421  # the /24
    assert workers.plugins[1].check_connect(workers.session("198.51.100.1")) is None
    workers.plugins[1].on_session_closed(sessions[1])
    workers.flush()
    assert workers.plugins[0].check_connect(workers.session()) is None


def test_a_proxy_tells_whose_connection_it_is() -> None:
    """The address may change after the connection was counted (XCLIENT)."""
    workers = Workers(1, connections_per_ip=1)
    plugin, session = workers.plugins[0], workers.session()
    assert plugin.check_connect(session) is None
    session.peer_ip = "198.51.100.1"
    assert plugin.check_connect(session) is None  # asked again
    assert plugin.check_connect(workers.session("198.51.100.1")).reply.code == 421
    assert plugin.check_connect(workers.session()) is None
    session.peer_ip = "203.0.113.1"
    plugin.on_session_closed(session)
    assert plugin.check_connect(workers.session("198.51.100.1")) is None


def test_connections_of_a_worker_that_was_killed_are_forgotten() -> None:
    workers = Workers(2, {"gmta": {"workers": 2}}, connections_per_ip=2)
    for _ in range(2):
        assert workers.plugins[0].check_connect(workers.session()) is None
    workers.plugins[0]._presence.exchange()
    workers.plugins[1]._presence.exchange()
    assert workers.plugins[1].check_connect(workers.session()).reply.code == 421
    workers.clock.advance(11)
    assert workers.plugins[1].check_connect(workers.session()) is None


def test_unknown_recipients_of_a_session_and_of_an_address() -> None:
    workers = Workers(2, unknown_recipients_per_session=2, unknown_recipients_per_ip="4/h")
    plugin = workers.plugins[0]
    transaction = make_transaction()
    for _ in range(2):
        session = workers.session()
        assert plugin.check_connect(session) is None
        for _ in range(2):
            assert plugin.permit_rcpt(session, transaction, transaction.recipients[0]) is None
            plugin.on_refused(session, transaction, "rcpt", Reply(550, "5.1.1", "no"))
        assert plugin.permit_rcpt(session, transaction, transaction.recipients[0]).reply.code == 450
        assert mail(plugin, session) == "421 4.7.0"
        plugin.on_session_closed(session)
    assert workers.plugins[1].check_connect(workers.session()) is None  # has not heard of it yet
    workers.plugins[0].on_worker_stopping()
    workers.clock.advance(1)
    assert [each.check_connect(workers.session()).reply.code for each in workers.plugins] == [421, 421]
    assert workers.plugins[1].check_connect(workers.session("192.0.2.2")) is None


def test_other_refusals_are_not_unknown_recipients() -> None:
    workers = Workers(1, unknown_recipients_per_session=1)
    plugin, session, transaction = workers.plugins[0], workers.session(), make_transaction()
    for stage, reply in (("rcpt", Reply(450, "4.7.1", "no")), ("rcpt", Reply(550, "5.7.1", "no")), ("mail", Reply(550, "5.1.1", "no"))):
        plugin.on_refused(session, transaction, stage, reply)
    plugin.on_refused(workers.session(user="alice"), transaction, "rcpt", Reply(550, "5.1.1", "no"))
    assert mail(plugin, session) == ""


def test_who_was_away_is_asked_for() -> None:
    workers = Workers(2, messages_per_ip="1000/h")
    session = workers.session()
    assert [mail(plugin, session) for plugin in workers.plugins] == ["", ""]
    for _ in range(2):
        assert all(mail(workers.plugins[0], session) == "" for _ in range(499))
        workers.flush()
    workers.clock.advance(6)
    assert mail(workers.plugins[1], session) == "450 4.7.1"


def test_no_more_clients_are_remembered_than_a_worker_can_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gmta_plugins.rate_limit.MOST", 10)
    workers = Workers(1, messages_per_ip="2/h")
    plugin = workers.plugins[0]
    for number in range(40):
        assert mail(plugin, workers.session(f"192.0.2.{number}")) == ""
    assert len(plugin._ledger._known) <= 10
    assert [mail(plugin, workers.session("192.0.2.0")) for _ in range(2)] == ["", "450 4.7.1"]  # what was forgotten is in the state


def test_far_from_the_bound_nothing_is_asked() -> None:
    workers = Workers(1, messages_per_ip="1000/h")
    session = workers.session()
    for _ in range(500):
        assert mail(workers.plugins[0], session) == ""
    assert workers.calls == 0
    workers.flush()
    assert workers.calls == 1


@pytest.mark.parametrize("text", ["5", "5/x", "/h", "x/h", "5/0h", "-1/h"])
def test_allowances_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="an allowance such as"):
        load_plugin("rate_limit", messages_per_ip=text)


def test_zero_is_no_bound() -> None:
    workers = Workers(1, messages_per_ip=0, unknown_recipients_per_session=0, new_connections_per_ip="0", connections_per_ip=0,
                      connections_per_subnet=0)
    session = workers.session()
    assert all(workers.plugins[0].check_connect(workers.session()) is None and mail(workers.plugins[0], session) == "" for _ in range(100))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 200), st.lists(st.tuples(st.integers(0, 2), st.integers(1, 30), st.booleans()), max_size=60))
def test_workers_together_never_let_too_much_through(amount: int, events: list[tuple[int, int, bool]]) -> None:
    """Past the bound goes at most what the others may not have told yet, which an exchange makes known."""
    clock = FakeClock(1767607200.0)
    state = MemoryState(clock)
    ledgers = []
    for _ in range(3):
        services = make_services(clock=clock)
        services._state = state
        services.spawn = lambda *_: None  # type: ignore[method-assign]
        ledgers.append(Ledger(services))
    allowance = Allowance(float(amount), 3600)
    spent = 0
    for which, wanted, tell in events:
        if ledgers[which].spend("x", "messages", wanted, allowance):
            spent += wanted
        if tell:
            for ledger in ledgers + ledgers:
                ledger.flush()
    untold = 2 * max(0.0, allowance.amount - max(LAST, allowance.amount / 5))
    assert spent <= allowance.amount + untold
    if all(tell for *_, tell in events):
        assert spent <= allowance.amount


def test_dialogue() -> None:
    run("rate_limit", r"""
S: 220
C: EHLO client.example.com
S: 250
C: MAIL FROM:<a@example.com>
S: 250
C: RCPT TO:<nobody1@example.test>
S: 550 5.1.1
C: RCPT TO:<nobody2@example.test>
S: 550 5.1.1
C: RCPT TO:<user@example.test>
S: 450 4.7.1
C: RSET
S: 250
C: MAIL FROM:<a@example.com>
S: 421 4.7.0
EOF
""", unknown_recipients_per_session=2)
