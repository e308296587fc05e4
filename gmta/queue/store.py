"""The Store: what the rest of gmta knows of the durable queue, written for two kinds of it.

SQLite shards (one worker the only writer of each), and one PostgreSQL for several machines; so nothing above assumes
one process or one file. A claim is a lease: recipients handed out by `due` (and those of a message just `put`) belong to
the caller until `record` or `release`, or until its lease ends: with the process, or when a node was not heard of for so long that
another has taken over. A result of a claim that was lost changes nothing of what the other does, and raises nothing.
Failure: every method raises StoreError, at once where the store is known to be down; StoreFull (no room) asks for 452 4.3.1 and for patience.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from gmta.mail.envelope import Envelope, RecipientState
from gmta.mail.message import Message


class StoreError(Exception):
    """The store can't do it now."""


class StoreFull(StoreError):
    """No room (disk, inodes): refuse intake with 452 4.3.1, keep what is there."""


@dataclass(slots=True)
class Event:
    """A row of a message's history: `kind` received, edited, delivered, deferred, failed, bounced, held, released, deleted; data is JSON-able."""

    queue_id: str
    at: float
    kind: str
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Settlement:
    """What one attempt changed, recorded in one commit: new recipient states, history, and messages it gave birth to (DSNs).

    A message whose recipients are all delivered or failed leaves the queue in that same commit.
    """

    envelope: Envelope
    changed: Sequence[RecipientState]
    events: Sequence[Event] = ()
    births: Sequence[tuple[Envelope, Message]] = ()


class Store(Protocol):
    """Methods block the calling greenlet (never the loop) until the answer is durable."""

    def put(self, envelope: Envelope, message: Message, events: Sequence[Event] = ()) -> None:
        """Takes the message; all its recipients are claimed by the caller. Durable when it returns."""

    def record(self, settlement: Settlement) -> None:
        """Writes an attempt's results and ends the claim on `changed`; births are claimed by the caller."""

    def due(self, now: float, limit: int, busy_lanes: Iterable[str] = (), probed_lanes: Iterable[str] = (),
            lane_limit: int | None = None) -> list[Envelope]:
        """Claims up to `limit` recipients that are due, oldest first, not of `busy_lanes` ("transport:next_hop").

        probed_lanes: of each at most one; lane_limit: of each other lane at most so many, so that all lanes have their turn.
        Each Envelope holds only the recipients claimed; `message` loads the octets.
        """

    def overdue(self, now: float, unwarned_before: float, before: float, reports_before: float, limit: int) -> list[Envelope]:
        """Claims up to `limit` recipients that are due but were not taken, of messages received before those times.

        unwarned_before: those without a delay notice; before: any; reports_before: those with the null sender. A call looks at a
        part of the queue, the next one at the next part.
        """

    def next_due_at(self) -> float | None:
        """When the earliest unclaimed recipient falls due, Unix seconds, or None."""

    def release(self, envelope: Envelope) -> None:
        """Gives back claims unused; where a recipient was to go meanwhile (transport, next hop) and its last reply are kept."""

    def holds(self, queue_id: str) -> bool:
        """Whether a message that the caller has claimed is still its own: asked before each attempt; cheap."""

    def message(self, queue_id: str) -> Message | None:
        """The octets of a queued message, or None if it left the queue."""

    def all_recipients(self, queue_id: str) -> list[RecipientState]:
        """Every recipient of a queued message, whatever its state."""

    def changed_outside(self) -> bool:
        """True when an operator's command changed the store since the last call."""

    def adopt(self) -> int:
        """Takes over what dead workers left; number of messages found."""

    def new_spool_file(self, queue_id: str) -> str:
        """Path for a large message's file, not created yet; `put` of a message whose body is that file keeps it."""

    def has_room(self, size_bytes: int) -> bool:
        """Whether there is room for intake, at message size limit `size_bytes` (cheap, cached); raises StoreError where it is down."""

    def listen(self, wake: Callable[[], None]) -> None:
        """Calls `wake` when another process has made something due; some calls may be lost, so the caller looks by itself as well."""

    def publish(self, state: dict[str, Any] | None) -> None:
        """Shows operators what this store's worker has under way (JSON-able), until the next call or its end; never fails."""

    def close(self) -> None:
        """Ends all claims and closes."""
