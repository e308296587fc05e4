"""What the store says to PostgreSQL: every statement, as (text, types of its columns) where a batch is one parameter a column.

Each finds its rows by key or by an index that holds only what it looks for, so that none grows with the queue; a test reads their plans.
"""

from __future__ import annotations

from gmta.queue.pgschema import ENVELOPE, OCTETS, RECIPIENT
from gmta.services.postgres import Floats, Integers, Octets, Texts

FENCE = ("WITH mine AS (UPDATE worker SET batch = %s, lease_until = clock_timestamp() + make_interval(secs => %s) WHERE id = %s RETURNING 1) "
          "SELECT 1 / count(*) FROM mine")
HOLD = "SELECT 1 / count(*) FROM (SELECT 1 FROM worker WHERE id = %s FOR KEY SHARE) mine"
PUT_MESSAGES = ("INSERT INTO message SELECT * FROM unnest(%s, %s, %s, %s, %s, %s, %s, %s, %s, %s)",
                 (Texts, Texts, Integers, Floats, Integers, Texts, Octets, Integers, Octets, Integers))
PUT_RECIPIENTS = ("INSERT INTO recipient SELECT * FROM unnest(%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s)",
                   (Texts, Integers, Texts, Texts, Integers, Floats, Texts, Texts, Texts, Texts, Integers, Texts, Integers))
PUT_EVENTS = ("INSERT INTO event SELECT * FROM unnest(%s, %s, %s, %s, %s) ON CONFLICT DO NOTHING", (Texts, Integers, Floats, Texts, Texts))
# existing rows only: what an operator deleted, held or bounced meanwhile stays so
SETTLE = ("UPDATE recipient r SET status = CASE WHEN r.status = 'held' AND u.status = 'queued' THEN 'held' ELSE u.status END, "
           "attempts = u.attempts, next_attempt_at = CASE WHEN r.transport = 'fail' THEN r.next_attempt_at ELSE u.at END, "
           "transport = CASE WHEN r.transport = 'fail' THEN r.transport ELSE u.transport END, "
           "next_hop = CASE WHEN r.transport = 'fail' THEN r.next_hop ELSE u.next_hop END, "
           "lane = CASE WHEN r.transport = 'fail' THEN r.lane ELSE u.lane END, last_reply = u.last_reply, warned = u.warned, owner = 0 "
           "FROM unnest(%s, %s, %s, %s, %s, %s, %s, %s, %s, %s) u(message, number, status, attempts, at, transport, next_hop, lane, last_reply, warned) "
           "WHERE r.message = u.message AND r.number = u.number",
           (Texts, Integers, Texts, Integers, Floats, Texts, Texts, Texts, Texts, Integers))
RELEASE = ("UPDATE recipient r SET transport = CASE WHEN u.transport = '' OR r.transport = 'fail' THEN r.transport ELSE u.transport END, "
            "next_hop = CASE WHEN u.transport = '' OR r.transport = 'fail' THEN r.next_hop ELSE u.next_hop END, "
            "lane = CASE WHEN u.transport = '' OR r.transport = 'fail' THEN r.lane ELSE u.lane END, "
            "last_reply = CASE WHEN u.transport = '' OR r.transport = 'fail' THEN r.last_reply ELSE u.last_reply END, owner = 0 "
            "FROM unnest(%s, %s, %s, %s, %s, %s, %s) u(message, number, transport, next_hop, lane, last_reply, owner) "
            "WHERE r.message = u.message AND r.number = u.number AND r.owner = u.owner",
            (Texts, Integers, Texts, Texts, Texts, Texts, Integers))
LATE = ("UPDATE recipient r SET status = 'delivered', attempts = u.attempts, last_reply = u.last_reply FROM unnest(%s, %s, %s, %s) "
         "u(message, number, attempts, last_reply) WHERE r.message = u.message AND r.number = u.number AND r.owner + 0 = 0 "
         "AND r.status IN ('queued', 'held')", (Texts, Integers, Integers, Texts))
DOUBTFUL = "SELECT 1 FROM message WHERE id = ANY(%s) ORDER BY id FOR UPDATE"  # two nodes that settle the last two one after the other
DROP_DOUBTFUL = (
    "WITH gone AS (DELETE FROM message m WHERE m.id = ANY(%s) AND NOT EXISTS "
    "(SELECT 1 FROM recipient r WHERE r.message = m.id AND r.status IN ('queued', 'held')) RETURNING m.id), "
    "pieces AS (DELETE FROM chunk c USING gone WHERE c.message = gone.id) DELETE FROM recipient r USING gone WHERE r.message = gone.id")
