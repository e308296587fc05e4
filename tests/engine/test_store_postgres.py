"""The PostgreSQL store's own: leases and who takes them over, answers that are lost, a database that goes, plans at many rows."""

from __future__ import annotations

import itertools
import re
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import gevent
import psycopg
import pytest

from gmta.mail.address import Address
from gmta.mail.envelope import DELIVERED, QUEUED, Envelope, RecipientState
from gmta.mail.message import MemoryBody, Message
from gmta.queue import pgschema, pgsql, postgres
from gmta.queue.ids import IdSource
from gmta.queue.postgres import PostgresStore
from gmta.queue.store import Event, Settlement, StoreError, StoreFull
from gmta.services.log import NullLog
from gmta.services.postgres import ARRAYS, Database, Integers, Texts, prepare
from tests.postgresql import PostgreSQL

IDS = IdSource(itertools.count(1_800_000_000).__next__, "AAAAA")
RAW = b"Subject: x\r\n\r\nbody\r\n"
DEADLINE_S = 30.0


class Wire:
    """Stands between a store and its database. `cut(when)`: the next transaction's connection is lost, "before" it gets there or "after"."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._cut = ""
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self, when: str) -> None:
        """Once."""
        self._cut = when

    def _accept(self) -> None:
        while True:
            try:
                client = self._listening.accept()[0]
            except OSError:
                return
            threading.Thread(target=self._carry, args=(client, socket.create_connection(("127.0.0.1", self._to))), daemon=True).start()

    def _carry(self, client: socket.socket, server: socket.socket) -> None:
        doomed = writer = False
        with closing(client), closing(server):
            while True:
                for ready in select.select([client, server], [], [])[0]:
                    try:
                        octets = ready.recv(1 << 20)
                        if not octets or (ready is server and doomed):
                            return
                        writer = writer or (ready is client and re.search(rb"gmta (writer|intake)", octets) is not None)
                        if ready is client and writer and self._cut:
                            doomed, when, self._cut = True, self._cut, ""
                            if when == "before":
                                return
                        (server if ready is client else client).sendall(octets)
                    except OSError:
                        return

    def close(self) -> None:
        """No new connections."""
        self._listening.close()


class Node:
    """A store with its connections, as a machine of its own."""

    def __init__(self, url: str, directory: Path, name: str, lease_s: float = 60.0) -> None:
        self.database = Database(url, name=name, log=NullLog())
        self.store = PostgresStore(self.database, str(directory / name), node=name, log=NullLog(), lease_s=lease_s)

    def freeze(self) -> None:
        """Nothing prolongs the lease any more."""
        self.store._beat.kill()

    def close(self) -> None:
        """Gives all back."""
        self.store.close()
        self.database.close()


@pytest.fixture
def node(database_url: str, tmp_path: Path) -> Iterator[Callable[..., Node]]:
    nodes: list[Node] = []

    def make(name: str = "", url: str = database_url, **how: Any) -> Node:
        nodes.append(Node(url, tmp_path, name or f"node{len(nodes)}", **how))
        return nodes[-1]

    yield make
    for one in nodes:
        one.close()


@pytest.fixture
def wire(postgresql: PostgreSQL) -> Iterator[Wire]:
    with closing(Wire(postgresql.port)) as one:
        yield one


def envelope(*names: str) -> Envelope:
    return Envelope(IDS.new(), Address("a", "b.example"), [
        RecipientState(n, Address(name, "c.example"), next_attempt_at=100.0) for n, name in enumerate(names)], received_at=100.0)


def put(store: PostgresStore, *names: str) -> Envelope:
    env = envelope(*(names or ("x",)))
    store.put(env, Message.from_bytes(RAW), [Event(env.id, 1.0, "received")])
    return env


def settled(env: Envelope, status: str, events: bool = True) -> Settlement:
    for r in env.recipients:
        r.status, r.attempts = status, r.attempts + 1
    return Settlement(env, env.recipients, [Event(env.id, 2.0, status, {"by": env.recipients[0].last_reply})] if events else ())


def rows(url: str, statement: str, *values: Any) -> list[Any]:
    with psycopg.connect(url, autocommit=True) as connection:
        return connection.execute(statement, values).fetchall()


def until(found: Callable[[], Any], what: str) -> Any:
    end = time.monotonic() + DEADLINE_S
    while not (answer := found()):
        assert time.monotonic() < end, what
        gevent.sleep(0.05)
    return answer


# --- leases -------------------------------------------------------------------------------------------------------------


def test_claims_of_a_silent_node_are_taken_over_when_its_lease_ends_and_not_before(node: Callable[..., Node]) -> None:
    frozen, other = node(lease_s=2.0), node(lease_s=2.0)
    began = time.monotonic()
    env = put(frozen.store)
    frozen.freeze()

    def take() -> list[Envelope]:
        other.store.adopt()
        return other.store.due(1000.0, 10)

    (taken,) = until(take, "taken over")
    assert taken.id == env.id and time.monotonic() - began >= 2.0
    assert not frozen.store.holds(env.id)  # it asks, since it can't be sure any more


def test_a_node_that_was_frozen_does_not_record_over_its_successor(node: Callable[..., Node], database_url: str) -> None:
    frozen, other = node(), node()
    delivered, failed, fresh = put(frozen.store), put(frozen.store), envelope("z")
    frozen.freeze()
    dismiss(database_url, other, frozen)
    taken = {env.id: env for env in other.store.due(1000.0, 10)}
    assert taken.keys() == {delivered.id, failed.id}
    report = envelope("dsn")
    frozen.store.record(settled(delivered, DELIVERED))
    frozen.store.record(Settlement(failed, settled(failed, "failed").changed, [Event(report.id, 2.0, "received")],
                                   [(report, Message.from_bytes(RAW))]))
    frozen.store.put(fresh, Message.from_bytes(RAW))  # under a new lease
    for env in taken.values():
        assert other.store.holds(env.id)
        assert [(r.status, r.attempts) for r in other.store.all_recipients(env.id)] == [(QUEUED, 0)]
    assert other.store.message(report.id) is None and frozen.store.holds(fresh.id) and not frozen.store.holds(failed.id)
    for env in taken.values():
        other.store.record(settled(env, DELIVERED))
    assert rows(database_url, "SELECT id FROM message") == [(fresh.id,)]


def test_what_a_frozen_node_has_delivered_is_not_delivered_again_where_nobody_has_it_in_hand(node: Callable[..., Node], database_url: str) -> None:
    frozen, other = node(), node()
    env, later = put(frozen.store, "x", "y"), put(frozen.store)
    frozen.freeze()
    dismiss(database_url, other, frozen)
    env.recipients[0].status = DELIVERED
    frozen.store.record(Settlement(env, env.recipients[:1], [Event(env.id, 2.0, DELIVERED)]))
    frozen.store.record(settled(later, DELIVERED))
    (rest,) = other.store.due(1000.0, 10)
    assert [r.number for r in rest.recipients] == [1]
    assert other.store.message(later.id) is None
    assert rows(database_url, "SELECT kind FROM event WHERE message = %s ORDER BY n", env.id) == [("received",), (DELIVERED,)]


def dismiss(url: str, by: Node, *nodes: Node) -> None:
    """As if their leases had ended."""
    for one in nodes:
        rows(url, "UPDATE worker SET lease_until = now() - interval '1 second' WHERE node = %s RETURNING 1", one.store._node)
    by.store._steady_since -= 1000
    by.store.adopt()


def test_a_living_node_keeps_its_claims_whatever_others_look_for(node: Callable[..., Node]) -> None:
    first, second = node(lease_s=2.0), node(lease_s=2.0)
    env = put(first.store)
    end = time.monotonic() + 3.0
    while time.monotonic() < end:
        second.store._steady_since -= 10
        assert second.store.adopt() == 0 and second.store.due(1000.0, 10) == []
        gevent.sleep(0.1)
    assert first.store.holds(env.id)


def test_after_an_outage_nobody_is_taken_for_dead_at_once(node: Callable[..., Node], database_url: str) -> None:
    first, second = node(), node()
    put(first.store)
    put(second.store)
    rows(database_url, "UPDATE worker SET lease_until = now() - interval '1 hour' RETURNING 1")
    assert second.store.adopt() == 0
    first.store._submit(first.store._prolong)
    second.store._steady_since -= 1000
    assert second.store.adopt() == 0 and second.store.due(1000.0, 10) == []


def test_two_nodes_share_what_is_due(node: Callable[..., Node]) -> None:
    first, second, third = node(), node(), node()
    for _ in range(100):
        first.store.release(put(first.store))
    first.store._writer.flush()
    found: list[str] = []

    def take(store: PostgresStore) -> None:
        while envelopes := store.due(1000.0, 7):
            found.extend(env.id for env in envelopes)

    gevent.joinall([gevent.spawn(take, one.store) for one in (first, second, third)], raise_error=True)
    assert len(found) == len(set(found)) == 100


def test_the_last_two_recipients_settled_by_two_nodes_end_the_message(node: Callable[..., Node], database_url: str) -> None:
    first, second = node(), node()
    for _ in range(20):
        env = put(first.store, "x", "y")
        first.store.release(Envelope(env.id, env.sender, env.recipients[1:]))
        first.store._writer.flush()
        (other,) = second.store.due(1000.0, 10)
        env.recipients[0].status = other.recipients[0].status = DELIVERED
        gevent.joinall([gevent.spawn(first.store.record, Settlement(env, env.recipients[:1])),
                        gevent.spawn(second.store.record, Settlement(other, other.recipients))], raise_error=True)
    assert rows(database_url, "SELECT (SELECT count(*) FROM message), (SELECT count(*) FROM recipient)") == [(0, 0)]


def test_who_gives_something_back_wakes_the_others(node: Callable[..., Node]) -> None:
    first, second = node(), node()
    heard: list[float] = []
    second.store.listen(lambda: heard.append(time.monotonic()))
    until(lambda: heard, "listening")
    first.store.release(put(first.store))
    until(lambda: len(heard) > 1, "woken")


def test_a_drained_node_claims_nothing_and_takes_nothing_in(node: Callable[..., Node], database_url: str) -> None:
    first = node("one")
    env = put(first.store)
    first.store.release(env)
    rows(database_url, "UPDATE node SET draining = true WHERE name = 'one' RETURNING 1")
    first.store.changed_outside()
    assert first.store.due(1000.0, 10) == []
    with pytest.raises(StoreError):
        first.store.has_room(1)
    rows(database_url, "UPDATE node SET draining = false RETURNING 1")
    first.store.changed_outside()
    assert first.store.has_room(1) and [found.id for found in first.store.due(1000.0, 10)] == [env.id]


# --- lost answers and lost databases -------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_transaction_whose_answer_was_lost_is_done_once(node: Callable[..., Node], wire: Wire, database_url: str, when: str) -> None:
    store = node(url=database_url.replace(rows(database_url, "SHOW port")[0][0], str(wire.port))).store
    first = put(store)
    wire.cut(when)
    second = put(store)
    wire.cut(when)
    report = envelope("dsn")
    store.record(Settlement(first, settled(first, "failed").changed, [Event(first.id, 2.0, "failed")], [(report, Message.from_bytes(RAW))]))
    assert store.message(first.id) is None and store.holds(second.id) and store.holds(report.id)
    second.recipients[0].next_attempt_at = 200.0
    wire.cut(when)
    store.record(settled(second, QUEUED))
    wire.cut(when)
    try:
        (found,) = store.due(1000.0, 10)
    except StoreError:  # what was claimed without our knowledge is given back
        (found,) = store.due(1000.0, 10)
    assert found.id == second.id and found.recipients[0].attempts == 1
    assert rows(database_url, "SELECT message, kind FROM event ORDER BY 1, n") == sorted(
        [(first.id, "received"), (first.id, "failed"), (second.id, "received"), (second.id, QUEUED)], key=lambda row: row[0])
    assert rows(database_url, "SELECT id FROM message ORDER BY 1") == sorted([(second.id,), (report.id,)])


def test_a_message_put_under_a_lease_that_ended_with_the_answer_is_known_by_its_id(node: Callable[..., Node], wire: Wire, database_url: str) -> None:
    store = node(url=database_url.replace(rows(database_url, "SHOW port")[0][0], str(wire.port))).store
    put(store)
    wire.cut("after")
    came = store._came

    def taken_over(*args: Any) -> bool:
        rows(database_url, "DELETE FROM worker RETURNING 1")
        return came(*args)

    store._came = taken_over  # type: ignore[method-assign]
    env = put(store)
    assert rows(database_url, "SELECT count(*) FROM message WHERE id = %s", env.id) == [(1,)]
    again = put(store)  # under a new lease
    assert not store.holds(env.id) and store.holds(again.id)


def test_a_large_message_whose_answer_was_lost_is_there_once(node: Callable[..., Node], postgresql: PostgreSQL, database_url: str) -> None:
    one = node()
    put(one.store)
    env = envelope("x")
    octets = b"x" * 600_000
    send, lost = one.database.use, []

    def use(timeout_s: float = 10.0) -> Any:
        if not lost:
            lost.append(1)
            return _Cut(send())
        return send(timeout_s)

    one.database.use = use  # type: ignore[method-assign]
    one.store.put(env, Message(b"A: b\r\n", b"\r\n", MemoryBody(octets)), [Event(env.id, 1.0, "received")])
    message = one.store.message(env.id)
    assert message is not None and b"".join(message.chunks()).endswith(octets) and one.store.holds(env.id)
    assert rows(database_url, "SELECT count(*) FROM chunk WHERE message = %s", env.id) == [(3,)]


class _Cut:
    """A connection that is lost after all was done."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __enter__(self) -> Any:
        return self._inner.__enter__()

    def __exit__(self, *args: Any) -> None:
        self._inner.__exit__(*args)
        raise postgres.DatabaseDown("lost")


