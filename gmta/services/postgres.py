"""A worker's connections to one PostgreSQL: a small pool that greenlets share, and what waits for a database that is down.

    with database.use() as connection:
        connection.execute("SELECT 1")
    if database.down: ...                 # why, known without asking

Waiting is the event loop's, whether or not the process is monkey patched. Every wait has an end: the server's statement_timeout, and
`timeout_s` of our own where the server says nothing at all. What a statement is to do is left to the callers (store, state, lanes).

Failure: DatabaseDown where no connection can be had or the one in use was lost; it is raised at once while the database is known to
be down, and a greenlet tries again with back-off until it is back. psycopg.Error where a statement fails on a sound connection.
"""

from __future__ import annotations

import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from typing import TYPE_CHECKING, Any

import gevent
import psycopg
from gevent.event import Event
from gevent.hub import Waiter, get_hub
from gevent.lock import BoundedSemaphore
from gevent.socket import wait_read
from psycopg import errors, pq, waiting
from psycopg.adapt import Dumper, PyFormat
from psycopg.conninfo import conninfo_to_dict

if TYPE_CHECKING:
    from gmta.services.log import Log

SIZE = 4  # connections of a pool; the store has three of its own
CONNECT_S = 5.0
STATEMENT_S = 20.0
ANSWER_S = 30.0  # without any answer the connection counts as lost
FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 3.0
LISTEN_S = 20.0  # a connection that only listens is tried so often

# A plan is kept as long as its connection, and made from what is known of tables that grow and shrink by the second: all rows are found
# by their keys, one after another, whatever the planner believes.
_SETTINGS = {"statement_timeout": f"{STATEMENT_S:.0f}s", "lock_timeout": "10s", "idle_in_transaction_session_timeout": "15s",
             "client_encoding": "UTF8", "timezone": "UTC", "enable_seqscan": "off", "enable_hashjoin": "off", "enable_mergejoin": "off",
             "jit": "off", "plan_cache_mode": "auto"}
_SET = "SELECT " + ", ".join(f"set_config('{name}', '{value}', false)" for name, value in _SETTINGS.items())


class DatabaseDown(Exception):
    """No connection, or it was lost: what was under way is done or not done."""


class Connection(psycopg.Connection[Any]):
    """A connection whose waits are the event loop's; after a wait that was cut short it is closed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._known: dict[str, bytes] = {}  # statement -> name that it was prepared under
        self._names = count()

    def transact(self, statements: Sequence[tuple[str, Sequence[Any]]]) -> None:
        """Statements without rows, one transaction in one round trip; raises the psycopg.Error of the first that fails.

        Parameters: lists of the kinds below, str, int, float. At a third of the cost of psycopg's pipeline, which sends each by itself.
        """
        if self.closed:
            raise psycopg.OperationalError("the connection is closed")
        fresh: list[str] = []
        try:
            failure = self.wait(self._exchange(statements, fresh))
            if failure is not None:
                raise errors.error_from_result(failure)
        except BaseException:
            for text in fresh:  # those behind one that failed were not prepared
                del self._known[text]
            raise

    def _exchange(self, statements: Sequence[tuple[str, Sequence[Any]]], fresh: list[str]) -> Generator[Any, Any, Any]:
        pgconn = self.pgconn
        pgconn.enter_pipeline_mode()
        for text, values in statements:
            kinds = [_ENCODED[type(value)] for value in values]
            name = self._known.get(text)
            if name is None:
                fresh.append(text)
                name = self._known[text] = b"gmta%d" % next(self._names)
                parts = text.split("%s")
                numbered = "".join(f"{part}${n}" for n, part in enumerate(parts[:-1], 1)) + parts[-1]
                pgconn.send_prepare(name, numbered.encode(), [oid for oid, _ in kinds])
            pgconn.send_query_prepared(name, [encode(value) for (_, encode), value in zip(kinds, values, strict=True)], [1] * len(values))
        pgconn.pipeline_sync()
        failure = None
        wanted = waiting.Wait.RW if pgconn.flush() else waiting.Wait.R
        while True:
            ready = yield wanted
            if ready & waiting.Ready.R:
                pgconn.consume_input()
            if wanted == waiting.Wait.RW and not pgconn.flush():
                wanted = waiting.Wait.R
            while not pgconn.is_busy():
                result = pgconn.get_result()
                if result is None:
                    continue  # the end of one statement's
                if result.status == pq.ExecStatus.PIPELINE_SYNC:
                    pgconn.exit_pipeline_mode()
                    return failure
                if result.status == pq.ExecStatus.FATAL_ERROR:
                    failure = failure or result
                    if pgconn.status != pq.ConnStatus.OK:
                        return failure

    def forget(self) -> None:
        """Gives all prepared statements up: what psycopg believes is prepared after a transaction that failed may not be."""
        self.execute("DEALLOCATE ALL")
        self._known.clear()

    def wait(self, gen: Any, interval: float = 0.0, timeout: float | None = None) -> Any:
        """Drives one of psycopg's exchanges with the server."""
        hub = get_hub()
        watcher, flags = None, 0
        timer = hub.loop.timer(timeout if timeout is not None else ANSWER_S)
        try:
            descriptor = self.pgconn.socket
            wanted = next(gen)
            while True:
                waiter: Waiter[Any] = Waiter(hub)
                if watcher is None or flags != wanted:
                    if watcher is not None:
                        watcher.close()
                    flags = int(wanted)  # psycopg's R and W are libev's READ and WRITE
                    watcher = hub.loop.io(descriptor, flags)
                watcher.start(waiter.switch, pass_events=True)
                timer.start(waiter.switch, 0)
                try:
                    got = waiter.get()
                except BaseException:
                    self.pgconn.finish()  # the answer is still to come: nothing else can use this connection
                    raise
                finally:
                    watcher.stop()
                    timer.stop()
                if not got:
                    self.pgconn.finish()
                    raise psycopg.OperationalError("the database gives no answer")
                wanted = gen.send(got & flags)
        except StopIteration as done:
            return done.value
        finally:
            timer.close()
            if watcher is not None:
                watcher.close()


