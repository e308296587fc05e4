"""The embedded queue: SQLite shards, one worker the only writer of each (an operator's short commands apart).

One native thread does all: whatever waits becomes one transaction, so puts, outcomes and history share a sync. A large body
lies in the spool, synced before its row. Claims live in memory and die with the process; a shard's flock dies with it too,
then `adopt` of another worker finds it. Failure: StoreError; StoreFull where the disk is full, after the reserve file was given
up so that results can still be recorded; intake resumes when the reserve is back. Start-up does not grow with the queue.
"""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any

from gevent.monkey import get_original

from gmta.mail.envelope import DELIVERED, FAILED, Envelope, RecipientState
from gmta.mail.message import FileBody, Message
from gmta.queue import schema
from gmta.queue.ids import ID, TAG_LENGTH, time_prefix
from gmta.queue.store import Event, Settlement, StoreError, StoreFull
from gmta.services.batch import Batch, BatchClosed, call_each
from gmta.services.files import NO_ROOM, start_writing_out, sync_directory, sync_file_system, write_all
from gmta.services.log import Log

ROWS = 64  # rows a statement
LINGER_S = 0.004  # a commit waits so long for company; reads do not
BODY_LINGER_S = 0.005  # the same for large bodies, which take longer to come in
MANY = 4  # bodies that are synced together with all else on their file system
RESERVE = 8 * 1024 * 1024
MIN_INODES = 1000
ROOM_FOR_S = 0.5
LANES = 5000  # lanes looked at in one search; the next one goes on behind them
SCAN = 2000  # recipients passed over in one search, before it goes lane by lane
PURGE = 2000
# the lanes behind one, as far as a number of them: a step into the index each
_NEXT_LANES = ("WITH RECURSIVE found(lane) AS (SELECT (SELECT min(lane) FROM recipient WHERE status = 'queued' AND lane > ?1) UNION ALL "
               "SELECT (SELECT min(lane) FROM recipient WHERE status = 'queued' AND lane > found.lane) FROM found WHERE found.lane IS NOT NULL "
               "LIMIT ?2) SELECT lane FROM found WHERE lane IS NOT NULL")
_start_new_thread = get_original("_thread", "start_new_thread")
_json = json.JSONEncoder(default=str, separators=(",", ":")).encode


class _Shard:
    """An open, locked shard."""

    __slots__ = ("connection", "judged", "lane", "lock", "number", "spool", "version")

    def __init__(self, number: int, lock: int, connection: sqlite3.Connection, spool: str) -> None:
        self.number = number
        self.lock = lock
        self.connection = connection
        self.spool = spool
        self.lane = ""  # the last one that a search by lanes came to
        self.judged = ""  # the last message that `overdue` came to
        self.version = self.data_version()

    def data_version(self) -> int:
        """Changes when another connection committed."""
        return int(self.connection.execute("PRAGMA data_version").fetchone()[0])


class _Claim:
    """What is claimed of one message. open: recipients not settled yet, None where not known."""

    __slots__ = ("file", "numbers", "open", "shard")

    def __init__(self, shard: _Shard, open: int | None, file: str | None) -> None:
        self.shard = shard
        self.open = open
        self.file = file
        self.numbers: set[int] = set()


class _Put:
    __slots__ = ("envelope", "events", "message")

    def __init__(self, envelope: Envelope, message: Message, events: Sequence[Event]) -> None:
        self.envelope = envelope
        self.message = message
        self.events = events


class _Release:
    __slots__ = ("routed", "shard")

    def __init__(self, shard: _Shard, routed: list[tuple[Any, ...]]) -> None:
        self.shard = shard
        self.routed = routed