def test_while_the_database_is_down_all_is_refused_quickly_and_then_goes_on(node: Callable[..., Node], postgresql: PostgreSQL) -> None:
    one = node(lease_s=30.0)
    env = put(one.store)
    postgresql.stop(immediate=True)
    try:
        with pytest.raises(StoreError):
            one.store.changed_outside()
        assert one.database.down
        began = time.monotonic()
        calls: list[Callable[[], Any]] = [
            lambda: put(one.store), lambda: one.store.record(settled(env, QUEUED)), lambda: one.store.due(1.0, 1),
            lambda: one.store.has_room(1), lambda: one.store.message(env.id), one.store.next_due_at, one.store.adopt,
            lambda: one.store.overdue(1.0, 1.0, 1.0, 1.0, 1), lambda: one.store.all_recipients(env.id)]
        for call in calls:
            with pytest.raises(StoreError):
                call()
        assert time.monotonic() - began < 5.0
        assert one.store.holds(env.id)  # the lease lasts
        one.store.publish({"under_way": 1})
    finally:
        postgresql.start()
    until(lambda: not one.database.down, "up")
    one.store.record(settled(env, DELIVERED))
    again = put(one.store)
    assert one.store.message(env.id) is None and one.store.holds(again.id) and one.store.due(1e9, 10) == []


