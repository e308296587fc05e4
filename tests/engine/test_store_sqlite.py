"""The SQLite store's own: shards, their adoption, and operators on them."""

from __future__ import annotations

import itertools
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from gmta.mail.address import Address
from gmta.mail.envelope import Envelope, RecipientState
from gmta.mail.message import Message
from gmta.queue import schema
from gmta.queue.admin import QueueAdmin
from gmta.queue.ids import IdSource
from gmta.queue.sqlite import SqliteStore, _Put
from gmta.queue.store import Settlement, StoreError
from gmta.services.log import NullLog

IDS = IdSource(itertools.count(1_800_000_000).__next__, "AAAAA")


def make(directory: Path, tag: str = "AAAAA") -> SqliteStore:
    return SqliteStore(str(directory), instance_tag=tag, log=NullLog(), clock=lambda: 1_800_000_000.0, message_limit=1000)


def envelope(*names: str, at: float = 100.0) -> Envelope:
    return Envelope(IDS.new(), Address("a", "b.example"), [
        RecipientState(n, Address(name, "c.example"), next_attempt_at=at) for n, name in enumerate(names)], received_at=at)


MESSAGE = b"Subject: x\r\n\r\nbody\r\n"


def test_orphans_are_adopted_and_duplicates_refused(tmp_path: Path) -> None:
    first, second = make(tmp_path), make(tmp_path, "BBBBB")
    env = envelope("x")
    first.put(env, Message.from_bytes(MESSAGE))
    with pytest.raises(StoreError):
        first.put(env, Message.from_bytes(MESSAGE))
    assert second.adopt() == 0
    first.close()
    assert second.adopt() == 1
    assert [e.id for e in second.due(1000.0, 10)] == [env.id]
    second.close()


def test_operator_wins_over_results_in_flight(tmp_path: Path) -> None:
    store = make(tmp_path)
    kept, doomed = envelope("x"), envelope("y")
    for env in (kept, doomed):
        store.put(env, Message.from_bytes(MESSAGE))
    store.changed_outside()
    admin = QueueAdmin(str(tmp_path))
    assert admin.hold([kept.id]) == 1 and admin.delete(domain="c.example", sender="a@b.example", ids=[doomed.id]) == 1
    assert store.changed_outside() and not store.changed_outside()
    for env in (kept, doomed):
        store.record(Settlement(env, env.recipients))
    (listed,) = admin.list()
    assert listed["id"] == kept.id and listed["held"] and listed["recipients"][0]["status"] == "held"
    assert admin.release(all=True) == 1 and admin.bounce(all=True) == 1
    (found,) = store.due(1000.0, 10)
    assert found.recipients[0].fixed_transport and found.recipients[0].transport == "fail"
    assert [event.kind for event in admin.trace(doomed.id)] == ["deleted"]
    assert b"".join(admin.cat(kept.id) or ()) == MESSAGE and admin.stats()["messages"] == 1
    admin.close()
    store.close()


def test_a_bounce_outlives_a_deferral_in_flight(tmp_path: Path) -> None:
    store = make(tmp_path)
    env = envelope("x")
    store.put(env, Message.from_bytes(MESSAGE))
    admin = QueueAdmin(str(tmp_path))
    assert admin.bounce([env.id]) == 1
    admin.close()
    (recipient,) = env.recipients
    recipient.transport, recipient.attempts, recipient.next_attempt_at = "outbound", 1, 900.0
    store.record(Settlement(env, [recipient]))
    (found,) = store.due(100.0, 10)
    assert (found.recipients[0].transport, found.recipients[0].fixed_transport, found.recipients[0].attempts) == ("fail", True, 1)
    store.close()


def test_an_empty_shard_is_opened_once_and_again_after_it_was_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SqliteStore, "_sweep", lambda self, shard: None)  # its thread opens the shard too
    first, second = make(tmp_path), make(tmp_path, "BBBBB")
    second.close()  # leaves an empty shard
    opened = []
    really = SqliteStore._open
    monkeypatch.setattr(SqliteStore, "_open", lambda self, number, lock: (opened.append(number), really(self, number, lock))[1])
    assert [first.adopt() for _ in range(3)] == [0, 0, 0]
    assert opened == [2]
    again = make(tmp_path, "CCCCC")
    again.put(envelope("x"), Message.from_bytes(MESSAGE))
    again.close()
    assert first.adopt() == 1
    first.close()


def test_a_shard_that_fails_does_not_undo_what_another_has_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, other = make(tmp_path), make(tmp_path, "BBBBB")
    other.put(envelope("x"), Message.from_bytes(MESSAGE))
    other.close()
    assert store.adopt() == 1
    (adopted,) = store.due(1000.0, 10)
    commit = store._commit

    def failing(shard: Any, operations: Any) -> None:
        if shard is not store._primary:
            raise sqlite3.OperationalError("disk I/O error")
        commit(shard, operations)

    monkeypatch.setattr(store, "_commit", failing)
    fresh = envelope("y")
    put, settled = store._run([_Put(fresh, Message.from_bytes(MESSAGE), ()), Settlement(adopted, adopted.recipients)])
    assert put is None and isinstance(settled, StoreError)  # who hears that it failed would send it again
    assert store.message(fresh.id) is not None and store.due(1000.0, 10) == []
    store.close()


def test_a_shard_that_cannot_be_opened_does_not_keep_others_from_adoption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, second, third = make(tmp_path), make(tmp_path, "BBBBB"), make(tmp_path, "CCCCC")
    third.put(envelope("x"), Message.from_bytes(MESSAGE))
    second.close()
    third.close()
    connect = schema.connect

    def failing(path: str, **how: Any) -> sqlite3.Connection:
        if path.endswith("002.db"):
            raise sqlite3.OperationalError("disk I/O error")
        return connect(path, **how)

    monkeypatch.setattr(schema, "connect", failing)
    assert store.adopt() == 1
    monkeypatch.undo()
    (tmp_path / "shard-002.db").touch()
    assert store.adopt() == 0
    assert [found.recipients[0].address.local for found in store.due(1000.0, 10)] == ["x"]
    store.close()
