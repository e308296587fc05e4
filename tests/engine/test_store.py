"""What every Store does, on SQLite and on PostgreSQL: what is put survives, claims are leases. What only one does is in its own file."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gevent
import pytest

from gmta.mail.address import Address
from gmta.mail.envelope import DELIVERED, HELD, QUEUED, Envelope, RecipientState
from gmta.mail.message import FileBody, MemoryBody, Message
from gmta.queue.ids import IdSource
from gmta.queue.sqlite import SqliteStore
from gmta.queue.store import Event, Settlement, Store, StoreError
from gmta.services.log import NullLog

IDS = IdSource(itertools.count(1_800_000_000).__next__, "AAAAA")
Open = Callable[[], Store]


@pytest.fixture(params=["sqlite", "postgresql"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Open]:
    """Opens the store, again and again what is the same one, each time as a worker of the same machine."""
    stores: list[Store] = []
    tags = (f"{number:05d}" for number in itertools.count())
    if request.param == "sqlite":
        def opened() -> Store:
            # the tag of the ids: what they name in the spool is being received
            stores.append(SqliteStore(str(tmp_path), instance_tag="AAAAA", log=NullLog(), clock=lambda: 1_800_000_000.0, message_limit=1000))
            return stores[-1]
        yield opened
    else:
        from gmta.queue.postgres import PostgresStore
        from gmta.services.postgres import Database

        url = request.getfixturevalue("database_url")
        databases: list[Database] = []

        def opened() -> Store:
            databases.append(Database(url, name=f"test/{next(tags)}", log=NullLog()))
            stores.append(PostgresStore(databases[-1], str(tmp_path), node="test", log=NullLog(), clock=lambda: 1_800_000_000.0, message_limit=1000))
            return stores[-1]
        yield opened
        for store in stores:
            store.close()
        for database in databases:
            database.close()
    for store in stores:
        store.close()


def envelope(*names: str, at: float = 100.0) -> Envelope:
    return Envelope(IDS.new(), Address("a", "b.example"), [
        RecipientState(n, Address(name, "c.example"), next_attempt_at=at) for n, name in enumerate(names)], received_at=at)


def routed(store: Store, next_hop: str, at: float = 100.0) -> Envelope:
    """A message that was tried and waits in a lane."""
    env = envelope("x", at=at)
    store.put(env, Message.from_bytes(MESSAGE))
    env.recipients[0].transport, env.recipients[0].next_hop = "out", next_hop
    store.record(Settlement(env, env.recipients))
    return env


MESSAGE = b"Subject: x\r\n\r\nbody\r\n"


def test_put_survives_and_is_due_again(opened: Open) -> None:
    store = opened()
    env = envelope("x", "y")
    store.put(env, Message.from_bytes(MESSAGE), [Event(env.id, 1.0, "received")])
    assert store.due(1000.0, 10) == []  # claimed by the caller
    store.close()
    store = opened()
    (found,) = store.due(1000.0, 10)
    assert found.id == env.id and [str(r.address) for r in found.recipients] == ["x@c.example", "y@c.example"]
    message = store.message(env.id)
    assert message is not None and b"".join(message.chunks()) == MESSAGE
    store.close()


def test_settled_message_leaves_in_parts(opened: Open) -> None:
    store = opened()
    env = envelope("x", "y")
    store.put(env, Message.from_bytes(MESSAGE))
    first, second = env.recipients
    first.status = DELIVERED
    second.next_attempt_at = 500.0
    store.record(Settlement(env, [first, second]))
    assert store.next_due_at() == 500.0
    assert store.due(499.0, 10) == []
    (again,) = store.due(500.0, 10)
    again.recipients[0].status = DELIVERED
    store.record(Settlement(again, again.recipients))
    assert store.message(env.id) is None and store.all_recipients(env.id) == []
    store.close()


def test_many_greenlets_share_commits(opened: Open) -> None:
    store = opened()

    def one() -> None:
        env = envelope("x")
        store.put(env, Message.from_bytes(MESSAGE))
        env.recipients[0].status = DELIVERED
        store.record(Settlement(env, env.recipients, births=[(envelope("dsn"), Message.from_bytes(MESSAGE))]))

    gevent.joinall([gevent.spawn(one) for _ in range(200)], raise_error=True)
    store.close()
    store = opened()
    assert len(store.due(1e9, 1000)) == 200
    store.close()


def test_large_body_stays_and_goes_with_its_row(opened: Open) -> None:
    store = opened()
    env = envelope("x")
    path = store.new_spool_file(env.id)
    Path(path).write_bytes(b"big body")
    store.put(env, Message(b"A: b\r\n", b"\r\n", FileBody(path, 0, 8)))
    message = store.message(env.id)
    assert message is not None and b"".join(message.chunks()).endswith(b"big body")
    env.recipients[0].status = DELIVERED
    store.record(Settlement(env, env.recipients))
    assert not os.path.exists(path)
    store.close()


def test_busy_lanes_are_passed_over(opened: Open) -> None:
    store = opened()
    for name in ("one", "two"):
        env = envelope("x")
        store.put(env, Message.from_bytes(MESSAGE))
        env.recipients[0].transport, env.recipients[0].next_hop, env.recipients[0].status = "out", name, QUEUED
        store.record(Settlement(env, env.recipients))
    (found,) = store.due(1000.0, 10, ["out:one"])
    assert found.recipients[0].next_hop == "two"
    store.release(found)
    assert len(store.due(1000.0, 10)) == 2
    store.close()


def test_each_lane_gives_what_it_has_room_for(opened: Open) -> None:
    store = opened()
    for n in range(6):
        routed(store, "one" if n < 4 else "two", 100.0 + n)
    found = store.due(1000.0, 10, [], ["out:two"], 3)
    assert sorted(e.recipients[0].next_hop for e in found) == ["one"] * 3 + ["two"]
    assert [e.received_at for e in found] == sorted(e.received_at for e in found)
    assert [e.recipients[0].next_hop for e in store.due(1000.0, 10, ["out:two"])] == ["one"]
    assert [e.recipients[0].next_hop for e in store.due(1000.0, 10)] == ["two"]


def test_a_lane_behind_many_busy_ones_has_its_turn(opened: Open) -> None:
    store = opened()
    crowd = envelope(*(f"u{n}" for n in range(2500)))
    store.put(crowd, Message.from_bytes(MESSAGE))
    for r in crowd.recipients:
        r.transport, r.next_hop = "out", "busy"
    store.record(Settlement(crowd, crowd.recipients))
    wanted = routed(store, "free", 500.0)
    assert [e.id for e in store.due(1000.0, 10, ["out:busy"])] == [wanted.id]
    assert len(store.due(1000.0, 10, [], ["out:busy"])[0].recipients) == 1


def test_what_is_old_is_found_though_its_lane_is_busy(opened: Open) -> None:
    store = opened()
    old, fresh = routed(store, "busy"), routed(store, "busy")
    assert store.overdue(1000.0, 0.0, 0.0, 0.0, 10) == []
    found = store.overdue(1000.0, 0.0, 1e10, 0.0, 1)
    assert [e.id for e in found] == [old.id]
    assert [e.id for e in store.overdue(1000.0, 0.0, 1e10, 0.0, 10)] == [fresh.id]
    store.release(found[0])
    assert [e.id for e in store.due(1000.0, 10)] == [old.id]


def test_a_release_keeps_where_the_recipient_was_to_go(opened: Open) -> None:
    store = opened()
    env = envelope("x", "y")
    store.put(env, Message.from_bytes(MESSAGE))
    env.recipients[0].transport, env.recipients[0].next_hop, env.recipients[0].last_reply = "out", "one", "451 4.3.0 later"
    store.release(env)
    (found,) = store.due(1000.0, 10, ["out:one"])
    assert [r.number for r in found.recipients] == [1]
    (rest,) = store.due(1000.0, 10)
    assert (rest.recipients[0].transport, rest.recipients[0].last_reply) == ("out", "451 4.3.0 later")
    assert [r.address.local for r in store.all_recipients(env.id)] == ["x", "y"]


def test_a_held_recipient_waits(opened: Open) -> None:
    store = opened()
    env = envelope("x")
    store.put(env, Message.from_bytes(MESSAGE))
    env.recipients[0].status = HELD
    store.record(Settlement(env, env.recipients))
    assert store.due(1e9, 10) == [] and store.next_due_at() is None and store.message(env.id) is not None


def test_duplicates_are_refused_and_spoil_nothing_beside_them(opened: Open) -> None:
    store = opened()
    env = envelope("x")
    store.put(env, Message.from_bytes(MESSAGE))
    again = gevent.spawn(store.put, env, Message.from_bytes(MESSAGE))
    beside = envelope("y")
    store.put(beside, Message.from_bytes(MESSAGE))
    with pytest.raises(StoreError):
        again.get()
    assert store.message(beside.id) is not None and store.message(env.id) is not None


def test_a_claim_is_held_until_it_is_settled_or_given_back(opened: Open) -> None:
    store = opened()
    env = envelope("x")
    assert not store.holds(env.id)
    store.put(env, Message.from_bytes(MESSAGE))
    assert store.holds(env.id)
    store.release(env)
    assert not store.holds(env.id)


@pytest.mark.parametrize("size", [1, 60_000, 300_000, 1_000_000])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_bodies_of_any_size_come_back(opened: Open, tmp_path: Path, size: int, elsewhere: bool) -> None:
    store = opened()
    env = envelope("x")
    path = str(tmp_path / "elsewhere") if elsewhere else store.new_spool_file(env.id)
    octets = os.urandom(size)
    Path(path).write_bytes(b"Head: er\r\n\r\n" + octets)
    store.put(env, Message(b"Head: er\r\n", b"\r\n", FileBody(path, 12, size)))
    store.close()
    if elsewhere:
        os.unlink(path)
    store = opened()
    (found,) = store.due(1000.0, 10)
    message = store.message(env.id)
    assert message is not None and b"".join(message.chunks()) == b"Head: er\r\n\r\n" + octets
    found.recipients[0].status = DELIVERED
    store.record(Settlement(found, found.recipients))
    assert store.message(env.id) is None
    assert not list(tmp_path.rglob("*.body"))


def test_a_body_in_memory_of_any_size_comes_back(opened: Open) -> None:
    store = opened()
    env, octets = envelope("x"), os.urandom(700_000)
    store.put(env, Message(b"A: b\r\n", b"\r\n", MemoryBody(octets)))
    message = store.message(env.id)
    assert message is not None and b"".join(message.chunks()).endswith(octets)


def test_odd_text_is_kept(opened: Open) -> None:
    store = opened()
    env = Envelope(IDS.new(), Address("a\udcff", "b.example"), [RecipientState(
        0, Address("ä\0", "c.example"), "ä\0@c.example", next_attempt_at=1.0)], received_at=1.0, facts={"helo": "\udc80\0"})
    store.put(env, Message.from_bytes(MESSAGE), [Event(env.id, 1.0, "received", {"x": "\0\udc80"})])
    env.recipients[0].transport, env.recipients[0].next_hop, env.recipients[0].last_reply = "out", "h" * 5000, "450 \0\udcff"
    store.record(Settlement(env, env.recipients))
    assert store.due(1000.0, 10, ["out:" + "h" * 5000]) == []
    (found,) = store.due(1000.0, 10)
    assert found.facts["helo"] == "\udc80\0" and found.recipients[0].next_hop == "h" * 5000


def test_what_a_worker_had_claimed_is_adopted_when_it_is_gone(opened: Open) -> None:
    first, second = opened(), opened()
    env = envelope("x")
    first.put(env, Message.from_bytes(MESSAGE))
    second.adopt()
    assert second.due(1000.0, 10) == []
    first.close()
    second.adopt()
    assert [e.id for e in second.due(1000.0, 10)] == [env.id]


def test_nothing_is_changed_outside_by_itself(opened: Open) -> None:
    store = opened()
    store.changed_outside()
    env = envelope("x")
    store.put(env, Message.from_bytes(MESSAGE))
    store.record(Settlement(env, env.recipients))
    assert not store.changed_outside()


def test_a_closed_store_says_so(opened: Open) -> None:
    store = opened()
    store.close()
    store.publish({"under_way": 1})
    store.close()
    refused: list[Callable[[], Any]] = [lambda: store.put(envelope("x"), Message.from_bytes(MESSAGE)), lambda: store.due(1.0, 1)]
    for call in refused:
        with pytest.raises(StoreError):
            call()
