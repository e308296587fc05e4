"""Shared state, in a file and on PostgreSQL: what workers count together, when it is forgotten, and a keeper that can't be used."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gevent
import psycopg
import pytest

from gmta.queue import pgschema
from gmta.services import state_postgres
from gmta.services.batch import Batch
from gmta.services.postgres import Database
from gmta.services.state import MAX_KEY, MAX_VALUE, PURGE_S, KeptState, MemoryState, SqliteState, State
from gmta.services.state_postgres import RETRY_S, PostgresState
from gmta.testing import FakeClock, MemoryLog, make_services


class Workers:
    """Several workers' states on one file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.clock = FakeClock()
        self.log = MemoryLog()
        self.made: list[KeptState] = []

    def one(self) -> KeptState:
        self.made.append(SqliteState(str(self.path), lambda run: Batch(run, max_items=256), self.log, self.clock))
        return self.made[-1]

    def close(self) -> None:
        for state in self.made:
            state.close()

    def keys(self) -> list[str]:
        """What the file has."""
        database = sqlite3.connect(self.path)
        try:
            return [key for key, in database.execute("SELECT key FROM state ORDER BY key")]
        finally:
            database.close()


class Nodes(Workers):
    """Several nodes' states on one database."""

    def __init__(self, url: str) -> None:
        super().__init__(Path())
        self.url = url
        self.databases: list[Database] = []
        with psycopg.connect(url, autocommit=True) as connection:
            pgschema.migrate(connection)

    def one(self) -> KeptState:
        self.databases.append(Database(self.url, name="test", log=self.log))
        self.made.append(PostgresState(self.databases[-1], self.log, self.clock))
        return self.made[-1]

    def close(self) -> None:
        super().close()
        for database in self.databases:
            database.close()

    def keys(self) -> list[str]:
        with psycopg.connect(self.url) as connection:
            return [key for key, in connection.execute("SELECT key FROM state ORDER BY key")]


@pytest.fixture
def in_file(tmp_path: Path) -> Iterator[Workers]:
    made = Workers(tmp_path / "data" / "state.db")
    yield made
    made.close()


@pytest.fixture
def nodes(database_url: str) -> Iterator[Nodes]:
    made = Nodes(database_url)
    yield made
    made.close()


@pytest.fixture(params=["in_file", "nodes"])
def workers(request: pytest.FixtureRequest) -> Workers:
    found: Workers = request.getfixturevalue(request.param)
    return found


@pytest.fixture(params=["in_file", "nodes", "memory"])
def kept(request: pytest.FixtureRequest) -> tuple[State, FakeClock]:
    if request.param == "memory":
        clock = FakeClock()
        return MemoryState(clock), clock
    workers = request.getfixturevalue(request.param)
    return workers.one(), workers.clock


@pytest.fixture
def state(kept: tuple[State, FakeClock]) -> State:
    return kept[0]


@pytest.fixture
def clock(kept: tuple[State, FakeClock]) -> FakeClock:
    return kept[1]


def test_values_come_back_until_their_time_is_over(state: State, clock: FakeClock) -> None:
    state.set("a", {"list": [1, 2.5, None, "ü"]}, 10)
    state.set("b", "short", 5)
    assert state.get("a") == {"list": [1, 2.5, None, "ü"]} and state.get("b") == "short" and state.get("c", "none") == "none"
    clock.advance(7)
    assert state.get("b") is None and state.get("a")
    state.delete("a")
    assert state.get("a") is None


def test_a_counter_counts_one_window_of_time(state: State, clock: FakeClock) -> None:
    assert [state.add("n", 2, 10), state.add("n", 0.5, 10)] == [2, 2.5]
    clock.advance(9)
    assert state.add("n", 1, 10) == 3.5  # the window is the first one's
    assert state.get("n") == 3.5
    clock.advance(2)
    assert state.get("n") is None
    state.count("n", 4, 10)
    assert state.add("n", -1, 10) == 3


def test_many_counters_in_one_go(state: State) -> None:
    state.add("a", 2)
    assert state.add_all([("a", 1, 10), ("b", 5, 10), ("a", 1, 10)]) == [3, 5, 4]
    assert state.add_all([]) == []
    assert (state.get("a"), state.get("b")) == (4, 5)


def test_a_counter_on_what_is_no_number_begins_anew(state: State) -> None:
    state.set("n", "word", 10)
    assert state.add("n", 3, 10) == 3