def parameters(url: str, name: str) -> dict[str, Any]:
    """What psycopg.connect is to be given; raises psycopg.ProgrammingError for a URL that can't be read. name: seen in pg_stat_activity."""
    given: dict[str, Any] = {
        "connect_timeout": f"{CONNECT_S:.0f}", "application_name": name[:63], "keepalives_idle": "10", "keepalives_interval": "5",
        "keepalives_count": "3", "tcp_user_timeout": "20000", "target_session_attrs": "read-write"}
    return given | {key: str(value) for key, value in conninfo_to_dict(url).items() if value is not None}


def prepare(connection: psycopg.Connection[Any]) -> None:
    """Sets a new connection up as gmta's statements want it."""
    connection.execute(_SET)
    for kind, dumper in ARRAYS.items():
        connection.adapters.register_dumper(kind, dumper)


def is_lost(error: BaseException, connection: psycopg.Connection[Any] | None = None) -> bool:
    """Whether an error is of the connection, not of the statement: also where the server became a replica or shuts down."""
    if isinstance(error, errors.ReadOnlySqlTransaction | errors.AdminShutdown | errors.CrashShutdown | errors.CannotConnectNow):
        return True
    return isinstance(error, psycopg.OperationalError | psycopg.InterfaceError) and (
        error.sqlstate is None  # the server has not said it
        or connection is None or connection.closed or connection.pgconn.status != pq.ConnStatus.OK)


