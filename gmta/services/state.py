"""State that all workers share: counters with expiry and small values, gone when their time is over. Here: in a file of this machine.

    total = services.state.add("greylist:192.0.2.1", 1, ttl_s=3600)
    services.state.set("sts:example.org", {"mode": "enforce"}, ttl_s=86400)
    services.state.get("sts:example.org")

Keys are text, values whatever JSON has. Everything has an expiry, at most a year ahead; past MAX_ROWS those go first that would
go soonest. Mail never depends on it: what is here can be found out again, so it is written without a sync of its own. Callers in
greenlets wait without stalling the loop; what several want at one moment is one transaction of the native thread.

Failure: nothing outside makes a method raise. Where the file (state_postgres: the database) can't be used `get` finds nothing new,
`set` and `add` count for this worker alone, and the log says so once; a damaged file is set aside and a new one begun.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from gmta.services.batch import Batch
    from gmta.services.log import Log

MAX_ROWS = 1_000_000
MAX_KEY = 512  # characters; what is longer is known by its hash
MAX_VALUE = 256 * 1024  # characters of JSON
MAX_TTL_S = 366 * 86400.0
FRESH_S = 1.0  # how old an answer of `get` may be: another worker may have written since
CACHED = 4096  # values remembered by a worker
PURGE_S = 60.0
BUSY_S = 5.0

_SCHEMA = """
CREATE TABLE IF NOT EXISTS state (key TEXT PRIMARY KEY, value TEXT NOT NULL, expires_at REAL NOT NULL) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS state_expiry ON state (expires_at);
"""
_GET = "SELECT value, expires_at FROM state WHERE key = ? AND expires_at > ?"
_SET = "INSERT INTO state VALUES (?, ?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value, expires_at = excluded.expires_at"
# A counter keeps the expiry that it began with: it counts what happened in one window of time.
_ADD = """INSERT INTO state VALUES (?1, ?2, ?3) ON CONFLICT (key) DO UPDATE SET
    value = CASE WHEN expires_at > ?4 THEN CAST(CAST(value AS NUMERIC) + ?2 AS TEXT) ELSE excluded.value END,
    expires_at = CASE WHEN expires_at > ?4 THEN expires_at ELSE excluded.expires_at END
    RETURNING value"""
_DELETE = "DELETE FROM state WHERE key = ?"
_SCAN = "SELECT key, value FROM state WHERE key >= ? AND key < ? AND expires_at > ? ORDER BY key LIMIT ?"
_PURGE = "DELETE FROM state WHERE expires_at <= ?"
_EXCESS = "DELETE FROM state WHERE key IN (SELECT key FROM state ORDER BY expires_at LIMIT max(0, (SELECT count(*) FROM state) - ?))"


class State(Protocol):
    """What shared state can do, wherever it is kept."""

    def get(self, key: str, default: Any = None) -> Any:
        """The value, as of at most FRESH_S ago; `default` where there is none."""

    def set(self, key: str, value: Any, ttl_s: float) -> None:
        """Keeps a value for so long."""

    def add(self, key: str, amount: float = 1, ttl_s: float = 3600.0) -> float:
        """Adds to a counter and returns its total; ttl_s counts from its first addition."""

    def count(self, key: str, amount: float = 1, ttl_s: float = 3600.0) -> None:
        """`add` without waiting for it to be done."""

    def add_all(self, amounts: Sequence[tuple[str, float, float]]) -> list[float]:
        """`add` of many (key, amount, ttl_s) with one wait; their totals."""

    def delete(self, key: str) -> None:
        """Forgets a key."""

    def scan(self, prefix: str, limit: int = 10000) -> list[tuple[str, Any]]:
        """The keys that begin so, in order, with their values."""

    def close(self) -> None:
        """Ends it."""


class Op(NamedTuple):
    """One wish to whoever keeps the state: get, set, add, delete or scan."""

    kind: str
    key: str
    value: str = ""
    amount: float = 0
    expires_at: float = 0.0
    now: float = 0.0
    limit: int = 0


class Keeper(Protocol):
    """Where the state is: answers come in the order of the ops, those of one moment together; it raises one of `errors` for all."""

    errors: tuple[type[Exception], ...]

    def submit_all(self, ops: list[Op]) -> list[Any]:
        """(JSON text, expiry) or None for a get, the total for an add, (key, text) pairs for a scan, None for the rest."""

    def post(self, op: Op) -> None:
        """The same without waiting for it."""

    def close(self) -> None:
        """Writes what is under way."""


class KeptState:
    """State that a Keeper keeps, with a cache of what was read of late. clock: Unix seconds."""

    def __init__(self, keeper: Keeper, log: Log, clock: Callable[[], float] = time.time) -> None:
        self._log = log
        self._clock = clock
        self._keeper = keeper
        self._cache: OrderedDict[str, tuple[Any, float, float]] = OrderedDict()  # key -> value, expiry, when it was true
        self._failing = False

    def get(self, key: str, default: Any = None) -> Any:
        """The value, as of at most FRESH_S ago; `default` where there is none."""
        now = self._clock()
        key = plain(key)
        kept = self._cache.get(key)
        if kept is not None and (now - FRESH_S <= kept[2] <= now or self._failing):
            return kept[0] if kept[1] > now else default
        found = self._do(Op("get", key, now=now))
        if found is _UNKNOWN:
            return kept[0] if kept is not None and kept[1] > now else default
        if found is None:
            self._cache.pop(key, None)
            return default
        value = json.loads(found[0])
        self._keep(key, value, found[1], now)
        return value

    def set(self, key: str, value: Any, ttl_s: float) -> None:
        """Keeps a value for so long. What JSON does not have raises TypeError, a value over MAX_VALUE ValueError."""
        text = json.dumps(value, separators=(",", ":"))
        if len(text) > MAX_VALUE:
            raise ValueError(f"a value of {len(text)} characters for {key[:80]!r}")
        now = self._clock()
        key, expires_at = plain(key), now + min(ttl_s, MAX_TTL_S)
        self._keep(key, value, expires_at, now)
        self._do(Op("set", key, text, expires_at=expires_at, now=now))

    def add(self, key: str, amount: float = 1, ttl_s: float = 3600.0) -> float:
        """Adds to a counter and returns its total; ttl_s counts from its first addition."""
        return self.add_all([(key, amount, ttl_s)])[0]

    def add_all(self, amounts: Sequence[tuple[str, float, float]]) -> list[float]:
        """`add` of many (key, amount, ttl_s) with one wait; their totals."""
        now = self._clock()
        ops = [Op("add", plain(key), "", amount, now + min(ttl_s, MAX_TTL_S), now) for key, amount, ttl_s in amounts]
        return [self._counted(op, total, now) for op, total in zip(ops, self._do_all(ops), strict=True)]

    def _counted(self, op: Op, total: Any, now: float) -> float:
        """The total that was found, or this worker's own where there is none."""
        key, amount = op.key, op.amount
        if total is _UNKNOWN:
            kept = self._cache.get(key)
            known, expires_at = (kept[0], kept[1]) if kept is not None and kept[1] > now else (0, op.expires_at)
            total = (known if isinstance(known, (int, float)) else 0) + amount
            self._keep(key, total, expires_at, now)
            return float(total)
        self._cache.pop(key, None)
        return float(total)

    def count(self, key: str, amount: float = 1, ttl_s: float = 3600.0) -> None:
        """`add` without waiting for it to be done."""
        now = self._clock()
        key = plain(key)
        self._cache.pop(key, None)
        self._keeper.post(Op("add", key, "", amount, now + min(ttl_s, MAX_TTL_S), now))

    def delete(self, key: str) -> None:
        """Forgets a key."""
        key = plain(key)
        self._cache.pop(key, None)
        self._do(Op("delete", key))

    def scan(self, prefix: str, limit: int = 10000) -> list[tuple[str, Any]]:
        """The keys that begin so, in order, with their values."""
        found = self._do(Op("scan", plain(prefix), now=self._clock(), limit=limit))
        return [] if found is _UNKNOWN else [(key, json.loads(text)) for key, text in found]

    def close(self) -> None:
        """Writes what is under way."""
        self._keeper.close()

    def _keep(self, key: str, value: Any, expires_at: float, now: float) -> None:
        cache = self._cache
        cache[key] = (value, expires_at, now)
        cache.move_to_end(key)
        if len(cache) > CACHED:
            cache.popitem(last=False)

    def _do(self, op: Op) -> Any:
        """The keeper's answer, or _UNKNOWN."""
        return self._do_all([op])[0]

    def _do_all(self, ops: list[Op]) -> list[Any]:
        """Its answers."""
        try:
            answers = self._keeper.submit_all(ops)
        except self._keeper.errors as error:
            if not self._failing:
                self._failing = True
                self._log.warning("state can't be kept", error=str(error))
            return [_UNKNOWN] * len(ops)
        if self._failing:
            self._failing = False
            self._log.info("state is kept again")
        return answers


