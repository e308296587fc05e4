"""Limits and back-off of lanes that hold for all nodes together, where they have one PostgreSQL; without one nothing here is loaded.

Connections: a worker holds so many permits of a limit, leased for LEASE_S and renewed in time; what it does not use it gives
back. Where they do not suffice for all, each worker gets its part, and where there are fewer permits than workers they go round: who
had one for TURN_S gives it back after the job at hand, with the connections that its transport kept. Rates: a worker takes points in
time for its next jobs, the earliest that are free, a few at a time. A lane that closes, opens, or is suspended by `on_reply` does so
everywhere, but not where it worked a moment ago; when its pause is over one worker of all probes it.
One greenlet does all that, a round trip at a time, in transactions that wait for no sync: a crash of the database forgets what the
last moments said, and workers say again what they hold.
Failure: where the database can't be reached permits lapse, so limited lanes wait; the others go on with what this worker knows.
"""

from __future__ import annotations

import traceback
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import gevent
import psycopg
from gevent.event import Event as Signal

from gmta.config import LaneSection
from gmta.deliver.lanes import TICK_S, Gate, Lane, Lanes
from gmta.queue import pgschema
from gmta.queue.pgschema import lane_key, storable
from gmta.services.log import Log
from gmta.services.postgres import Database, DatabaseDown, Floats, Integers, Texts

LEASE_S = 15.0
RENEW_S = 3.0
TURN_S = 5.0
KEEP_S = 2.0
BLOCK_S = 0.25  # how far ahead points in time are taken
LATE_S = 0.25  # and how long one is good
SPARE = 1.01  # of a rate's gap: 60 a minute stay so where one comes late and the one after it in time
PROBE_S = 60.0  # a probe has so long to come to an end, then another worker may
WAIT_S = 5.0  # for the database
OVERLAP_S = 5.0  # changes are asked for again so long: transactions end in another order than they begin
MOST = 5000  # changes taken at a time
FORGET_S = 3600.0
PURGE_S = 600.0

_NOW = "extract(epoch FROM clock_timestamp())::float8"
_LOCK = f"""INSERT INTO lane_limit AS l (name, next_at, used_at) SELECT n, 0, {_NOW} FROM unnest(%s) n ORDER BY n
    ON CONFLICT (name) DO UPDATE SET used_at = excluded.used_at"""
# `since`: who waits longer comes first. What a worker says that it holds it keeps.
_GRANT = f"""WITH ask AS (
      SELECT a.*, coalesce(h.since, {_NOW}) AS since FROM unnest(%s, %s, %s, %s) AS a(name, most, holding, want)
      LEFT JOIN lane_holder h ON h.name = a.name AND h.worker = %s AND h.held = 0 AND h.want > 0 AND h.until > {_NOW}),
    others AS (
      SELECT ask.name, coalesce(sum(h.held), 0) AS taken, count(h.name) FILTER (WHERE h.want > 0) AS interested,
        count(h.name) FILTER (WHERE h.want > h.held) AS short, count(h.name) FILTER (WHERE h.want > 0 AND h.held = 0) AS starving,
        count(h.name) FILTER (WHERE h.want > 0 AND h.held = 0 AND h.since < ask.since) AS ahead
      FROM ask LEFT JOIN lane_holder h ON h.name = ask.name AND h.worker <> %s AND h.until > {_NOW} GROUP BY ask.name),
    parts AS (
      SELECT ask.*, taken, ahead, starving, CASE WHEN short = 0 THEN most
        WHEN starving > 0 THEN greatest(1, most / (interested + 1)) ELSE (most + interested) / (interested + 1) END AS part
      FROM ask JOIN others USING (name)),
    put AS (INSERT INTO lane_holder AS h (name, worker, held, want, since, until)
    SELECT name, %s, greatest(holding, least(want, part, most - taken - ahead)), want, since, {_NOW} + %s FROM parts
    ON CONFLICT (name, worker) DO UPDATE SET held = excluded.held, want = excluded.want, since = excluded.since, until = excluded.until
    RETURNING name, held)
    SELECT name, put.held, part, starving FROM put JOIN parts USING (name)"""
