"""The operator's side of the queue: what `gmta queue` and `gmta trace` do, on the store itself, with the server up or down.

A change is made in short transactions, so that a worker's commits find room between them; a worker sees it within a second.
A bounce is done by the worker: the recipient becomes due with the fixed transport "fail". Failure: sqlite3.Error where a shard
can't be read or stays locked for 10 s, PermissionError where the queue is another account's.
"""

from __future__ import annotations

import builtins
import heapq
import json
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from gmta.mail.address import domain_key
from gmta.mail.envelope import Envelope
from gmta.mail.message import Message
from gmta.queue import schema
from gmta.queue.store import Event, StoreError

if TYPE_CHECKING:
    from gmta.queue.pgadmin import PostgresAdmin
    from gmta.services import Services

Admin: TypeAlias = "QueueAdmin | PostgresAdmin"
Answer = TypeVar("Answer")

GIVEN_UP = "550 5.0.0 The postmaster has given this message up"
SLICE = 2000  # messages changed in one transaction
GAP_S = 0.01  # between two of them


class QueueAdmin:
    """The queue in `directory`; selections are ids, a recipient domain, a sender, or all."""

    def __init__(self, directory: str, clock: Callable[[], float] = time.time) -> None:
        self._directory = directory
        self._clock = clock
        try:
            os.stat(directory)
        except FileNotFoundError:
            pass  # nothing was ever queued
        self._shards = [(schema.shard_path(directory, n, "spool"), schema.connect(schema.shard_path(directory, n, "db"), create=True))
                        for n in schema.shards(directory)]

    def close(self) -> None:
        """Closes the shards."""
        for _, connection in self._shards:
            connection.close()

    @staticmethod
    def _where(ids: Iterable[str], domain: str | None, sender: str | None, all: bool) -> tuple[str, builtins.list[Any]]:
        wanted = builtins.list(ids)
        parts: builtins.list[str] = []
        values: builtins.list[Any] = []
        if wanted:
            parts.append("m.id IN (SELECT value FROM json_each(?))")
            values.append(json.dumps(wanted))
        if domain is not None:
            patterns = ["%@" + name.replace("\\", "\\\\").replace("_", "\\_").replace("%", "\\%")
                        for name in (domain.lower().rstrip("."), domain_key(domain))]
            parts.append("EXISTS (SELECT 1 FROM recipient d WHERE d.message = m.id AND (lower(d.address) LIKE ? ESCAPE '\\' "
                         "OR lower(d.address) LIKE ? ESCAPE '\\'))")
            values += patterns
        if sender is not None:
            parts.append("lower(m.sender) = lower(?)")
            values.append(sender.strip("<>"))
        if not parts:
            parts.append("1" if all else "0")
        return " AND ".join(parts), values

    def list(self, ids: Iterable[str] = (), *, domain: str | None = None, sender: str | None = None,
             all: bool = True) -> Iterator[dict[str, Any]]:
        """Queued messages in the form of `queue list --json`, oldest first; read as they are asked for."""
        where, values = self._where(ids, domain, sender, all)
        return heapq.merge(*(self._rows(connection, where, values) for _, connection in self._shards), key=lambda row: row["id"])

    @staticmethod
    def _rows(connection: sqlite3.Connection, where: str, values: builtins.list[Any]) -> Iterator[dict[str, Any]]:
        """One shard's part of `list`."""
        for id, sent_by, size, at in connection.execute(
                f"SELECT m.id, m.sender, m.size, m.received_at FROM message m WHERE {where} ORDER BY m.id", values):
            recipients = [{"address": r[2], "status": r[3], "attempts": r[4], "next_attempt_at": r[5], "transport": r[6],
                           "next_hop": r[7], "last_reply": r[8]} for r in connection.execute(
                               f"SELECT {schema.RECIPIENT} FROM recipient r WHERE message = ? ORDER BY number", (id,))]
            if recipients:  # none: settled between the two reads
                held = any(r["status"] == "held" for r in recipients)
                yield {"id": id, "sender": sent_by, "size": size, "received_at": at, "held": held, "recipients": recipients}

    def show(self, id: str) -> dict[str, Any] | None:
        """One message, with its envelope's facts, or None."""
        for found in self.list([id]):
            for _, connection in self._shards:
                row = connection.execute("SELECT data FROM message WHERE id = ?", (id,)).fetchone()
                if row is not None:
                    return {**json.loads(row[0] or "{}"), **found}
        return None

    def cat(self, id: str) -> Iterator[bytes] | None:
        """The octets of a queued message, or None."""
        for spool, connection in self._shards:
            row = connection.execute(f"SELECT {schema.OCTETS} FROM message WHERE id = ?", (id,)).fetchone()
            if row is not None:
                return schema.message_of(row, spool).chunks()
        return None

    def load(self, id: str) -> tuple[Envelope, Message] | None:
        """A queued message with all recipients that are not forgotten yet, or None."""
        for spool, connection in self._shards:
            row = connection.execute(f"SELECT {schema.ENVELOPE} FROM message m WHERE id = ?", (id,)).fetchone()
            octets = connection.execute(f"SELECT {schema.OCTETS} FROM message WHERE id = ?", (id,)).fetchone()
            if row is not None and octets is not None:
                rows = connection.execute(f"SELECT {schema.RECIPIENT} FROM recipient r WHERE message = ? ORDER BY number", (id,))
                return schema.envelope_of(row, [schema.recipient_of(one) for one in rows]), schema.message_of(octets, spool)
        return None

    def stats(self) -> dict[str, Any]:
        """Counts: messages, octets, recipients by status, recipients waiting by lane, arrival of the oldest; and what workers do now."""
        out: dict[str, Any] = {"messages": 0, "octets": 0, "oldest": None, "recipients": {}, "lanes": {}, **self._now()}
        for _, connection in self._shards:
            count, octets, oldest = connection.execute("SELECT count(*), sum(size), min(received_at) FROM message").fetchone()
            out["messages"] += count
            out["octets"] += octets or 0
            if oldest is not None:
                out["oldest"] = oldest if out["oldest"] is None else min(oldest, out["oldest"])
            for key, column in (("recipients", "status"), ("lanes", "lane")):
                rest = "WHERE status = 'queued'" if key == "lanes" else ""
                for name, n in connection.execute(f"SELECT {column}, count(*) FROM recipient {rest} GROUP BY 1"):
                    out[key][name] = out[key].get(name, 0) + n
        return out

    def _now(self) -> dict[str, Any]:
        """What living workers show (Store.publish): how many attempts are under way, those that take time (the oldest first), closed lanes."""
        out: dict[str, Any] = {"under_way": 0, "attempts": [], "closed": []}
        for number in schema.shards(self._directory):
            try:
                with open(schema.shard_path(self._directory, number, "now"), encoding="utf-8") as file:
                    shown = json.load(file)
                os.kill(int(shown["pid"]), 0)
            except PermissionError:
                pass  # it lives, as another account
            except (OSError, ValueError, KeyError, TypeError):
                continue  # nothing under way, or its worker is gone
            out["under_way"] += shown.get("under_way", 0)
            out["attempts"] += shown.get("attempts", [])
            out["closed"] += shown.get("closed", [])
        out["attempts"].sort(key=lambda attempt: attempt["since"])
        return out

    def trace(self, id: str) -> builtins.list[Event]:
        """A message's history, in or out of the queue."""
        return sorted((Event(id, at, kind, json.loads(data or "{}")) for _, connection in self._shards for at, kind, data in
                       connection.execute("SELECT at, kind, data FROM event WHERE message = ? ORDER BY n", (id,))),
                      key=lambda event: event.at)

    def happened(self, since: float, kinds: Iterable[str], limit: int, node: str = "") -> builtins.list[tuple[Event, dict[str, Any]]]:
        """What became of messages from that time on, on the node of that name (there is none but this), oldest first, each with what was noted when its message came. Looks through the
        whole history."""
        wanted = json.dumps(builtins.list(kinds))
        found: builtins.list[tuple[Event, dict[str, Any]]] = []
        for _, connection in self._shards:
            rows = connection.execute("SELECT message, at, kind, data FROM event WHERE at >= ? AND kind IN (SELECT value FROM json_each(?)) "
                                      "ORDER BY at DESC LIMIT ?", (since, wanted, limit)).fetchall()
            for id, at, kind, data in rows:
                came = connection.execute("SELECT data FROM event WHERE message = ? AND kind = 'received'", (id,)).fetchone()
                found.append((Event(id, at, kind, json.loads(data or "{}")), json.loads(came[0] or "{}") if came else {}))
        return sorted(found, key=lambda pair: pair[0].at)[-limit:]

    def retry(self, ids: Iterable[str] = (), **choice: Any) -> int:
        """Makes waiting recipients due now; how many messages have some. choice: domain, sender, all."""
        return self._change(ids, choice, "retried", "next_attempt_at = 0", "r.status = 'queued'")

    def hold(self, ids: Iterable[str] = (), **choice: Any) -> int:
        """Stops delivery until released."""
        return self._change(ids, choice, "held", "status = 'held'", "r.status = 'queued'")

    def release(self, ids: Iterable[str] = (), **choice: Any) -> int:
        """Lets held recipients go, at once."""
        return self._change(ids, choice, "released", "status = 'queued', next_attempt_at = 0", "r.status = 'held'")

    def bounce(self, ids: Iterable[str] = (), **choice: Any) -> int:
        """Gives up now: the worker fails the open recipients and tells the sender."""
        return self._change(ids, choice, "bounced", "status = 'queued', next_attempt_at = 0, transport = 'fail', next_hop = '', "
                            "lane = 'fail:', facts = json_set(CASE facts WHEN '' THEN '{}' ELSE facts END, '$.fixed_transport', "
                            f"json('true'), '$.refused', '{GIVEN_UP}')", "r.status IN ('queued', 'held')")

    def delete(self, ids: Iterable[str] = (), **choice: Any) -> int:
        """Removes messages; nobody is told."""
        return self._change(ids, choice, "deleted", None, "")

    def _change(self, ids: Iterable[str], choice: dict[str, Any], kind: str, change: str | None, which: str) -> int:
        """Applies `change` (None: deletes) to the chosen messages' recipients for which `which` holds; how many messages had some."""
        where, values = self._where(ids, choice.get("domain"), choice.get("sender"), bool(choice.get("all")))
        if which:
            where += f" AND EXISTS (SELECT 1 FROM recipient r WHERE r.message = m.id AND {which})"
        total = 0
        for spool, connection in self._shards:
            chosen = [id for (id,) in connection.execute(f"SELECT m.id FROM message m WHERE {where}", values)]
            for start in range(0, len(chosen), SLICE):
                if start:
                    time.sleep(GAP_S)
                total += self._change_slice(spool, connection, chosen[start:start + SLICE], kind, change, which)
        return total

    def _change_slice(self, spool: str, connection: sqlite3.Connection, ids: builtins.list[str], kind: str, change: str | None,
                      which: str) -> int:
        """One transaction of `_change`; what left the queue meanwhile is passed over."""
        having = f"AND EXISTS (SELECT 1 FROM recipient r WHERE r.message = m.id AND {which})" if which else ""
        connection.execute("BEGIN IMMEDIATE")
        try:
            found = connection.execute(f"SELECT m.id, m.file FROM message m WHERE m.id IN (SELECT value FROM json_each(?)) {having}",
                                       (json.dumps(ids),)).fetchall()
            names = json.dumps([id for id, _ in found])
            if change is None:
                connection.execute("DELETE FROM recipient WHERE message IN (SELECT value FROM json_each(?))", (names,))
                connection.execute("DELETE FROM message WHERE id IN (SELECT value FROM json_each(?))", (names,))
            else:
                connection.execute(f"UPDATE recipient AS r SET {change} WHERE {which} "
                                   "AND r.message IN (SELECT value FROM json_each(?))", (names,))
            now = self._clock()
            connection.executemany("INSERT OR IGNORE INTO event VALUES (?, ?, ?, ?, '{\"by\":\"operator\"}')",
                                   [(id, int(now * 1e6), now, kind) for id, _ in found])
            connection.execute("COMMIT")
        except sqlite3.Error:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        for _, file in found if change is None else ():
            if file:
                try:
                    os.unlink(os.path.join(spool, file))
                except OSError:
                    pass  # swept at the worker's next start
        return len(found)


def open_queue(store: str, data_dir: str) -> Admin:
    """The queue of a configuration ([queue] store), for a command; raises StoreError, or as QueueAdmin."""
    if store == "sqlite":
        return QueueAdmin(os.path.join(data_dir, "queue"))
    from gmta.queue.pgadmin import open_database

    return open_database(store)


def ask(services: Services, directory: str, question: Callable[[Admin], Answer]) -> Answer:
    """What the queue has to say to a worker, without stalling its loop; raises StoreError. directory: of the queue, where it is in files."""
    if services.database is not None:
        from gmta.queue.pgadmin import PostgresAdmin

        return question(PostgresAdmin(services.database))
    import gevent

    def run() -> tuple[Any, Exception | None]:
        try:
            admin = QueueAdmin(directory)
            try:
                return question(admin), None
            finally:
                admin.close()
        except (OSError, sqlite3.Error) as error:  # raised below: the pool would print it
            return None, error

    answer: Answer
    answer, error = gevent.get_hub().threadpool.apply(run)
    if error is not None:
        raise StoreError(str(error)) from error
    return answer
