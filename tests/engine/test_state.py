"""Shared state: what workers count together, when it is forgotten, and a file that can't be used."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gevent
import pytest

from gmta.services.batch import Batch
from gmta.services.state import MAX_KEY, MAX_VALUE, PURGE_S, MemoryState, SqliteState, State
from gmta.testing import FakeClock, MemoryLog, make_services


class Workers:
    """Several workers' states on one file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.clock = FakeClock()
        self.log = MemoryLog()
        self.made: list[SqliteState] = []

    def one(self) -> SqliteState:
        self.made.append(SqliteState(str(self.path), lambda run: Batch(run, max_items=256), self.log, self.clock))
        return self.made[-1]


@pytest.fixture
def workers(tmp_path: Path) -> Iterator[Workers]:
    made = Workers(tmp_path / "data" / "state.db")
    yield made
    for state in made.made:
        state.close()


@pytest.fixture(params=["sqlite", "memory"])
def state(request: pytest.FixtureRequest, workers: Workers) -> State:
    return workers.one() if request.param == "sqlite" else MemoryState(workers.clock)


def test_values_come_back_until_their_time_is_over(state: State, workers: Workers) -> None:
    state.set("a", {"list": [1, 2.5, None, "ü"]}, 10)
    state.set("b", "short", 5)
    assert state.get("a") == {"list": [1, 2.5, None, "ü"]} and state.get("b") == "short" and state.get("c", "none") == "none"
    workers.clock.advance(7)
    assert state.get("b") is None and state.get("a")
    state.delete("a")
    assert state.get("a") is None


def test_a_counter_counts_one_window_of_time(state: State, workers: Workers) -> None:
    assert [state.add("n", 2, 10), state.add("n", 0.5, 10)] == [2, 2.5]
    workers.clock.advance(9)
    assert state.add("n", 1, 10) == 3.5  # the window is the first one's
    assert state.get("n") == 3.5
    workers.clock.advance(2)
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


def test_scan_gives_what_begins_so(state: State, workers: Workers) -> None:
    for key in ("x:2", "x:1", "x", "y:1", "x:ü"):
        state.set(key, key, 10)
    state.set("x:0", 0, 1)
    workers.clock.advance(2)
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

    with sqlite3.connect(workers.path) as database:
        assert [key for key, in database.execute("SELECT key FROM state")] == ["new"]
    database.close()


def test_there_is_an_end_to_rows(workers: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gmta.services.state.MAX_ROWS", 3)
    state = workers.one()
    for number in range(6):
        state.set(f"k{number}", number, 100 + number)
    workers.clock.advance(PURGE_S + 1)
    state.set("last", 0, 1000)
    assert [key for key, _ in state.scan("")] == ["k4", "k5", "last"]


def test_what_no_file_should_keep_is_the_callers_mistake(state: State) -> None:
    with pytest.raises(TypeError):
        state.set("a", object(), 10)
    if isinstance(state, SqliteState):
        with pytest.raises(ValueError, match="characters"):
            state.set("a", "x" * (MAX_VALUE + 1), 10)


def test_without_a_file_a_worker_goes_on_alone_and_says_so_once(workers: Workers, tmp_path: Path) -> None:
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


@pytest.mark.parametrize("spoil", [lambda path: path.write_bytes(b"no database at all " * 500),
                                   lambda path: path.write_bytes(path.read_bytes()[:100] + b"\xff" * 20000)])
def test_a_damaged_file_is_set_aside(workers: Workers, spoil: Callable[[Path], Any]) -> None:
    first = workers.one()
    first.set("a", 1, 100)
    first.close()
    spoil(workers.path)
    state = workers.one()
    assert state.get("a") is None
    state.set("a", 2, 100)
    workers.clock.advance(2)
    assert state.get("a") == 2 and os.path.exists(f"{workers.path}.damaged")


def test_services_open_it_when_it_is_used(tmp_path: Path) -> None:
    """In a process of its own, patched as a worker is."""
    config = tmp_path / "config.ini"
    config.write_text("[gmta]\nhostname = mx.example.test\n")
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
    assert done.stdout == "6.0\n" and (tmp_path / "var/state.db").exists()


def test_in_tests_it_is_in_memory() -> None:
    services = make_services()
    services.state.set("a", 1, 10)
    assert services.state.get("a") == 1 and isinstance(services.state, MemoryState)