def test_scan_gives_what_begins_so(state: State, clock: FakeClock) -> None:
    for key in ("x:2", "x:1", "x", "y:1", "x:ü"):
        state.set(key, key, 10)
    state.set("x:0", 0, 1)
    clock.advance(2)
    assert state.scan("x:") == [("x:1", "x:1"), ("x:2", "x:2"), ("x:ü", "x:ü")]
    assert [key for key, _ in state.scan("x:", 1)] == ["x:1"]
    assert len(state.scan("")) == 5


def test_any_text_is_a_key(state: State) -> None:
    keys = ["k" * MAX_KEY + end for end in "ab"] + ["\udcff", "\0", "a'b", "%_"]
    for number, key in enumerate(keys):
        state.set(key, number, 10)
    assert [state.get(key) for key in keys] == list(range(len(keys)))


def test_workers_see_each_other_within_a_second(workers: Workers) -> None:
    one, other = workers.one(), workers.one()
    one.set("a", 1, 10)
    assert other.get("a") == 1
    one.set("a", 2, 10)
    assert one.get("a") == 2 and other.get("a") == 1  # read a moment ago
    workers.clock.advance(1.5)
    assert other.get("a") == 2
    greenlets = [gevent.spawn(worker.add, "n", 1, 60) for worker in (one, other) * 50]
    gevent.joinall(greenlets, timeout=10, raise_error=True)
    assert sorted(greenlet.value for greenlet in greenlets) == list(range(1, 101))


def test_what_is_over_leaves_the_file(workers: Workers) -> None:
    state = workers.one()
    state.set("old", 1, 5)
    workers.clock.advance(PURGE_S + 10)
    state.set("new", 1, 50)
    state.get("another's")  # a round later
    assert workers.keys() == ["new"]


