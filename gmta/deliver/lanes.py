"""Lanes: one line per (transport, next hop), with its own concurrency and back-off, served in turns by one pool of greenlets.

Turns: a lane that has work stands once in the ring; who takes it runs one job and lets the next lane come, so a busy destination
never starves the rest. `deliveries` bounds what a worker has under way. Dead destinations can't take it all: lanes being probed,
and lanes without a success of late whose mail was tried before, get at most half, and an attempt longer than SLOW_S makes room
for another beside it, up to as many again.
Feedback: a lane to a next hop starts with one job at a time and grows with each success, as TCP does; a failure of the next hop as
a whole (connection, greeting, 421) halves it, and at the bottom closes it. A closed lane's jobs are handed back unspent
(`give_back`); when its pause is over one job probes it, and each failed probe doubles the pause.
Gates: a [lane:NAME] section bounds rate and connections of all lanes that its domains or the MX hosts of their domains match, and
closes them for a while where a remote says what `on_reply` names. Rates and connections are a whole gmta's: each worker has its share;
with `shares` (gmta.deliver.shares) they, and what a lane's failures have taught, are those of all nodes.
What a job does is the scheduler's `run`; routing and the store are left to others. An exception of `run` ends nothing here.
Memory: MAX_LANES lanes are remembered; past that the longest unused are forgotten, which only costs what was learnt about them.
"""

from __future__ import annotations

import fnmatch
import heapq
import math
import re
from collections import deque
from collections.abc import Callable, Iterator
from enum import Enum
from itertools import count
from typing import Any

import gevent
from gevent.queue import SimpleQueue

from gmta.config import LaneSection, ReplyRule, rate_gap, reply_rules
from gmta.mail.reply import Reply

DEFAULT_CONCURRENCY = 20
MAX_LANES = 10_000
MAX_PAUSE_S = 1800.0
SLOW_S = 5.0
TICK_S = 1.0  # how often `tick` is called from outside
_IDLE_LANE_S = 60.0
_FAILED_LANE_S = 3600.0
_SWEEP_S = 10.0
_MX_FOR_S = 3600.0  # how long a lane stays with the gate that its MX hosts gave it
_SPARE = 20  # greenlets that may idle


class Health(Enum):
    """How the next hop as a whole behaved in one job."""

    GOOD = 1
    BAD = 2
    UNKNOWN = 3


