"""What the engine and the plugins are handed: log, metrics, TLS contexts, resolver, shared state, native-thread batches.

`Services` is that bundle; everything in it is built by the worker and passed down. It imports no gevent by itself, so the
command line and the supervisor may build one; `batch` and `spawn` bring gevent in when they are first used.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gmta.config import Config
    from gmta.services.batch import Batch
    from gmta.services.deadlines import Deadlines
    from gmta.services.log import Log
    from gmta.services.metrics import Metrics
    from gmta.services.postgres import Database
    from gmta.services.state import State


class Services:
    """hostname; log; metrics; clock() in Unix seconds; resolver or None; config; state; spawn(fn, *args); batch(name)."""

    __slots__ = ("_batches", "_database", "_deadlines", "_state", "agent", "clock", "config", "hostname", "log", "metrics", "resolver")

    def __init__(self, config: Config, log: Log, metrics: Metrics, *, hostname: str | None = None,
                 clock: Callable[[], float] = time.time, resolver: Any = None) -> None:
        self.config = config
        self.agent = ""  # address of the delivery agent's socket, where there is one
        self.log = log
        self.metrics = metrics
        self.hostname = config.gmta.hostname if hostname is None else hostname
        self.clock = clock
        self.resolver = resolver
        self._batches: dict[str, Batch] = {}
        self._database: Database | None = None
        self._deadlines: Deadlines | None = None
        self._state: State | None = None

    def spawn(self, function: Callable[..., Any], *args: Any) -> Any:
        """Starts `function(*args)` in a greenlet of its own and returns the greenlet."""
        import gevent

        return gevent.spawn(function, *args)

    @property
    def deadlines(self) -> Deadlines:
        """The deadlines of this worker's connections, in and out."""
        if self._deadlines is None:
            from gmta.services.deadlines import Deadlines

            self._deadlines = Deadlines()
        return self._deadlines

    @property
    def node(self) -> str:
        """This machine's name among those that share a queue."""
        return self.config.queue.node or socket.gethostname()

    @property
    def database(self) -> Database | None:
        """The PostgreSQL that [queue] store names; None where that is SQLite."""
        url = self.config.queue.store
        if self._database is None and url != "sqlite":
            from gmta.services.postgres import Database

            self._database = Database(url, name=f"{self.node}/{os.getpid()}", log=self.log)
        return self._database

    @property
    def state(self) -> State:
        """The state that all workers share, of all nodes where they have one database, opened when it is first used."""
        if self._state is None and self.database is not None:
            from gmta.services.state_postgres import PostgresState

            self._state = PostgresState(self.database, self.log, self.clock)
        elif self._state is None:
            from gmta.services.state import SqliteState

            self._state = SqliteState(os.path.join(self.config.gmta.data_dir, "state.db"),
                                      lambda run: self.batch("state", run, max_items=256), self.log, self.clock)
        return self._state

    def batch(self, name: str, run: Callable[[list[Any]], list[Any]] | None = None, *, max_items: int = 32,
              linger_s: float = 0.0) -> Batch:
        """The Batch of that name, one native thread, made at the first call.

        linger_s: how long the first item waits for company.  run: what it does with a list of items; without one, items are callables without arguments, run one after another.
        The first call for a name decides.
        """
        batch = self._batches.get(name)
        if batch is None:
            from gmta.services.batch import Batch, call_each

            batch = self._batches[name] = Batch(call_each if run is None else run, max_items=max_items, linger_s=linger_s, name=name)
        return batch

    def close(self) -> None:
        """Ends the native threads after what they have at hand."""
        for batch in self._batches.values():
            batch.close()
        self._batches.clear()
        if self._state is not None:
            self._state.close()
            self._state = None
        if self._database is not None:
            self._database.close()
            self._database = None