_POINTS = f"""UPDATE lane_limit l SET next_at = greatest(l.next_at, {_NOW}) + a.n * a.gap
    FROM unnest(%s, %s, %s) AS a(name, gap, n) WHERE l.name = a.name RETURNING l.name, l.next_at, a.n"""
_LOCK_CLOSED = "SELECT 1 FROM lane_closed WHERE name = ANY(%s) ORDER BY name FOR UPDATE"
_CLOSE = f"""INSERT INTO lane_closed AS c (name, failures, until, said, worker, changed_at, prober, probe_until)
    SELECT name, failures, {_NOW} + pause, said, %s, {_NOW}, '', 0 FROM unnest(%s, %s, %s, %s) AS a(name, failures, pause, said) ORDER BY name
    ON CONFLICT (name) DO UPDATE SET failures = greatest(c.failures, excluded.failures), until = greatest(c.until, excluded.until),
    said = excluded.said, worker = excluded.worker, changed_at = excluded.changed_at, prober = '', probe_until = 0"""
_OPEN = f"""UPDATE lane_closed SET failures = 0, until = 0, worker = %s, changed_at = {_NOW}, prober = '', probe_until = 0
    WHERE name = ANY(%s)"""
_PROBE = f"UPDATE lane_closed SET prober = %s, probe_until = {_NOW} + %s WHERE name = ANY(%s) AND (prober = %s OR probe_until <= {_NOW})"
_PROBERS = "SELECT name, prober, probe_until FROM lane_closed WHERE name = ANY(%s)"
_CHANGES = """SELECT name, failures, until, said, worker, changed_at FROM lane_closed WHERE changed_at > %s AND (failures > 0 OR %s)
    ORDER BY changed_at LIMIT %s"""
_CLOCK = f"SELECT {_NOW}"
_LEAVE = "DELETE FROM lane_holder WHERE worker = %s"
_DUTY = f"""INSERT INTO duty AS d VALUES ('lanes', {_NOW} + %s) ON CONFLICT (name) DO UPDATE SET due_at = excluded.due_at
    WHERE d.due_at <= {_NOW} RETURNING 1"""
_PURGES = tuple(f"DELETE FROM {table} WHERE {column} < {_NOW} - %s" for table, column in
                (("lane_holder", "until"), ("lane_limit", "greatest(used_at, next_at)"), ("lane_closed", "greatest(changed_at, until)")))


