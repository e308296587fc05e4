"""Lanes: one line per (transport, next hop) with its own workers, concurrency, rate and back-off.

A lane's workers are greenlets that live as long as there is work for them, so that a message costs a queue hand-over
and no spawn. Each lane has its own, so a busy destination never starves the rest. What a job does is the scheduler's
`run`; it answers with how the next hop behaved. A next hop that fails as a whole (connection, greeting) closes its lane
for a while: what waits in it is handed back through `postpone`, and afterwards one job alone probes it. Where other
connections of the lane still succeed, its concurrency shrinks instead. An exception of `run` ends nothing: it is logged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import Enum
from typing import Any

import gevent
from gevent.queue import SimpleQueue

from gmta.config import rate_gap

DEFAULT_CONCURRENCY = 20
_IDLE_LANE_S = 60.0


class Health(Enum):
    """How the next hop as a whole behaved in one job."""

    GOOD = 1
    BAD = 2
    UNKNOWN = 3


class Lane:
    """Backlog and workers of one (transport, next hop)."""

    __slots__ = (
        "_queue",
        "_tick",
        "_waiting",
        "active",
        "backlog",
        "failures",
        "key",
        "lanes",
        "last_reply",
        "last_success",
        "limit",
        "maximum",
        "paused_until",
        "rate_gap_s",
        "used_at",
        "workers",
    )

    def __init__(self, lanes: Lanes, key: tuple[str, str], concurrency: int, rate_gap_s: float) -> None:
        self.lanes = lanes
        self.key = key
        self.maximum = concurrency
        self.limit: float = concurrency
        self.rate_gap_s = rate_gap_s
        self._queue: SimpleQueue = SimpleQueue()
        self._waiting = 0
        self._tick = 0.0
        self.workers: set[gevent.Greenlet] = set()
        self.backlog = 0
        self.active = 0
        self.failures = 0
        self.last_reply = ""
        self.last_success = 0.0
        self.paused_until = 0.0
        self.used_at = 0.0

    def put(self, job: Any) -> None:
        """Queues a job and sees that a worker will take it."""
        self.backlog += 1
        self._queue.put(job)
        if self.backlog > self._waiting and len(self.workers) < self.limit and not self.lanes.stopping:
            self._start_worker()

    def _start_worker(self) -> None:
        worker = gevent.Greenlet(self._work)
        self.workers.add(worker)
        worker.start()

    def _work(self) -> None:
        """A worker's life: take a job, run it, take the next."""
        me = gevent.getcurrent()
        queue, lanes = self._queue, self.lanes
        try:
            while True:
                self._waiting += 1
                try:
                    job = queue.get()
                finally:
                    self._waiting -= 1
                if job is None:
                    return
                if self.active >= self.limit:  # the lane shrank: those at work take it up
                    queue.put(job)
                    return
                self.backlog -= 1
                now = self.used_at = lanes.clock()
                if now < self.paused_until:
                    lanes.postpone(self, job)
                    continue
                if self.rate_gap_s:
                    self._tick = max(self._tick + self.rate_gap_s, now)
                    if self._tick > now:
                        gevent.sleep(self._tick - now)
                self.active += 1
                try:
                    health = lanes.run(job)
                finally:
                    self.active -= 1
                if health is Health.GOOD:
                    if self.failures or self.limit < self.maximum:
                        self._recover()
                    self.last_success = now
                elif health is Health.BAD:
                    self._back_off()
                if lanes.stopping or len(self.workers) > max(1.0, self.limit):
                    return
        finally:
            self.workers.discard(me)
            if self.backlog and not self.workers and not lanes.stopping:
                self._start_worker()

    def _recover(self) -> None:
        """A success: the lane opens, by one connection a success."""
        self.failures = 0
        self.paused_until = 0.0
        self.limit = min(self.maximum, self.limit + 1)
        missing = min(self.backlog - self._waiting, int(self.limit) - len(self.workers))
        for _ in range(missing):
            self._start_worker()

    def _back_off(self) -> None:
        """The next hop failed as a whole: fewer connections while others succeed, else a pause and then one probe."""
        now = self.lanes.clock()
        if self.active and self.last_success > now - self.lanes.pause_s and not self.failures:
            self.limit = max(1.0, self.active)
            return
        self.failures += 1
        self.limit = 1
        self.paused_until = now + self.lanes.pause_s

    def resume(self) -> None:
        """Opens a paused lane at once (an operator's retry)."""
        self.paused_until = 0.0

    def dismiss(self) -> None:
        """Lets idle workers end."""
        for _ in range(self._waiting):
            self._queue.put(None)

    @property
    def idle(self) -> bool:
        """Nothing waits here, nothing runs, and there is no failure to remember."""
        return not self.backlog and not self.active and len(self.workers) == self._waiting


class Lanes:
    """All lanes of a worker, made when first used and dropped when idle.

    run(job) -> Health does a job; postpone(lane, job) takes back one whose lane is closed; pause_s: how long a failed
    next hop is left alone; clock: Unix seconds.
    """

    def __init__(self, config: Any, transports: dict[str, Any], run: Callable[[Any], Health],
                 postpone: Callable[[Lane, Any], None], pause_s: float, clock: Callable[[], float]) -> None:
        self._config = config
        self._transports = transports
        self.run = run
        self.postpone = postpone
        self.pause_s = pause_s
        self.clock = clock
        self.stopping = False
        self._lanes: dict[tuple[str, str], Lane] = {}

    def __iter__(self) -> Iterator[Lane]:
        return iter(list(self._lanes.values()))

    def lane(self, transport: str, next_hop: str) -> Lane:
        """The lane of a transport and next hop."""
        key = (transport, next_hop)
        lane = self._lanes.get(key)
        if lane is None:
            concurrency, gap = self._settings(transport)
            lane = self._lanes[key] = Lane(self, key, concurrency, gap)
        return lane

    def put(self, transport: str, next_hop: str, job: Any) -> None:
        """Queues a job in its lane."""
        self.lane(transport, next_hop).put(job)

    def _settings(self, name: str) -> tuple[int, float]:
        """(concurrency, seconds between jobs) of a transport: its section's keys, else its own default."""
        section = self._config.transports.get(name) or {}
        transport = self._transports.get(name)
        concurrency = int(section.get("concurrency") or getattr(transport, "concurrency", 0) or DEFAULT_CONCURRENCY)
        return max(1, concurrency), rate_gap(section.get("rate"))

    def busy(self, backlog: int) -> list[str]:
        """Keys ("transport:next_hop") of lanes that should get nothing more: `backlog` jobs wait, or closed."""
        now = self.clock()
        return [":".join(lane.key) for lane in self._lanes.values() if lane.backlog >= backlog or lane.paused_until > now]

    def resume_all(self) -> None:
        """Opens all paused lanes."""
        for lane in self._lanes.values():
            lane.resume()

    def sweep(self) -> None:
        """Drops lanes unused for a minute with their idle workers."""
        now = self.clock()
        for key, lane in list(self._lanes.items()):
            if lane.idle and lane.used_at < now - _IDLE_LANE_S and lane.paused_until < now:
                lane.dismiss()
                del self._lanes[key]

    def stop(self, timeout_s: float) -> None:
        """Lets running jobs end within timeout_s, then ends their workers; queued jobs stay unrun (their claims lapse)."""
        self.stopping = True
        workers: list[gevent.Greenlet] = []
        for lane in self._lanes.values():
            lane.dismiss()
            workers += lane.workers
        gevent.joinall(workers, timeout=timeout_s)
        gevent.killall([worker for worker in workers if not worker.dead], timeout=2)
