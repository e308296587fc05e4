"""The queue that several machines share: one PostgreSQL, whose rows are claimed by workers under a lease.

New messages of about the same time are one transaction, sent in one go; results, releases and claims are another, beside it. A claim is
`owner` in the recipient's row: the id of the worker's row in the table `worker`, which is its lease. Each transaction ends by touching that
row, and fails where it is gone: who deletes it has taken all that worker's claims away, and a node that was frozen can't record over its
successor. After a lost connection the queue ids tell whether new messages are in, and a count in the row whether the rest was done.

A worker whose lock of the same machine is free is dead at once, one of another machine when its lease has ended. Large bodies lie in
rows of 256 KiB; who delivers one has it in a file of its spool meanwhile, which is worth nothing after its process.

Failure: StoreError at once while the database is down; a put under way is answered when it is known what became of it, within PUT_S.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import gevent
import psycopg
from gevent import get_hub
from psycopg import errors

from gmta.mail.envelope import DELIVERED, FAILED, Envelope, RecipientState
from gmta.mail.message import FileBody, MemoryBody, Message
from gmta.queue import pgschema, pgsql
from gmta.queue.ids import time_prefix
from gmta.queue.pgschema import BODY_IN_ROW, CHUNK, storable
from gmta.queue.store import Event, Settlement, StoreError, StoreFull
from gmta.services.files import NO_ROOM, write_all
from gmta.services.log import Log
from gmta.services.postgres import Connection, Database, DatabaseDown, Gather, Integers, Texts, columns, is_lost

LINGER_S = 0.0005  # intake waits so long for company; more comes while the transaction before is under way
RESULTS_LINGER_S = 0.008  # the same for results: no client waits for them
PUT_S = 100.0  # a client is told that it must come again when it is not known after so long what became of its message
RESOLVE_S = 5.0
ROOM_FOR_S = 0.5
FULL_S = 5.0
MIN_INODES = 1000
SCAN = 2000  # recipients looked at in the order of time, before it goes lane by lane
LANES = 1000  # lanes looked at in one search; the next one goes on behind them
SLICE = 5000  # claims of a dead worker given up in one transaction
PURGE = 2000
PURGES = 20  # slices a minute
ORPHANS_S = 30.0
AGAIN = 3  # times that something undone is tried
TRIES = 4  # of a claim, where other nodes were faster
_json = json.JSONEncoder(default=str, separators=(",", ":")).encode
_LOCK = re.compile(r"worker-([0-9a-f]+)\.lock\Z")


class _Claim:
    """What is claimed of one message. owner: in whose name.  open: recipients not settled yet, None where not known.

    large: it may have pieces in the database, and a file in the spool.
    """

    __slots__ = ("large", "numbers", "open", "owner")

    def __init__(self, owner: int, open: int | None, large: bool) -> None:
        self.owner = owner
        self.open = open
        self.large = large
        self.numbers: set[int] = set()


class _Put:
    """given_up: the caller is gone, or was told that it failed."""

    __slots__ = ("body", "envelope", "events", "given_up", "message")

    def __init__(self, envelope: Envelope, message: Message, events: Sequence[Event], body: bytes) -> None:
        self.envelope = envelope
        self.message = message
        self.events = events
        self.body = body
        self.given_up = False


class _Release:
    __slots__ = ("rows",)

    def __init__(self, rows: list[tuple[Any, ...]]) -> None:
        self.rows = rows


class _Lapsed(Exception):
    """The worker's row is gone: its claims were taken over."""


class _Undone(DatabaseDown):
    """The connection was lost, and what was under way is known not to be done."""


