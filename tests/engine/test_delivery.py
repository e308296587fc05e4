"""Routing, lanes and the scheduler: what happens to a message from intake to its last outcome, on a real store and a fake clock."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gevent
import pytest
from gevent.event import Event as Signal

from gmta.config import rate_gap
from gmta.deliver.router import HELD_ROUTE, Router
from gmta.deliver.scheduler import Scheduler
from gmta.mail.address import Address
from gmta.mail.envelope import Envelope, RecipientState
from gmta.mail.message import Message
from gmta.mail.reply import Reply
from gmta.mail.verdict import Outcome, Status, deferred, delivered, failed, outcome_of
from gmta.queue import sqlite
from gmta.queue.admin import QueueAdmin
from gmta.queue.ids import IdSource
from gmta.queue.sqlite import SqliteStore
from gmta.queue.store import Settlement, StoreError
from gmta.services.log import NullLog
from gmta.testing import FakeClock, MemoryLog, make_config
from gmta.testing.zone import Zone

START = 1_800_000_000.0
MESSAGE = Message.from_bytes(b"Subject: x\r\n\r\nbody\r\n")


class FakePlugins:
    """A plugin manager with the given hooks and transports."""

    def __init__(self, transports: dict[str, Any], hooks: dict[str, Callable[..., Any]] | None = None) -> None:
        self.transports = transports
        self.hooks = hooks or {}

    def has(self, hook: str) -> bool:
        return hook in self.hooks

    def get(self, hook: str, *args: Any) -> list[tuple[str, Any]]:
        return [("fake", self.hooks[hook](*args))]

    def on(self, hook: str, *args: Any) -> None:
        self.hooks[hook](*args)


class FakeTransport:
    """Answers with `answer(delivery, recipient)` and remembers deliveries."""

    concurrency = 5

    def __init__(self, answer: Callable[[Any, RecipientState], Outcome | None] | None = None) -> None:
        self.answer = answer or (lambda delivery, recipient: delivered())
        self.seen: list[Any] = []

    def deliver(self, delivery: Any) -> dict[int, Outcome]:
        self.seen.append(delivery)
        answers = {r.number: self.answer(delivery, r) for r in delivery.recipients}
        return {number: outcome for number, outcome in answers.items() if outcome is not None}


class World:
    """A scheduler with all it needs."""

    def __init__(self, directory: Path, transport: Any, *, hooks: dict[str, Callable[..., Any]] | None = None,
                 route: dict[str, str] | None = None, window: int = 1000, store: Any = None, concurrency: int = 5,
                 sections: dict[str, dict[str, Any]] | None = None, resolver: Any = None) -> None:
        self.clock = FakeClock(START)
        self.ids = IdSource(self.clock, "AAAAA")
        self.store = store or SqliteStore(str(directory), instance_tag="AAAAA", log=NullLog(), clock=self.clock, message_limit=1000)
        self.transport = transport
        self.plugins = FakePlugins({"out": transport}, hooks)
        self.config = make_config({
            "gmta": {"workers": 1}, "domains": {"local": "local.example"}, "transport:out": {"type": "fake", "concurrency": concurrency},
            "route": route or {"*": "out"},
            "queue": {"retry": "300s 900s", "window": window, "lifetime": "1h", "bounce_lifetime": "30m", "warn_after": "20m",
                      **(sections or {}).get("queue", {})},
            **{name: keys for name, keys in (sections or {}).items() if name != "queue"}})
        self.log = MemoryLog()
        services = SimpleNamespace(clock=self.clock, log=self.log, hostname="mx.example", config=self.config, resolver=resolver)
        self.scheduler = Scheduler(self.config, self.store, self.plugins, services, self.ids)

    def send(self, *to: str, sender: str = "a@b.example", notify: tuple[str, ...] = ()) -> Envelope:
        envelope = Envelope(self.ids.new(), Address.parse(sender), [
            RecipientState(n, Address.parse(text), next_attempt_at=self.clock.now, notify=frozenset(notify))
            for n, text in enumerate(to)], MESSAGE.size, self.clock.now)
        self.store.put(envelope, MESSAGE)
        self.scheduler.accept(envelope, MESSAGE)
        return envelope

    def put_away(self, to: str, *, last_reply: str = "") -> str:
        """Queues a message for the domain's lane without delivering it; its id."""
        address = Address.parse(to)
        envelope = Envelope(self.ids.new(), Address.parse("a@b.example"), [RecipientState(0, address, next_attempt_at=self.clock.now)], 10,
                            self.clock.now)
        self.store.put(envelope, MESSAGE)
        state = envelope.recipients[0]
        state.transport, state.next_hop, state.last_reply = "out", address.host, last_reply
        self.store.release(envelope)
        return envelope.id

    def settle(self) -> None:
        """Until nothing is in memory."""
        with gevent.Timeout(10):
            while self.scheduler.in_memory:
                gevent.sleep(0)
                gevent.idle()

    def later(self, seconds: float) -> None:
        """Moves the clock, takes what is due, and lets it end."""
        self.clock.now += seconds
        self.scheduler._tick()
        while True:
            self.scheduler._wake.clear()
            self.scheduler._take()
            self.settle()
            if not self.scheduler._wake.is_set():
                return

    def close(self) -> None:
        self.scheduler.stop(1.0)
        self.store.close()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[Callable[..., World]]:
    made: list[World] = []

    def make(transport: Any = None, **options: Any) -> World:
        made.append(World(tmp_path / f"q{len(made)}", transport or FakeTransport(), **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


# --- router ---------------------------------------------------------------------------------------------------------

ROUTES = {"*": "star", "local": "mine", ".sub.example": "suffix", "deep.sub.example": "exact", "joe@local.example": "person",
          "bad.example": "fail", "wait.example": "hold", "void.example": "discard"}


def route(text: str, **options: Any) -> Any:
    plugins = FakePlugins({name: object() for name in ("star", "mine", "suffix", "exact", "person")}, options.pop("hooks", None))
    config = SimpleNamespace(route=ROUTES, domains=SimpleNamespace(local=frozenset({"local.example"})))
    address = Address("postmaster", "") if text == "postmaster" else Address.parse(text)
    return Router(config, plugins).route(Envelope("1", Address("a", "b"), []), RecipientState(0, address, **options))


@pytest.mark.parametrize(("address", "target"), [
    ("x@other.example", "star"), ("x@local.example", "mine"), ("JOE@Local.example", "person"), ("x@a.sub.example", "suffix"),
    ("x@deep.sub.example", "exact"), ("x@b.a.sub.example", "suffix"), ("x@sub.example", "star"), ("postmaster", "mine"),
])
def test_most_specific_route_wins(address: str, target: str) -> None:
    assert route(address) == (target, "")


def test_routes_without_a_transport() -> None:
    assert route("x@bad.example").status is Status.FAILED
    assert route("x@wait.example") is HELD_ROUTE
    assert route("x@void.example").status is Status.DELIVERED


def test_plugin_and_fixed_transport_come_first() -> None:
    assert route("x@bad.example", hooks={"get_route": lambda *_: "mine"}) == ("mine", "")
    assert route("x@bad.example", hooks={"get_route": lambda *_: None}).status is Status.FAILED
    assert route("x@bad.example", fixed_transport=True, transport="person") == ("person", "")
    assert route("x@o.example", hooks={"get_route": lambda *_: "nonsense"}).status is Status.DEFERRED


@pytest.mark.parametrize(("text", "gap"), [(None, 0.0), ("10/s", 0.1), ("60/m", 1.0), ("1/5m", 300.0), ("20/min", 3.0)])
def test_rate(text: str | None, gap: float) -> None:
    assert rate_gap(text) == gap


# --- scheduler ------------------------------------------------------------------------------------------------------


def test_delivered_from_memory_and_gone(world: Callable[..., World]) -> None:
    seen: list[Any] = []
    it = world(hooks={"on_delivery": lambda *args: seen.append(args)})
    envelope = it.send("x@c.example", "y@c.example")
    it.settle()
    (delivery,) = it.transport.seen  # one delivery for both
    assert delivery.first_attempt and delivery.message is MESSAGE
    assert it.store.message(envelope.id) is None
    assert len(seen) == 2


def test_deferred_is_tried_again_by_the_retry_list(world: Callable[..., World]) -> None:
    answers = [deferred("no"), deferred("no"), delivered()]
    it = world(FakeTransport(lambda *_: answers.pop(0)))
    envelope = it.send("x@c.example")
    it.settle()
    (state,) = it.store.all_recipients(envelope.id)
    assert state.attempts == 1 and START + 300 <= state.next_attempt_at <= START + 330 and state.last_reply == "no"
    it.later(299)
    assert len(it.transport.seen) == 1
    it.later(32)
    assert len(it.transport.seen) == 2 and not it.transport.seen[1].first_attempt
    it.later(1000)
    assert it.store.message(envelope.id) is None


def test_left_out_and_raising_defer(world: Callable[..., World]) -> None:
    def answer(delivery: Any, recipient: RecipientState) -> Outcome | None:
        if recipient.address.local == "raise":
            raise RuntimeError("broken")
        return None

    it = world(FakeTransport(answer))
    for name in ("raise", "leave"):
        envelope = it.send(f"{name}@c.example")
        it.settle()
        assert it.store.all_recipients(envelope.id)[0].attempts == 1


def test_failure_is_reported_to_the_sender(world: Callable[..., World]) -> None:
    bounced: list[Any] = []
    it = world(FakeTransport(lambda d, r: failed("no such user", enhanced="5.1.1") if r.address.local == "x" else delivered()),
               hooks={"on_bounced": lambda *args: bounced.append(args)})
    it.send("x@c.example")
    it.settle()
    report = it.transport.seen[1]
    assert not report.envelope.sender and str(report.recipients[0].address) == "a@b.example"
    assert b"Action: failed" in b"".join(report.message.chunks())
    assert len(bounced) == 1
    assert it.store.next_due_at() is None


def test_no_report_about_the_null_sender_or_with_never(world: Callable[..., World]) -> None:
    it = world(FakeTransport(lambda *_: failed("no")))
    it.send("x@c.example", sender="")
    it.send("y@c.example", notify=("NEVER",))
    it.settle()
    assert len(it.transport.seen) == 2


def test_success_is_reported_where_asked_for(world: Callable[..., World]) -> None:
    it = world()
    it.send("x@c.example", notify=("SUCCESS",))
    it.settle()
    assert b"Action: delivered" in b"".join(it.transport.seen[1].message.chunks())
    it = world(FakeTransport(lambda *_: delivered(remote="mx.c.example")))  # a next hop with DSN reports itself
    it.send("x@c.example", notify=("SUCCESS",))
    it.settle()
    assert len(it.transport.seen) == 1


def test_one_delay_notice_then_expiry(world: Callable[..., World]) -> None:
    def answer(delivery: Any, recipient: RecipientState) -> Outcome:
        return deferred("later") if delivery.envelope.sender else delivered()

    it = world(FakeTransport(answer))
    envelope = it.send("x@c.example")
    it.settle()
    for _ in range(7):
        it.later(600)
    reports = [b"".join(d.message.chunks()) for d in it.transport.seen if not d.envelope.sender]
    assert [b"Action: delayed" in text for text in reports] == [True, False]
    assert b"Action: failed" in reports[1] and b"Status: 5.4.7" in reports[1]
    assert it.store.message(envelope.id) is None


def test_hold_and_discard_routes(world: Callable[..., World]) -> None:
    it = world(route={"*": "out", "wait.example": "hold", "void.example": "discard"})
    held = it.send("x@wait.example")
    gone = it.send("x@void.example")
    it.settle()
    assert it.store.all_recipients(held.id)[0].status == "held"
    assert it.store.message(gone.id) is None and it.transport.seen == []


def test_dead_next_hop_is_probed_by_one(world: Callable[..., World]) -> None:
    up = False

    def answer(delivery: Any, recipient: RecipientState) -> Outcome:
        return delivered() if up else deferred("connection refused", recipient_fault=False)

    it = world(FakeTransport(answer), concurrency=1)
    envelopes = [it.send(f"u{n}@c.example") for n in range(20)]
    it.settle()
    assert len(it.transport.seen) == 1
    states = [it.store.all_recipients(envelope.id)[0] for envelope in envelopes]
    assert sorted(state.attempts for state in states) == [0] * 19 + [1]
    assert all("connection refused" in state.last_reply for state in states)
    it.later(331)
    assert len(it.transport.seen) == 2
    up = True
    it.later(4000)  # past the second gap: either message may have been the probe
    assert all(it.store.message(envelope.id) is None for envelope in envelopes)


def test_past_the_window_mail_waits_in_the_store(world: Callable[..., World]) -> None:
    gate = Signal()

    class Slow(FakeTransport):
        def deliver(self, delivery: Any) -> dict[int, Outcome]:
            gate.wait()
            return super().deliver(delivery)

    it = world(Slow(), window=2)
    for n in range(30):
        it.send(f"u{n}@c.example")
    assert it.scheduler.in_memory <= 14  # four windows and one, and five being delivered
    gate.set()
    it.settle()
    for _ in range(15):
        it.later(0)
    assert len(it.transport.seen) == 30
    assert len({d.envelope.id for d in it.transport.seen}) == 30


def test_record_is_repeated_until_it_works(world: Callable[..., World], monkeypatch: pytest.MonkeyPatch) -> None:
    it = world()
    record, failures = it.store.record, [1, 2]

    def flaky(settlement: Settlement) -> None:
        if failures:
            failures.pop()
            raise StoreError("disk full")
        record(settlement)

    monkeypatch.setattr(it.store, "record", flaky)
    envelope = it.send("x@c.example")
    it.settle()
    assert len(it.transport.seen) == 1 and not failures and it.store.message(envelope.id) is None


def test_what_was_queued_before_the_start_is_delivered(world: Callable[..., World]) -> None:
    it = world()
    envelope = Envelope(it.ids.new(), Address.parse("a@b.example"), [RecipientState(0, Address.parse("x@c.example"))], 10, START)
    it.store.put(envelope, MESSAGE)
    it.store.release(envelope)
    it.scheduler.start()
    with gevent.Timeout(10):
        while it.store.message(envelope.id) is not None:
            gevent.sleep(0.01)
    assert not it.transport.seen[0].first_attempt


def test_workers_are_reused(world: Callable[..., World]) -> None:
    it = world()
    for n in range(50):
        it.send(f"u{n}@c.example")
        it.settle()
    assert len(it.scheduler.lanes._greenlets) <= 5


# --- what is said and kept --------------------------------------------------------------------------------------------


def reports(it: World) -> list[str]:
    """The reports that were delivered, as text."""
    return [b"".join(d.message.chunks()).decode() for d in it.transport.seen if not d.envelope.sender]


def only_reports(outcome: Outcome) -> Callable[[Any, RecipientState], Outcome]:
    """An answer that takes reports, and gives `outcome` to all else."""
    return lambda delivery, recipient: outcome if delivery.envelope.sender else delivered()


def test_last_reply_is_the_remotes_whole_reply_or_our_own_reason(world: Callable[..., World]) -> None:
    said = Reply.parse([b"421-4.7.26 line 0", b"421 4.7.26 last"])
    it = world(FakeTransport(lambda d, r: outcome_of(said, remote="mx") if r.address.local == "x" else deferred("No route", remote="mx")))
    envelope = it.send("x@c.example", "y@c.example")
    it.settle()
    assert [r.last_reply for r in it.store.all_recipients(envelope.id)] == ["421 4.7.26 line 0 4.7.26 last", "No route"]


def test_each_host_that_was_tried_is_in_the_history_and_the_log(world: Callable[..., World], tmp_path: Path) -> None:
    class Several(FakeTransport):
        def deliver(self, delivery: Any) -> dict[int, Outcome]:
            delivery.tried(outcome_of(Reply(421, "4.3.2", "busy"), remote="mx1"))
            return super().deliver(delivery)

    it = world(Several(lambda *_: Outcome(Status.DELIVERED, Reply(250, None, "ok"), remote="mx2", tls="TLSv1.3")))
    envelope = it.send("x@c.example")
    it.settle()
    attempt, last = QueueAdmin(str(tmp_path / "q0")).trace(envelope.id)
    assert (attempt.kind, attempt.data["remote"], attempt.data["reply"]) == ("attempt", "mx1", "421 4.3.2 busy")
    assert (last.kind, last.data["remote"], last.data["tls"]) == ("delivered", "mx2", "TLSv1.3")
    (line,) = it.log.of("attempt")
    assert line["remote"] == "mx1" and str(line["reply"]) == "421 4.3.2 busy"


def test_a_loop_is_given_up_before_it_is_sent(world: Callable[..., World]) -> None:
    it = world(sections={"limits": {"hops": 5}})
    for hops in (5, 6):
        message = Message.from_bytes(b"Received: x\r\n" * hops + b"\r\nbody\r\n")
        envelope = Envelope(it.ids.new(), Address.parse("a@b.example"), [RecipientState(0, Address.parse("x@c.example"))], 10, START)
        it.store.put(envelope, message)
        it.scheduler.accept(envelope, message)
        it.settle()
    assert len(it.transport.seen) == 2
    (report,) = reports(it)
    assert "Status: 5.4.6" in report


def test_a_recipient_refused_by_a_check_fails_in_its_words(world: Callable[..., World]) -> None:
    it = world()
    states = [RecipientState(n, Address(name, "c.example"), transport="fail", fixed_transport=True, refused=f"550 5.7.{n} no {name}")
              for n, name in enumerate(("x", "y"))] + [RecipientState(2, Address("z", "c.example"))]
    envelope = Envelope(it.ids.new(), Address.parse("a@b.example"), states, 10, START)
    it.store.put(envelope, MESSAGE)
    it.scheduler.accept(envelope, MESSAGE)
    it.settle()
    (report,) = reports(it)  # both in one
    assert "Status: 5.7.0" in report and "Status: 5.7.1" in report and "no x" in report and "no y" in report
    assert "Final-Recipient: rfc822;z@c.example" not in report


def test_what_the_postmaster_gives_up_says_so(world: Callable[..., World], tmp_path: Path) -> None:
    it = world(FakeTransport(only_reports(deferred("later"))))
    envelope = it.send("x@c.example")
    it.settle()
    assert QueueAdmin(str(tmp_path / "q0")).bounce([envelope.id]) == 1
    it.later(1)
    (report,) = reports(it)
    assert "The postmaster has given this message up" in report and it.store.message(envelope.id) is None


def test_expansion_is_reported_once_and_the_members_are_not(world: Callable[..., World]) -> None:
    it = world()
    envelope = Envelope(it.ids.new(), Address.parse("a@b.example"), [
        RecipientState(n, Address(f"m{n}", "c.example"), "list@c.example", notify=frozenset({"NEVER"})) for n in range(2)], 10, START,
        facts={"expanded": [["list@c.example", "rfc822;list@c.example"]]})
    it.store.put(envelope, MESSAGE)
    it.scheduler.accept(envelope, MESSAGE)
    it.settle()
    (report,) = reports(it)
    assert "Action: expanded" in report and "Final-Recipient: rfc822;list@c.example" in report and "m0@" not in report


@pytest.mark.parametrize(("mode", "facts", "ret", "whole"), [
    ("trusted", {"trusted": True}, "", True), ("trusted", {}, "", False), ("trusted", {}, "FULL", False),
    ("trusted", {"trusted": True}, "HDRS", False), ("always", {}, "", True), ("never", {"trusted": True}, "FULL", False),
    ("always", {"trusted": True, "requiretls": True}, "FULL", False)])
def test_whose_message_goes_back_whole(world: Callable[..., World], mode: str, facts: dict[str, Any], ret: str, whole: bool) -> None:
    it = world(FakeTransport(only_reports(failed("no"))), sections={"queue": {"return_message": mode}})
    envelope = Envelope(it.ids.new(), Address.parse("a@b.example"), [RecipientState(0, Address("x", "c.example"))], 10, START, ret=ret, facts=facts)
    it.store.put(envelope, MESSAGE)
    it.scheduler.accept(envelope, MESSAGE)
    it.settle()
    assert ("\r\nbody\r\n" in reports(it)[0]) is whole
    assert it.transport.seen[-1].envelope.facts.get("requiretls") == facts.get("requiretls")  # RFC 8689 section 5


def test_a_report_that_fails_is_logged_and_told_to_the_postmaster_once(world: Callable[..., World]) -> None:
    it = world(FakeTransport(lambda *_: failed("no such user", enhanced="5.1.1")))
    it.send("x@c.example")
    it.settle()
    assert len(it.transport.seen) == 2 and len(it.log.of("bounce undeliverable")) == 1
    it = world(FakeTransport(lambda *_: failed("no such user", enhanced="5.1.1")), sections={"queue": {"double_bounce": "boss@b.example"}})
    it.send("x@c.example")
    it.settle()
    assert [str(d.recipients[0].address) for d in it.transport.seen] == ["x@c.example", "a@b.example", "boss@b.example"]
    assert len(it.log.of("bounce undeliverable")) == 2 and it.store.next_due_at() is None


# --- time -------------------------------------------------------------------------------------------------------------


def test_retry_list_repeats_its_last_with_a_jitter_of_a_tenth(world: Callable[..., World]) -> None:
    it = world(FakeTransport(only_reports(deferred("later"))), sections={"queue": {"lifetime": "1d", "warn_after": "0"}})
    envelope = it.send("x@c.example")
    it.settle()
    for gap in (300, 900, 900, 900):
        (state,) = it.store.all_recipients(envelope.id)
        assert gap <= state.next_attempt_at - it.clock.now <= gap * 1.1
        it.later(state.next_attempt_at - it.clock.now)
    assert len(it.transport.seen) == 5


@pytest.mark.parametrize(("domain", "gap", "life"), [
    ("c.example", 10, 3600), ("sub.d.example", 20, 60), ("d.example", 300, 3600), ("c.sub.d.example", 20, 60)])
def test_a_domain_may_have_times_of_its_own(world: Callable[..., World], domain: str, gap: float, life: float) -> None:
    it = world(FakeTransport(only_reports(deferred("later"))),
               sections={"queue:c.example": {"retry": "10s"}, "queue:.d.example": {"retry": "20s", "lifetime": "1m", "warn_after": "0"}})
    envelope = it.send(f"x@{domain}")
    it.settle()
    (state,) = it.store.all_recipients(envelope.id)
    assert gap <= state.next_attempt_at - START <= gap * 1.1
    it.later(life - 1)
    assert it.store.message(envelope.id) is not None
    it.later(3)
    assert it.store.message(envelope.id) is None and "Status: 5.4.7" in reports(it)[-1]


def test_the_expired_keep_the_last_words_of_the_remote(world: Callable[..., World]) -> None:
    it = world(FakeTransport(only_reports(outcome_of(Reply(451, None, "later"), remote="mx.c.example[192.0.2.1]:25"))))
    it.send("x@c.example")
    it.settle()
    it.later(3600)
    assert "Status: 5.4.7\r\n" in reports(it)[-1] and "Diagnostic-Code: smtp; 451 later\r\n" in reports(it)[-1]


def test_what_waits_behind_a_dead_next_hop_is_warned_and_expires_untried(world: Callable[..., World]) -> None:
    def answer(delivery: Any, recipient: RecipientState) -> Outcome:
        return delivered() if delivery.next_hop == "b.example" else deferred("refused", remote="mx", recipient_fault=False)

    it = world(HopTransport(answer), sections={"queue": {"retry": "2000s", "lifetime": "2h", "bounce_lifetime": "1h", "warn_after": "20m"}})
    first = it.send("first@c.example")
    it.settle()
    waiting = it.send("waiting@c.example", "other@c.example")
    it.send("never@c.example", notify=("NEVER",))
    it.settle()
    assert [r.attempts for r in it.store.all_recipients(waiting.id)] == [0, 0]
    assert [d.envelope.id for d in it.transport.seen] == [first.id]
    it.later(1199)
    assert not reports(it)
    it.later(1)
    it.later(1)
    assert len(reports(it)) == 2 and all("Action: delayed" in text for text in reports(it))
    assert "Final-Recipient: rfc822;other@c.example" in "".join(reports(it)) and "Delivery suspended" in "".join(reports(it))
    it.later(600)
    assert len(reports(it)) == 2  # once
    it.later(7200 - 1801)
    it.later(1)
    texts = reports(it)[2:]
    assert all("Action: failed" in text and "Status: 5.4.7" in text for text in texts)
    assert "Final-Recipient: rfc822;waiting@c.example" in "".join(texts)
    assert it.store.message(waiting.id) is None


# --- lanes and the store ------------------------------------------------------------------------------------------------


class HopTransport(FakeTransport):
    """One with a lane for each domain."""

    def next_hop(self, address: Address) -> str:
        return address.host


def test_a_reply_that_closes_a_lane(world: Callable[..., World]) -> None:
    said = outcome_of(Reply(421, "4.7.0", "too fast"), remote="mx", recipient_fault=True)
    it = world(HopTransport(lambda *_: said), sections={"lane:x": {"match": "*.example", "on_reply": "421 4.7.0 -> pause 40m"},
                                                        "queue": {"retry": "5m", "warn_after": "0"}})
    first = it.send("x@c.example")
    it.settle()
    other = it.send("y@d.example")
    it.settle()
    (state,) = it.store.all_recipients(first.id)
    assert state.attempts == 1 and state.next_attempt_at >= START + 2400
    (state,) = it.store.all_recipients(other.id)
    assert state.attempts == 0 and "after the reply: 421 4.7.0 too fast" in state.last_reply
    it.later(2300)
    assert len(it.transport.seen) == 1
    it.later(101)
    assert len(it.transport.seen) == 2


def test_one_reply_for_many_recipients_closes_a_lane_once(world: Callable[..., World]) -> None:
    it = world(HopTransport(lambda *_: outcome_of(Reply(421, "4.7.0", "too fast"), remote="mx", recipient_fault=True)),
               sections={"lane:x": {"match": "*.example", "on_reply": "421 4.7.0 -> pause 40m"}, "queue": {"retry": "5m", "warn_after": "0"}})
    envelope = it.send(*[f"u{n}@c.example" for n in range(50)])
    it.settle()
    assert len(it.log.of("lane suspended")) == 1 and len(it.scheduler.lanes._times) <= 3
    assert all(state.next_attempt_at >= START + 2400 for state in it.store.all_recipients(envelope.id))


def test_mx_hosts_decide_on_the_lane(world: Callable[..., World]) -> None:
    zone = Zone({"c.example": {"MX": [(10, "mx1.big.example")]}, "d.example": {"MX": [(10, "mx.small.example")]}})
    it = world(HopTransport(), sections={"lane:big": {"match_mx": "*.big.example", "rate": "1/h"}}, resolver=zone)
    for domain in ("c.example", "d.example"):
        for n in range(3):
            it.send(f"u{n}@{domain}")
    with gevent.Timeout(10):
        while it.scheduler.in_memory > 2 or len(it.transport.seen) < 4:
            gevent.sleep(0.001)  # the store's native thread needs its turn
    assert sorted(d.next_hop for d in it.transport.seen) == ["c.example"] + ["d.example"] * 3


def unrouted(it: World, *to: Address) -> list[Envelope]:
    """Messages in the store whose lanes it does not know yet."""
    envelopes = []
    for address in to:
        envelope = Envelope(it.ids.new(), Address.parse("a@b.example"), [RecipientState(0, address)], 10, START)
        it.store.put(envelope, MESSAGE)
        it.store.release(envelope)
        envelopes.append(envelope)
    it.scheduler._left_in_store = True
    return envelopes


def routed(it: World, envelopes: list[Envelope]) -> int:
    """How many of them the store knows the lane of."""
    return sum(bool(state.next_hop) for envelope in envelopes for state in it.store.all_recipients(envelope.id))


def test_mail_learns_in_portions_that_its_lane_is_full(world: Callable[..., World], monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Signal()

    class Slow(HopTransport):
        def deliver(self, delivery: Any) -> dict[int, Outcome]:
            if delivery.next_hop == "slow.example":
                gate.wait()
            return super().deliver(delivery)

    monkeypatch.setattr("gmta.deliver.scheduler.SORTED_A_TICK", 20)
    it = world(Slow(), window=10)
    slow = unrouted(it, *[Address(f"u{n}", "slow.example") for n in range(90)])
    fast, = unrouted(it, Address("x", "fast.example"))
    known = []
    with gevent.Timeout(10):
        while it.store.message(fast.id) is not None:
            it.scheduler._tick()
            it.scheduler._take()
            gevent.sleep(0.01)
            known.append(routed(it, slow))
    assert len(known) >= 3 and all(0 <= later - sooner <= 20 + 10 for sooner, later in pairwise(known))
    assert it.scheduler._waiting <= 10
    gate.set()
    for _ in range(40):
        it.later(0)
    assert len(it.transport.seen) == 91 and len({delivery.envelope.id for delivery in it.transport.seen}) == 91


@pytest.mark.parametrize("hooks", [{}, {"get_route": lambda envelope, recipient: None}])
def test_mail_that_finds_no_room_in_memory_leaves_its_lane_to_the_store(world: Callable[..., World], monkeypatch: pytest.MonkeyPatch,
                                                                        hooks: dict[str, Any]) -> None:
    """So that nobody waits behind what waits for a full lane; a hook may take its time and is asked later, as one of many."""
    gate = Signal()

    class Slow(HopTransport):
        def deliver(self, delivery: Any) -> dict[int, Outcome]:
            if delivery.next_hop == "slow.example":
                gate.wait()
            return super().deliver(delivery)

    monkeypatch.setattr("gmta.deliver.scheduler.SORTED_A_TICK", 20)
    monkeypatch.setattr("gmta.deliver.scheduler.MEMORY_BYTES", 10 * MESSAGE.size)
    it = world(Slow(), window=10, hooks=hooks, route={"*": "out", "held.example": "hold", "failed.example": "fail"})
    slow = [it.send(f"u{n}@slow.example") for n in range(200)]
    others = [it.send(f"x@{kind}.example") for kind in ("held", "failed", "fast")]
    assert it.scheduler._waiting <= 11
    assert routed(it, slow) == (0 if hooks else 189)
    assert [state.status for other in others for state in it.store.all_recipients(other.id)] == ["queued"] * 3
    it.scheduler._tick()
    it.scheduler._take()
    if not hooks:
        with gevent.Timeout(5):
            while it.store.message(others[2].id) is not None:
                gevent.sleep(0.001)
    gate.set()
    for _ in range(40):
        it.later(0)
    assert len(it.transport.seen) == 202  # and the report of the failure
    assert [state.status for other in others for state in it.store.all_recipients(other.id)] == ["held"]


def test_fresh_mail_of_a_slow_lane_keeps_nothing_in_the_store(world: Callable[..., World]) -> None:
    gate = Signal()

    class Slow(HopTransport):
        def deliver(self, delivery: Any) -> dict[int, Outcome]:
            if delivery.next_hop == "slow.example":
                gate.wait()
            return super().deliver(delivery)

    it = world(Slow(), window=10)
    for n in range(60):
        it.send(f"u{n}@slow.example")
    again = it.put_away("x@fast.example", last_reply="450 later")
    it.scheduler._tick()
    it.scheduler._take()
    with gevent.Timeout(5):
        while it.store.message(again) is not None:
            gevent.sleep(0.001)
    assert 20 <= it.scheduler._waiting <= 45
    gate.set()
    for _ in range(20):
        it.later(0)
    assert len(it.transport.seen) == 61 and it.scheduler._stored == it.scheduler._waiting == 0


def test_a_closed_lane_stops_nobody_where_nothing_else_waits(world: Callable[..., World], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gmta.deliver.scheduler.SORTED_A_TICK", 20)
    down = deferred("down", enhanced="4.4.1", recipient_fault=False)
    it = world(HopTransport(lambda delivery, recipient: down if delivery.next_hop == "down.example" else delivered()), window=10)
    it.send("x@down.example")
    it.settle()
    unrouted(it, *[Address(f"u{n}", "down.example") for n in range(60)])
    fast, = unrouted(it, Address("x", "fast.example"))
    it.scheduler._take()
    it.settle()
    assert it.store.message(fast.id) is None and len(it.transport.seen) == 2


def test_mail_that_is_delivered_while_its_neighbours_are_routed_has_had_room(world: Callable[..., World]) -> None:
    it = world(FakeTransport(), hooks={"get_route": lambda envelope, recipient: gevent.sleep(0.005)})
    unrouted(it, *[Address(f"u{n}", "c.example") for n in range(40)])
    it.scheduler._take()
    it.settle()
    assert len(it.transport.seen) == 40 and it.scheduler._sorted == 0


def test_a_slow_lane_leaves_room_in_the_window(world: Callable[..., World]) -> None:
    gate = Signal()

    class Slow(HopTransport):
        def deliver(self, delivery: Any) -> dict[int, Outcome]:
            if delivery.next_hop == "slow.example":
                gate.wait()
            return super().deliver(delivery)

    it = world(Slow(), window=10)
    unrouted(it, *[Address(f"u{n}", "slow.example") for n in range(40)])
    last, = unrouted(it, Address("x", "fast.example"))
    with gevent.Timeout(10):
        while it.store.message(last.id) is not None:
            it.scheduler._take()
            gevent.sleep(0)
    assert it.scheduler._waiting <= 10
    gate.set()
    for _ in range(20):
        it.later(0)
    assert len(it.transport.seen) == 41


def test_more_lanes_than_a_search_looks_at_all_get_their_turn(world: Callable[..., World], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite, "LANES", 10)
    monkeypatch.setattr(sqlite, "SCAN", 20)
    it = world()
    busy = [f"out:busy{n:03d}.example" for n in range(60)]
    for n in range(60):
        for _ in range(3):
            it.put_away(f"u@busy{n:03d}.example")
    it.clock.now += 1
    free = [it.put_away(f"u@zz{n}.example") for n in range(3)]
    new = Envelope(it.ids.new(), Address.parse("a@b.example"), [RecipientState(0, Address.parse("u@new.example"), next_attempt_at=it.clock.now)])
    it.store.put(new, MESSAGE)
    it.store.release(new)  # in no lane yet
    free.append(new.id)
    found: list[str] = []
    for _ in range(10):
        found += [envelope.id for envelope in it.store.due(it.clock.now, 5, busy, (), 2)]
    assert sorted(found) == sorted(free)


def test_of_each_lane_no_more_than_its_room(world: Callable[..., World]) -> None:
    it = world()
    for name in ("a", "b", "c", "d"):
        for _ in range(5):
            it.put_away(f"u@{name}.example")
    found = it.store.due(it.clock.now, 100, ["out:a.example"], ["out:b.example"], 2)
    assert sorted(envelope.recipients[0].next_hop for envelope in found) == ["b.example", "c.example", "c.example", "d.example", "d.example"]


def test_what_a_released_recipient_waits_for_is_kept(world: Callable[..., World], tmp_path: Path) -> None:
    it = world()
    queue_id = it.put_away("u@c.example", last_reply="Delivery suspended")
    it.store.changed_outside()  # behind it in the thread
    (row,) = QueueAdmin(str(tmp_path / "q0")).list([queue_id])
    assert row["recipients"][0]["next_hop"] == "c.example" and row["recipients"][0]["last_reply"] == "Delivery suspended"


def test_overdue_goes_through_the_queue_in_parts(world: Callable[..., World], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite, "SCAN", 7)
    it = world()
    old = []
    for _ in range(20):
        it.clock.now += 1
        old.append(it.put_away("u@c.example"))
    it.clock.now += 1000
    it.put_away("new@c.example")
    now = it.clock.now
    found: list[Envelope] = []
    for _ in range(8):
        found += it.store.overdue(now, now - 500, 0.0, 0.0, 5)
    assert [envelope.id for envelope in found] == old  # each once: it is claimed
    assert it.store.overdue(now, now - 500, 0.0, 0.0, 5) == []


def test_what_is_under_way_and_closed_is_shown(world: Callable[..., World], tmp_path: Path) -> None:
    gate = Signal()

    class Slow(HopTransport):
        def deliver(self, delivery: Any) -> dict[int, Outcome]:
            if delivery.next_hop == "slow.example":
                gate.wait()
            return super().deliver(delivery)

    it = world(Slow(lambda d, r: deferred("refused", remote="mx", recipient_fault=False) if d.next_hop == "dead.example" else delivered()))
    it.send("x@dead.example")
    it.settle()
    envelope = it.send("x@slow.example")
    gevent.sleep(0)
    it.clock.now += 60
    it.scheduler._tick()
    it.store.changed_outside()  # behind it in the thread
    shown = QueueAdmin(str(tmp_path / "q0")).stats()
    assert shown["under_way"] == 1 and shown["attempts"][0]["id"] == envelope.id and shown["attempts"][0]["since"] == START
    assert shown["closed"][0]["lane"] == "out:dead.example" and "refused" in shown["closed"][0]["reason"]
    gate.set()
    it.settle()
    it.scheduler.lanes.resume_all()
    it.scheduler._tick()
    it.store.changed_outside()
    assert QueueAdmin(str(tmp_path / "q0")).stats()["under_way"] == 0