class Database:
    """One PostgreSQL, as a worker sees it. name: of the worker, for pg_stat_activity behind `gmta`."""

    def __init__(self, url: str, *, name: str, log: Log, size: int = SIZE) -> None:
        self.url = url
        self.name = name
        self.down = ""
        self._down_since = 0.0
        self._log = log
        self._idle: list[Connection] = []
        self._free = BoundedSemaphore(size)
        self._back = Event()
        self._retrying: gevent.Greenlet | None = None
        self._listeners: list[gevent.Greenlet] = []
        self._closed = False

    def connect(self, purpose: str = "") -> Connection:
        """A connection of the caller's own, in autocommit; raises DatabaseDown. purpose: put before the worker's name."""
        if self._closed:
            raise DatabaseDown("closed")
        try:
            given = _resolved(parameters(self.url, f"gmta {purpose}{self.name}"))
            connection = Connection.connect(autocommit=True, prepare_threshold=1, **given)
            try:
                prepare(connection)
            except BaseException:
                connection.close()
                raise
        except (psycopg.Error, OSError) as error:
            self.lost(error)
            raise DatabaseDown(_first_line(error)) from error
        if self.down:
            self._log.info("database up", after_s=round(time.monotonic() - self._down_since, 1))
            self.down = ""
            self._back.set()
        return connection

    @contextmanager
    def use(self, timeout_s: float = 10.0) -> Iterator[Connection]:
        """A connection of the pool for a while, in autocommit (`with connection.transaction():` for more); raises DatabaseDown.

        timeout_s: how long to wait for a free one. One that is left inside a transaction, or by an exception that is not the
        statement's, is closed.
        """
        if self.down:
            raise DatabaseDown(self.down)
        if not self._free.acquire(timeout=timeout_s):
            raise DatabaseDown("all connections are busy")
        connection: Connection | None = None
        sound = False
        try:
            connection = self._idle.pop() if self._idle else self.connect()
            yield connection
            sound = True
        except psycopg.Error as error:
            if is_lost(error, connection):
                self.lost(error)
                raise DatabaseDown(_first_line(error)) from error
            sound = True
            raise
        finally:
            if connection is not None:
                if sound and not self._closed and not connection.closed and connection.info.transaction_status == pq.TransactionStatus.IDLE:
                    self._idle.append(connection)
                else:
                    with suppress(psycopg.Error):
                        connection.close()
            self._free.release()

    def lost(self, error: BaseException) -> None:
        """Notes that the database can't be reached; a greenlet waits for it to be back."""
        if self._closed or self.down:
            return
        self.down = _first_line(error)
        self._down_since = time.monotonic()
        self._back.clear()
        self._log.error("database down", error=self.down)
        self._retrying = gevent.spawn(self._retry)

    def wait_until_up(self, timeout_s: float) -> bool:
        """Blocks the greenlet while the database is down; whether it is up."""
        return not self.down or bool(self._back.wait(timeout_s))

    def _retry(self) -> None:
        idle, self._idle = self._idle, []
        for connection in idle:
            with suppress(psycopg.Error):
                connection.close()
        pause_s = FIRST_PAUSE_S
        while self.down and not self._closed:
            try:
                self._idle.append(self.connect())
                return
            except DatabaseDown as error:
                self.down = str(error)
            gevent.sleep(pause_s)
            pause_s = min(LONGEST_PAUSE_S, pause_s * 1.7)

    def listen(self, channel: str, heard: Callable[[str], None]) -> None:
        """Calls `heard(payload)` at every NOTIFY there, on a connection of its own; what is sent while that is down is missed."""
        self._listeners.append(gevent.spawn(self._listen, channel, heard))

    def _listen(self, channel: str, heard: Callable[[str], None]) -> None:
        while not self._closed:
            self.wait_until_up(60.0)
            try:
                with self.connect("listener ") as connection:
                    connection.add_notify_handler(lambda notify: heard(notify.payload))
                    connection.execute(psycopg.sql.SQL("LISTEN {}").format(psycopg.sql.Identifier(channel)))
                    heard("")  # something may have been said meanwhile
                    while True:
                        with gevent.Timeout(LISTEN_S, False):
                            wait_read(connection.fileno())
                        connection.execute("")  # hands what has come to the handler, and finds out whether the connection lives
            except (DatabaseDown, psycopg.Error, OSError) as error:
                if not isinstance(error, DatabaseDown):
                    self.lost(error)
                gevent.sleep(FIRST_PAUSE_S)

    def close(self) -> None:
        """Closes all that is not in use; what is, is closed when it is given back."""
        self._closed = True
        gevent.killall([*self._listeners, *([self._retrying] if self._retrying is not None else [])], block=False)
        while self._idle:
            with suppress(psycopg.Error):
                self._idle.pop().close()
        self._back.set()


class Gather:
    """What greenlets submit at about the same time, done together: `run(items) -> results`, one call at a time, in a greenlet.

    linger_s: how long the first item waits for company.  A result that is an exception is raised at its item's `submit`; what `run`
    raises, at every one. A greenlet killed while it waits leaves its item to be done, unseen.
    """

    def __init__(self, run: Callable[[list[Any]], list[Any]], *, max_items: int = 256, linger_s: float = 0.0) -> None:
        self._run = run
        self._max_items = max_items
        self._linger_s = linger_s
        self._waiting: deque[tuple[Any, Waiter[Any] | None]] = deque()
        self._greenlet: gevent.Greenlet | None = None

    def submit(self, item: Any) -> Any:
        """What `run` makes of the item."""
        waiter: Waiter[Any] = Waiter()
        self._push(item, waiter)
        result = waiter.get()
        if isinstance(result, BaseException):
            raise result
        return result

    def post(self, item: Any) -> None:
        """Hands an item in without waiting."""
        self._push(item, None)

    def _push(self, item: Any, waiter: Waiter[Any] | None) -> None:
        self._waiting.append((item, waiter))
        if self._greenlet is None:
            self._greenlet = gevent.spawn(self._work)

    def _work(self) -> None:
        waiting = self._waiting
        while waiting:
            if self._linger_s and len(waiting) < self._max_items:
                gevent.sleep(self._linger_s)
            pairs = [waiting.popleft() for _ in range(min(len(waiting), self._max_items))]
            try:
                results = self._run([item for item, _ in pairs])
            except Exception as error:
                results = [error] * len(pairs)
            get_hub().loop.run_callback(_tell, [(waiter, result) for (_, waiter), result in zip(pairs, results, strict=True) if waiter is not None])
        self._greenlet = None

    def refuse(self, wanted: Callable[[Any], bool], error: Exception) -> None:
        """Takes out of the line what `wanted` says: its callers get `error`."""
        kept = [pair for pair in self._waiting if not wanted(pair[0])]
        refused = [pair for pair in self._waiting if wanted(pair[0])]
        self._waiting.clear()
        self._waiting.extend(kept)
        get_hub().loop.run_callback(_tell, [(waiter, error) for _, waiter in refused if waiter is not None])

    def flush(self) -> None:
        """Blocks until all that was handed in is done."""
        while self._greenlet is not None:
            self._greenlet.join()


