"""Lanes in virtual time: turns, slow start and feedback, probes and pauses, rates, gates, what dead destinations may cost the others."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from itertools import count, pairwise
from types import SimpleNamespace
from typing import Any

import gevent
import pytest
from gevent.event import Event as Signal

from gmta.config import ConfigError, reply_rules
from gmta.deliver import lanes as lanes_module
from gmta.deliver.lanes import Health, Lane, Lanes
from gmta.deliver.scheduler import Scheduler
from gmta.mail.address import Address
from gmta.mail.envelope import Envelope, RecipientState
from gmta.mail.message import Message
from gmta.mail.reply import Reply
from gmta.mail.verdict import Outcome, deferred, delivered, outcome_of
from gmta.queue.ids import IdSource
from gmta.services.log import NullLog
from gmta.testing import MemoryStore, make_config

START = 1_800_000_000.0
GOOD, BAD, UNKNOWN = Health.GOOD, Health.BAD, Health.UNKNOWN


class Time:
    """A clock that goes on when everybody sleeps."""

    def __init__(self) -> None:
        self.now = START
        self.sleeping = 0
        self._due: list[tuple[float, int, Callable[[], Any]]] = []
        self._serial = count()

    def __call__(self) -> float:
        return self.now

    def later(self, seconds: float, call: Callable[[], Any]) -> None:
        heapq.heappush(self._due, (self.now + seconds, next(self._serial), call))

    def sleep(self, seconds: float) -> None:
        signal = Signal()
        self.later(seconds, signal.set)
        self.sleeping += 1
        signal.wait()
        self.sleeping -= 1

    def run(self, lanes: Lanes, seconds: float, each_second: Callable[[], None], *, until: Callable[[], bool] = lambda: False) -> None:
        """Lets so much time pass, or less."""
        end = self.now + seconds
        second = self.now
        while not until():
            settle(self, lanes)
            if until():
                return
            if self.now >= second:
                second += 1
                each_second()
                continue
            at = min(second, self._due[0][0]) if self._due else second
            if at > end:
                self.now = end
                return
            self.now = max(self.now, at)
            while self._due and self._due[0][0] <= self.now:
                heapq.heappop(self._due)[2]()


def settle(time: Time, lanes: Lanes) -> None:
    """Until every greenlet sleeps or has nothing to do."""
    with gevent.Timeout(20):
        quiet = 0
        while quiet < 3:
            gevent.sleep(0)
            stuck = lanes._ring.qsize() == 0 or len(lanes.under_way) == len(lanes._greenlets) >= lanes._allowed
            quiet = quiet + 1 if stuck and time.sleeping == len(lanes.under_way) else 0


class Job:
    def __init__(self, name: str, *, again: bool = False) -> None:
        self.name = name
        self.again = again


class Lines:
    """Lanes over a fake network: `answer(lane, job)` does a job, in virtual time, and tells of its health."""

    def __init__(self, answer: Callable[[Lane, Job], Health] | None = None, *, exchangers: dict[str, list[str]] | None = None,
                 slow_start: bool = True, **sections: dict[str, Any]) -> None:
        self.time = Time()
        self.answer = answer or (lambda lane, job: GOOD)
        self.begun: list[tuple[float, str, str]] = []
        self.returned: list[str] = []
        self.opened = 0
        self.most_at_once = 0
        self.asked: list[str] = []
        network = SimpleNamespace(concurrency=20, **({"next_hop": lambda address: address.host} if slow_start else {}))
        config = make_config({"gmta": {"workers": 1}, "transport:out": {"type": "fake"}, "queue": {"retry": "5m 15m 1h"},
                              **{name.replace("_", ":", 1): keys for name, keys in sections.items()}})

        def exchange(domain: str) -> list[str]:
            self.asked.append(domain)
            return (exchangers or {}).get(domain, [])

        self.lanes = Lanes(config, {"out": network, "other": network}, self._run, lambda lane, job: self.returned.append(job.name), self._open,
                           self.time, exchange, self.time.later)

    def _run(self, lane: Lane, job: Job) -> Health:
        self.begun.append((self.time.now - START, lane.key[1], job.name))
        self.most_at_once = max(self.most_at_once, len(self.lanes.under_way))
        return self.answer(lane, job)

    def _open(self) -> None:
        self.opened += 1

    def put(self, host: str, *names: str, transport: str = "out", again: bool = False, most: int = 10_000) -> list[bool]:
        return [self.lanes.put(transport, host, Job(name, again=again), most) is None for name in names]

    def go(self, seconds: float = 0.5) -> None:
        self.time.run(self.lanes, seconds, self.lanes.tick)

    def lane(self, host: str) -> Lane:
        return self.lanes._lanes["out", host]


def names(number: int, prefix: str = "m") -> list[str]:
    return [f"{prefix}{n}" for n in range(number)]


# --- turns ----------------------------------------------------------------------------------------------------------


def test_lanes_take_turns() -> None:
    it = Lines(queue={"deliveries": 1, "retry": "5m"})
    it.answer = lambda lane, job: it.time.sleep(1) or GOOD  # type: ignore[func-returns-value]
    it.put("busy.example", *names(50))
    it.put("calm.example", "x")
    it.go(3.5)
    assert "x" in [name for _, _, name in it.begun[:3]]


def test_not_more_than_deliveries_at_once() -> None:
    it = Lines(queue={"deliveries": 7, "retry": "5m"})
    it.answer = lambda lane, job: it.time.sleep(1) or GOOD  # type: ignore[func-returns-value]
    for n in range(40):
        it.put(f"d{n}.example", "x")
    it.go(30)
    assert it.most_at_once == 7 and len(it.begun) == 40


def test_slow_start_doubles_up_to_the_concurrency() -> None:
    it = Lines()
    it.answer = lambda lane, job: it.time.sleep(1) or GOOD  # type: ignore[func-returns-value]
    it.put("a.example", *names(100))
    it.go(6.5)
    begun = [int(at) for at, _, _ in it.begun]
    assert [begun.count(second) for second in range(6)] == [1, 2, 4, 8, 16, 20]


def test_a_disk_needs_no_slow_start() -> None:
    it = Lines(slow_start=False)
    it.answer = lambda lane, job: it.time.sleep(1) or GOOD  # type: ignore[func-returns-value]
    it.put("", *names(30))
    it.go(0.5)
    assert len(it.begun) == 20


def test_long_attempts_make_room() -> None:
    it = Lines(queue={"deliveries": 4, "retry": "5m"})
    it.answer = lambda lane, job: it.time.sleep(60 if "dead" in job.name else 0.1) or GOOD  # type: ignore[func-returns-value]
    for n in range(4):
        it.put(f"dead{n}.example", "dead")
    it.put("live.example", *names(10))
    it.go(10)
    assert sum(host == "live.example" for _, host, _ in it.begun) == 10
    assert it.most_at_once <= 8


def test_mail_that_failed_before_gets_half_of_the_room() -> None:
    it = Lines(queue={"deliveries": 10, "retry": "5m"})
    it.answer = lambda lane, job: it.time.sleep(4) or (BAD if "dead" in lane.name else GOOD)  # type: ignore[func-returns-value]
    for n in range(30):
        it.put(f"dead{n}.example", "dead", again=True)
    for n in range(5):
        it.put(f"live{n}.example", "live")
    it.go(0.5)
    assert sorted(name for _, _, name in it.begun) == ["dead"] * 5 + ["live"] * 5
    it.go(60)
    assert len(it.begun) == 35


# --- feedback -------------------------------------------------------------------------------------------------------


def test_a_dead_next_hop_costs_one_attempt_and_is_probed_at_growing_gaps() -> None:
    it = Lines(lambda lane, job: BAD)
    it.put("dead.example", *names(20))
    it.go()
    assert [name for _, _, name in it.begun] == ["m0"] and it.returned == names(20)[1:]
    for _ in range(4000):
        it.put("dead.example", "again")  # refused while it is closed
        it.go(1)
    gaps = [b - a for (a, _, _), (b, _, _) in pairwise(it.begun)]
    assert [round(gap / 10) * 10 for gap in gaps] == [300, 600, 1200, 1800]


def test_pauses_end_at_the_longest() -> None:
    it = Lines()
    assert [it.lanes.pause_s(n) for n in (1, 2, 3, 4, 1000)] == [300, 600, 1200, 1800, 1800]
    assert Lines(queue={"retry": "1s 2s 4s"}).lanes.pause_s(9) == 4


def test_a_lane_being_probed_takes_one_job_and_opens_with_its_success() -> None:
    health = BAD
    it = Lines(lambda lane, job: health)
    it.put("a.example", "first")
    it.go()
    assert it.lanes.rooms(100)[:2] == (["out:a.example"], []) and it.put("a.example", "x") == [False]
    it.go(301)
    assert it.lanes.rooms(100)[:2] == ([], ["out:a.example"]) and it.opened == 1
    health = GOOD
    assert it.put("a.example", "probe", "other") == [True, False]
    it.go()
    assert it.lanes.rooms(100) == ([], [], False) and it.opened == 2
    assert it.put("a.example", *names(3)) == [True] * 3


def test_a_probe_that_tells_nothing_lets_the_next_one_go() -> None:
    health = BAD
    it = Lines(lambda lane, job: health)
    it.put("a.example", "first")
    it.go(301)
    health = UNKNOWN
    it.put("a.example", "gone")
    it.go()
    assert it.lanes.rooms(100)[:2] == ([], ["out:a.example"]) and it.opened == 2


def test_failures_beside_successes_halve_the_lane() -> None:
    it = Lines()
    it.put("a.example", *names(60))
    it.go()
    lane = it.lane("a.example")
    assert lane.limit == 20
    it.answer = lambda lane, job: BAD
    it.put("a.example", "x")
    it.go()
    assert lane.limit == 10 and not lane.failures
    it.answer = lambda lane, job: GOOD
    it.put("a.example", *names(10))
    it.go()
    assert 10.5 < lane.limit < 11.5  # past the point where it failed it grows by one a round
    it.answer = lambda lane, job: BAD
    it.put("a.example", *names(10))
    it.go()
    assert lane.failures == 1 and len(it.returned) == 6


def test_what_was_under_way_when_a_lane_failed_is_one_failure() -> None:
    it = Lines()
    it.put("a.example", *names(60))
    it.go()
    it.answer = lambda lane, job: it.time.sleep(10) or BAD  # type: ignore[func-returns-value]
    it.put("a.example", *names(20))
    it.go(11)
    assert it.lane("a.example").failures == 1


def test_an_operator_opens_all() -> None:
    it = Lines(lambda lane, job: BAD)
    it.put("a.example", "x")
    it.go()
    it.lanes.resume_all()
    assert it.put("a.example", "y", "z") == [True, False]


# --- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("health", [GOOD, BAD])
def test_lanes_are_forgotten(health: Health, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes_module, "MAX_LANES", 100)
    it = Lines(lambda lane, job: health)
    for n in range(1000):
        it.put(f"d{n}.example", "x")
        it.go(0)
        assert len(it.lanes) <= 100
    assert len(it.begun) == 1000
    busy, probing, _ = it.lanes.rooms(10)
    assert len(busy) + len(probing) <= 100
    it.go(3 * 3600)
    assert len(it.lanes) == 0


def test_a_lane_costs_little() -> None:
    it = Lines()
    it.put("d.example", "x")
    it.go(70)
    lane = it.lanes._make(("out", "e.example"))
    assert lane.jobs is None and not hasattr(lane, "__dict__")


# --- rates and gates ------------------------------------------------------------------------------------------------


def test_rate_of_a_transport_is_each_next_hops() -> None:
    it = Lines(transport_out={"type": "fake", "rate": "20/min"})
    it.put("a.example", *names(50))
    it.put("b.example", *names(50))
    it.go(61)
    assert [sum(host == name for _, host, _ in it.begun) for name in ("a.example", "b.example")] in ([21, 21], [22, 22])


def test_rate_of_a_lane_section_is_all_its_domains() -> None:
    it = Lines(lane_big={"match": "*.example, other.test", "rate": "2/s"})
    for host in ("a.example", "b.example", "other.test", "free.test"):
        it.put(host, *names(50))
    it.go(10)
    begun = [sum(host == name for _, host, _ in it.begun) for name in ("a.example", "b.example", "other.test", "free.test")]
    assert sum(begun[:3]) in (20, 21, 22) and max(begun[:3]) - min(begun[:3]) <= 1 and begun[3] == 50


def test_connections_of_an_operator_found_by_mx() -> None:
    running = most = 0

    def answer(lane: Lane, job: Job) -> Health:
        nonlocal running, most
        if lane.key[1] != "free.test":
            running += 1
            most = max(most, running)
            it.time.sleep(1)
            running -= 1
        return GOOD

    exchangers = {f"d{n}.example": ["mx1.GOOGLE.com.", "other.example"] for n in range(10)} | {"free.test": ["mx.google.com.evil.test"]}
    it = Lines(answer, exchangers=exchangers, lane_google={"match_mx": "*.google.com", "connections": 3})
    for n in range(10):
        it.put(f"d{n}.example", *names(5))
    it.put("free.test", *names(5))
    it.go(60)
    assert len(it.begun) == 55 and most == 3 and sorted(set(it.asked)) == sorted(exchangers) and len(it.asked) == 11


def test_shares_of_several_workers() -> None:
    it = Lines(gmta={"workers": 4}, lane_x={"match": "a.example", "rate": "60/min", "connections": 5})
    assert it.lanes.gates[0].gap_s == 4.0 and it.lanes.gates[0].connections == 2


def test_on_reply_closes_all_lanes_of_the_gate() -> None:
    it = Lines(lane_x={"match": "*.example", "on_reply": "421 4.7.0 -> pause 10m\n  45x too many -> pause 1h"})

    def answer(lane: Lane, job: Job) -> Health:
        it.time.sleep(0.1)
        if job.name == "m1":
            assert it.lanes.heard(lane, Reply(421, "4.7.0", "slow down")) == 600
        return GOOD

    it.answer = answer
    it.put("a.example", *names(10))
    it.put("b.example", *names(10))
    it.put("free.test", "x")
    it.go(5)
    assert len(it.begun) < 10 and it.returned and it.put("a.example", "y") == [False]
    assert it.put("c.example", "new") == [False]
    assert "[lane:x] after the reply: 421 4.7.0 slow down" in it.lanes.reason(it.lane("a.example"))
    assert set(it.lanes.rooms(100)[0]) >= {"out:a.example", "out:b.example"}
    it.go(600)
    assert it.lanes.rooms(100) == ([], [], False)
    assert it.put("a.example", "y") == [True]
    lane = it.lane("a.example")
    assert it.lanes.heard(lane, Reply(452, None, "Too Many messages")) == 3600
    assert it.lanes.heard(lane, Reply(421, "4.7.1", "x")) == 0
    assert it.put("free.test", "x") == [True] and it.lanes.heard(it.lane("free.test"), Reply(421, "4.7.0", "x")) == 0


def test_a_failing_lane_leaves_the_gate() -> None:
    it = Lines(lambda lane, job: BAD if lane.key[1] == "dead.example" else GOOD, lane_x={"match": "*.example", "connections": 1})
    it.put("dead.example", *names(5))
    it.put("live.example", *names(5))
    it.go(5)
    assert sum(host == "live.example" for _, host, _ in it.begun) == 5 and it.lanes.gates[0].active == 0


# --- with the scheduler: 2,000 destinations -------------------------------------------------------------------------


class Network:
    """A transport: live hosts take their time, dead ones let the connection time out, busy ones answer 421."""

    concurrency = 20

    def __init__(self, time: Time) -> None:
        self.time = time
        self.seen: dict[str, list[float]] = {}
        self.last = 0.0
        self.left = 0
        self._random = random.Random(7)

    def next_hop(self, address: Address) -> str:
        return address.host

    def deliver(self, delivery: Any) -> dict[int, Outcome]:
        kind = delivery.next_hop.partition("-")[0]
        self.seen.setdefault(delivery.next_hop, []).append(self.time.now)
        if kind == "live":
            self.time.sleep(self._random.uniform(0.2, 2.0))
            self.last = self.time.now
            self.left -= 1
            outcome = delivered(remote="mx")
        elif kind == "dead":
            self.time.sleep(30)
            outcome = deferred("Timeout while connecting", enhanced="4.4.1", remote="mx", recipient_fault=False)
        else:
            self.time.sleep(0.2)
            outcome = outcome_of(Reply(421, "4.3.2", "busy"), remote="mx", recipient_fault=False)
        return {recipient.number: outcome for recipient in delivery.recipients}


class FakePlugins:
    def __init__(self, transports: dict[str, Any]) -> None:
        self.transports = transports

    def has(self, hook: str) -> bool:
        return False


def time_for_the_live(monkeypatch: pytest.MonkeyPatch, *, dead: int, busy: int, seconds: float = 0.0) -> tuple[float, Network, Scheduler]:
    """Seconds until 1,700 live destinations have their three messages each, among others."""
    time = Time()
    network = Network(time)
    plugins = FakePlugins({"out": network})
    config = make_config({"gmta": {"workers": 1}, "transport:out": {"type": "fake"}, "route": {"*": "out"}})
    services = SimpleNamespace(clock=time, log=NullLog(), hostname="mx.example", config=config, resolver=None)
    store = MemoryStore()
    scheduler = Scheduler(config, store, plugins, services, IdSource(time, "AAAAA"))
    monkeypatch.setattr(scheduler.lanes, "_later", time.later)
    hosts = [f"live-{n}.example" for n in range(1700)] + [f"dead-{n}.example" for n in range(dead)] + [f"busy-{n}.example" for n in range(busy)]
    random.Random(3).shuffle(hosts)
    message = Message.from_bytes(b"Subject: x\r\n\r\nbody\r\n")
    network.left = 1700 * 3
    for round_ in range(3):
        for host in hosts:
            envelope = Envelope(scheduler._ids.new(), Address("a", "b.example"),
                                [RecipientState(0, Address(f"u{round_}", host), next_attempt_at=time.now)], 20, time.now)
            store.put(envelope, message)
            scheduler.accept(envelope, message)

    def second() -> None:
        scheduler._tick()
        scheduler._take()

    def woken() -> bool:
        if scheduler._wake.is_set():
            scheduler._wake.clear()
            scheduler._take()
        return network.left == 0 and time.now >= START + seconds

    time.run(scheduler.lanes, 4000, second, until=woken)
    assert network.left == 0
    return network.last - START, network, scheduler


def test_dead_and_busy_destinations_do_not_hold_up_the_live(monkeypatch: pytest.MonkeyPatch) -> None:
    alone, _, scheduler = time_for_the_live(monkeypatch, dead=0, busy=0)
    scheduler.stop(1)
    among, network, scheduler = time_for_the_live(monkeypatch, dead=200, busy=100, seconds=1000)
    scheduler.stop(1)
    print(f"alone {alone:.2f} s, among dead and busy ones {among:.2f} s")
    assert among <= 1.2 * alone
    for host, times in network.seen.items():
        if not host.startswith("live"):
            gaps = [b - a for a, b in pairwise(times)]
            assert len(gaps) == 2 and gaps[0] >= 300 and gaps[1] >= 600, (host, gaps)
    for envelope in scheduler._store.messages.values():  # the others of a dead destination wait, untried
        assert envelope.recipients[0].attempts <= 3
    attempts = [envelope.recipients[0].attempts for envelope in scheduler._store.messages.values()]
    assert len(attempts) == 900 and sum(attempts) == 900


# --- the sections ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "said"), [
    ("[lane:x]\nrate = 1/s", "expected match or match_mx"),
    ("[lane:x]\nmatch = a$b", "expected names such as"),
    ("[lane:x]\nmatch = a\nrate = often", "expected a rate such as"),
    ("[lane:x]\nmatch = a\nconnections = -1", "[lane:x] connections"),
    ("[lane:x]\nmatch = a\non_reply = 421 -> stop", "expected lines such as"),
    ("[lane:x]\nmatch = a\non_reply = 250 -> pause 1m", "expected lines such as"),
    ("[queue:bad..domain]\nretry = 1m", "expected a domain"),
    ("[queue:c.example]\nretry = soon", "expected a time such as"),
    ("[queue]\ndouble_bounce = nobody", "expected an address"),
    ("[queue]\nreturn_message = sometimes", "expected one of"),
])
def test_what_is_wrong_is_said(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as found:
        make_config(text)
    assert said in str(found.value)


@pytest.mark.parametrize(("rule", "code", "enhanced", "text", "matches"), [
    ("421", 421, "4.7.0", "x", True), ("421", 421, None, "x", True), ("421", 421, "4.3.2", "x", True), ("421", 450, "4.7.0", "x", False),
    ("421 4.7.0", 421, "4.7.0", "x", True), ("421 4.7.0", 421, "4.7.1", "x", False), ("421 4.7.0", 421, None, "4.7.0 x", False),
    ("421 4.7.x", 421, "4.7.28", "x", True), ("4xx Too Many", 451, "4.7.0", "sent too many", True), ("4xx too many", 451, None, "few", False),
    ("45x 4.7.0 rate", 452, "4.7.0", "Rate limit", True), ("45x", 421, None, "", False),
])
def test_on_reply(rule: str, code: int, enhanced: str | None, text: str, matches: bool) -> None:
    (one,) = reply_rules(f"{rule} -> pause 90s")
    assert one.pause_s == 90 and one.matches(Reply(code, enhanced, text)) is matches