class PostgresStore:
    """The Store on PostgreSQL. directory: of this machine, for spool files and locks.  node: this machine's name.  lease_s: seconds."""

    def __init__(self, database: Database, directory: str, *, node: str, log: Log, clock: Callable[[], float] = time.time,
                 history_s: float = 7 * 86400.0, message_limit: int = 35_000_000, lease_s: float = 60.0) -> None:
        self._database = database
        self._directory = directory
        self._node = node
        self._log = log
        self._clock = clock
        self._history_s = history_s
        self._limit = message_limit
        self._lease_s = lease_s
        self._tag = secrets.token_hex(6)
        self._claims: dict[str, _Claim] = {}
        self._connection: Connection | None = None
        self._migrated = False
        self._id = 0  # of our row in `worker`
        self._batch = 0
        self._sure_until = 0.0  # until then nobody may take our claims; monotonic
        self._steady_since = time.monotonic()  # the database was never away since
        self._unsure = False  # rows may be claimed in our name that we know nothing of
        self._undo: set[str] = set()  # their clients were told that they are not queued
        self._event_number = 0
        self._changes = -1
        self._intake_name = ""  # its connection's, as the database knows it
        self._draining = False  # this node claims nothing more, and takes no mail in
        self._lane = ""  # the last one that a search by lanes came to
        self._judged = ""  # the last message that `overdue` came to
        self._full_until = 0.0
        self._room = True
        self._room_at = -1.0
        self._purged_at = clock()
        self._purged = ""  # the last message whose history was looked at
        self._orphans_at = 0.0
        self._notified_at = 0.0
        self._closed = False
        os.makedirs(directory, mode=0o700, exist_ok=True)
        self._home = f"{self._read_home()} {node}"  # a machine may be the copy of another
        self._lock = self._take_lock()
        self._spool = os.path.join(directory, f"worker-{self._tag}.spool")
        os.makedirs(self._spool, mode=0o700)
        self._intake = Gather(self._take_in, max_items=256, linger_s=LINGER_S)
        self._intake_connection: Connection | None = None
        self._writer = Gather(self._run, max_items=512, linger_s=RESULTS_LINGER_S)
        self._reader = Gather(self._read, max_items=16)
        self._beat = gevent.spawn(self._keep_lease)

    # --- this machine --------------------------------------------------------------------------------------------

    def _read_home(self) -> str:
        """What tells this data directory from all others."""
        path = os.path.join(self._directory, "home")
        while True:
            try:
                with open(path, encoding="ascii") as file:
                    home = file.read().strip()
                if home:
                    return home
                os.unlink(path)
            except FileNotFoundError:
                pass
            temporary = f"{path}.{self._tag}"
            with open(temporary, "w", encoding="ascii") as file:
                file.write(secrets.token_hex(16))
            try:
                os.link(temporary, path)
            except FileExistsError:
                pass
            finally:
                os.unlink(temporary)

    def _lock_path(self, tag: str) -> str:
        return os.path.join(self._directory, f"worker-{tag}.lock")

    def _take_lock(self) -> int:
        """Our own lock, held while we live; others of this machine see by it that we do."""
        while True:
            fd = os.open(self._lock_path(self._tag), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(fd, fcntl.LOCK_EX)
            try:
                if os.fstat(fd).st_ino == os.stat(self._lock_path(self._tag)).st_ino:
                    return fd
            except FileNotFoundError:
                pass
            os.close(fd)

    def _is_dead(self, tag: str) -> bool:
        """Whether a worker of this machine is gone; what it has left on the disk is removed then."""
        if tag == self._tag:
            return False
        try:
            fd = os.open(self._lock_path(tag), os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return True
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(os.path.join(self._directory, f"worker-{tag}.spool"), ignore_errors=True)
            os.unlink(self._lock_path(tag))
            return True
        except OSError:
            return False
        finally:
            os.close(fd)

    def _tidy(self) -> None:
        """Removes what dead workers have left on this disk."""
        for name in os.listdir(self._directory):
            match = _LOCK.match(name)
            if match is not None:
                self._is_dead(match[1])

    # --- Store ---------------------------------------------------------------------------------------------------

    def put(self, envelope: Envelope, message: Message, events: Sequence[Event] = ()) -> None:
        """See Store.put."""
        if not self.has_room(self._limit):
            raise StoreFull("no room in the queue")
        body = message.body
        if body.size > BODY_IN_ROW:
            self._put_large(envelope, message, events)
            return
        put = _Put(envelope, message, events, self._octets_of(message))
        try:
            self._submit(put, PUT_S, self._intake)
        except BaseException as error:
            put.given_up = True
            if isinstance(error, StoreFull):
                self._full_until = time.monotonic() + FULL_S
            raise

    def record(self, settlement: Settlement) -> None:
        """See Store.record."""
        self._up()
        for envelope, message in settlement.births:
            if message.body.size > BODY_IN_ROW and envelope.id not in self._claims:
                self._put_large(envelope, message, ())
        self._submit(settlement)

    def due(self, now: float, limit: int, busy_lanes: Iterable[str] = (), probed_lanes: Iterable[str] = (),
            lane_limit: int | None = None) -> list[Envelope]:
        """See Store.due."""
        room = dict.fromkeys(map(pgschema.lane_key, busy_lanes), 0) | dict.fromkeys(map(pgschema.lane_key, probed_lanes), 1)
        self._up()
        if self._draining:
            return []
        found: list[Envelope] = self._submit(lambda: self._due(now, limit, room, limit if lane_limit is None else lane_limit))
        return found

    def overdue(self, now: float, unwarned_before: float, before: float, reports_before: float, limit: int) -> list[Envelope]:
        """See Store.overdue."""
        self._up()
        if self._draining:
            return []
        found: list[Envelope] = self._submit(lambda: self._overdue(now, unwarned_before, before, reports_before, limit))
        return found

    def next_due_at(self) -> float | None:
        """See Store.next_due_at."""
        row = self._ask(pgsql.NEXT_DUE, ())
        return None if row is None else float(row[0])

    def release(self, envelope: Envelope) -> None:
        """See Store.release: with its lane known, `due` can pass over a recipient while that is busy."""
        claim = self._claims.get(envelope.id)
        if claim is None:
            return
        rows = [(envelope.id, r.number, storable(r.transport), storable(r.next_hop), pgschema.lane(r), storable(r.last_reply), claim.owner)
                for r in envelope.recipients]
        self._unclaim(envelope.id, (r.number for r in envelope.recipients))
        if not self._closed and claim.owner == self._id:
            self._writer.post(_Release(rows))

    def message(self, queue_id: str) -> Message | None:
        """See Store.message; a large body is copied into the spool."""
        self._known()
        try:
            row = self._reader.submit(queue_id)
            if row is None:
                return None
            header, separator, body, size = row
            held = MemoryBody(bytes(body)) if body is not None else self._fetch(queue_id, size)
        except (psycopg.Error, DatabaseDown, OSError) as error:
            raise StoreError(str(error)) from error
        return None if held is None else Message(bytes(header), b"\r\n" if separator else b"", held)

    def all_recipients(self, queue_id: str) -> list[RecipientState]:
        """See Store.all_recipients."""
        self._known()
        try:
            with self._database.use() as connection:
                return [pgschema.recipient_of(row) for row in connection.execute(pgsql.RECIPIENTS, (queue_id,), binary=True)]
        except (psycopg.Error, DatabaseDown) as error:
            raise StoreError(str(error)) from error

    def holds(self, queue_id: str) -> bool:
        """See Store.holds."""
        if time.monotonic() >= self._sure_until:
            self._up()
            self._submit(self._prolong)
        claim = self._claims.get(queue_id)
        return claim is not None and claim.owner == self._id

    def changed_outside(self) -> bool:
        """See Store.changed_outside."""
        row = self._ask(pgsql.CHANGES, (self._node,))
        value, draining = (int(row[0]), bool(row[1])) if row is not None else (0, False)
        if draining != self._draining:
            self._draining = draining
            self._log.info("node is drained" if draining else "node takes mail again", node=self._node)
        changed = self._changes >= 0 and value != self._changes
        self._changes = value
        return changed

    def adopt(self) -> int:
        """See Store.adopt; history past its time is purged by and by."""
        self._known()
        try:
            return self._adopt()
        except (psycopg.Error, DatabaseDown) as error:
            raise StoreError(str(error)) from error

    def new_spool_file(self, queue_id: str) -> str:
        """See Store.new_spool_file."""
        return os.path.join(self._spool, queue_id + ".body")

    def has_room(self, size_bytes: int) -> bool:
        """See Store.has_room; the room is that of this machine's spool, the database says itself when it is full."""
        self._up()
        if self._draining:
            raise StoreError("this node is being drained")
        now = time.monotonic()
        if now < self._full_until:
            return False
        if now - self._room_at > ROOM_FOR_S or self._room_at < 0:
            self._room_at = now
            try:
                stat = os.statvfs(self._spool)
            except OSError:
                self._room = False
                return False
            self._room = stat.f_bavail * stat.f_frsize >= 2 * size_bytes and (stat.f_files == 0 or stat.f_favail >= MIN_INODES)
        return self._room

    def publish(self, state: dict[str, Any] | None) -> None:
        """See Store.publish."""
        if not self._closed and not self._database.down:
            shown = "" if state is None else _json({"at": self._clock(), "pid": os.getpid(), "node": self._node, **state})
            self._writer.post(lambda: self._transact([("UPDATE worker SET shown = %s WHERE id = %s", (shown, self._id))]))

    def listen(self, wake: Callable[[], None]) -> None:
        """See Store.listen."""
        self._database.listen(pgschema.CHANNEL, lambda payload: None if payload.endswith(self._tag) else wake())

    def close(self) -> None:
        """See Store.close."""
        if self._closed:
            return
        self._beat.kill()
        with gevent.Timeout(RESOLVE_S, False):
            self._intake.flush()
            self._writer.flush()
        self._closed = True
        connection = self._connection
        if connection is not None and not self._database.down:
            try:
                while connection.execute(pgsql.FREE, (self._id, SLICE)).rowcount == SLICE:
                    pass
                connection.execute("DELETE FROM worker WHERE id = %s", (self._id,))
                connection.execute("SELECT pg_notify(%s, %s)", (pgschema.CHANNEL, "due"))
            except psycopg.Error as error:
                self._log.warning("claims not given back", error=str(error))
        self._drop_connection()
        if self._intake_connection is not None:
            self._intake_connection.close()
        self._claims.clear()
        shutil.rmtree(self._spool, ignore_errors=True)
        try:
            os.unlink(self._lock_path(self._tag))
        except OSError:
            pass
        os.close(self._lock)

    # --- from greenlets to the writer ----------------------------------------------------------------------------

    def _up(self) -> None:
        """Raises StoreError where the database is known to be down."""
        if self._database.down:
            raise StoreError(f"database down: {self._database.down}")
        if self._closed:
            raise StoreError("closed")

    def _known(self) -> None:
        """Raises StoreError where the database is down or has no tables yet."""
        self._up()
        if not self._migrated:
            self._submit(self._ready)

    def _submit(self, operation: Any, timeout_s: float | None = None, line: Gather | None = None) -> Any:
        with gevent.Timeout(timeout_s, StoreError("the database gives no answer")):
            try:
                return (line or self._writer).submit(operation)
            except (psycopg.Error, DatabaseDown) as error:
                raise _store_error(error) from error

    def _ask(self, statement: str, values: tuple[Any, ...]) -> Any:
        """The first row."""
        self._known()
        try:
            with self._database.use() as connection:
                return connection.execute(statement, values, binary=True).fetchone()
        except (psycopg.Error, DatabaseDown) as error:
            raise StoreError(str(error)) from error

    def _octets_of(self, message: Message) -> bytes:
        """A body that fits into its row."""
        body = message.body
        if isinstance(body, MemoryBody):
            return body.data
        try:
            return b"".join(body.chunks())
        except OSError as error:
            raise StoreError(str(error)) from error

    def _unclaim(self, queue_id: str, numbers: Iterable[int]) -> None:
        claim = self._claims.get(queue_id)
        if claim is not None:
            claim.numbers.difference_update(numbers)
            if not claim.numbers:
                del self._claims[queue_id]
                if claim.large:
                    self._forget_file(queue_id)

    def _forget_file(self, queue_id: str) -> None:
        try:
            os.unlink(self.new_spool_file(queue_id))
        except OSError:
            pass

    def _claim_whole(self, envelope: Envelope, large: bool, owner: int) -> None:
        """What is put is ours."""
        claim = self._claims[envelope.id] = _Claim(owner, len(envelope.recipients), large)
        claim.numbers.update(r.number for r in envelope.recipients)

    def _keep_lease(self) -> None:
        """Prolongs the lease while nothing else does."""
        pause_s = min(self._lease_s / 4, 10.0)
        while True:
            try:
                if self._sure_until - time.monotonic() < self._lease_s - pause_s / 2:
                    self._submit(self._prolong)
            except StoreError as error:
                if not self._database.down:
                    self._log.error("lease not prolonged", error=str(error))
                self._database.wait_until_up(pause_s)
                gevent.sleep(0.05)
                continue
            gevent.sleep(pause_s)

    def _prolong(self) -> None:
        self._transact([])

    # --- intake: a greenlet and a connection of its own, since clients wait for it ---------------------------------

    def _take_in(self, puts: list[Any]) -> list[Any]:
        """New messages, in one transaction; those that fail together are tried one by one."""
        results: list[Any] = [self._put_together(puts)] * len(puts)
        if results[0] is not None and len(puts) > 1 and not self._database.down:
            results = [self._put_together([put]) for put in puts]
        for put in puts:
            if put.given_up and self._claims.pop(put.envelope.id, None) is not None:
                self._forget_file(put.envelope.id)
                self._undo_put(put.envelope.id)
        return results

    def _put_together(self, puts: list[Any]) -> StoreError | None:
        """Commits; what went wrong."""
        for _ in range(AGAIN):
            live = [put for put in puts if not put.given_up]
            ids = [put.envelope.id for put in live]
            if self._claims.keys() & ids:
                return StoreError("a message of that id is queued")
            connection = None
            try:
                if not self._id:
                    self._submit(self._ready)
                owner = self._id
                connection = self._intake_ready()
                for put in live:
                    self._claim_whole(put.envelope, isinstance(put.message.body, FileBody), owner)
                rows = (([_message_row(put.envelope, put.message, put.body) for put in live], pgsql.PUT_MESSAGES),
                        ([pgschema.recipient_row(put.envelope.id, r, owner) for put in live for r in put.envelope.recipients], pgsql.PUT_RECIPIENTS),
                        (self._event_rows(event for put in live for event in put.events), pgsql.PUT_EVENTS))
                connection.transact([*((statement, columns(some, *kinds)) for some, (statement, kinds) in rows if some), (pgsql.HOLD, (owner,))])
                return None
            except BaseException as error:
                lost = connection is not None and is_lost(error, connection)
                if lost:
                    self._lost_intake(error)
                    if self._came(ids, self._intake_name):
                        return None
                for queue_id in ids:
                    self._claims.pop(queue_id, None)
                if isinstance(error, errors.DivisionByZero):
                    try:
                        self._submit(self._prolong)  # finds the lease lost, and gets another
                    except StoreError as trouble:
                        return trouble
                elif not lost:
                    if isinstance(error, psycopg.Error | DatabaseDown | StoreError):
                        return _store_error(error)
                    raise
        return StoreError("connection or lease was lost again and again")

    def _undo_put(self, queue_id: str) -> None:
        """A message whose client was told that it is not queued, and will come again."""
        self._undo.add(queue_id)
        self._writer.post(_Release([]))

    def _intake_ready(self) -> Connection:
        connection = self._intake_connection
        if connection is None or connection.closed:
            connection = self._intake_connection = self._database.connect(f"intake {self._tag} ")
            self._intake_name = connection.info.parameter_status("application_name") or ""
        return connection

    def _lost_intake(self, error: BaseException) -> None:
        self._database.lost(error)
        self._steady_since = time.monotonic()
        if self._intake_connection is not None:
            self._intake_connection.close()
            self._intake_connection = None

    # --- the writer: one greenlet, one connection ----------------------------------------------------------------

    def _run(self, operations: list[Any]) -> list[Any]:
        """One batch: all writes in one transaction, then the rest."""
        results: list[Any] = [None] * len(operations)
        writes = [n for n, operation in enumerate(operations) if not callable(operation)]
        if writes:
            for n, result in zip(writes, self._write([operations[n] for n in writes]), strict=True):
                results[n] = result
        for n, operation in enumerate(operations):
            if callable(operation):
                results[n] = self._outcome(operation)
        return results

    def _write(self, operations: list[Any]) -> list[Any]:
        """Commits together; what fails together, or has to be looked at by itself, one by one."""
        if len(operations) > 1 and not any(map(self._is_late, operations)):
            for _ in range(AGAIN):
                try:
                    self._commit(operations)
                    return [None] * len(operations)
                except _Undone:
                    continue
                except DatabaseDown as error:
                    return [_store_error(error)] * len(operations)
                except (_Lapsed, psycopg.Error, StoreError):
                    break
        return [self._outcome(operation) for operation in operations]

    def _outcome(self, operation: Any) -> Any:
        """What an operation gives, or its failure; it is done again where it is known to be undone, or needs a new lease."""
        for _ in range(AGAIN):
            try:
                if callable(operation):
                    return operation()
                if self._is_late(operation):
                    return self._record_late(operation)
                return self._commit([operation])
            except (_Lapsed, _Undone):
                continue
            except (psycopg.Error, DatabaseDown, StoreError) as error:
                self._unsure = self._unsure or isinstance(operation, _Release)
                return _store_error(error)
        return StoreError("connection or lease was lost again and again")

    def _ready(self) -> Connection:
        """The writer's connection, with a lease; raises DatabaseDown, psycopg.Error."""
        connection = self._connection
        if connection is not None and not connection.closed:
            if not self._id:
                self._register(connection)
            return connection
        self._drop_connection()
        connection = self._database.connect(f"writer {self._tag} ")
        try:
            connection.execute(pgsql.END_OLD, (connection.info.parameter_status("application_name"),))
            if not self._migrated:
                pgschema.migrate(connection)
                self._migrated = True
            if not self._id:
                self._register(connection)
        except BaseException as error:
            connection.close()
            if isinstance(error, psycopg.Error) and is_lost(error, connection):
                self._database.lost(error)
                raise DatabaseDown(str(error)) from error
            raise
        self._connection = connection
        return connection

    def _drop_connection(self) -> None:
        if self._connection is not None:
            try:
                self._connection.close()
            except psycopg.Error:
                pass
            self._connection = None

    def _register(self, connection: Connection) -> None:
        """A lease of our own."""
        began = time.monotonic()
        row = connection.execute("WITH known AS (INSERT INTO node (name) VALUES (%s) ON CONFLICT DO NOTHING) INSERT INTO worker (node, home, tag, pid, "
                                 "lease_until) VALUES (%s, %s, %s, %s, clock_timestamp() + "
                                 "make_interval(secs => %s)) RETURNING id", (self._node, self._node, self._home, self._tag, os.getpid(), self._lease_s)).fetchone()
        self._id = int(row[0]) if row is not None else 0
        self._sure_until = began + self._lease_s

    def _lapse(self) -> None:
        """Another node has taken our claims: what is recorded for them from now on may count or not."""
        self._log.warning("lease lost: what this worker had in hand was taken over", claims=len(self._claims))
        self._id = 0
        self._sure_until = 0.0
        self._batch = 0

    def _transact(self, statements: list[tuple[str, Any]], question: tuple[str, dict[str, Any]] | None = None) -> list[Any]:
        """One transaction in one go; the rows of `question`, none where only the answer was lost.

        Raises psycopg.Error where it failed, DatabaseDown where it can't be known for now, _Lapsed.
        """
        with self._reading() as connection:
            if self._unsure:
                self._reconcile(connection)
        self._batch += 1
        began = time.monotonic()
        fence = (pgsql.FENCE, (self._batch, self._lease_s, self._id))
        try:
            if question is None:
                connection.transact([*statements, fence])
                rows = []
            else:
                with connection.pipeline():
                    asked, _ = connection.execute(*question, binary=True), connection.execute(*fence)
                rows = asked.fetchall()
        except (psycopg.Error, OSError) as error:
            if not is_lost(error, connection):
                if question is not None:
                    connection.forget()
                if isinstance(error, errors.DivisionByZero):
                    self._lapse()
                    raise _Lapsed from error
                raise
            self._lost(error)
            if not self._was_committed():
                raise _Undone(str(error)) from error
            rows = []
        self._sure_until = began + self._lease_s
        return rows

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        """The writer's connection for statements that do no harm when they are repeated."""
        connection = self._ready()
        try:
            yield connection
        except psycopg.Error as error:
            if not is_lost(error, connection):
                raise
            self._lost(error)
            raise _Undone(str(error)) from error

    def _lost(self, error: BaseException) -> None:
        self._database.lost(error)
        self._drop_connection()
        self._unsure = True
        self._steady_since = time.monotonic()

    def _was_committed(self) -> bool:
        """Whether the transaction that lost its connection is done; asks until it is known. Raises _Lapsed where it can't be."""
        while True:
            self._turn_away()
            if self._closed:
                raise DatabaseDown("closed")
            if not self._database.wait_until_up(0.1):
                continue
            try:
                connection = self._ready()
                row = connection.execute("SELECT batch FROM worker WHERE id = %s", (self._id,)).fetchone()
            except (psycopg.Error, DatabaseDown) as error:
                self._drop_connection()
                self._database.lost(error)
                gevent.sleep(0.05)
                continue
            self._steady_since = time.monotonic()
            if row is None:
                self._lapse()
                raise _Lapsed
            return int(row[0]) >= self._batch

    def _turn_away(self) -> None:
        """What was not sent yet and has a caller who can come again need not wait for a database that is down."""
        if self._database.down:
            for line in (self._writer, self._intake):
                line.refuse(lambda item: not isinstance(item, _Release), StoreError(f"database down: {self._database.down}"))

    def _reconcile(self, connection: Connection) -> None:
        """Gives back what is claimed in our name without our knowledge: the answer was lost, or our giving it back was."""
        strange = [row for row in connection.execute(pgsql.OWNED, (self._id,), binary=True)
                   if row[0] not in self._claims or row[1] not in self._claims[row[0]].numbers]
        if strange:
            connection.execute("UPDATE recipient r SET owner = 0 FROM unnest(%s, %s) u(message, number) WHERE r.message = u.message "
                               "AND r.number = u.number AND r.owner = %s", (*columns(strange, Texts, Integers), self._id))
        self._unsure = False

    def _commit(self, operations: list[Any]) -> None:
        """Writes settlements and releases in one transaction; claims change with it."""
        self._ready()
        messages: list[tuple[Any, ...]] = []
        recipients: list[tuple[Any, ...]] = []
        events: list[tuple[Any, ...]] = []
        born: list[tuple[Envelope, Message]] = []
        updates: list[tuple[Any, ...]] = []
        doomed: list[str] = []
        pieces: list[str] = []
        doubtful: list[str] = []
        settled: list[tuple[str, set[int], int]] = []
        released: list[tuple[Any, ...]] = []
        undone = list(self._undo)
        for operation in operations:
            if isinstance(operation, _Release):
                released += operation.rows
                continue
            self._settle(operation, updates, doomed, pieces, doubtful, settled)
            for envelope, message in operation.births:
                if message.body.size <= BODY_IN_ROW:
                    messages.append(_message_row(envelope, message, self._octets_of(message)))
                    recipients.extend(pgschema.recipient_row(envelope.id, r, self._id) for r in envelope.recipients)
                    born.append((envelope, message))
            events += self._event_rows(operation.events)
        statements: list[tuple[str, Any]] = [
            (statement, columns(rows, *kinds)) for rows, (statement, kinds) in (
                (messages, pgsql.PUT_MESSAGES), (recipients, pgsql.PUT_RECIPIENTS), (events, pgsql.PUT_EVENTS)) if rows]
        if doubtful:
            statements.append((pgsql.DOUBTFUL, (Texts(doubtful),)))
        statements += [(statement, columns(rows, *kinds)) for rows, (statement, kinds) in ((updates, pgsql.SETTLE), (released, pgsql.RELEASE)) if rows]
        if doubtful:
            statements.append((pgsql.DROP_DOUBTFUL, (Texts(doubtful),)))
        if doomed or undone:
            statements += [(statement, (Texts(doomed + undone),)) for statement in pgsql.DROP]
        if pieces or undone:
            statements.append((pgsql.DROP_CHUNKS, (Texts(pieces + undone),)))
        if undone:
            statements.append(("DELETE FROM event WHERE message = ANY(%s)", (Texts(undone),)))
        if released and time.monotonic() - self._notified_at > 1.0:
            self._notified_at = time.monotonic()
            statements.append(("SELECT pg_notify(%s, %s)", (pgschema.CHANNEL, f"due {self._tag}")))
        known = {envelope.id for envelope, _ in born if envelope.id in self._claims}
        for envelope, message in born:
            if envelope.id not in known:
                self._claim_whole(envelope, isinstance(message.body, FileBody), self._id)
        try:
            self._transact(statements)
        except BaseException as error:
            ids = [envelope.id for envelope, _ in born]
            if not (isinstance(error, _Lapsed) and self._came(ids)):
                for queue_id in ids:
                    if queue_id not in known:
                        self._claims.pop(queue_id, None)
                raise
        self._undo.difference_update(undone)
        for queue_id, numbers, count in settled:
            done = self._claims.get(queue_id)
            if done is not None and done.open is not None:
                done.open -= count
            self._unclaim(queue_id, numbers)

    def _event_rows(self, events: Iterable[Event]) -> list[tuple[Any, ...]]:
        rows = []
        for event in events:
            self._event_number = max(self._event_number + 1, int(event.at * 1e6))
            rows.append((event.queue_id, self._event_number, event.at, event.kind, _json({**event.data, "node": self._node})))
        return rows

    def _settle(self, settlement: Settlement, updates: list[tuple[Any, ...]], doomed: list[str], pieces: list[str], doubtful: list[str],
                settled: list[tuple[str, set[int], int]]) -> None:
        """Sorts one settlement into what the transaction does."""
        queue_id = settlement.envelope.id
        claim = self._claims.get(queue_id)
        numbers = {r.number for r in settlement.changed}
        ended = {r.number for r in settlement.changed if r.status in (DELIVERED, FAILED)}
        settled.append((queue_id, numbers, len(ended)))
        if claim is not None and claim.open is not None and ended <= claim.numbers and claim.open == len(ended) > 0:
            doomed.append(queue_id)
            if claim.large:
                pieces.append(queue_id)
            return
        for r in settlement.changed:
            updates.append((queue_id, r.number, r.status, r.attempts, r.next_attempt_at, storable(r.transport), storable(r.next_hop),
                            pgschema.lane(r), storable(r.last_reply), int(r.warned)))
        if ended:
            doubtful.append(queue_id)

    # --- what came after the lease -------------------------------------------------------------------------------

    def _is_late(self, operation: Any) -> bool:
        """Whether it is the result of a claim made under a lease that is lost."""
        if not isinstance(operation, Settlement):
            return False
        claim = self._claims.get(operation.envelope.id)
        return claim is not None and claim.owner != self._id

    def _record_late(self, settlement: Settlement) -> None:
        """What was delivered is kept from being delivered again, where nobody else has it in hand; the rest is another's to find out."""
        queue_id = settlement.envelope.id
        rows = [(queue_id, r.number, r.attempts, storable(r.last_reply)) for r in settlement.changed if r.status == DELIVERED]
        self._log.warning("result of a claim that was taken over", id=queue_id, recipients=len(settlement.changed), delivered=len(rows))
        if rows:
            statement, kinds = pgsql.LATE
            events = self._event_rows(event for event in settlement.events if event.kind == DELIVERED)
            self._transact([(pgsql.DOUBTFUL, (Texts([queue_id]),)), (statement, columns(rows, *kinds)), (pgsql.DROP_DOUBTFUL, (Texts([queue_id]),)),
                            *([(pgsql.PUT_EVENTS[0], columns(events, *pgsql.PUT_EVENTS[1]))] if events else [])])
        self._unclaim(queue_id, {r.number for r in settlement.changed})

    def _came(self, ids: list[str], application: str = "") -> bool:
        """Whether messages of a transaction are, or were, in the queue; asks until it is known. application: whose old connection ends first."""
        while ids:
            if self._closed:
                raise DatabaseDown("closed")
            self._turn_away()
            if not self._database.wait_until_up(0.1):
                continue
            try:
                with self._database.use() as connection:
                    if application:
                        connection.execute(pgsql.END_OLD, (application,))
                    return connection.execute(pgsql.CAME, (Texts(ids), Texts(ids))).fetchone() is not None
            except (psycopg.Error, DatabaseDown):
                gevent.sleep(0.05)
        return False

    # --- large messages ------------------------------------------------------------------------------------------

    def _put_large(self, envelope: Envelope, message: Message, events: Sequence[Event]) -> None:
        """A message in pieces: a transaction of its own, in which memory holds one piece."""
        self._submit(self._ready)
        self._claim_whole(envelope, True, self._id)
        try:
            self._send_large(envelope, message, events)
            body = message.body
            if isinstance(body, FileBody) and body.path != self.new_spool_file(envelope.id):
                body.path, body.offset = self._keep_file(envelope.id, body), 0
        except BaseException as error:
            self._claims.pop(envelope.id, None)
            if isinstance(error, psycopg.Error | DatabaseDown | OSError):
                raise _store_error(error) from error
            raise

    def _send_large(self, envelope: Envelope, message: Message, events: Sequence[Event]) -> None:
        pid = name = None
        try:
            with self._database.use() as connection:
                pid, name = connection.info.backend_pid, connection.info.parameter_status("application_name")
                with connection.transaction():
                    for n, piece in enumerate(_pieces(message.body)):
                        connection.execute("INSERT INTO chunk VALUES (%s, %s, %b)", (envelope.id, n, piece))
                        gevent.sleep(0)
                    for rows, (statement, kinds) in (([_message_row(envelope, message, None)], pgsql.PUT_MESSAGES),
                                                     ([pgschema.recipient_row(envelope.id, r, self._id) for r in envelope.recipients], pgsql.PUT_RECIPIENTS),
                                                     (self._event_rows(events), pgsql.PUT_EVENTS)):
                        if rows:
                            connection.execute(statement, columns(rows, *kinds))
                    connection.execute(pgsql.HOLD, (self._id,))
        except DatabaseDown:
            if pid is None or not self._is_there(envelope.id, pid, name):
                raise

    def _is_there(self, queue_id: str, pid: int, name: str | None) -> bool:
        """Whether a message whose commit was not answered is in the queue; where it can't be known in time, it is not to be."""
        end = time.monotonic() + PUT_S
        while time.monotonic() < end and not self._closed:
            if not self._database.wait_until_up(0.5):
                continue
            try:
                with self._database.use() as connection:
                    connection.execute("SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE pid = %s AND application_name = %s "
                                       "AND pid <> pg_backend_pid()", (pid, name))
                    return connection.execute(pgsql.CAME, (Texts([queue_id]), Texts([queue_id]))).fetchone() is not None
            except (psycopg.Error, DatabaseDown):
                gevent.sleep(0.1)
        self._undo_put(queue_id)
        return False

    def _keep_file(self, queue_id: str, body: FileBody) -> str:
        """A body that lies elsewhere, copied into the spool: its owner may remove it."""
        path = self.new_spool_file(queue_id)
        get_hub().threadpool.apply(_copy, (body, path))
        return path

    def _fetch(self, queue_id: str, size: int) -> FileBody | None:
        """A large body, brought into the spool piece by piece; None where it is gone."""
        path = self.new_spool_file(queue_id)
        if os.path.exists(path):
            start = os.path.getsize(path) - size
            if start >= 0:
                return FileBody(path, start, size)
        temporary = f"{path}.{secrets.token_hex(4)}"
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            left, n = size, 0
            while left > 0:
                with self._database.use() as connection:
                    row = connection.execute("SELECT data FROM chunk WHERE message = %s AND n = %s", (queue_id, n), binary=True).fetchone()
                if row is None:
                    return None
                error = get_hub().threadpool.apply(_write, (fd, row[0]))
                if error is not None:
                    raise error
                left -= len(row[0])
                n += 1
            os.rename(temporary, path)
            return FileBody(path, 0, size)
        finally:
            os.close(fd)
            if os.path.exists(temporary):
                os.unlink(temporary)

    # --- reading and claiming ------------------------------------------------------------------------------------

    def _read(self, ids: list[str]) -> list[Any]:
        """The octets of several messages."""
        with self._database.use() as connection:
            rows = {row[0]: row[1:] for row in connection.execute(pgsql.OCTETS_OF, (Texts(ids),), binary=True)}
        return [rows.get(queue_id) for queue_id in ids]

    def _due(self, now: float, limit: int, room: dict[str, int], lane_limit: int) -> list[Envelope]:
        """Claims what is due, the oldest first, of each lane as many as it has room for.

        First in the order of time. Where that is held up by what can't be taken, lane by lane: a few lanes at a time, going on where
        the last search stopped, so that every lane comes to its turn however many there are and however much waits in each.
        """
        scan = limit if not room and lane_limit >= limit else SCAN + limit
        values = {"now": now, "limit": limit, "room": json.dumps(room), "lane_limit": lane_limit}
        found: list[Envelope] = []
        for _ in range(TRIES):
            (looked, wanted), envelopes = self._claim(pgsql.DUE, values | {"scan": scan})
            found += envelopes
            taken = sum(len(envelope.recipients) for envelope in envelopes)
            values["limit"] = limit = limit - taken
            if taken == wanted or limit <= 0:
                break  # no other node was at the same ones
        if limit > 0 and looked >= scan > SCAN and wanted < scan:
            (self._lane, _), envelopes = self._claim(pgsql.DUE_BY_LANE, values | {"before": self._lane, "scan": LANES})
            found += envelopes
        return found

    def _claim(self, statement: str, values: dict[str, Any]) -> tuple[tuple[Any, ...], list[Envelope]]:
        """(the statement's first two columns, what it has claimed)."""
        self._ready()
        rows = self._transact([], (statement, values | {"me": self._id}))
        if not rows:
            raise DatabaseDown("the answer was lost")  # what it claimed is given back by _reconcile
        by_message: dict[str, tuple[Any, list[RecipientState]]] = {}
        for row in rows:
            if row[2] is not None:
                by_message.setdefault(row[2], (row, []))[1].append(pgschema.recipient_of(row[9:]))
        found = []
        for queue_id, (row, recipients) in by_message.items():
            recipients.sort(key=lambda r: r.number)
            claim = self._claims.get(queue_id)
            if claim is None or claim.owner != self._id:
                claim = self._claims[queue_id] = _Claim(self._id, row[7] if row[7] == len(recipients) else None, bool(row[8]))
            claim.numbers.update(r.number for r in recipients)
            found.append(pgschema.envelope_of(row[2:8], recipients))
        found.sort(key=lambda envelope: min(r.next_attempt_at for r in envelope.recipients))
        return rows[0][:2], found

    def _overdue(self, now: float, unwarned_before: float, before: float, reports_before: float, limit: int) -> list[Envelope]:
        unwarned, old, reports = (time_prefix(at) if at > 0 else "" for at in (unwarned_before, before, reports_before))
        with self._reading() as connection:
            rows = connection.execute(pgsql.OVERDUE, {"now": now, "old": old, "unwarned": unwarned, "reports": reports, "judged": self._judged,
                                                 "youngest": max(unwarned, old, reports), "scan": SCAN}, binary=True).fetchall()
        wanted: list[tuple[str, int]] = []
        queue_id = ""
        for queue_id, number, over in rows:
            if over:
                wanted.append((queue_id, number))
                if len(wanted) >= limit:
                    break
        # a message whose recipients were cut off by the limit is come back to with the next round
        self._judged = queue_id if rows and (len(wanted) >= limit or len(rows) == SCAN) else ""
        if not wanted:
            return []
        messages, numbers = columns(wanted, Texts, Integers)
        return self._claim(pgsql.CLAIM_THESE, {"messages": messages, "numbers": numbers})[1]

    def _adopt(self) -> int:
        """Ends the leases of dead workers and frees what they had claimed."""
        now = time.monotonic()
        count = 0
        get_hub().threadpool.apply(self._tidy)
        with self._database.use() as connection:
            others = connection.execute("SELECT id, home, tag, lease_until < clock_timestamp() FROM worker WHERE id <> %s", (self._id,)).fetchall()
            ours = [id for id, home, tag, _ in others if home == self._home and self._is_dead(tag)]
            # after an outage of the database the others need time to prolong theirs
            theirs = [id for id, _, _, ended in others if ended] if now - self._steady_since >= self._lease_s else []
            dead = connection.execute(pgsql.DEAD, (ours, theirs)).fetchall() if ours or theirs else []
            for id, node, tag in dead:
                self._log.warning("worker dead, its claims are free", node=node, worker=id)
                connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE %s AND usename = current_user",
                                   (f"gmta % {tag} %",))
            if dead or now - self._orphans_at > ORPHANS_S:
                self._orphans_at = now
                for (owner,) in connection.execute(pgsql.ORPHANS).fetchall():
                    while True:
                        freed = connection.execute(pgsql.FREE, (owner, SLICE)).fetchall()
                        count += len({message for (message,) in freed})
                        if len(freed) < SLICE:
                            break
            if count:
                connection.execute("SELECT pg_notify(%s, %s)", (pgschema.CHANNEL, f"due {self._tag}"))
        self._purge()
        return count

    def _purge(self) -> None:
        """Deletes history of messages that came and left before its time, some a minute."""
        now = self._clock()
        if now - self._purged_at < 60:
            return
        self._purged_at = now
        before = time_prefix(now - self._history_s)
        for _ in range(PURGES):
            with self._database.use() as connection:
                row = connection.execute(pgsql.PURGE, (self._purged, before, PURGE)).fetchone()
            if row is None or row[0] < PURGE:
                self._purged = ""
                return
            self._purged = row[1]  # the rest of that message's events: with the next round
            gevent.sleep(0.05)


def _message_row(envelope: Envelope, message: Message, body: bytes | None) -> tuple[Any, ...]:
    return (envelope.id, storable(str(envelope.sender)), envelope.size or message.size, envelope.received_at, len(envelope.recipients),
            _json(envelope.to_dict()), message.header, len(message.separator), body, message.body.size)


def _pieces(body: MemoryBody | FileBody) -> Iterable[bytes]:
    """A body in pieces of CHUNK octets."""
    if isinstance(body, FileBody):
        return body.chunks(CHUNK)
    return (body.data[at:at + CHUNK] for at in range(0, body.size, CHUNK))


def _write(descriptor: int, octets: bytes) -> OSError | None:
    """Runs in a native thread; an error is given back, since the pool would print it."""
    try:
        write_all(descriptor, octets)
    except OSError as error:
        return error
    return None


def _copy(body: FileBody, path: str) -> None:
    with open(path, "wb", buffering=0) as file:
        for piece in body.chunks():
            write_all(file.fileno(), piece)


def _store_error(error: BaseException) -> StoreError:
    """As the Store's callers know it."""
    if isinstance(error, StoreError):
        return error
    full = isinstance(error, errors.DiskFull) or getattr(error, "errno", 0) in NO_ROOM
    return (StoreFull if full else StoreError)(str(error))


__all__ = ["PostgresStore"]
