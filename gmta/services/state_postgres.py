"""The shared state on PostgreSQL: limits, greylist, guard counts and policy caches are one for all nodes.

What greenlets want while a round trip is under way makes the next one: one statement for all that is written and one for all that is
read, in one pipeline. Keys are written in their order, so no two workers wait for each other in a circle. The table is UNLOGGED: a
crash of the database, or a replica that is promoted, begins with an empty one, which costs what could be found out again.
Expiries are the nodes' own time: their clocks are to agree within a second or so.
Failure: as in gmta.services.state. A database that does not answer within WAIT_S counts as down; one that is down is asked again
after RETRY_S, and until then nobody waits for it.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from typing import Any

import gevent
import psycopg

from gmta.services import state
from gmta.services.log import Log
from gmta.services.postgres import Database, DatabaseDown, Floats, Gather, Texts
from gmta.services.state import KeptState, Op, plain

WAIT_S = 5.0
RETRY_S = 1.0
AT_ONCE = 256  # wishes of a round trip
PURGED = 10_000  # rows that a purge deletes at most
_MAX_OCTETS = 2000  # of a key: an entry of PostgreSQL's index has room for 2,704

# A counter has no value: that tells an addition from a value that is set. It keeps the expiry that it began with.
_WRITE = """INSERT INTO state AS s (key, value, number, expires_at)
    SELECT * FROM unnest(%s::text[], %s::text[], %s::float8[], %s::float8[])
    ON CONFLICT (key) DO UPDATE SET value = excluded.value,
    number = CASE WHEN excluded.value IS NULL AND s.expires_at > %s THEN coalesce(s.number, 0) + excluded.number ELSE excluded.number END,
    expires_at = CASE WHEN excluded.value IS NULL AND s.expires_at > %s THEN s.expires_at ELSE excluded.expires_at END
    RETURNING key, number"""
_READ = "SELECT key, value, number, expires_at FROM state WHERE key = ANY(%s) AND expires_at > %s"
_SCAN = "SELECT key, value, number FROM state WHERE key >= %s AND key < %s AND expires_at > %s ORDER BY key LIMIT %s"
_PURGE = "DELETE FROM state WHERE key IN (SELECT key FROM state WHERE expires_at <= %s LIMIT %s FOR UPDATE SKIP LOCKED)"
# they are counted where the last estimate is not well below the limit
_EXCESS = """DELETE FROM state WHERE key IN (SELECT key FROM state ORDER BY expires_at
    LIMIT CASE WHEN (SELECT reltuples FROM pg_class WHERE oid = 'state'::regclass) BETWEEN 0 AND %s THEN 0
    ELSE greatest(0, (SELECT count(*) FROM state) - %s) END FOR UPDATE SKIP LOCKED)"""
# Whose turn it is to purge: one worker's of all nodes.
_DUTY = """INSERT INTO duty AS d VALUES ('state', %s) ON CONFLICT (name) DO UPDATE SET due_at = excluded.due_at
    WHERE d.due_at <= %s OR d.due_at > excluded.due_at RETURNING 1"""


class PostgresState(KeptState):
    """State in the database of all nodes."""

    def __init__(self, database: Database, log: Log, clock: Callable[[], float] = time.time) -> None:
        super().__init__(_Keeper(database, clock), log, clock)


class _Round:
    """What one round trip can do: ops of which no two want different things of one key."""

    def __init__(self) -> None:
        self.adds: dict[str, list[tuple[int, float]]] = {}
        self.sets: dict[str, Op] = {}
        self.gets: dict[str, list[int]] = {}
        self.scans: list[tuple[int, Op]] = []
        self.rows: dict[str, tuple[str | None, float | None, float]] = {}  # value, number, expiry to write

    def takes(self, number: int, op: Op) -> bool:
        """Takes an op in, or leaves it and all behind it to the next round."""
        key = op.key
        if op.kind == "get":
            self.gets.setdefault(key, []).append(number)
        elif op.kind == "scan":
            self.scans.append((number, op))
        elif op.kind == "add":
            if key in self.sets:
                return False
            sofar = self.adds.setdefault(key, [])
            before = self.rows[key] if sofar else (None, 0.0, op.expires_at)
            sofar.append((number, op.amount))
            self.rows[key] = (None, (before[1] or 0.0) + op.amount, before[2])
        else:
            if key in self.adds:
                return False
            self.sets[key] = op
            self.rows[key] = ("null", None, 0.0) if op.kind == "delete" else (op.value, _number(op.value), op.expires_at)
        return True


class _Keeper:
    """The Keeper of a database: what comes during a round trip makes the next."""

    errors: tuple[type[Exception], ...] = (psycopg.Error, DatabaseDown, OSError, RuntimeError)

    def __init__(self, database: Database, clock: Callable[[], float]) -> None:
        self._database = database
        self._clock = clock
        self._gather = Gather(self._run, max_items=AT_ONCE)
        self._down: Exception | None = None
        self._down_until = 0.0
        self._purge_at = 0.0
        self._closed = False

    def submit_all(self, ops: list[Op]) -> list[Any]:
        """See Keeper."""
        self._judge()
        answers: list[Any] = self._gather.submit(ops)
        return answers

    def post(self, op: Op) -> None:
        """See Keeper."""
        if not self._closed:
            self._gather.post([op])

    def close(self) -> None:
        """See Keeper."""
        self._closed = True
        with gevent.Timeout(WAIT_S, False):
            self._gather.flush()

    def _judge(self) -> None:
        """Raises what a moment ago was wrong with the database."""
        if self._closed:
            raise RuntimeError("the state is closed")
        if self._down is not None and self._down_until - RETRY_S <= self._clock() < self._down_until:
            raise self._down

    def _run(self, wishes: list[list[Op]]) -> list[Any]:
        """The answers to what several greenlets wish."""
        ops = [op for wish in wishes for op in wish]
        answers: list[Any] = [None] * len(ops)  # of sets and deletes: None
        done = 0
        failure: Exception | None = None
        try:
            if self._down is not None and self._clock() < self._down_until:
                raise self._down
            with gevent.Timeout(WAIT_S, OSError(f"no answer from the database within {WAIT_S:g} s")), self._database.use(WAIT_S) as connection:
                while done < len(ops):
                    done = self._round(connection, ops, done, answers)
                self._purge(connection, ops)
            self._down = None
        except self.errors as error:
            failure = error
            if error is not self._down:
                self._down, self._down_until = error, self._clock() + RETRY_S
        results: list[Any] = []
        start = 0
        for wish in wishes:
            end = start + len(wish)
            results.append(answers[start:end] if failure is None or end <= done else failure)  # what is done is not done again
            start = end
        return results

    @staticmethod
    def _round(connection: psycopg.Connection[Any], ops: list[Op], start: int, answers: list[Any]) -> int:
        """One round trip; gives the number of the first op that it left."""
        this = _Round()
        end = start
        while end < len(ops) and this.takes(end, ops[end]):
            end += 1
        now = max(op.now for op in ops)
        keys = sorted(this.rows)
        values, numbers, expiries = zip(*(this.rows[key] for key in keys), strict=True) if keys else ((), (), ())
        wishes: list[tuple[str, tuple[Any, ...]]] = []
        if keys:
            wishes.append((_WRITE, (Texts(map(_safe, keys)), list(values), list(numbers), Floats(expiries), now, now)))
        if this.gets:
            wishes.append((_READ, (Texts(map(_safe, this.gets)), now)))
        wishes += [(_SCAN, (_safe(op.key), _behind(op.key), op.now, op.limit)) for _, op in this.scans]
        found = _ask(connection, wishes)
        if keys:
            totals = dict(found.pop(0))
            for key, parts in this.adds.items():
                total = totals[_safe(key)]
                for number, amount in reversed(parts):
                    answers[number] = total
                    total -= amount
        if this.gets:
            read = {key: (_text(value, number), expires_at) for key, value, number, expires_at in found.pop(0)}
            for key, places in this.gets.items():
                for number in places:
                    answers[number] = read.get(_safe(key))
        for (number, _), rows in zip(this.scans, found, strict=True):
            answers[number] = [(key, _text(value, total)) for key, value, total in rows]
        return end

    def _purge(self, connection: psycopg.Connection[Any], ops: list[Op]) -> None:
        """Deletes what is over, once in PURGE_S on all nodes together."""
        now = self._clock()
        if now < self._purge_at or all(op.kind in ("get", "scan") for op in ops):
            return
        self._purge_at = now + state.PURGE_S
        if connection.execute(_DUTY, (self._purge_at, now)).fetchone() is not None:
            while connection.execute(_PURGE, (now, PURGED)).rowcount == PURGED:
                pass
            connection.execute(_EXCESS, (state.MAX_ROWS // 2, state.MAX_ROWS))


def _ask(connection: psycopg.Connection[Any], wishes: list[tuple[str, tuple[Any, ...]]]) -> list[list[Any]]:
    """The rows that each statement gives, in one round trip."""
    if len(wishes) == 1:
        return [connection.execute(*wishes[0]).fetchall()]
    with connection.pipeline():
        cursors = [connection.execute(*wish) for wish in wishes]
        return [cursor.fetchall() for cursor in cursors]


def _safe(key: str) -> str:
    """A key as PostgreSQL takes it: without NUL, and not too long for its index."""
    key = key.replace("\0", "\\0")
    return key if len(key) * 4 <= _MAX_OCTETS or len(octets := key.encode()) <= _MAX_OCTETS else f"{key[:100]}#{hashlib.sha256(octets).hexdigest()}"


def _behind(prefix: str) -> str:
    """What sorts behind all keys that begin so."""
    prefix = _safe(prefix)
    return plain(prefix[:-1] + chr(ord(prefix[-1]) + 1)) if prefix else "\U0010ffff"


def _number(text: str) -> float | None:
    """A JSON text's number, so that it can be added to."""
    value = json.loads(text) if text[:1] in "-0123456789" else None
    return float(value) if value is not None and math.isfinite(value) else None


def _text(value: str | None, number: float | None) -> str:
    """JSON of what a row has."""
    if value is not None:
        return value
    number = number or 0.0
    return str(int(number)) if number.is_integer() else json.dumps(number)


__all__ = ["PostgresState"]