def _tell(answers: list[tuple[Waiter[Any], Any]]) -> None:
    """In the hub: wakes the greenlets whose items are done."""
    for waiter, result in answers:
        waiter.switch(result)


# --- arrays, in the server's binary form: a column of a batch is one parameter ------------------------------------------


class Texts(list[str]):
    """A parameter of type text[]."""


class Octets(list["bytes | None"]):
    """A parameter of type bytea[]."""


class Integers(list[int]):
    """A parameter of type bigint[]."""


class Floats(list[float]):
    """A parameter of type double precision[]."""


_HEAD = struct.Struct("!iiIii").pack
_LENGTH = struct.Struct("!i").pack
_INTEGER = struct.Struct("!iq").pack
_FLOAT = struct.Struct("!id").pack


def _array(oid: int, count: int, parts: list[bytes], nulls: int = 0) -> bytes:
    return b"".join((_HEAD(1, nulls, oid, count, 1), *parts)) if count else struct.pack("!iiI", 0, 0, oid)


class _ArrayDumper(Dumper):
    format = pq.Format.BINARY

    def get_key(self, obj: Any, format: PyFormat) -> type:
        """One dumper a class, whatever is inside."""
        return self.cls


class _TextsDumper(_ArrayDumper):
    oid = 1009

    def dump(self, obj: Texts) -> bytes:
        parts: list[bytes] = []
        for text in obj:
            octets = text.encode()
            parts += (_LENGTH(len(octets)), octets)
        return _array(25, len(obj), parts)


class _OctetsDumper(_ArrayDumper):
    oid = 1001

    def dump(self, obj: Octets) -> bytes:
        parts: list[bytes] = []
        for octets in obj:
            parts += (_LENGTH(-1), b"") if octets is None else (_LENGTH(len(octets)), octets)
        return _array(17, len(obj), parts, int(None in obj))


class _IntegersDumper(_ArrayDumper):
    oid = 1016

    def dump(self, obj: Integers) -> bytes:
        return _array(20, len(obj), [_INTEGER(8, number) for number in obj])


class _FloatsDumper(_ArrayDumper):
    oid = 1022

    def dump(self, obj: Floats) -> bytes:
        return _array(701, len(obj), [_FLOAT(8, number) for number in obj])


def _arrays(dumper: type[Dumper], kind: type) -> tuple[int, Callable[[Any], bytes]]:
    return dumper.oid, dumper(kind).dump  # type: ignore[return-value]


_ENCODED: dict[type, tuple[int, Callable[[Any], bytes]]] = {
    str: (25, str.encode), int: (20, struct.Struct("!q").pack), float: (701, struct.Struct("!d").pack),
    Texts: _arrays(_TextsDumper, Texts), Octets: _arrays(_OctetsDumper, Octets), Integers: _arrays(_IntegersDumper, Integers),
    Floats: _arrays(_FloatsDumper, Floats)}
ARRAYS: dict[type, type[Dumper]] = {Texts: _TextsDumper, Octets: _OctetsDumper, Integers: _IntegersDumper, Floats: _FloatsDumper}


def columns(rows: Sequence[tuple[Any, ...]], *kinds: type) -> list[Any]:
    """The columns of `rows` as parameters for unnest; kinds: Texts, Octets, Integers or Floats for each."""
    return [kind(column) for kind, column in zip(kinds, zip(*rows, strict=True), strict=True)] if rows else [kind() for kind in kinds]


def _resolved(given: dict[str, Any]) -> dict[str, Any]:
    """With the addresses of hosts that are names: libpq would stall the loop over their look-up. Raises OSError."""
    hosts = str(given.get("host", "")).split(",")
    if "hostaddr" in given or not hosts[0]:
        return given
    ports = str(given.get("port", "")).split(",")
    names: list[str] = []
    addresses: list[str] = []
    numbers: list[str] = []
    trouble: OSError | None = None
    for n, host in enumerate(hosts):
        port = ports[n] if len(ports) == len(hosts) else ports[0]
        if host.startswith(("/", "@")):
            found = [""]
        else:
            try:
                found = list(dict.fromkeys(str(info[4][0]) for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)))
            except OSError as error:
                trouble = error
                continue
        for address in found:
            names.append(host)
            addresses.append(address)
            numbers.append(port)
    if not names:
        raise trouble or OSError("no host")
    return given | {"host": ",".join(names), "port": ",".join(numbers)} | ({"hostaddr": ",".join(addresses)} if any(addresses) else {})


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