class SharedGate(Gate):
    """A limit of all nodes. permits: jobs that this worker may have under way; points: when its next jobs may begin."""

    __slots__ = ("asked", "asked_points", "leased_until", "part", "peak", "peak_until", "permits", "points", "starving",
                 "tell_at", "told", "turn_until", "want")

    def __init__(self, name: str, section: LaneSection, want: Callable[[SharedGate], None]) -> None:
        super().__init__(name, section, 1)
        self.name = name
        self.gap_s *= SPARE
        self.want = want
        self.asked = False  # it is known that permits are missing
        self.asked_points = False
        self.permits = 0
        self.peak = 0  # the most of them that were used of late
        self.peak_until = 0.0
        self.part = self.connections  # what of it is for this worker
        self.leased_until = 0.0
        self.told = (0, 0)
        self.tell_at = 0.0
        self.starving = False  # others have none
        self.turn_until = 0.0  # and wait for ours, from then on
        self.points: deque[float] = deque()

    def lets(self, now: float) -> bool:
        """Whether a job may begin now; if not, what is missing is asked for."""
        self.next_at = 0.0
        if self.connections and self.active >= self.usable(now):
            if not self.asked:
                self.asked = True
                self.want(self)
            return False
        if not self.gap_s:
            return True
        points = self.points
        while points and points[0] < now - LATE_S:
            points.popleft()
        if points:
            self.next_at = points[0]
            return points[0] <= now
        if not self.asked_points:
            self.asked_points = True
            self.want(self)
        return False

    def usable(self, now: float) -> int:
        """Permits that may be used; none where the lease is over, or it is another worker's turn."""
        if now >= self.leased_until or (self._is_over(now) and not (self.points and self.points[-1] >= now - LATE_S)):
            return 0
        return min(self.permits, self.part)

    def _is_over(self, now: float) -> bool:
        """Whether it is another's turn, once the points in time that this worker has taken are used."""
        return self.starving and now >= self.turn_until

    def begin(self, now: float) -> None:
        """A job begins."""
        self.active += 1
        self.peak = max(self.peak, self.active)
        if self.gap_s:
            self.points.popleft()

    def backlog(self) -> int:
        """Jobs that wait for it, as far as their lanes would have them run."""
        return sum(min(lane.backlog, max(1, int(lane.limit) - lane.active)) for lane in self.waiting)

    def keeps(self, now: float) -> int:
        """Permits that it has use for: those used of late too, where nobody is without."""
        if now >= self.peak_until:
            self.peak, self.peak_until = self.active, now + KEEP_S
        return max(self.active, min(self.usable(now), max(0 if self.starving else self.peak, self.active + self.backlog())))

    def wants(self) -> int:
        """Permits that it would like to have."""
        return min(self.connections, max(self.permits, self.active + self.backlog()))

    def news(self, now: float) -> tuple[int, int] | None:
        """What is to be said: permits that it holds, and that it would like to have; None where that was said a moment ago."""
        news = self.permits, self.wants()
        if news == self.told and now < self.tell_at and not self.asked:
            return None
        self.told, self.tell_at = news, now + RENEW_S
        return news

    def misses(self, now: float) -> int:
        """Points in time that it could use."""
        if not self.gap_s or (self.connections and (self.active >= self.usable(now) or self._is_over(now))):
            return 0
        most = max(1, int(BLOCK_S / self.gap_s))
        return max(0, min(most, sum(lane.backlog for lane in self.waiting)) - len(self.points))

    def grant(self, now: float, held: int, part: int, starving: bool) -> None:
        """What the database says that this worker has."""
        if held > self.permits or not starving:
            self.turn_until = now + TURN_S
        if held > self.permits:
            self.asked = False
        self.permits, self.part, self.starving = held, max(1, part), starving
        self.leased_until = now + LEASE_S - TICK_S