class _Unknown:
    """The type of _UNKNOWN."""


_UNKNOWN = _Unknown()


class SqliteState(KeptState):
    """State in one SQLite file that the workers of this machine share. batch(run) -> Batch."""

    def __init__(self, path: str, batch: Callable[[Callable[[list[Any]], list[Any]]], Batch], log: Log,
                 clock: Callable[[], float] = time.time) -> None:
        super().__init__(_Thread(_File(path), batch), log, clock)


class _Thread:
    """The Keeper of a file: a batch of a native thread."""

    errors: tuple[type[Exception], ...] = (sqlite3.Error, OSError, RuntimeError)

    def __init__(self, file: _File, batch: Callable[[Callable[[list[Any]], list[Any]]], Batch]) -> None:
        self._file = file
        self._batch = batch(file.run)
        self.submit_all = self._batch.submit_all
        self.post = self._batch.post

    def close(self) -> None:
        """Ends the thread."""
        self._batch.close()
        self._file.close()


class _File:
    """The native thread's side: the database, opened at the first batch."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._database: sqlite3.Connection | None = None
        self._purge_at = 0.0
        self._inode = 0

    def run(self, ops: list[Op]) -> list[Any]:
        """One transaction of all that waits; raises sqlite3.Error or OSError for all."""
        try:
            return self._run(ops)
        except sqlite3.DatabaseError as error:
            damaged = (error.sqlite_errorcode & 0xFF) in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
            self.close()  # whatever it was (disk full, file removed), the next batch begins anew
            if not damaged:
                raise
            self._set_aside()
            return self._run(ops)

    def _set_aside(self) -> None:
        """Moves a damaged file away, unless another worker has done it since: nothing in it is worth more than going on."""
        try:
            if os.stat(self._path).st_ino != self._inode:
                return
        except FileNotFoundError:
            return
        for suffix in ("", "-wal", "-shm"):
            if os.path.exists(self._path + suffix):
                os.replace(self._path + suffix, f"{self._path}{suffix}.damaged")

    def _run(self, ops: list[Op]) -> list[Any]:
        database = self._database or self._open()
        writing = any(op.kind not in ("get", "scan") for op in ops)
        database.execute("BEGIN IMMEDIATE" if writing else "BEGIN")
        try:
            results = [_apply(database, op) for op in ops]
            now = max(op.now for op in ops)
            if writing and now >= self._purge_at:
                self._purge_at = now + PURGE_S
                database.execute(_PURGE, (now,))
                database.execute(_EXCESS, (MAX_ROWS,))
            database.execute("COMMIT")
        except BaseException:
            if database.in_transaction:
                database.execute("ROLLBACK")
            raise
        return results

    def _open(self) -> sqlite3.Connection:
        os.makedirs(os.path.dirname(self._path), exist_ok=True)
        database = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False, timeout=BUSY_S)
        try:
            self._inode = os.stat(self._path).st_ino
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA synchronous = NORMAL")  # whole after a power cut, if not the latest
            database.executescript(_SCHEMA)
        except BaseException:
            database.close()
            raise
        self._database = database
        return database

    def close(self) -> None:
        """Closes the file."""
        database, self._database = self._database, None
        if database is not None:
            database.close()


def _apply(database: sqlite3.Connection, op: Op) -> Any:
    if op.kind == "get":
        return database.execute(_GET, (op.key, op.now)).fetchone()
    if op.kind == "add":
        amount = int(op.amount) if op.amount == int(op.amount) else op.amount
        row = database.execute(_ADD, (op.key, amount, op.expires_at, op.now)).fetchone()
        return float(row[0])
    if op.kind == "set":
        database.execute(_SET, (op.key, op.value, op.expires_at))
    elif op.kind == "delete":
        database.execute(_DELETE, (op.key,))
    else:
        end = op.key[:-1] + chr(ord(op.key[-1]) + 1) if op.key else "\U0010ffff"
        return database.execute(_SCAN, (op.key, end, op.now, op.limit)).fetchall()
    return None


def plain(key: str) -> str:
    """The key as it is kept: one that is too long by its hash, one that is no Unicode with escapes."""
    if len(key) > MAX_KEY:
        key = f"{key[:MAX_KEY // 2]}#{hashlib.sha256(key.encode('utf-8', 'surrogatepass')).hexdigest()}"
    return key if key.isascii() else key.encode("utf-8", "backslashreplace").decode()


class MemoryState:
    """State of one process alone, for tests and tools."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._rows: dict[str, tuple[str, float]] = {}

    def get(self, key: str, default: Any = None) -> Any:
        """The value; `default` where there is none."""
        row = self._rows.get(plain(key))
        return json.loads(row[0]) if row is not None and row[1] > self._clock() else default

    def set(self, key: str, value: Any, ttl_s: float) -> None:
        """Keeps a value for so long."""
        self._rows[plain(key)] = (json.dumps(value), self._clock() + min(ttl_s, MAX_TTL_S))

    def add(self, key: str, amount: float = 1, ttl_s: float = 3600.0) -> float:
        """Adds to a counter and returns its total; ttl_s counts from its first addition."""
        key, now = plain(key), self._clock()
        row = self._rows.get(key)
        known = json.loads(row[0]) if row is not None and row[1] > now else 0
        total = (known if isinstance(known, (int, float)) else 0) + amount
        self._rows[key] = (json.dumps(total), row[1] if row is not None and row[1] > now else now + min(ttl_s, MAX_TTL_S))
        return float(total)

    def add_all(self, amounts: Sequence[tuple[str, float, float]]) -> list[float]:
        """`add` of each."""
        return [self.add(*one) for one in amounts]

    def count(self, key: str, amount: float = 1, ttl_s: float = 3600.0) -> None:
        """`add` without its total."""
        self.add(key, amount, ttl_s)

    def delete(self, key: str) -> None:
        """Forgets a key."""
        self._rows.pop(plain(key), None)

    def scan(self, prefix: str, limit: int = 10000) -> list[tuple[str, Any]]:
        """The keys that begin so, in order, with their values."""
        prefix, now = plain(prefix), self._clock()
        return [(key, json.loads(text)) for key, (text, expires_at) in sorted(self._rows.items())
                if key.startswith(prefix) and expires_at > now][:limit]

    def close(self) -> None:
        """Nothing."""