def test_there_is_an_end_to_rows(workers: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gmta.services.state.MAX_ROWS", 3)
    state = workers.one()
    for number in range(6):
        state.set(f"k{number}", number, 100 + number)
    workers.clock.advance(PURGE_S + 1)
    state.set("last", 0, 1000)
    state.get("another's")
    assert [key for key, _ in state.scan("")] == ["k4", "k5", "last"]


def test_what_no_file_should_keep_is_the_callers_mistake(state: State) -> None:
    with pytest.raises(TypeError):
        state.set("a", object(), 10)
    if isinstance(state, KeptState):
        with pytest.raises(ValueError, match="characters"):
            state.set("a", "x" * (MAX_VALUE + 1), 10)


def test_without_a_file_a_worker_goes_on_alone_and_says_so_once(in_file: Workers, tmp_path: Path) -> None:
    workers = in_file
    (tmp_path / "data").write_text("no directory")
    state = workers.one()
    state.set("a", 1, 10)
    assert state.get("a") == 1 and [state.add("n", 1, 10), state.add("n", 1, 10)] == [1, 2]
    workers.clock.advance(5)
    assert state.get("a") == 1 and state.get("b") is None and state.scan("") == []
    assert len(workers.log.of("state can't be kept")) == 1
    (tmp_path / "data").unlink()
    assert state.add("n", 1, 10) == 1
    assert len(workers.log.of("state is kept again")) == 1


def test_without_a_database_a_worker_goes_on_alone_and_says_so_once(nodes: Nodes) -> None:
    state, other = nodes.one(), nodes.one()
    assert [state.add("n", 2, 60), other.add("n", 2, 60)] == [2, 4]
    with psycopg.connect(nodes.url, autocommit=True) as connection:
        connection.execute("ALTER TABLE state RENAME TO hidden")
        state.set("a", 1, 10)
        assert state.get("a") == 1 and [state.add("m", 1, 10), state.add("m", 1, 10)] == [1, 2]
        state.count("m", 1, 10)
        assert state.get("b", "none") == "none" and state.scan("") == []
        assert len(nodes.log.of("state can't be kept")) == 1
        connection.execute("ALTER TABLE hidden RENAME TO state")
    assert state.add("n", 1, 60) == 1  # a moment ago it was down: nobody waits for it
    nodes.clock.advance(RETRY_S)
    assert state.add("n", 1, 60) == 5
    assert len(nodes.log.of("state is kept again")) == 1


def test_a_connection_that_is_lost_costs_no_more_than_a_moment(nodes: Nodes) -> None:
    state = nodes.one()
    assert state.add("n", 1, 60) == 1
    with psycopg.connect(nodes.url, autocommit=True) as connection:
        connection.execute("SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = current_database() "
                           "AND pid <> pg_backend_pid()")
        assert state.add("n", 1, 60) == 1  # this worker's own count begins
        assert nodes.databases[0].wait_until_up(10)
        nodes.clock.advance(RETRY_S)
        assert state.add("n", 1, 60) == 2


def test_what_is_wanted_at_one_moment_is_one_round_trip(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = 0
    inner = state_postgres._ask

    def ask(connection: Any, wishes: Any) -> Any:
        nonlocal rounds
        rounds += 1
        return inner(connection, wishes)

    monkeypatch.setattr(state_postgres, "_ask", ask)
    state = nodes.one()
    state.set("a", 1, 60)
    rounds = 0
    wishes = [gevent.spawn(state.add, "n", 1, 60) for _ in range(50)] + [gevent.spawn(state.get, key) for key in ("x", "y", "a")]
    wishes += [gevent.spawn(state.set, f"k{n}", n, 60) for n in range(50)] + [gevent.spawn(state.scan, "a")]
    gevent.joinall(wishes, timeout=10, raise_error=True)
    assert rounds == 1
    assert sorted(wish.value for wish in wishes[:50]) == list(range(1, 51)) and wishes[-1].value == [("a", 1)]


def test_different_wishes_for_one_key_keep_their_order(nodes: Nodes) -> None:
    state = nodes.one()
    values: list[Any] = []
    gevent.joinall([gevent.spawn(lambda: values.append(state.add("n", 2, 60))), gevent.spawn(state.set, "n", 10, 60),
                    gevent.spawn(lambda: values.append(state.add("n", 1, 60))), gevent.spawn(state.delete, "n"),
                    gevent.spawn(lambda: values.append(state.add("n", 3, 60)))], timeout=10, raise_error=True)
    assert sorted(values) == [2, 3, 11]


def test_workers_that_write_the_same_keys_never_wait_in_a_circle(nodes: Nodes) -> None:
    states = [nodes.one() for _ in range(3)]
    keys = [f"k{n}" for n in range(30)]
    greenlets = [gevent.spawn(state.add_all, [(key, 1, 60) for key in (keys if turn % 2 else keys[::-1])])
                 for turn in range(10) for state in states]
    gevent.joinall(greenlets, timeout=30, raise_error=True)
    assert states[0].add_all([(key, 0, 60) for key in keys]) == [30] * 30 and not nodes.log.of("state can't be kept")


@pytest.mark.parametrize("spoil", [lambda path: path.write_bytes(b"no database at all " * 500),
                                   lambda path: path.write_bytes(path.read_bytes()[:100] + b"\xff" * 20000)])
def test_a_damaged_file_is_set_aside(in_file: Workers, spoil: Callable[[Path], Any]) -> None:
    workers = in_file
    first = workers.one()
    first.set("a", 1, 100)
    first.close()
    spoil(workers.path)
    state = workers.one()
    assert state.get("a") is None
    state.set("a", 2, 100)
    workers.clock.advance(2)
    assert state.get("a") == 2 and os.path.exists(f"{workers.path}.damaged")


@pytest.mark.parametrize("store", ["sqlite", "postgresql"])
def test_services_open_it_when_it_is_used(tmp_path: Path, store: str, request: pytest.FixtureRequest) -> None:
    """In a process of its own, patched as a worker is."""
    config = tmp_path / "config.ini"
    url = "sqlite" if store == "sqlite" else request.getfixturevalue("nodes").url
    config.write_text(f"[gmta]\nhostname = mx.example.test\n[queue]\nstore = {url}\n")
    code = """
from gevent import monkey
monkey.patch_all()
import sys
from gmta.config import load
from gmta.services import Services
from gmta.services.log import NullLog
from gmta.services.metrics import Metrics
services = Services(load(sys.argv[1]), NullLog(), Metrics())
services.state.count("n", 5, 60)
print(services.state.add("n", 1, 60))
services.close()
"""
    done = subprocess.run([sys.executable, "-c", code, str(config)], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "6.0\n" and (tmp_path / "var/state.db").exists() == (store == "sqlite")


def test_in_tests_it_is_in_memory() -> None:
    services = make_services()
    services.state.set("a", 1, 10)
    assert services.state.get("a") == 1 and isinstance(services.state, MemoryState)
