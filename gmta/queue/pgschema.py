"""Tables of the queue on PostgreSQL, shared by the store (in a worker) and QueueAdmin (in a command); no gevent here.

`owner` of a recipient is the id of the worker that has claimed it, 0 where nobody has; a row of `worker` is that worker's lease, and
who deletes it takes its claims away. What nobody has claimed is in the indexes by time and by lane, nothing else is. Bodies past
BODY_IN_ROW lie in rows of `chunk`. Migrations are additive: a step is never changed after a release, and a node of the release
before works on.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import psycopg

from gmta.mail.envelope import Envelope, RecipientState
from gmta.queue import schema

BODY_IN_ROW = 256 * 1024
CHUNK = 256 * 1024
CHANNEL = "gmta"  # NOTIFY: "due" some recipients can be claimed, "changed" an operator changed something
_LOCK = 0x676D7461  # advisory lock of migrations
_LANE_LENGTH = 500  # an index entry has its limits

_QUEUE = """
CREATE TABLE message(id text COLLATE "C" PRIMARY KEY, sender text NOT NULL, size bigint NOT NULL, received_at double precision NOT NULL,
  total integer NOT NULL, data text NOT NULL, header bytea NOT NULL, separator smallint NOT NULL, body bytea, body_size bigint NOT NULL)
  WITH (toast_tuple_target = 8160, autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_threshold = 5000, autovacuum_vacuum_cost_delay = 1);
ALTER TABLE message ALTER header SET STORAGE EXTERNAL, ALTER body SET STORAGE EXTERNAL;
CREATE TABLE recipient(message text COLLATE "C" NOT NULL, number integer NOT NULL, address text NOT NULL, status text COLLATE "C" NOT NULL,
  attempts integer NOT NULL, next_attempt_at double precision NOT NULL, transport text NOT NULL, next_hop text NOT NULL,
  lane text COLLATE "C" NOT NULL, last_reply text NOT NULL, warned smallint NOT NULL, facts text NOT NULL, owner bigint NOT NULL,
  PRIMARY KEY(message, number))
  WITH (autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 5000, autovacuum_vacuum_cost_delay = 1);
CREATE INDEX recipient_due ON recipient(next_attempt_at) WHERE status = 'queued' AND owner = 0;
CREATE INDEX recipient_lane ON recipient(lane, next_attempt_at) WHERE status = 'queued' AND owner = 0;
CREATE INDEX recipient_owner ON recipient(owner) WHERE owner <> 0;
CREATE TABLE chunk(message text COLLATE "C" NOT NULL, n integer NOT NULL, data bytea NOT NULL, PRIMARY KEY(message, n));
ALTER TABLE chunk ALTER data SET STORAGE EXTERNAL;
CREATE TABLE event(message text COLLATE "C" NOT NULL, n bigint NOT NULL, at double precision NOT NULL, kind text NOT NULL, data text NOT NULL,
  PRIMARY KEY(message, n));
CREATE TABLE worker(id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, node text NOT NULL, home text NOT NULL, tag text NOT NULL,
  pid integer NOT NULL, started_at timestamptz NOT NULL DEFAULT now(), lease_until timestamptz NOT NULL, batch bigint NOT NULL DEFAULT 0,
  shown text NOT NULL DEFAULT '') WITH (fillfactor = 20, autovacuum_vacuum_threshold = 500);
CREATE TABLE counter(name text COLLATE "C" PRIMARY KEY, value bigint NOT NULL);
INSERT INTO counter VALUES ('changes', 0);
"""

_SHARED = """
CREATE TABLE node(name text COLLATE "C" PRIMARY KEY, draining boolean NOT NULL DEFAULT false);
CREATE UNLOGGED TABLE state(key text COLLATE "C" PRIMARY KEY, value text, number double precision, expires_at double precision NOT NULL)
  WITH (fillfactor = 80, autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_threshold = 2000);
CREATE INDEX state_expiry ON state(expires_at);
CREATE TABLE duty(name text COLLATE "C" PRIMARY KEY, due_at double precision NOT NULL);
CREATE TABLE lane_limit(name text COLLATE "C" PRIMARY KEY, next_at double precision NOT NULL, used_at double precision NOT NULL)
  WITH (fillfactor = 20, autovacuum_vacuum_threshold = 500);
CREATE TABLE lane_holder(name text COLLATE "C" NOT NULL, worker text COLLATE "C" NOT NULL, held integer NOT NULL, want integer NOT NULL,
  since double precision NOT NULL, until double precision NOT NULL, PRIMARY KEY(name, worker)) WITH (fillfactor = 20, autovacuum_vacuum_threshold = 500);
CREATE INDEX lane_holder_worker ON lane_holder(worker);
CREATE TABLE lane_closed(name text COLLATE "C" PRIMARY KEY, failures integer NOT NULL, until double precision NOT NULL, said text NOT NULL,
  worker text NOT NULL, changed_at double precision NOT NULL, prober text NOT NULL, probe_until double precision NOT NULL);
CREATE INDEX lane_closed_change ON lane_closed(changed_at);
CREATE INDEX event_at ON event USING brin(at) WITH (autosummarize = on);
"""

MIGRATIONS: tuple[str, ...] = (_QUEUE, _SHARED)

RECIPIENT = schema.RECIPIENT
ENVELOPE = "m.id, m.sender, m.size, m.received_at, m.data, m.total"
OCTETS = "header, separator, body, body_size"


def migrate(connection: psycopg.Connection[Any]) -> int:
    """Makes the tables, or brings them up to date, one node at a time; the version. Raises psycopg.Error."""
    with connection.transaction():
        connection.execute("SELECT pg_advisory_xact_lock(%s)", (_LOCK,))
        connection.execute("CREATE TABLE IF NOT EXISTS schema_version(version integer NOT NULL)")
        row = connection.execute("SELECT max(version) FROM schema_version").fetchone()
        version = int(row[0] or 0) if row else 0
        for number, step in enumerate(MIGRATIONS[version:], version + 1):
            connection.execute(step, prepare=False)
            connection.execute("INSERT INTO schema_version VALUES (%s)", (number,))
            version = number
    return version


def storable(text: str) -> str:
    """Text that PostgreSQL takes: lone surrogates escaped, and no NUL."""
    if "\0" in text:
        text = text.replace("\0", "\\x00")
    return schema.storable(text)


def lane_key(lane: str) -> str:
    """The lane's name in its column: a long one is known by its hash."""
    lane = storable(lane)
    return lane if len(lane) <= _LANE_LENGTH else hashlib.sha256(lane.encode()).hexdigest()


def lane(r: RecipientState) -> str:
    """The lane column, "" where the recipient was never routed."""
    return lane_key(f"{r.transport}:{r.next_hop}") if r.transport else ""


def recipient_row(queue_id: str, r: RecipientState, owner: int) -> tuple[Any, ...]:
    """The columns of the recipient table."""
    facts = r.facts()
    return (queue_id, r.number, storable(str(r.address)), r.status, r.attempts, r.next_attempt_at, storable(r.transport),
            storable(r.next_hop), lane(r), storable(r.last_reply), int(r.warned), json.dumps(facts) if facts else "", owner)


def recipient_of(row: tuple[Any, ...]) -> RecipientState:
    """A RecipientState from the columns of RECIPIENT."""
    return schema.recipient_of(row)


def envelope_of(row: tuple[Any, ...], recipients: list[RecipientState]) -> Envelope:
    """An Envelope from the columns of ENVELOPE."""
    return schema.envelope_of(row, recipients)
