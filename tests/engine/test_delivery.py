"""Routing, lanes and the scheduler: what happens to a message from intake to its last outcome, on a real store and a fake clock."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
from gmta.mail.verdict import Outcome, Status, deferred, delivered, failed
from gmta.queue.ids import IdSource
from gmta.queue.sqlite import SqliteStore
from gmta.queue.store import Settlement, StoreError
from gmta.services.log import NullLog
from gmta.testing import FakeClock, MemoryLog, make_config

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
            "queue": {"retry": "300s 900s", "window": window, "lifetime": "1h", "bounce_lifetime": "30m", "warn_after": "20m"},
            **(sections or {})})
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
