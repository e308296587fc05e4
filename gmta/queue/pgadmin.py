"""QueueAdmin on PostgreSQL: the queue of all nodes, from any machine that can reach the database; and the nodes themselves.

As gmta.queue.admin, in short transactions; long answers are read page by page, so no transaction of a command stays open while
somebody looks at them. Failure: StoreError with what is wrong, also where the tables are not there yet.
"""

from __future__ import annotations

import builtins
import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg

from gmta.mail.address import domain_key
from gmta.mail.envelope import Envelope
from gmta.mail.message import MemoryBody, Message
from gmta.queue import pgschema
from gmta.queue.admin import GAP_S, GIVEN_UP
from gmta.queue.store import Event, StoreError
from gmta.services.postgres import Database, DatabaseDown, Floats, Integers, Texts, columns

SLICE = 1000  # messages looked at with one statement, or changed in one transaction
TRIES = 5  # of one that met a worker's

_WAITING = "r.status = 'queued'"
_BY_OPERATOR = '{"by":"operator"}'
_ADDRESSES = ("EXISTS (SELECT 1 FROM recipient d WHERE d.message = m.id AND (lower(d.address) LIKE %(domain)s OR lower(d.address) LIKE %(ascii)s))")


class PostgresAdmin:
    """See QueueAdmin. database: closed with it where it is its own."""

    def __init__(self, database: Database, *, own: bool = False, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._own = own
        self._clock = clock

    def close(self) -> None:
        """Ends it."""
        if self._own:
            self._database.close()

    @contextmanager
    def _use(self) -> Iterator[psycopg.Connection[Any]]:
        """A connection whose failures are StoreErrors."""
        try:
            with self._database.use() as connection:
                yield connection
        except psycopg.errors.UndefinedTable as error:
            raise StoreError("the database has no tables yet: a node that starts makes them") from error
        except (psycopg.Error, DatabaseDown) as error:
            raise StoreError((str(error).strip() or type(error).__name__).splitlines()[0]) from error

    def _pages(self, ids: Iterable[str], domain: str | None, sender: str | None, all: bool,
               which: str = "") -> Iterator[builtins.list[tuple[str, str, int, float]]]:
        """The chosen messages (id, sender, size, arrival), oldest first, a statement for each SLICE of the queue: none takes long.

        which: what has to hold for a recipient r.
        """
        wanted = builtins.list(ids)
        parts: builtins.list[str] = []
        values: dict[str, Any] = {"last": "", "slice": SLICE}
        if wanted:
            values["ids"] = Texts(map(pgschema.storable, wanted))
        if domain is not None:
            parts.append(_ADDRESSES)
            for key, name in (("domain", domain.lower().rstrip(".")), ("ascii", domain_key(domain))):
                values[key] = "%@" + _like(pgschema.storable(name))
        if sender is not None:
            parts.append("lower(m.sender) = lower(%(sender)s)")
            values["sender"] = pgschema.storable(sender.strip("<>"))
        if not (wanted or parts or all):
            return
        if which:
            parts.append(f"EXISTS (SELECT 1 FROM recipient r WHERE r.message = m.id AND {which})")
        statement = f"""WITH page AS MATERIALIZED (SELECT id, sender, size, received_at FROM message
            WHERE id > %(last)s {"AND id = ANY(%(ids)s)" if wanted else ""} ORDER BY id LIMIT %(slice)s)
            SELECT looked.*, chosen.* FROM (SELECT count(*), max(id) FROM page) looked
            LEFT JOIN (SELECT * FROM page m {"WHERE " + " AND ".join(parts) if parts else ""}) chosen ON true ORDER BY chosen.id"""
        while True:
            with self._use() as connection:
                rows = connection.execute(statement, values).fetchall()
            yield [row[2:] for row in rows if row[2] is not None]
            if rows[0][0] < SLICE:
                return
            values["last"] = rows[0][1]

    # --- looking --------------------------------------------------------------------------------------------------

    def list(self, ids: Iterable[str] = (), *, domain: str | None = None, sender: str | None = None,
             all: bool = True) -> Iterator[dict[str, Any]]:
        """Queued messages in the form of `queue list --json`, oldest first; read as they are asked for. node: whose a recipient is now."""
        for messages in self._pages(ids, domain, sender, all):
            with self._use() as connection:
                recipients: dict[str, builtins.list[dict[str, Any]]] = {id: [] for id, *_ in messages}
                for r in connection.execute(f"SELECT {pgschema.RECIPIENT}, coalesce(w.node, '') FROM recipient r LEFT JOIN worker w "
                                            "ON w.id = r.owner AND w.lease_until > clock_timestamp() WHERE r.message = ANY(%s) "
                                            "ORDER BY r.message, r.number", (Texts(recipients),)):
                    recipients[r[0]].append({"address": r[2], "status": r[3], "attempts": r[4], "next_attempt_at": r[5], "transport": r[6],
                                             "next_hop": r[7], "last_reply": r[8], "node": r[11]})
            for id, sent_by, size, at in messages:
                if recipients[id]:  # none: settled between the two reads
                    held = any(r["status"] == "held" for r in recipients[id])
                    yield {"id": id, "sender": sent_by, "size": size, "received_at": at, "held": held, "recipients": recipients[id]}

    def show(self, id: str) -> dict[str, Any] | None:
        """One message, with its envelope's facts, or None."""
        for found in self.list([id]):
            with self._use() as connection:
                row = connection.execute("SELECT data FROM message WHERE id = %s", (found["id"],)).fetchone()
            if row is not None:
                return {**json.loads(row[0] or "{}"), **found}
        return None

    def cat(self, id: str) -> Iterator[bytes] | None:
        """The octets of a queued message, or None."""
        row = self._octets(id)
        if row is None:
            return None
        header, separator, body, _ = row
        return self._pieces(id, bytes(header) + (b"\r\n" if separator else b""), body)

    def _octets(self, id: str) -> Any:
        with self._use() as connection:
            return connection.execute(f"SELECT {pgschema.OCTETS} FROM message WHERE id = %s", (pgschema.storable(id),), binary=True).fetchone()

    def _pieces(self, id: str, head: bytes, body: bytes | None) -> Iterator[bytes]:
        yield head
        if body is not None:
            yield bytes(body)
            return
        n = -1
        while True:
            with self._use() as connection:
                row = connection.execute("SELECT n, data FROM chunk WHERE message = %s AND n > %s ORDER BY n LIMIT 1", (id, n),
                                         binary=True).fetchone()
            if row is None:
                return
            n = row[0]
            yield bytes(row[1])

    def load(self, id: str) -> tuple[Envelope, Message] | None:
        """A queued message with all recipients that are not forgotten yet, or None."""
        octets = self._octets(id)
        with self._use() as connection:
            row = connection.execute(f"SELECT {pgschema.ENVELOPE} FROM message m WHERE id = %s", (pgschema.storable(id),)).fetchone()
            rows = connection.execute(f"SELECT {pgschema.RECIPIENT} FROM recipient r WHERE message = %s ORDER BY number",
                                      (pgschema.storable(id),)).fetchall()
        if row is None or octets is None:
            return None
        header, separator, body, _ = octets
        message = Message(bytes(header), b"\r\n" if separator else b"", MemoryBody(b"".join(self._pieces(id, b"", body))))
        return pgschema.envelope_of(row, [pgschema.recipient_of(one) for one in rows]), message

    def stats(self) -> dict[str, Any]:
        """As QueueAdmin.stats, of all nodes; nodes: what each has under way."""
        out: dict[str, Any] = {"messages": 0, "octets": 0, "oldest": None, "recipients": {}, "lanes": {}, **self._now()}
        with self._use() as connection, connection.transaction():
            connection.execute("SET LOCAL enable_seqscan = on")
            row = connection.execute("SELECT count(*), coalesce(sum(size), 0)::bigint, min(received_at) FROM message").fetchone()
            if row is not None:
                out["messages"], out["octets"], out["oldest"] = row
            for status, lane, count in connection.execute("SELECT status, lane, count(*) FROM recipient GROUP BY 1, 2"):
                out["recipients"][status] = out["recipients"].get(status, 0) + count
                if status == "queued":
                    out["lanes"][lane] = count
        return out

    def _now(self) -> dict[str, Any]:
        """What living workers show (Store.publish)."""
        out: dict[str, Any] = {"under_way": 0, "attempts": [], "closed": [], "nodes": {}}
        closed: dict[str, dict[str, Any]] = {}
        with self._use() as connection:
            rows = connection.execute("SELECT w.node, w.shown, coalesce(n.draining, false) FROM worker w LEFT JOIN node n ON n.name = w.node "
                                      "WHERE w.lease_until > clock_timestamp() ORDER BY w.node").fetchall()
        for name, text, draining in rows:
            shown = json.loads(text or "{}")
            node = out["nodes"].setdefault(name, {"workers": 0, "under_way": 0, "draining": draining})
            node["workers"] += 1
            for where in (out, node):
                where["under_way"] += shown.get("under_way", 0)
            out["attempts"] += [{**attempt, "node": name} for attempt in shown.get("attempts", [])]
            for lane in shown.get("closed", []):  # all workers know of the same ones
                if lane["until"] > closed.get(lane["lane"], lane | {"until": 0.0})["until"]:
                    closed[lane["lane"]] = lane
        out["closed"] = builtins.list(closed.values())
        out["attempts"].sort(key=lambda attempt: attempt["since"])
        return out

    def trace(self, id: str) -> builtins.list[Event]:
        """A message's history, in or out of the queue."""
        with self._use() as connection:
            return [Event(id, at, kind, json.loads(data or "{}")) for at, kind, data in connection.execute(
                "SELECT at, kind, data FROM event WHERE message = %s ORDER BY at, n", (pgschema.storable(id),))]

    def happened(self, since: float, kinds: Iterable[str], limit: int, node: str) -> builtins.list[tuple[Event, dict[str, Any]]]:
        """See QueueAdmin.happened; of one node."""
        with self._use() as connection, connection.transaction():
            connection.execute("SET LOCAL enable_seqscan = on")
            rows = connection.execute("SELECT e.message, e.at, e.kind, e.data, c.data FROM (SELECT * FROM event WHERE at >= %s AND kind = ANY(%s) AND data LIKE %s "
                                      "ORDER BY at DESC LIMIT %s) e LEFT JOIN event c ON c.message = e.message AND c.kind = 'received' "
                                      "ORDER BY e.at", (since, Texts(kinds), f"%\"node\":{_like(json.dumps(node))}}}", limit)).fetchall()
        return [(Event(id, at, kind, json.loads(data or "{}")), json.loads(came or "{}")) for id, at, kind, data, came in rows]

    # --- changing -------------------------------------------------------------------------------------------------

    def retry(self, ids: Iterable[str] = (), **choice: Any) -> int:
        """Makes waiting recipients due now; how many messages have some. choice: domain, sender, all."""
        return self._change(ids, choice, "retried", "next_attempt_at = 0", _WAITING)

    def hold(self, ids: Iterable[str] = (), **choice: Any) -> int:
        """Stops delivery until released."""
        return self._change(ids, choice, "held", "status = 'held'", _WAITING)

    def release(self, ids: Iterable[str] = (), **choice: Any) -> int:
        """Lets held recipients go, at once."""
        return self._change(ids, choice, "released", "status = 'queued', next_attempt_at = 0", "r.status = 'held'")

    def bounce(self, ids: Iterable[str] = (), **choice: Any) -> int:
        """Gives up now: a worker fails the open recipients and tells the sender."""
        return self._change(ids, choice, "bounced", "", "r.status IN ('queued', 'held')")

    def delete(self, ids: Iterable[str] = (), **choice: Any) -> int:
        """Removes messages; nobody is told."""
        return self._change(ids, choice, "deleted", None, "")

    def _change(self, ids: Iterable[str], choice: dict[str, Any], kind: str, change: str | None, which: str) -> int:
        """Applies `change` (None: deletes, "": gives up) to the chosen messages' recipients for which `which` holds; how many messages had some."""
        total = 0
        chosen: builtins.list[str] = []
        for page in self._pages(ids, choice.get("domain"), choice.get("sender"), bool(choice.get("all")), which):
            chosen += [id for id, *_ in page]
            if len(chosen) >= SLICE:
                total += self._change_slice(chosen, kind, change, which)
                chosen = []
                time.sleep(GAP_S)
        return total + (self._change_slice(chosen, kind, change, which) if chosen else 0)

    def _change_slice(self, ids: builtins.list[str], kind: str, change: str | None, which: str) -> int:
        """One transaction of `_change`, again where it and a worker's were in each other's way."""
        for left in range(TRIES)[::-1]:
            try:
                with self._use() as connection, connection.transaction():
                    return self._change_these(connection, ids, kind, change, which)
            except StoreError as error:
                if not left or not isinstance(error.__cause__, psycopg.errors.DeadlockDetected | psycopg.errors.SerializationFailure):
                    raise
        return 0

    def _change_these(self, connection: psycopg.Connection[Any], ids: builtins.list[str], kind: str, change: str | None, which: str) -> int:
        """What left the queue meanwhile is passed over."""
        having = f"AND EXISTS (SELECT 1 FROM recipient r WHERE r.message = m.id AND {which})" if which else ""
        found = Texts(id for id, in connection.execute(f"SELECT m.id FROM message m WHERE m.id = ANY(%s) {having} ORDER BY m.id FOR UPDATE OF m",
                                                       (Texts(ids),)))
        if change is None:
            for table, column in (("recipient", "message"), ("chunk", "message"), ("message", "id")):
                connection.execute(f"DELETE FROM {table} WHERE {column} = ANY(%s)", (found,))
        elif change:
            connection.execute(f"UPDATE recipient AS r SET {change} WHERE {which} AND r.message = ANY(%s)", (found,))
        else:
            self._give_up(connection, found, which)
        now = self._clock()
        count = len(found)
        connection.execute("INSERT INTO event SELECT * FROM unnest(%s, %s, %s, %s, %s) ON CONFLICT DO NOTHING",
                           (found, Integers([int(now * 1e6)] * count), Floats([now] * count), Texts([kind] * count), Texts([_BY_OPERATOR] * count)))
        if count:
            connection.execute("UPDATE counter SET value = value + 1 WHERE name = 'changes'")
            connection.execute(f"NOTIFY {pgschema.CHANNEL}, 'changed'")
        return count

    @staticmethod
    def _give_up(connection: psycopg.Connection[Any], ids: Texts, which: str) -> None:
        """Makes recipients due, to fail; their facts are JSON text, which may hold what PostgreSQL's own JSON can't."""
        rows = []
        for id, number, text in connection.execute(f"SELECT r.message, r.number, r.facts FROM recipient r WHERE {which} AND r.message = ANY(%s) "
                                                   "ORDER BY r.message, r.number FOR UPDATE", (ids,)):
            facts = json.loads(text) if text else {}
            rows.append((id, number, json.dumps({**facts, "fixed_transport": True, "refused": GIVEN_UP})))
        connection.execute("UPDATE recipient r SET status = 'queued', next_attempt_at = 0, transport = 'fail', next_hop = '', lane = 'fail:', "
                           "facts = u.facts FROM unnest(%s, %s, %s) u(message, number, facts) WHERE r.message = u.message AND r.number = u.number",
                           columns(rows, Texts, Integers, Texts))

    # --- nodes ----------------------------------------------------------------------------------------------------

    def nodes(self) -> builtins.list[dict[str, Any]]:
        """Every node that lives or is to be drained: name, state (up, draining, drained, down), workers, recipients it has at hand, since."""
        with self._use() as connection:
            rows = connection.execute("""SELECT coalesce(w.node, n.name) AS name, coalesce(bool_or(n.draining), false), count(w.id),
                coalesce(sum((SELECT count(*) FROM recipient r WHERE r.owner <> 0 AND r.owner = w.id)), 0)::bigint,
                extract(epoch FROM min(w.started_at))::float8
                FROM (SELECT * FROM worker WHERE lease_until > clock_timestamp()) w FULL JOIN node n ON n.name = w.node GROUP BY 1 ORDER BY 1""").fetchall()
        return [{"node": name, "state": ("draining" if claimed else "drained") if draining else "up" if workers else "down", "workers": workers,
                 "claimed": claimed, "since": since} for name, draining, workers, claimed, since in rows]

    def drain(self, name: str, draining: bool) -> bool:
        """Has a node take no more mail, in or out of the queue, or take it again; whether that is new. Raises StoreError for an unknown name."""
        with self._use() as connection, connection.transaction():
            self._known(connection, name)
            changed = connection.execute("UPDATE node SET draining = %s WHERE name = %s AND draining <> %s", (draining, name, draining)).rowcount
            connection.execute(f"NOTIFY {pgschema.CHANNEL}, 'node'")
        return changed > 0

    def forget(self, name: str) -> None:
        """Takes a node that is no more off the list; raises StoreError where it lives."""
        with self._use() as connection, connection.transaction():
            self._known(connection, name)
            if connection.execute("SELECT 1 FROM worker WHERE node = %s AND lease_until > clock_timestamp()", (name,)).fetchone() is not None:
                raise StoreError(f"node {name} has workers that live")
            connection.execute("DELETE FROM node WHERE name = %s", (name,))

    @staticmethod
    def _known(connection: psycopg.Connection[Any], name: str) -> None:
        """Raises StoreError for a node that never was."""
        known = [row[0] for row in connection.execute("SELECT name FROM node ORDER BY name FOR UPDATE")]
        if name not in known:
            raise StoreError(f"there is no node {name!r}: expected one of {', '.join(known) or 'none'}")


def open_database(url: str) -> PostgresAdmin:
    """The admin of a command; raises StoreError where the database can't be reached."""
    from gmta.services.log import NullLog

    admin = PostgresAdmin(Database(url, name="command", log=NullLog(), size=1), own=True)
    try:
        with admin._use():
            return admin
    except BaseException:
        admin.close()  # else it would go on trying
        raise


def _like(text: str) -> str:
    """A text as LIKE's pattern has it."""
    return text.replace("\\", "\\\\").replace("_", "\\_").replace("%", "\\%")