class Gate:
    """What the lanes of one [lane:NAME] share in this worker. gap_s: seconds between two jobs; connections: jobs at a time, 0: any."""

    __slots__ = ("active", "connections", "domains", "gap_s", "hosts", "name", "next_at", "rules", "said", "timed", "until", "waiting")

    def __init__(self, name: str, section: LaneSection, workers: int) -> None:
        self.name = f"[lane:{name}]"
        self.domains = _patterns(section.match)
        self.hosts = _patterns(section.match_mx)
        self.gap_s = rate_gap(section.rate) * workers
        self.connections = -(-section.connections // workers)
        self.rules: tuple[ReplyRule, ...] = reply_rules(section.on_reply)
        self.active = 0
        self.next_at = 0.0
        self.until = 0.0  # closed till then
        self.said = ""
        self.waiting: deque[Lane] = deque()  # lanes that wait for their turn through the gate
        self.timed = False

    def lets(self, now: float) -> bool:
        """Whether a job may begin now."""
        return self.next_at <= now and (not self.connections or self.active < self.connections)

    def begin(self, now: float) -> None:
        """A job begins."""
        self.active += 1
        self.next_at = _next_at(self, now)


class Lane:
    """Backlog and state of one (transport, next hop)."""

    __slots__ = ("active", "failed_at", "failures", "gap_s", "gate", "gate_until", "jobs", "key", "last_reply", "limit", "maximum", "name",
                 "next_at", "own", "placed", "plain", "proven", "shared", "threshold", "until", "used_at")

    def __init__(self, key: tuple[str, str], maximum: int, gap_s: float, limit: float) -> None:
        self.key = key
        self.name = ":".join(key)
        self.maximum = maximum
        self.limit = limit  # jobs at a time, now
        self.threshold: float = maximum  # past it the lane grows slowly
        self.gap_s = gap_s
        self.jobs: deque[Any] | None = None  # an empty deque is larger than all the rest
        self.active = 0
        self.placed = False  # in the ring, or waiting for a gate or a time
        self.own: Gate | None = None  # its own limits, where all nodes share them
        self.plain = not gap_s  # no limits of its own
        self.shared = False  # all nodes learn from its failures
        self.gate: Gate | None = None
        self.gate_until = 0.0  # when to ask again which gate it has
        self.proven = limit > 1
        self.failures = 0  # probes failed one after another
        self.failed_at = 0.0
        self.until = 0.0  # closed till then
        self.next_at = 0.0
        self.last_reply = ""
        self.used_at = 0.0

    @property
    def backlog(self) -> int:
        """Jobs that wait."""
        return len(self.jobs) if self.jobs else 0


class Lanes:
    """All lanes of a worker, made when first used.

    run(lane, job) -> Health does a job; give_back(lane, job) takes one back undone; opened() hears that a lane takes jobs again;
    clock: Unix seconds; exchangers(domain) -> names of its MX hosts, may block; later(seconds, callback): a timer; shares: LaneShares, with several nodes.
    `tick` is to be called every TICK_S. A job's attribute `again` tells that its mail was tried before.
    """

    def __init__(self, config: Any, transports: dict[str, Any], run: Callable[[Lane, Any], Health], give_back: Callable[[Lane, Any], None],
                 opened: Callable[[], None], clock: Callable[[], float], exchangers: Callable[[str], list[str]],
                 later: Callable[[float, Callable[[], None]], Any] = gevent.spawn_later, shares: Any = None) -> None:
        self._shares = shares
        self._transports = transports
        self._sections = config.transports
        self._run = run
        self._give_back = give_back
        self._opened = opened
        self._clock = clock
        self._exchangers = exchangers
        self._later = later
        self._workers: int = config.gmta.workers
        self._first_pause_s = config.queue.retry[0]
        self._last_pause_s = min(MAX_PAUSE_S, max(config.queue.retry))
        self._bound: int = config.queue.deliveries
        self._allowed = self._bound
        self._doubtful_most = max(1, self._bound // 2)
        self.gates: list[Gate] = [Gate(name, section, self._workers) if shares is None else shares.gate(f"[lane:{name}]", section)
                                  for name, section in config.lanes.items()]
        self._by_host = [gate for gate in self.gates if gate.hosts is not None]
        self._lanes: dict[tuple[str, str], Lane] = {}
        self._ring: SimpleQueue = SimpleQueue()
        self._greenlets: set[gevent.Greenlet] = set()
        self._idle = 0
        self._peak = 0  # most jobs under way since the last sweep
        self._swept_at = 0.0
        self._doubtful = 0  # jobs under way that may well fail
        self._patient: deque[Lane] = deque()  # lanes that wait until there are fewer of those
        self._filled: set[Lane] = set()  # lanes with more than one job waiting
        self._closed: dict[str, Lane] = {}
        self._probing: dict[str, Lane] = {}  # the pause is over, nothing has succeeded yet
        self._times: list[tuple[float, int, Callable[[Any], None], Any]] = []
        self._serial = count()
        self.under_way: dict[Any, tuple[Lane, float]] = {}  # job -> its lane, when it began; the oldest first
        self.stopping = False

    def __iter__(self) -> Iterator[Lane]:
        return iter(list(self._lanes.values()))

    def __len__(self) -> int:
        return len(self._lanes)

    # --- what comes in --------------------------------------------------------------------------------------------

    def put(self, transport: str, next_hop: str, job: Any, most: float) -> Lane | None:
        """Queues a job. The lane where it can't be taken now: it is closed, or being probed, or `most` jobs wait there."""
        lane = self._lanes.get((transport, next_hop))
        if lane is None:
            lane = self._make((transport, next_hop))
        jobs = lane.jobs
        if lane.failures or (lane.gate is not None and lane.gate.until):
            if self._closed_till(lane) > self._clock():
                if lane.name not in self._closed:  # its gate was closed before it came
                    self._close(lane)
                return lane
            if jobs or lane.active:
                return lane
        elif jobs and len(jobs) >= most:
            return lane
        if jobs:
            self._filled.add(lane)
        elif jobs is None:
            jobs = lane.jobs = deque()
        jobs.append(job)
        if not lane.placed and lane.active < lane.limit:
            self._place(lane)
        return None

    def rooms(self, most: float) -> tuple[list[str], list[str], bool]:
        """Names of lanes that take nothing more now, and of those that take one job, to be probed; whether some are just full.

        Closed lanes, those being probed and those where `most` jobs wait take nothing.
        """
        busy = [lane.name for lane in self._filled if lane.backlog >= most]
        full = bool(busy)
        busy += self._closed
        probing: list[str] = []
        for name, lane in self._probing.items():
            (busy if lane.jobs or lane.active else probing).append(name)
        return busy, probing, full

    def _make(self, key: tuple[str, str]) -> Lane:
        if len(self._lanes) >= MAX_LANES:
            self._forget()
        section = self._sections.get(key[0]) or {}
        transport = self._transports.get(key[0])
        given = int(section.get("concurrency") or 0)
        shared = self._shares is not None and hasattr(transport, "next_hop")
        workers = 1 if shared else self._workers
        maximum = max(1, -(-given // workers) or getattr(transport, "concurrency", 0) or DEFAULT_CONCURRENCY)
        # slow start is for those who have a next hop: a disk needs none
        lane = self._lanes[key] = Lane(key, maximum, 0.0 if shared else rate_gap(section.get("rate")) * workers,
                                       1 if hasattr(transport, "next_hop") else maximum)
        lane.used_at = self._clock()
        if shared:
            lane.shared = True
            if given or section.get("rate"):
                lane.own = self._shares.gate(lane.name, LaneSection.model_validate({"rate": section.get("rate"), "connections": given}))
                lane.plain = False
        for gate in self.gates:
            if gate.domains is not None and gate.domains.match(key[1]):
                lane.gate, lane.gate_until = gate, math.inf
                break
        return lane

    def _forget(self) -> None:
        """Drops a tenth of the lanes: idle ones, those open first, the longest unused first."""
        idle = sorted((lane for lane in self._lanes.values() if _is_idle(lane)), key=lambda lane: (lane.failures > 0, lane.used_at))
        for lane in idle[:max(1, MAX_LANES // 10)]:
            self._drop(lane)

    def _drop(self, lane: Lane) -> None:
        del self._lanes[lane.key]
        self._closed.pop(lane.name, None)
        self._probing.pop(lane.name, None)
        if lane.shared:
            self._shares.forget(lane)

    # --- turns ----------------------------------------------------------------------------------------------------

    def _place(self, lane: Lane) -> None:
        """Puts a lane into the ring and sees that somebody takes it."""
        lane.placed = True
        self._ring.put(lane)
        if self._idle < self._ring.qsize() and len(self._greenlets) < self._allowed and not self.stopping:
            self._start()

    def _start(self) -> None:
        greenlet = gevent.Greenlet(self._work)
        self._greenlets.add(greenlet)
        greenlet.start()

    def _work(self) -> None:
        """A greenlet's life: take the next lane, run one of its jobs."""
        me = gevent.getcurrent()
        ring, clock = self._ring, self._clock
        try:
            while not self.stopping and len(self._greenlets) <= self._allowed:
                self._idle += 1
                try:
                    lane = ring.get()
                finally:
                    self._idle -= 1
                if lane is None:
                    return
                lane.placed = False
                now = lane.used_at = clock()
                plain = lane.proven and not self.gates and lane.plain
                if not (lane.jobs and lane.active < lane.limit if plain else self._may_go(lane, now)):
                    continue
                self._do(lane, None if plain else lane.gate, None if plain else lane.own, now)
        finally:
            self._greenlets.discard(me)
            if self._ring.qsize() > self._idle and len(self._greenlets) < self._allowed and not self.stopping:
                self._start()

    def _do(self, lane: Lane, gate: Gate | None, own: Gate | None, now: float) -> None:
        """Runs the lane's next job and learns from it."""
        jobs = lane.jobs
        assert jobs
        job = jobs.popleft()
        lane.active += 1
        doubtful = not lane.proven and _is_doubtful(lane, job)
        if doubtful:
            self._doubtful += 1
        if not jobs:
            self._filled.discard(lane)
        elif lane.active < lane.limit:
            self._place(lane)
        self.under_way[job] = (lane, now)
        if len(self.under_way) > self._peak:
            self._peak = len(self.under_way)
        health = Health.UNKNOWN
        try:
            health = self._run(lane, job)
        finally:
            del self.under_way[job]
            lane.active -= 1
            if doubtful:
                self._doubtful -= 1
            if gate is not None:
                gate.active -= 1
                self.call(gate)
            if own is not None:
                own.active -= 1
                self.call(own)
            if health is Health.GOOD:
                if not lane.proven or lane.limit < lane.maximum:
                    self._grow(lane)
            elif health is Health.BAD and now >= lane.failed_at:  # what began before the last failure says nothing new
                self._shrink(lane)
            elif lane.failures:
                self._opened()
            if self._patient:
                self._call_patient()
            if lane.jobs and not lane.placed and lane.active < lane.limit:
                self._place(lane)

    def _may_go(self, lane: Lane, now: float) -> bool:
        """Whether a lane's next job may begin, as far as gates, rates and closed lanes go; if not, it waits where it will be called."""
        if lane.gate_until <= now and self._by_host and lane.key[1]:
            self._find_gate(lane, now)
            now = self._clock()
        gate = lane.gate
        if self._closed_till(lane) > now:
            self._close(lane)
        elif lane.jobs and lane.active < lane.limit:
            if not lane.proven and _is_doubtful(lane, lane.jobs[0]) and self._doubtful >= self._doubtful_most:
                self._patient.append(lane)
                lane.placed = True
            elif gate is not None and not gate.lets(now):
                gate.waiting.append(lane)
                lane.placed = True
            elif lane.own is not None and not lane.own.lets(now):
                lane.own.waiting.append(lane)
                lane.placed = True
            elif lane.next_at > now:
                lane.placed = True
                self._at(lane.next_at, self._place, lane)
            else:
                lane.next_at = _next_at(lane, now)
                if lane.own is not None:
                    lane.own.begin(now)
                if gate is not None:
                    gate.begin(now)
                    self.call(gate)
                return True
        if gate is not None:
            self.call(gate)
        if self._patient:
            self._call_patient()
        return False

    def call(self, gate: Gate) -> None:
        """Calls the next lane that waits for a gate, where the gate lets one through, or sees to it that it will be."""
        if not gate.waiting:
            return
        now = self._clock()
        if gate.lets(now):
            self._place(gate.waiting.popleft())
        elif gate.next_at > now and not gate.timed and (self._shares is None or gate.next_at < now + TICK_S):  # shares call again
            gate.timed = True
            self._at(gate.next_at, self._call_timed, gate)

    def _call_timed(self, gate: Gate) -> None:
        gate.timed = False
        self.call(gate)

    def _call_patient(self) -> None:
        if self._doubtful < self._doubtful_most:
            self._place(self._patient.popleft())

    # --- feedback -------------------------------------------------------------------------------------------------

    def _grow(self, lane: Lane) -> None:
        """A success: one more job at a time, past the threshold one a round."""
        lane.proven = True
        lane.limit = min(float(lane.maximum), lane.limit + (1 if lane.limit < lane.threshold else 1 / lane.limit))
        if lane.failures:
            self._recover(lane)
            if lane.shared:
                self._shares.opened(lane.name)

    def _recover(self, lane: Lane) -> None:
        """A closed lane works again."""
        lane.failures = 0
        lane.until = 0.0
        self._probing.pop(lane.name, None)
        if self._closed_till(lane) <= self._clock():
            self._closed.pop(lane.name, None)
        self._opened()

    def _shrink(self, lane: Lane) -> None:
        """The next hop failed as a whole: half as many at a time; where that is less than one, a pause and then a probe."""
        half = lane.limit / 2
        if half >= 1 and lane.proven:
            lane.limit = lane.threshold = half
            return
        now = self._clock()
        lane.failures += 1
        lane.failed_at = now
        lane.proven = False
        lane.limit = 1
        lane.threshold = max(2.0, lane.threshold / 2)
        pause_s = self.pause_s(lane.failures)
        lane.until = now + pause_s
        if lane.shared:
            self._shares.closed(lane.name, lane.failures, pause_s, lane.last_reply)
        self._close(lane)

    def pause_s(self, failures: int) -> float:
        """How long a lane is closed after so many failed probes: the first pause of `retry`, doubled each time, up to the longest."""
        return min(self._first_pause_s * 2.0 ** min(failures - 1, 40), self._last_pause_s)

    def heard(self, lane: Lane, reply: Reply) -> float:
        """Judges what a remote said by the `on_reply` of the lane's gate; seconds that it is closed now, 0 where no rule matches."""
        gate = lane.gate
        rule = None if gate is None else next((rule for rule in gate.rules if rule.matches(reply)), None)
        if gate is None or rule is None:
            return 0.0
        now = self._clock()
        self._suspend(gate, now + rule.pause_s, str(reply)[:200])
        if self._shares is not None:
            self._shares.closed(gate.name, 0, rule.pause_s, gate.said)
        return gate.until - now

    def _suspend(self, gate: Gate, until: float, said: str) -> None:
        """Closes a gate, with all its lanes."""
        gate.until = max(gate.until, until)
        gate.said = said
        for other in self:
            if other.gate is gate:
                self._close(other)
        self._at(gate.until, self._open_gate, gate)

    # --- closed lanes ---------------------------------------------------------------------------------------------

    @staticmethod
    def _closed_till(lane: Lane) -> float:
        gate = lane.gate
        return lane.until if gate is None or gate.until < lane.until else gate.until

    def reason(self, lane: Lane) -> str:
        """Why a lane is closed or probed, for people; "" where it is open."""
        gate = lane.gate
        if gate is not None and gate.until > max(lane.until, self._clock()):
            return f"Delivery suspended by {gate.name} after the reply: {gate.said}"
        return f"Delivery suspended, the next hop failed: {lane.last_reply}" if lane.failures else ""

    def _close(self, lane: Lane) -> None:
        """Hands a closed lane's jobs back and sees that it is opened in time."""
        self._closed[lane.name] = lane
        self._probing.pop(lane.name, None)
        self._filled.discard(lane)
        self._at(self._closed_till(lane), self._open, lane)
        jobs, lane.jobs = lane.jobs, None
        for job in jobs or ():
            self._give_back(lane, job)

    def _open(self, lane: Lane) -> None:
        """A lane's pause is over; one that failed is still to be probed."""
        if self._closed.get(lane.name) is lane and self._closed_till(lane) <= self._clock():
            if lane.failures and lane.shared and not self._shares.may_probe(lane):
                return  # it will be told, by `probe` or `await_probe`
            del self._closed[lane.name]
            if lane.failures:
                self._probing[lane.name] = lane
            self._opened()

    def probe(self, lane: Lane) -> None:
        """It is this worker that probes a lane whose pause is over."""
        self._open(lane)

    def await_probe(self, lane: Lane, until: float) -> None:
        """Another worker does; until then it is to have come to an end."""
        if self._closed.get(lane.name) is lane:
            lane.until = max(until, self._clock() + TICK_S)
            self._at(lane.until, self._open, lane)

    def learn(self, name: str, failures: int, until: float, said: str) -> None:
        """What another node knows of a lane or gate: failures 0: it works.  until: Unix seconds.  said: by the remote."""
        now = self._clock()
        gate = next((gate for gate in self.gates if gate.name == name), None)
        if gate is not None:
            if until > now:
                self._suspend(gate, until, said)
            return
        transport, _, next_hop = name.partition(":")
        lane = self._lanes.get((transport, next_hop))
        if not failures:
            if lane is not None and lane.failures:
                self._recover(lane)
            return
        if lane is None:
            if not hasattr(self._transports.get(transport), "next_hop") or len(self._lanes) >= MAX_LANES:
                return
            lane = self._make((transport, next_hop))
        elif lane.proven and lane.used_at > now - _IDLE_LANE_S:
            return  # from here it works
        lane.failures = failures
        lane.failed_at = now
        lane.proven = False
        lane.limit = 1
        lane.until = max(lane.until, until)
        lane.last_reply = said
        self._close(lane)

    def let_go(self, gate: Gate) -> None:
        """Has the connections closed that transports keep for the lanes of a gate: what they may use is another node's now."""
        for lane in self:
            if lane.gate is gate or lane.own is gate:
                let_go = getattr(self._transports.get(lane.key[0]), "let_go", None)
                if let_go is not None:
                    let_go(lane.key[1])

    def _open_gate(self, gate: Gate) -> None:
        if gate.until <= self._clock():
            gate.until = 0.0
            self.call(gate)

    def resume_all(self) -> None:
        """Opens all closed lanes and gates (an operator's retry); what failed is still probed by one job."""
        for gate in self.gates:
            gate.until = 0.0
        for lane in list(self._closed.values()):
            lane.until = 0.0
            self._open(lane)

    def closed(self) -> Iterator[tuple[Lane, float]]:
        """Closed lanes, with the time when they open."""
        return ((lane, self._closed_till(lane)) for lane in list(self._closed.values()))

    def _find_gate(self, lane: Lane, now: float) -> None:
        """Looks up the MX hosts of a lane's domain; the first gate that names one is the lane's. Blocks: others take their turns."""
        lane.placed = True
        lane.gate_until = now + _MX_FOR_S
        try:
            names = [name.lower().rstrip(".") for name in self._exchangers(lane.key[1])]
        finally:
            lane.placed = False
        lane.gate = next((gate for gate in self._by_host if gate.hosts is not None and any(map(gate.hosts.match, names))), None)

    # --- time -----------------------------------------------------------------------------------------------------

    def _at(self, at: float, call: Callable[[Any], None], what: Lane | Gate) -> None:
        """Has `call(what)` called at that time, by the next `tick` past it or, where that would be late, by a timer."""
        heapq.heappush(self._times, (at, next(self._serial), call, what))
        wait_s = at - self._clock()
        if wait_s < TICK_S:
            self._later(max(0.0, wait_s), self._ring_times)

    def _ring_times(self) -> None:
        now = self._clock()
        while self._times and self._times[0][0] <= now:
            _, _, call, what = heapq.heappop(self._times)
            call(what)

    def tick(self) -> None:
        """What is to be done every TICK_S; never blocks."""
        self._ring_times()
        now = self._clock()
        slow = 0
        for _, began in self.under_way.values():
            if began > now - SLOW_S:
                break
            slow += 1
        self._allowed = self._bound + min(self._bound, slow)
        for _ in range(min(len(self._patient), self._doubtful_most - self._doubtful)):
            self._place(self._patient.popleft())
        for _ in range(min(self._ring.qsize() - self._idle, self._allowed - len(self._greenlets))):
            self._start()
        if now >= self._swept_at + _SWEEP_S:
            self._swept_at = now
            self._sweep(now)

    def _sweep(self, now: float) -> None:
        """Drops lanes that nothing is to be remembered of, and lets greenlets go that were not needed of late."""
        for lane in list(self._lanes.values()):
            if _is_idle(lane):
                lane.jobs = None
                if lane.used_at < now - _IDLE_LANE_S and (not lane.failures or lane.until < now - _FAILED_LANE_S):
                    self._drop(lane)
        for _ in range(min(self._idle, len(self._greenlets) - self._peak - _SPARE)):
            self._ring.put(None)
        self._peak = len(self.under_way)

    def stop(self, timeout_s: float) -> None:
        """Lets running jobs end within timeout_s, then ends their greenlets; queued jobs stay undone (their claims lapse)."""
        self.stopping = True
        greenlets = list(self._greenlets)
        for _ in range(self._idle):
            self._ring.put(None)
        gevent.joinall(greenlets, timeout=timeout_s)
        gevent.killall([greenlet for greenlet in greenlets if not greenlet.dead], timeout=2)


def _is_idle(lane: Lane) -> bool:
    return not lane.jobs and not lane.active and not lane.placed


def _next_at(what: Lane | Gate, now: float) -> float:
    """When the job after one that begins now may begin; one that began late does not delay those behind it."""
    return max(what.next_at, now - min(what.gap_s / 2, TICK_S)) + what.gap_s if what.gap_s else 0.0


def _is_doubtful(lane: Lane, job: Any) -> bool:
    return lane.failures > 0 or bool(job.again)


def _patterns(words: list[str]) -> re.Pattern[str] | None:
    """Matches names that one of the patterns (*.google.com) does, in lower case."""
    return re.compile("|".join(fnmatch.translate(word.lower().rstrip(".")) for word in words)) if words else None