def test_a_worker_that_starts_before_its_database_waits_for_it(node: Callable[..., Node], postgresql: PostgreSQL) -> None:
    postgresql.stop()
    try:
        one = node()
        with pytest.raises(StoreError):
            put(one.store)
    finally:
        postgresql.start()
    until(lambda: not one.database.down, "up")
    assert one.store.holds(put(one.store).id)


def test_a_put_that_was_given_up_is_not_in_the_queue(node: Callable[..., Node], database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = node().store
    put(store)
    monkeypatch.setattr(postgres, "PUT_S", 0.2)
    with psycopg.connect(database_url) as connection:
        connection.execute("LOCK TABLE event IN ACCESS EXCLUSIVE MODE")
        env = envelope("x")
        with pytest.raises(StoreError):
            store.put(env, Message.from_bytes(RAW), [Event(env.id, 1.0, "received")])
    store._intake.flush()
    put(store)
    store._writer.flush()
    assert not store.holds(env.id)
    assert rows(database_url, "SELECT count(*) FROM message") == [(2,)]
    assert rows(database_url, "SELECT count(*) FROM event WHERE message = %s", env.id) == [(0,)]


def test_a_full_disk_of_the_database_is_said_to_be_that(node: Callable[..., Node], monkeypatch: pytest.MonkeyPatch) -> None:
    store = node().store
    put(store)

    def full(statements: Any) -> Any:
        raise psycopg.errors.DiskFull("could not extend file")

    monkeypatch.setattr(store._intake_connection, "transact", full)
    with pytest.raises(StoreFull):
        put(store)
    assert not store.has_room(1)
    monkeypatch.undo()
    store._full_until = 0.0
    assert store.has_room(1) and store.holds(put(store).id)


def test_what_a_killed_worker_of_this_machine_had_is_free_at_once(node: Callable[..., Node], tmp_path: Path, database_url: str) -> None:
    first, second = node("same"), node("same")
    env = put(first.store)
    body = Path(first.store.new_spool_file(IDS.new()))
    body.write_bytes(b"unfinished")
    assert second.store.adopt() == 0
    first.freeze()
    postgres.os.close(first.store._lock)  # as its death does
    assert second.store.adopt() == 1
    assert [found.id for found in second.store.due(1000.0, 10)] == [env.id] and not body.exists()
    first.store._lock = postgres.os.open("/dev/null", postgres.os.O_RDONLY)


# --- plans ---------------------------------------------------------------------------------------------------------------


def test_no_recurring_query_reads_a_whole_table(node: Callable[..., Node], database_url: str) -> None:
    one = node()
    put(one.store)
    mine = one.store._id
    with psycopg.connect(database_url, autocommit=True) as connection:
        indexes = connection.execute("SELECT indexname, indexdef FROM pg_indexes WHERE indexname ~ '^recipient_(due|lane|owner)$'").fetchall()
        for name, _ in indexes:  # made again at once below: a third of the time
            connection.execute(f"DROP INDEX {name}")
        number = "'M' || lpad(i::text, 15, '0')"
        connection.execute(f"""
            INSERT INTO message SELECT {number}, '', 0, i, 1, '', '', 2, '', 0 FROM generate_series(1, 1000000) i;
            INSERT INTO recipient SELECT {number}, 0, '', 'queued', 0, i, '', '', 'out:h' || i % 1000, '', 0, '', CASE WHEN i % 50 = 0 THEN {mine} ELSE 0 END
              FROM generate_series(1, 1000000) i;
            INSERT INTO event SELECT {number}, 1, i, '', '' FROM generate_series(1, 100000) i;
            INSERT INTO chunk SELECT {number}, 0, '' FROM generate_series(1, 20000) i""")
        for _, definition in indexes:
            connection.execute(definition)
        ids = Texts([f"M{n:015d}" for n in range(500, 530)])
        search = {"me": mine, "now": 1e9, "limit": 200, "room": '{"out:h1": 0, "out:h2": 1}', "lane_limit": 20, "scan": 2200, "before": "out:h5"}
        asked: list[tuple[str, Any]] = [
            (pgsql.DUE, search), (pgsql.DUE_BY_LANE, search | {"scan": 500}),
            (pgsql.CLAIM_THESE, {"me": mine, "messages": ids, "numbers": Integers([0] * len(ids))}),
            (pgsql.OVERDUE, {"now": 1e9, "old": "N", "unwarned": "N", "reports": "N", "judged": "M000000000000500", "youngest": "N", "scan": 2000}),
            (pgsql.NEXT_DUE, ()), (pgsql.OCTETS_OF, (ids,)), (pgsql.RECIPIENTS, (ids[0],)), (pgsql.OWNED, (mine,)),
            (pgsql.ORPHANS, ()), (pgsql.FREE, (mine, 5000)), (pgsql.PURGE, ("M000000000001000", "M000000000050000", 2000)),
            (pgsql.DOUBTFUL, (ids,)), (pgsql.DROP_DOUBTFUL, (ids,)), *((statement, (ids,)) for statement in pgsql.DROP),
            (pgsql.DROP_CHUNKS, (ids,)), (pgsql.CAME, (ids, ids))]
        for statement, kinds in (pgsql.SETTLE, pgsql.RELEASE, pgsql.LATE):
            asked.append((statement, [Texts(ids) if kind is Texts else kind([0] * len(ids)) for kind in kinds]))
        for kind, dumper in ARRAYS.items():
            connection.adapters.register_dumper(kind, dumper)
        with psycopg.connect(database_url, autocommit=True) as own:  # as the store has it, before anything is known of the tables
            prepare(own)
            for statement, values in asked[:2]:
                with own.transaction(force_rollback=True):
                    plan = "\n".join(row[0] for row in own.execute("EXPLAIN " + statement, values))
                locked = plan.partition("CTE locked")[2].partition("CTE claimed")[0]
                assert "recipient_pkey" in locked and "recipient_lane" not in locked and "Seq Scan on recipient" not in plan, plan
        connection.execute("ANALYZE")
        for statement, values in asked:
            with connection.transaction(force_rollback=True):
                plan = "\n".join(row[0] for row in connection.execute("EXPLAIN " + statement, values))
            for table in ("message", "recipient", "event", "chunk"):
                assert f"Seq Scan on {table} " not in plan and f"Seq Scan on {table}\n" not in plan, f"{statement}\n{plan}"
        connection.execute("UPDATE recipient SET owner = 0 WHERE owner <> 0")


def test_the_schema_is_made_once_by_many(database_url: str) -> None:
    versions: list[int] = []

    def migrate() -> None:
        with psycopg.connect(database_url, autocommit=True) as connection:
            versions.append(pgschema.migrate(connection))

    threads = [threading.Thread(target=migrate) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert versions == [len(pgschema.MIGRATIONS)] * 4
    assert rows(database_url, "SELECT count(*) FROM schema_version") == [(len(pgschema.MIGRATIONS),)]