class LaneShares:
    """What this worker has of the limits of all. worker: its name, unlike every other's."""

    def __init__(self, database: Database, worker: str, log: Log, clock: Callable[[], float]) -> None:
        self._database = database
        self._worker = worker
        self._log = log
        self._clock = clock
        self._gates: dict[str, SharedGate] = {}  # those that hold or want something
        self._closed: dict[str, tuple[int, float, str]] = {}  # to be told: failures, seconds, what was said
        self._opened: set[str] = set()
        self._asked: dict[str, Lane] = {}  # lanes whose pause is over
        self._probing: dict[str, Lane] = {}  # those that this worker probes
        self._seen_at = 0.0
        self._seen: set[tuple[str, float]] = set()
        self._purge_at = 0.0
        self._renew_at = 0.0
        self._wake = Signal()
        self._greenlet: gevent.Greenlet | None = None
        self._failing = False
        self._migrated = False
        self._unsure = False  # what the database says that this worker holds may be more than it knows of

    # --- for Lanes ------------------------------------------------------------------------------------------------

    def gate(self, name: str, section: LaneSection) -> SharedGate:
        """A limit; one of the same name is the same limit on all nodes."""
        return SharedGate(lane_key(name), section, self._want)

    def _want(self, gate: SharedGate) -> None:
        self._gates[gate.name] = gate
        self._wake.set()

    def closed(self, name: str, failures: int, pause_s: float, said: str) -> None:
        """A lane or gate closes."""
        if lane_key(name) != name:
            return
        self._opened.discard(name)
        self._probing.pop(name, None)
        self._closed[name] = (failures, pause_s, storable(said))
        self._wake.set()

    def opened(self, name: str) -> None:
        """A lane that was closed works again."""
        if lane_key(name) != name:
            return
        self._closed.pop(name, None)
        self._probing.pop(name, None)
        self._opened.add(name)
        self._wake.set()

    def may_probe(self, lane: Lane) -> bool:
        """Whether it is this worker that probes a lane; where that is not known yet `Lanes.probe` or `Lanes.await_probe` will be called."""
        if lane.name in self._probing or lane_key(lane.name) != lane.name:  # too long a name is nobody else's
            return True
        self._asked[lane.name] = lane
        self._wake.set()
        return False

    def forget(self, lane: Lane) -> None:
        """Nothing is to be remembered of a lane."""
        self._probing.pop(lane.name, None)
        self._asked.pop(lane.name, None)

    # --- the greenlet ---------------------------------------------------------------------------------------------

    def start(self, lanes: Lanes) -> None:
        """Begins to share."""
        self._greenlet = gevent.spawn(self._work, lanes)

    def stop(self) -> None:
        """Gives back all that is held."""
        if self._greenlet is not None:
            self._greenlet.kill()
        try:
            with gevent.Timeout(1.0, OSError("no answer")), self._database.use() as connection:
                connection.execute(_LEAVE, (self._worker,))
        except (psycopg.Error, DatabaseDown, OSError):
            pass  # it lapses

    def _work(self, lanes: Lanes) -> None:
        while True:
            try:
                self.share(lanes)
            except (psycopg.Error, DatabaseDown, OSError) as error:
                if not self._failing:
                    self._failing = True
                    self._log.warning("lanes are not shared", error=str(error))
                gevent.sleep(TICK_S)
            else:
                if self._failing:
                    self._failing = False
                    self._log.info("lanes are shared again")
            self._wake.wait(TICK_S)
            self._wake.clear()

    def share(self, lanes: Lanes) -> None:
        """One round trip: says what has changed here, hears what has elsewhere. Raises psycopg.Error, DatabaseDown, OSError."""
        self._make_tables()
        now = self._clock()
        gates = [self._gates[name] for name in sorted(self._gates)]
        for gate in gates:
            keeps = gate.keeps(now)
            if keeps < gate.permits:
                gate.permits = keeps
                try:
                    lanes.let_go(gate)
                except Exception:  # a transport's own
                    self._log.error("transport failed", lane=gate.name, traceback=traceback.format_exc())
            if self._unsure:
                gate.told = (-1, -1)
        limited = [(gate.name, gate.connections, *news) for gate in gates if gate.connections and (news := gate.news(now))]
        missing = [(gate.name, gate.gap_s, n) for gate in gates if (n := gate.misses(now))]
        for gate in gates:
            gate.asked_points = False
        closed, opened, asked = dict(self._closed), set(self._opened), dict(self._asked)
        unsure, self._unsure = self._unsure, True
        answers = self._exchange(limited, missing, closed, opened, asked, unsure)
        self._unsure = False
        offset_s = self._clock() - answers[_CLOCK][0][0]  # our clock minus the database's
        for name, told in closed.items():
            if self._closed.get(name) is told:
                del self._closed[name]
        self._opened -= opened
        for name, held, part, starving in answers.get(_GRANT, ()):
            self._gates[name].grant(now, held, part, starving > 0)
        for name, behind, n in answers.get(_POINTS, ()):
            gate = self._gates[name]
            gate.points += (behind + offset_s - (n - i) * gate.gap_s for i in range(n))
        self._hear_probers(lanes, asked, answers.get(_PROBERS, ()), offset_s)
        self._hear_changes(lanes, answers[_CHANGES], answers[_CLOCK][0][0], offset_s)
        for gate in gates:
            if gate.waiting:
                lanes.call(gate)
            elif not gate.active and not gate.permits:
                del self._gates[gate.name]
                gate.asked = False
        self._purge(now)

    def _make_tables(self) -> None:
        """The first who comes makes them, be it the store or this."""
        if not self._migrated:
            with gevent.Timeout(WAIT_S, OSError("no answer from the database")), self._database.use() as connection:
                pgschema.migrate(connection)
            self._migrated = True

    def _exchange(self, limited: list[tuple[Any, ...]], missing: list[tuple[Any, ...]], closed: dict[str, tuple[int, float, str]],
                  opened: set[str], asked: dict[str, Lane], unsure: bool = False) -> dict[str, list[Any]]:
        """The statements with their rows, in one transaction. unsure: what this worker holds is said anew as a whole."""
        worker = self._worker
        probed = {*asked}
        if self._clock() >= self._renew_at:
            self._renew_at = self._clock() + PROBE_S / 3
            probed |= {*self._probing}
        asks: list[tuple[str, tuple[Any, ...]]] = []
        if limited or missing:
            asks.append((_LOCK, (Texts(sorted({row[0] for row in (*limited, *missing)})),)))
        if unsure:
            asks.append((_LEAVE, (worker,)))
        if limited:
            names, most, holding, want = zip(*limited, strict=True)
            asks.append((_GRANT, (Texts(names), Integers(most), Integers(holding), Integers(want), worker, worker, worker, LEASE_S)))
        if missing:
            names, gaps, counts = zip(*missing, strict=True)
            asks.append((_POINTS, (Texts(names), Floats(gaps), Integers(counts))))
        if closed or opened or probed:
            asks.append((_LOCK_CLOSED, (Texts({*closed, *opened, *probed}),)))
        if closed:
            failures, pauses, said = zip(*closed.values(), strict=True)
            asks.append((_CLOSE, (worker, Texts(closed), Integers(failures), Floats(pauses), Texts(said))))
        if opened:
            asks.append((_OPEN, (worker, Texts(opened))))
        if probed:
            asks += [(_PROBE, (worker, PROBE_S, Texts(probed), worker)), (_PROBERS, (Texts(probed),))]
        since = self._seen_at - OVERLAP_S if self._seen_at else 0.0
        asks += [(_CHANGES, (since, bool(self._seen_at), MOST)), (_CLOCK, ())]
        with gevent.Timeout(WAIT_S, OSError("no answer from the database")), self._database.use() as connection, connection.pipeline() as pipeline:
            connection.execute("BEGIN")
            connection.execute("SET LOCAL synchronous_commit = off")
            cursors = {statement: connection.execute(statement, values) for statement, values in asks}
            connection.execute("COMMIT")
            pipeline.sync()
            return {statement: cursor.fetchall() if cursor.description else [] for statement, cursor in cursors.items()}

    def _hear_probers(self, lanes: Lanes, asked: dict[str, Lane], rows: Iterable[Any], offset_s: float) -> None:
        """Who is to probe the lanes that were asked for; nobody knows of those that have no row."""
        known = {name: (prober, until) for name, prober, until in rows}
        for name, lane in asked.items():
            if self._asked.get(name) is not lane:
                continue
            del self._asked[name]
            prober, until = known.get(name, (self._worker, 0.0))
            if prober == self._worker:
                self._probing[name] = lane
                lanes.probe(lane)
            else:
                lanes.await_probe(lane, until + offset_s)

    def _hear_changes(self, lanes: Lanes, rows: list[Any], now: float, offset_s: float) -> None:
        """Which lanes others have closed and opened. now: by the database's clock."""
        for name, failures, until, said, worker, changed_at in rows:
            if worker != self._worker and (name, changed_at) not in self._seen:
                self._probing.pop(name, None)
                lanes.learn(name, failures, until + offset_s, said)
        self._seen = {(row[0], row[5]) for row in rows}
        self._seen_at = now if len(rows) < MOST else rows[-1][5] + OVERLAP_S

    def _purge(self, now: float) -> None:
        """Deletes what nobody has used for long, one worker on behalf of all."""
        if now < self._purge_at:
            return
        self._purge_at = now + PURGE_S
        with gevent.Timeout(WAIT_S, OSError("no answer from the database")), self._database.use() as connection:
            if connection.execute(_DUTY, (PURGE_S,)).fetchone() is not None:
                for statement in _PURGES:
                    connection.execute(statement, (FORGET_S,))
