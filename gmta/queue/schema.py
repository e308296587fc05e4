"""Tables and files of the SQLite queue, shared by the store (in a worker) and QueueAdmin (in a command); no gevent here.

A shard NNN is shard-NNN.db (WAL, synchronous FULL), shard-NNN.lock (flock: its one worker), shard-NNN.spool/ID.body for
large bodies and shard-NNN.reserve, room that is given up when the disk is full. Rows map to Envelope and RecipientState here.
"""

from __future__ import annotations

import json
import os
import re
import sqlite3
from typing import Any

from gmta.mail.envelope import Envelope, RecipientState, stored_address
from gmta.mail.message import FileBody, MemoryBody, Message

SHARD = re.compile(r"shard-(\d{3,})\.db\Z")
SPOOLED = re.compile(r"([0-9A-V]{16})\.body\Z")

SCHEMA = """
CREATE TABLE IF NOT EXISTS message(id TEXT PRIMARY KEY, sender TEXT, size INTEGER, received_at REAL, total INTEGER, data TEXT,
  header BLOB, separator INTEGER, body BLOB, file TEXT, offset INTEGER, body_size INTEGER);
CREATE TABLE IF NOT EXISTS recipient(message TEXT, number INTEGER, address TEXT, status TEXT, attempts INTEGER,
  next_attempt_at REAL, transport TEXT, next_hop TEXT, lane TEXT, last_reply TEXT, warned INTEGER, facts TEXT,
  PRIMARY KEY(message, number)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS recipient_due ON recipient(next_attempt_at) WHERE status = 'queued';
CREATE INDEX IF NOT EXISTS recipient_lane ON recipient(lane, next_attempt_at) WHERE status = 'queued';
CREATE TABLE IF NOT EXISTS event(message TEXT, n INTEGER, at REAL, kind TEXT, data TEXT, PRIMARY KEY(message, n)) WITHOUT ROWID;
"""

RECIPIENT = ("r.message, r.number, r.address, r.status, r.attempts, r.next_attempt_at, r.transport, r.next_hop, r.last_reply, "
             "r.warned, r.facts")
ENVELOPE = "m.id, m.sender, m.size, m.received_at, m.data, m.total, m.file"
OCTETS = "header, separator, body, file, offset, body_size"


def connect(path: str, *, create: bool = False, timeout_s: float = 10.0) -> sqlite3.Connection:
    """A connection to a shard; raises sqlite3.Error."""
    connection = sqlite3.connect(path, timeout=timeout_s, isolation_level=None, check_same_thread=False, cached_statements=512)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA secure_delete = FAST")  # zeroes where that writes no page more: a fifth to a third less is written
        connection.execute("PRAGMA wal_autocheckpoint = 4000")
        connection.execute("PRAGMA journal_size_limit = 67108864")
        if create:
            connection.executescript(SCHEMA)
    except BaseException:
        connection.close()
        raise
    return connection


def shards(directory: str) -> list[int]:
    """Numbers of the shards that are there, lowest first."""
    found = (SHARD.match(name) for name in os.listdir(directory)) if os.path.isdir(directory) else ()
    return sorted(int(match[1]) for match in found if match)


def shard_path(directory: str, number: int, kind: str) -> str:
    """Path of a shard's file of that kind: db, lock, spool, reserve."""
    return os.path.join(directory, f"shard-{number:03d}.{kind}")


def storable(text: str) -> str:
    """Text that SQLite takes: lone surrogates escaped."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def lane(recipient: RecipientState) -> str:
    """The lane's name, "" where the recipient was never routed."""
    return storable(f"{recipient.transport}:{recipient.next_hop}") if recipient.transport else ""


def recipient_row(queue_id: str, r: RecipientState) -> tuple[Any, ...]:
    """The columns of the recipient table."""
    facts = r.facts()
    return (queue_id, r.number, storable(str(r.address)), r.status, r.attempts, r.next_attempt_at, storable(r.transport),
            storable(r.next_hop), lane(r), storable(r.last_reply), int(r.warned), json.dumps(facts) if facts else "")


def recipient_of(row: tuple[Any, ...]) -> RecipientState:
    """A RecipientState from the columns of RECIPIENT."""
    _, number, address, status, attempts, next_attempt_at, transport, next_hop, last_reply, warned, text = row[:11]
    facts = json.loads(text) if text else {}
    return RecipientState(number, stored_address(address), str(facts.get("original") or address), str(facts.get("orcpt", "")),
                          frozenset(facts.get("notify", ())), transport, next_hop, bool(facts.get("fixed_transport", False)),
                          status, attempts, next_attempt_at, last_reply, bool(warned), str(facts.get("refused", "")))


def envelope_of(row: tuple[Any, ...], recipients: list[RecipientState]) -> Envelope:
    """An Envelope from the columns of ENVELOPE."""
    return Envelope.from_dict(row[0], row[1], row[2], row[3], json.loads(row[4] or "{}"), recipients)


def message_of(row: tuple[Any, ...], spool: str) -> Message:
    """A Message from the columns of OCTETS."""
    header, separator, body, file, offset, body_size = row
    held = MemoryBody(body or b"") if file is None else FileBody(os.path.join(spool, file), offset, body_size)
    return Message(header, b"\r\n" if separator else b"", held)