class SqliteStore:
    """The Store on SQLite. instance_tag: the IdSource's tag.  history_s: how long history stays.  message_limit: octets."""

    def __init__(self, directory: str, *, instance_tag: str, log: Log, clock: Callable[[], float] = time.time,
                 history_s: float = 7 * 86400.0, message_limit: int = 35_000_000) -> None:
        self._directory = directory
        self._tag = instance_tag
        self._log = log
        self._clock = clock
        self._history_s = history_s
        self._limit = message_limit
        self._claims: dict[str, _Claim] = {}
        self._event_number = 0
        self._full = False
        self._room = True
        self._room_at = -1.0
        self._purged_at = 0.0
        self._empty: dict[int, tuple[int, ...]] = {}
        self._closed = False
        os.makedirs(directory, mode=0o700, exist_ok=True)
        sync_directory(os.path.dirname(os.path.abspath(directory)))
        self._primary = self._take()
        self._shards = [self._primary]
        self._writer = Batch(self._run, max_items=512, linger_s=LINGER_S, patient=_is_write, name="queue")
        self._files = Batch(_sync_bodies, max_items=32, linger_s=BODY_LINGER_S, name="spool")
        self._fill_reserve()
        _start_new_thread(self._sweep, (self._primary,))

    # --- opening -------------------------------------------------------------------------------------------------

    def _take(self) -> _Shard:
        """A free shard, or a new one."""
        known = schema.shards(self._directory)
        number = 1
        for number in (*known, *range((known[-1] if known else 0) + 1, (known[-1] if known else 0) + 10_000)):
            lock = self._lock(number)
            if lock is not None:
                return self._open(number, lock)
        raise StoreError(f"no shard can be locked up to {number}")

    def _lock(self, number: int) -> int | None:
        fd = os.open(schema.shard_path(self._directory, number, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(fd)
            return None
        return fd

    def _open(self, number: int, lock: int) -> _Shard:
        path = schema.shard_path(self._directory, number, "db")
        spool = schema.shard_path(self._directory, number, "spool")
        try:
            os.makedirs(spool, mode=0o700, exist_ok=True)
            try:
                connection = schema.connect(path, create=True)
            except sqlite3.OperationalError:
                raise
            except sqlite3.DatabaseError as error:  # not a database: never let it stop the start
                self._log.error("queue shard set aside", shard=number, error=str(error))
                for suffix in ("", "-wal", "-shm"):
                    if os.path.exists(path + suffix):
                        self._set_aside(path + suffix)
                connection = schema.connect(path, create=True)
            sync_directory(self._directory)
            return _Shard(number, lock, connection, spool)
        except (OSError, sqlite3.Error) as error:
            os.close(lock)
            raise StoreError(f"queue shard {number}: {error}") from error

    def _set_aside(self, path: str) -> None:
        odd = os.path.join(self._directory, "odd")
        os.makedirs(odd, mode=0o700, exist_ok=True)
        os.rename(path, os.path.join(odd, f"{os.path.basename(path)}.{time.time_ns()}"))

    def _sweep(self, shard: _Shard) -> None:
        """Native thread, after start: removes bodies without a row (never acknowledged), sets odd names aside."""
        removed = 0
        try:
            connection = schema.connect(schema.shard_path(self._directory, shard.number, "db"))
            try:
                for entry in os.scandir(shard.spool):
                    if self._closed:
                        return
                    match = schema.SPOOLED.match(entry.name)
                    if match is None or not entry.is_file(follow_symlinks=False):
                        self._log.warning("odd file in the spool set aside", file=entry.name, shard=shard.number)
                        self._set_aside(entry.path)
                    elif match[1][-TAG_LENGTH:] != self._tag and connection.execute(  # ours are being received
                            "SELECT 1 FROM message WHERE id = ?", (match[1],)).fetchone() is None:
                        os.unlink(entry.path)
                        removed += 1
            finally:
                connection.close()
        except (OSError, sqlite3.Error) as error:
            self._log.warning("spool not swept", shard=shard.number, error=str(error))
        if removed:
            self._log.info("unfinished messages removed", shard=shard.number, count=removed)

    # --- Store ---------------------------------------------------------------------------------------------------

    def put(self, envelope: Envelope, message: Message, events: Sequence[Event] = ()) -> None:
        """See Store.put."""
        if not self.has_room(self._limit):
            raise StoreFull("no room in the queue")
        self._sync_body(envelope.id, message)
        self._submit(_Put(envelope, message, events))

    def record(self, settlement: Settlement) -> None:
        """See Store.record."""
        for envelope, message in settlement.births:
            self._sync_body(envelope.id, message)
        self._submit(settlement)

    def due(self, now: float, limit: int, busy_lanes: Iterable[str] = (), probed_lanes: Iterable[str] = (),
            lane_limit: int | None = None) -> list[Envelope]:
        """See Store.due."""
        room = dict.fromkeys(map(schema.storable, busy_lanes), 0) | dict.fromkeys(map(schema.storable, probed_lanes), 1)
        found: list[Envelope] = self._submit(lambda: self._due(now, limit, room, limit if lane_limit is None else lane_limit))
        return found

    def overdue(self, now: float, unwarned_before: float, before: float, reports_before: float, limit: int) -> list[Envelope]:
        """See Store.overdue."""
        found: list[Envelope] = self._submit(lambda: self._overdue(now, unwarned_before, before, reports_before, limit))
        return found

    def next_due_at(self) -> float | None:
        """See Store.next_due_at."""
        at: float | None = self._submit(self._next_due_at)
        return at

    def release(self, envelope: Envelope) -> None:
        """See Store.release: with its lane known, `due` can pass over a recipient while that is busy."""
        claim = self._claims.get(envelope.id)
        if claim is None:
            return
        routed = [(schema.storable(r.transport), schema.storable(r.next_hop), schema.lane(r), schema.storable(r.last_reply), envelope.id,
                   r.number) for r in envelope.recipients if r.transport]
        self._unclaim(envelope.id, (r.number for r in envelope.recipients))
        if routed and not self._closed:
            self._writer.post(_Release(claim.shard, routed))

    def message(self, queue_id: str) -> Message | None:
        """See Store.message."""
        found: Message | None = self._submit(lambda: self._message(queue_id))
        return found

    def all_recipients(self, queue_id: str) -> list[RecipientState]:
        """See Store.all_recipients."""
        found: list[RecipientState] = self._submit(lambda: [
            schema.recipient_of(row) for shard in list(self._shards) for row in shard.connection.execute(
                f"SELECT {schema.RECIPIENT} FROM recipient r WHERE message = ? ORDER BY number", (queue_id,))])
        return found

    def holds(self, queue_id: str) -> bool:
        """See Store.holds: nobody takes a claim from a process that lives."""
        return queue_id in self._claims

    def changed_outside(self) -> bool:
        """See Store.changed_outside."""
        return bool(self._submit(self._changed))

    def adopt(self) -> int:
        """See Store.adopt; shards drained are let go, and history past its time is purged by and by."""
        return int(self._submit(self._adopt))

    def new_spool_file(self, queue_id: str) -> str:
        """See Store.new_spool_file."""
        return os.path.join(self._primary.spool, queue_id + ".body")

    def has_room(self, size_bytes: int) -> bool:
        """See Store.has_room."""
        now = time.monotonic()
        if now - self._room_at > ROOM_FOR_S or self._room_at < 0:
            self._room_at = now
            try:
                stat = os.statvfs(self._directory)
            except OSError:
                self._room = False
                return False
            room = stat.f_bavail * stat.f_frsize >= 2 * size_bytes and (stat.f_files == 0 or stat.f_favail >= MIN_INODES)
            if room and self._full:
                self._fill_reserve()
            if not room or self._full:
                self._writer.post(self._shrink)  # the log's own room may be all that is missing
            if room != self._room:
                (self._log.info if room else self._log.warning)("queue has room" if room else "queue has no room")
            self._room = room
        return self._room and not self._full

    def listen(self, wake: Callable[[], None]) -> None:
        """See Store.listen: what other processes change is seen by `changed_outside` and `adopt`."""

    def publish(self, state: dict[str, Any] | None) -> None:
        """See Store.publish."""
        if not self._closed:
            self._writer.post(lambda: self._publish(state))

    def _publish(self, state: dict[str, Any] | None) -> None:
        path = schema.shard_path(self._directory, self._primary.number, "now")
        try:
            if state is None:
                os.unlink(path)
                return
            fd = os.open(path + "~", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                write_all(fd, _json({"at": self._clock(), "pid": os.getpid(), **state}).encode())
            finally:
                os.close(fd)
            os.rename(path + "~", path)
        except OSError:
            pass  # it only shows: a full disk has other ways to be heard

    def close(self) -> None:
        """See Store.close."""
        if self._closed:
            return
        self.publish(None)
        self._closed = True
        self._files.close()
        self._writer.close()
        for shard in self._shards:
            shard.connection.close()
            os.close(shard.lock)
        self._claims.clear()

    # --- between greenlets and the thread ------------------------------------------------------------------------

    def _submit(self, operation: Any) -> Any:
        try:
            return self._writer.submit(operation)
        except (sqlite3.Error, OSError, BatchClosed) as error:
            raise StoreError(str(error)) from error

    def _sync_body(self, queue_id: str, message: Message) -> None:
        """Syncs a large body and its name; one that lies elsewhere is copied into the spool."""
        body = message.body
        if not isinstance(body, FileBody):
            return
        try:
            self._files.submit((body, self.new_spool_file(queue_id)))
        except (OSError, BatchClosed) as error:
            raise (StoreFull if getattr(error, "errno", 0) in NO_ROOM else StoreError)(str(error)) from error

    def _unclaim(self, queue_id: str, numbers: Iterable[int]) -> None:
        claim = self._claims.get(queue_id)
        if claim is not None:
            claim.numbers.difference_update(numbers)
            if not claim.numbers:
                self._claims.pop(queue_id, None)

    # --- in the native thread ------------------------------------------------------------------------------------

    def _run(self, operations: list[Any]) -> list[Any]:
        """One batch: all writes in one transaction (a shard), then the reads; what fails together is tried singly."""
        results: list[Any] = [None] * len(operations)
        by_shard: dict[_Shard, list[int]] = {}
        for n, operation in enumerate(operations):
            if isinstance(operation, _Put | Settlement | _Release):
                try:
                    by_shard.setdefault(self._shard_of(operation), []).append(n)
                except sqlite3.Error as error:
                    results[n] = StoreError(str(error))
        for shard, numbers in by_shard.items():
            try:
                self._commit(shard, [operations[n] for n in numbers])
            except Exception as error:
                self._make_way(error)
                for n in numbers:
                    try:
                        if self._full and isinstance(operations[n], _Put):
                            raise StoreFull("the disk is full") from error
                        self._commit(shard, [operations[n]])
                    except Exception as single:
                        self._make_way(single)
                        results[n] = (StoreFull if self._is_full(single) else StoreError)(str(single))
        for n, operation in enumerate(operations):
            if callable(operation):
                results[n] = call_each([operation])[0]
        return results

    @staticmethod
    def _is_full(error: Exception) -> bool:
        return isinstance(error, StoreFull) or getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL

    def _make_way(self, error: Exception) -> None:
        """Gives up the reserve where the store itself says that it is full."""
        if self._is_full(error) and not self._full:
            self._full = True
            self._log.error("queue is full, reserve given up", error=str(error))
            try:
                os.unlink(schema.shard_path(self._directory, self._primary.number, "reserve"))
            except OSError:
                pass

    def _shrink(self) -> None:
        """Moves the write-ahead logs into their databases and cuts them, which gives their room back."""
        for shard in list(self._shards):
            try:
                shard.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            except sqlite3.Error as error:
                self._log.warning("write-ahead log can't be cut", shard=shard.number, error=str(error))

    def _fill_reserve(self) -> None:
        """Allocates the reserve; intake stays closed without it."""
        path = schema.shard_path(self._directory, self._primary.number, "reserve")
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                if os.fstat(fd).st_size < RESERVE:
                    os.posix_fallocate(fd, 0, RESERVE)
            finally:
                os.close(fd)
        except OSError as error:
            if not self._full:
                self._log.error("queue reserve can't be allocated", error=error.strerror)
            self._full = True
            return
        if self._full:
            self._full = False
            self._log.info("queue takes messages again")

    def _shard_of(self, operation: Any) -> _Shard:
        """Where an operation is to be written."""
        if isinstance(operation, _Release):
            shard: _Shard = operation.shard
            return shard
        if isinstance(operation, Settlement):
            claim = self._claims.get(operation.envelope.id)
            return claim.shard if claim is not None else self._find(operation.envelope.id)
        return self._primary

    def _find(self, queue_id: str) -> _Shard:
        for shard in self._shards:
            if shard.connection.execute("SELECT 1 FROM message WHERE id = ?", (queue_id,)).fetchone():
                return shard
        return self._primary

    def _commit(self, shard: _Shard, operations: list[Any]) -> None:
        """Writes puts, settlements and releases of one shard in one transaction; claims change with it."""
        messages: list[tuple[Any, ...]] = []
        recipients: list[tuple[Any, ...]] = []
        events: list[tuple[Any, ...]] = []
        born: list[str] = []
        updates: list[tuple[Any, ...]] = []
        doomed: list[str] = []
        doubtful: list[str] = []
        files: list[str] = []
        settled: list[tuple[str, set[int], int]] = []
        routed: list[tuple[Any, ...]] = []
        for operation in operations:
            if isinstance(operation, _Release):
                routed += operation.routed
                continue
            if isinstance(operation, _Put):
                births: Iterable[tuple[Envelope, Message]] = ((operation.envelope, operation.message),)
            else:
                births = operation.births
                self._settle(operation, updates, doomed, doubtful, files, settled)
            for envelope, message in births:
                messages.append(self._message_row(envelope, message))
                recipients.extend(schema.recipient_row(envelope.id, r) for r in envelope.recipients)
                born.append(envelope.id)
                claim = _Claim(shard, len(envelope.recipients), messages[-1][9])
                claim.numbers.update(r.number for r in envelope.recipients)
                self._claims[envelope.id] = claim
            for event in operation.events:
                self._event_number = max(self._event_number + 1, int(event.at * 1e6))
                events.append((event.queue_id, self._event_number, event.at, event.kind, _json(event.data)))
        connection = shard.connection
        try:
            connection.execute("BEGIN IMMEDIATE")
            try:
                _insert(connection, "INSERT INTO message VALUES ", messages)
                _insert(connection, "INSERT INTO recipient VALUES ", recipients)
                _insert(connection, "INSERT OR IGNORE INTO event VALUES ", events)
                if updates:  # existing rows only: what an operator deleted, held or bounced meanwhile stays so
                    connection.executemany(
                        "UPDATE recipient SET status = CASE WHEN status = 'held' AND ?1 = 'queued' THEN 'held' ELSE ?1 END, "
                        "attempts = ?2, next_attempt_at = CASE WHEN transport = 'fail' THEN next_attempt_at ELSE ?3 END, "
                        "transport = CASE WHEN transport = 'fail' THEN transport ELSE ?4 END, "
                        "next_hop = CASE WHEN transport = 'fail' THEN next_hop ELSE ?5 END, "
                        "lane = CASE WHEN transport = 'fail' THEN lane ELSE ?6 END, last_reply = ?7, warned = ?8 "
                        "WHERE message = ?9 AND number = ?10", updates)
                if routed:
                    connection.executemany(
                        "UPDATE recipient SET transport = ?1, next_hop = ?2, lane = ?3, last_reply = ?4 WHERE message = ?5 AND number = ?6 "
                        "AND status = 'queued' AND transport <> 'fail' AND (lane <> ?3 OR last_reply <> ?4)", routed)
                for queue_id in doubtful:
                    if connection.execute("SELECT 1 FROM recipient WHERE message = ? AND status IN ('queued', 'held')",
                                          (queue_id,)).fetchone() is None:
                        doomed.append(queue_id)
                _delete(connection, "DELETE FROM recipient WHERE message IN ", doomed)
                _delete(connection, "DELETE FROM message WHERE id IN ", doomed)
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise
        except BaseException:
            for queue_id in born:
                self._claims.pop(queue_id, None)
            raise
        gone = set(doomed)
        for queue_id, numbers, count in settled:
            done = self._claims.get(queue_id)
            if done is not None and done.open is not None:
                done.open -= count
            if done is not None and queue_id in gone and done.file:
                files.append(done.file)
            self._unclaim(queue_id, numbers)
        for file in set(files):
            try:
                os.unlink(os.path.join(shard.spool, file))
            except OSError:
                pass  # swept at the next start

    def _settle(self, settlement: Settlement, updates: list[tuple[Any, ...]], doomed: list[str], doubtful: list[str],
                files: list[str], settled: list[tuple[str, set[int], int]]) -> None:
        """Sorts one settlement into what the transaction does."""
        queue_id = settlement.envelope.id
        claim = self._claims.get(queue_id)
        numbers = {r.number for r in settlement.changed}
        ended = {r.number for r in settlement.changed if r.status in (DELIVERED, FAILED)}
        settled.append((queue_id, numbers, len(ended)))
        if claim is not None and claim.open is not None and ended <= claim.numbers and claim.open == len(ended) > 0:
            doomed.append(queue_id)
            return
        for r in settlement.changed:
            updates.append((r.status, r.attempts, r.next_attempt_at, schema.storable(r.transport), schema.storable(r.next_hop),
                            schema.lane(r), schema.storable(r.last_reply), int(r.warned), queue_id, r.number))
        if ended:
            doubtful.append(queue_id)

    @staticmethod
    def _message_row(envelope: Envelope, message: Message) -> tuple[Any, ...]:
        body = message.body
        in_file = isinstance(body, FileBody)
        return (envelope.id, schema.storable(str(envelope.sender)), envelope.size or message.size, envelope.received_at,
                len(envelope.recipients), _json(envelope.to_dict()), message.header, len(message.separator),
                None if isinstance(body, FileBody) else body.data,
                os.path.basename(body.path) if isinstance(body, FileBody) else None,
                body.offset if isinstance(body, FileBody) else 0, body.size if in_file else 0)

    def _message(self, queue_id: str) -> Message | None:
        for shard in self._shards:
            row = shard.connection.execute(f"SELECT {schema.OCTETS} FROM message WHERE id = ?", (queue_id,)).fetchone()
            if row is not None:
                return schema.message_of(row, shard.spool)
        return None

    def _due(self, now: float, limit: int, room: dict[str, int], lane_limit: int) -> list[Envelope]:
        found: list[Envelope] = []
        left = limit
        for shard in self._shards:
            if left <= 0:
                break
            for queue_id, numbers in self._find_due(shard, now, left, room, lane_limit).items():
                envelope = self._claim(shard, queue_id, numbers)
                if envelope is not None:
                    found.append(envelope)
                    left -= len(envelope.recipients)
        return found

    def _claim(self, shard: _Shard, queue_id: str, numbers: set[int]) -> Envelope | None:
        """Claims recipients of a message for the caller."""
        row = shard.connection.execute(f"SELECT {schema.ENVELOPE} FROM message m WHERE id = ?", (queue_id,)).fetchone()
        if row is None:
            return None
        rows = shard.connection.execute(f"SELECT {schema.RECIPIENT} FROM recipient r WHERE message = ? ORDER BY number", (queue_id,))
        wanted = [schema.recipient_of(one) for one in rows if one[1] in numbers]
        claim = self._claims.get(queue_id)
        if claim is None:
            claim = self._claims[queue_id] = _Claim(shard, row[5] if row[5] == len(wanted) else None, row[6])
        claim.numbers.update(r.number for r in wanted)
        return schema.envelope_of(row, wanted)

    def _find_due(self, shard: _Shard, now: float, limit: int, room: dict[str, int], lane_limit: int) -> dict[str, set[int]]:
        """{message: recipients} due and unclaimed, the oldest first, of each lane as many as it has room for.

        First in the order of time. Where that is held up by what can't be taken, lane by lane: a few lanes at a time, going on where
        the last search stopped, so that every lane comes to its turn however many there are and however much waits in each.
        """
        connection = shard.connection
        rows: set[tuple[float, str, int]] = set()
        taken: dict[str, int] = {}
        passed = 0
        cursor = connection.execute("SELECT next_attempt_at, message, number, lane FROM recipient WHERE status = 'queued' "
                                    "AND next_attempt_at <= ? ORDER BY next_attempt_at", (now,))
        for at, queue_id, number, lane in cursor:
            claim = self._claims.get(queue_id)
            if claim is not None and number in claim.numbers:
                continue
            if lane and taken.get(lane, 0) >= room.get(lane, lane_limit):
                passed += 1
                if passed > SCAN:
                    break
                continue
            taken[lane] = taken.get(lane, 0) + 1
            rows.add((at, queue_id, number))
            if len(rows) >= limit:
                break
        cursor.close()
        if passed > SCAN:
            self._find_by_lane(shard, now, limit, room, lane_limit, rows, taken)
        out: dict[str, set[int]] = {}
        for _, queue_id, number in sorted(rows):
            out.setdefault(queue_id, set()).add(number)
        return out

    def _find_by_lane(self, shard: _Shard, now: float, limit: int, room: dict[str, int], lane_limit: int,
                      rows: set[tuple[float, str, int]], taken: dict[str, int]) -> None:
        """Adds to `rows` what the next lanes have that is due."""
        connection = shard.connection
        before = shard.lane
        lanes = [lane for (lane,) in connection.execute(_NEXT_LANES, (before, LANES))]
        due = dict(connection.execute(
            "SELECT value, (SELECT min(next_attempt_at) FROM recipient WHERE status = 'queued' AND lane = value) FROM json_each(?)",
            (json.dumps(["", *(lane for lane in lanes if room.get(lane, lane_limit) > taken.get(lane, 0))]),)))
        shard.lane = lanes[-1] if len(lanes) == LANES else ""  # past the last one the next search begins anew
        for lane, at in due.items():
            if at is None or at > now:
                continue
            if len(rows) >= limit:
                shard.lane = before
                return
            before = lane or before
            found: list[tuple[float, str, int]] = []
            self._gather(connection.execute(
                "SELECT next_attempt_at, message, number FROM recipient WHERE status = 'queued' AND lane = ? "
                "AND next_attempt_at <= ? ORDER BY next_attempt_at", (lane, now)), found,
                min(room.get(lane, lane_limit) - taken.get(lane, 0) if lane else limit, limit - len(rows)))
            rows.update(found)

    def _overdue(self, now: float, unwarned_before: float, before: float, reports_before: float, limit: int) -> list[Envelope]:
        found: list[Envelope] = []
        unwarned, old, reports = (time_prefix(at) if at > 0 else "" for at in (unwarned_before, before, reports_before))
        for shard in self._shards:
            if limit <= 0:
                break
            rows = shard.connection.execute(
                "SELECT message, number, status = 'queued' AND next_attempt_at <= ?2 AND (message < ?3 OR (warned = 0 AND message < ?4) "
                "OR (message < ?5 AND (SELECT sender FROM message WHERE id = r.message) = '')) FROM recipient r "
                "WHERE message > ?1 AND message < ?6 ORDER BY message, number LIMIT ?7",
                (shard.judged, now, old, unwarned, reports, max(unwarned, old, reports), SCAN)).fetchall()
            wanted: dict[str, set[int]] = {}
            for queue_id, number, over in rows:
                claim = self._claims.get(queue_id)
                if over and (claim is None or number not in claim.numbers):
                    wanted.setdefault(queue_id, set()).add(number)
                    limit -= 1
                if limit <= 0:
                    break
            # a message whose recipients were cut off by the limit is come back to with the next round
            shard.judged = queue_id if rows and (limit <= 0 or len(rows) == SCAN) else ""
            found += filter(None, (self._claim(shard, queue_id, numbers) for queue_id, numbers in wanted.items()))
        return found

    def _gather(self, cursor: sqlite3.Cursor, rows: list[tuple[float, str, int]], limit: int) -> None:
        for row in cursor:
            claim = self._claims.get(row[1])
            if claim is None or row[2] not in claim.numbers:
                rows.append(row)
                limit -= 1
                if limit <= 0:
                    break
        cursor.close()

    def _next_due_at(self) -> float | None:
        rows: list[tuple[float, str, int]] = []
        for shard in self._shards:
            self._gather(shard.connection.execute("SELECT next_attempt_at, message, number FROM recipient "
                                                  "WHERE status = 'queued' ORDER BY next_attempt_at"), rows, 1)
        return min(rows)[0] if rows else None

    def _changed(self) -> bool:
        changed = False
        for shard in self._shards:
            version = shard.data_version()
            changed = changed or version != shard.version
            shard.version = version
        return changed

    def _adopt(self) -> int:
        self._purge()
        count = 0
        held = {claim.shard for claim in list(self._claims.values())}
        for shard in self._shards[1:]:
            if shard not in held and shard.connection.execute("SELECT 1 FROM message LIMIT 1").fetchone() is None:
                self._shards.remove(shard)
                shard.connection.close()
                os.close(shard.lock)
        ours = {shard.number for shard in self._shards}
        for number in schema.shards(self._directory):
            # one seen empty is not opened again until somebody has written to it
            if number in ours or self._empty.get(number) == self._stamp(number):
                continue
            try:
                count += self._adopt_shard(number)
            except (StoreError, OSError, sqlite3.Error) as error:  # the mail in the others must not wait for this one
                self._log.error("queue shard can't be adopted", shard=number, error=str(error))
        return count

    def _adopt_shard(self, number: int) -> int:
        """Takes one shard over where it is nobody's and has messages; how many."""
        lock = self._lock(number)
        if lock is None:
            return 0
        shard = self._open(number, lock)
        found = 0
        try:
            found = int(shard.connection.execute("SELECT count(*) FROM (SELECT 1 FROM message LIMIT 1000000)").fetchone()[0])
            if found:
                self._shards.append(shard)
        finally:
            if not found:
                shard.connection.close()
                os.close(lock)
        if not found:
            self._empty[number] = self._stamp(number)
            return 0
        _start_new_thread(self._sweep, (shard,))
        self._log.info("queue shard adopted", shard=number, messages=found)
        return found

    def _stamp(self, number: int) -> tuple[int, ...]:
        """What changes when a shard is written to: size and time of the database and of its write-ahead log."""
        path = schema.shard_path(self._directory, number, "db")
        stamp: list[int] = []
        for name in (path, f"{path}-wal"):
            try:
                stat = os.stat(name)
            except OSError:
                stamp.append(-1)
            else:
                stamp += (stat.st_size, stat.st_mtime_ns)
        return tuple(stamp)

    def _purge(self) -> None:
        """Deletes history of messages that came and left before its time, a slice a minute."""
        now = self._clock()
        if now - self._purged_at < 60 or self._full:
            return
        self._purged_at = now
        before = time_prefix(now - self._history_s)
        for shard in self._shards:
            shard.connection.execute(
                "DELETE FROM event WHERE (message, n) IN (SELECT message, n FROM event WHERE message < ?1 "
                "AND NOT EXISTS (SELECT 1 FROM message WHERE id = event.message) LIMIT ?2)", (before, PURGE))


def _is_write(operation: Any) -> bool:
    return isinstance(operation, _Put | Settlement)


def _sync_bodies(items: list[tuple[FileBody, str]]) -> list[OSError | None]:
    """Makes large bodies durable at their (body, path), copying those that lie elsewhere; each directory is synced once."""
    results: list[OSError | None] = [None] * len(items)
    written: list[tuple[int, int]] = []
    for number, (body, path) in enumerate(items):
        try:
            if body.path != path:
                with open(path, "wb", buffering=0) as file:
                    for piece in body.chunks():
                        write_all(file.fileno(), piece)
                body.path, body.offset = path, 0
            written.append((number, os.open(path, os.O_RDONLY | os.O_CLOEXEC)))
            start_writing_out(written[-1][1])
        except OSError as error:
            results[number] = error
    together = len(written) >= MANY
    for number, descriptor in written:
        try:
            if not together:
                os.fdatasync(descriptor)
            elif number == written[-1][0]:
                sync_file_system(descriptor)
        except OSError as error:
            if together:
                results = [result or error for result in results]
            results[number] = error
        finally:
            os.close(descriptor)
    if together:
        return results
    for directory in {os.path.dirname(path) for _, path in items}:
        try:
            sync_directory(directory)
        except OSError as error:
            results = [result or error for result in results]
    return results


def _insert(connection: sqlite3.Connection, statement: str, rows: list[tuple[Any, ...]]) -> None:
    """Many rows a statement: each step of SQLite gives the interpreter's lock away, and getting it back costs more than a row."""
    for start in range(0, len(rows), ROWS):
        part = rows[start:start + ROWS]
        row = "(" + ",".join("?" * len(part[0])) + ")"
        connection.execute(statement + ",".join([row] * len(part)), list(chain.from_iterable(part)))


def _delete(connection: sqlite3.Connection, statement: str, ids: list[str]) -> None:
    for start in range(0, len(ids), ROWS):
        part = ids[start:start + ROWS]
        connection.execute(f"{statement}({','.join('?' * len(part))})", part)


__all__ = ["ID", "SqliteStore"]