DROP = tuple(f"DELETE FROM {table} WHERE {column} = ANY(%s)" for table, column in (("recipient", "message"), ("message", "id")))
DROP_CHUNKS = "DELETE FROM chunk WHERE message = ANY(%s)"
WAITING = "status = 'queued' AND owner = 0"  # as the indexes have it
# what is picked becomes the caller's, where no other node is at it; "+ 0" keeps from a look through all that waits
CLAIM = f"""
locked AS (SELECT r.message, r.number FROM recipient r JOIN picked p ON r.message = p.message AND r.number = p.number
  WHERE r.status = 'queued' AND r.owner + 0 = 0 FOR UPDATE OF r SKIP LOCKED),
claimed AS (UPDATE recipient r SET owner = %(me)s FROM locked l WHERE r.message = l.message AND r.number = l.number RETURNING {RECIPIENT}),
found AS (SELECT {ENVELOPE}, m.body IS NULL, c.* FROM claimed c JOIN message m ON m.id = c.message)"""
DUE = f"""
WITH head AS MATERIALIZED (SELECT message, number, lane, next_attempt_at FROM recipient WHERE {WAITING} AND next_attempt_at <= %(now)s
  ORDER BY next_attempt_at LIMIT %(scan)s),
room AS MATERIALIZED (SELECT %(room)s::jsonb AS of),
ranked AS (SELECT *, row_number() OVER (PARTITION BY lane ORDER BY next_attempt_at, message, number) AS place FROM head),
picked AS MATERIALIZED (SELECT d.message, d.number FROM ranked d, room
  WHERE d.lane = '' OR d.place <= coalesce((room.of ->> d.lane)::bigint, %(lane_limit)s) ORDER BY d.next_attempt_at LIMIT %(limit)s),
{CLAIM}
SELECT n.*, found.* FROM (SELECT (SELECT count(*) FROM head) AS looked, (SELECT count(*) FROM picked) AS wanted) n LEFT JOIN found ON true"""
DUE_BY_LANE = f"""
WITH RECURSIVE step(lane) AS (
  (SELECT lane FROM recipient WHERE {WAITING} AND lane > %(before)s ORDER BY lane LIMIT 1) UNION ALL
  SELECT (SELECT lane FROM recipient WHERE {WAITING} AND lane > step.lane ORDER BY lane LIMIT 1) FROM step WHERE step.lane IS NOT NULL),
lanes AS MATERIALIZED (SELECT lane FROM step WHERE lane IS NOT NULL LIMIT %(scan)s),
room AS MATERIALIZED (SELECT %(room)s::jsonb AS of),
picked AS MATERIALIZED (SELECT d.message, d.number, s.lane FROM (SELECT '' AS lane UNION ALL SELECT lane FROM lanes) s CROSS JOIN room
  CROSS JOIN LATERAL (SELECT message, number FROM recipient WHERE {WAITING} AND lane = s.lane AND next_attempt_at <= %(now)s
    ORDER BY next_attempt_at LIMIT CASE WHEN s.lane = '' THEN %(limit)s ELSE coalesce((room.of ->> s.lane)::bigint, %(lane_limit)s) END) d LIMIT %(limit)s),
{CLAIM}
SELECT n.*, found.* FROM (SELECT CASE WHEN (SELECT count(*) FROM picked) >= %(limit)s THEN (SELECT max(lane) FROM picked)
  WHEN (SELECT count(*) FROM lanes) >= %(scan)s THEN (SELECT max(lane) FROM lanes) ELSE '' END AS lane, 0) n LEFT JOIN found ON true"""
CLAIM_THESE = (f"WITH picked AS (SELECT * FROM unnest(%(messages)s, %(numbers)s) p(message, number)), {CLAIM} "
                "SELECT n.*, found.* FROM (SELECT 0, 0) n LEFT JOIN found ON true")
OVERDUE = ("SELECT message, number, status = 'queued' AND owner = 0 AND next_attempt_at <= %(now)s AND (message < %(old)s OR "
            "(warned = 0 AND message < %(unwarned)s) OR (message < %(reports)s AND (SELECT sender FROM message WHERE id = r.message) = '')) "
            "FROM recipient r WHERE message > %(judged)s AND message < %(youngest)s ORDER BY message, number LIMIT %(scan)s")
OCTETS_OF = f"SELECT id, {OCTETS} FROM message WHERE id = ANY(%s)"
NEXT_DUE = f"SELECT next_attempt_at FROM recipient WHERE {WAITING} ORDER BY next_attempt_at LIMIT 1"
CHANGES = "SELECT value, coalesce((SELECT draining FROM node WHERE name = %s), false) FROM counter WHERE name = 'changes'"
RECIPIENTS = f"SELECT {RECIPIENT} FROM recipient r WHERE message = %s ORDER BY number"
OWNED = "SELECT message, number FROM recipient WHERE owner = %s"
ORPHANS = """
WITH RECURSIVE step(owner) AS ((SELECT owner FROM recipient WHERE owner <> 0 ORDER BY owner LIMIT 1) UNION ALL
  SELECT (SELECT owner FROM recipient WHERE owner <> 0 AND owner > step.owner ORDER BY owner LIMIT 1) FROM step WHERE step.owner IS NOT NULL)
SELECT owner FROM step WHERE owner IS NOT NULL AND NOT EXISTS (SELECT 1 FROM worker WHERE id = step.owner)"""
FREE = """
WITH chosen AS (SELECT message, number FROM recipient WHERE owner <> 0 AND owner = %s LIMIT %s FOR UPDATE SKIP LOCKED)
UPDATE recipient r SET owner = 0 FROM chosen s WHERE r.message = s.message AND r.number = s.number RETURNING r.message"""
PURGE = """
WITH old AS MATERIALIZED (SELECT ctid AS place, message FROM event WHERE message > %s AND message < %s ORDER BY message, n LIMIT %s),
gone AS (DELETE FROM event WHERE ctid = ANY(ARRAY(
  SELECT place FROM old o WHERE (SELECT 1 FROM message m WHERE m.id = o.message) IS NULL)))
SELECT count(*), max(message) FROM old"""
DEAD = """
DELETE FROM worker WHERE id IN (SELECT id FROM worker WHERE id = ANY(%s) OR (id = ANY(%s) AND lease_until < clock_timestamp())
  FOR UPDATE SKIP LOCKED) RETURNING id, node, tag"""
# what a lost connection of ours left running ends before it is asked what became of it
END_OLD = """SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity
WHERE application_name = %s AND usename = current_user AND pid <> pg_backend_pid()"""
CAME = "SELECT id FROM message WHERE id = ANY(%s) UNION SELECT message FROM event WHERE message = ANY(%s)"
