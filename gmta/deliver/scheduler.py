"""The scheduler: takes messages from intake and from the store, has them delivered, and settles what came of it.

A message just queued goes to its lane from memory; past the window (recipients and octets in memory) it is given back to
the store, which hands it out again when it is due. `_settle` turns Outcomes into recipient states, history, reports to the
sender and hook calls, in one record of the store. Routing, lanes, transports and the report's text are left to their modules.

Failure: where the store can't record, the worker that waits for it tries again until it can (nothing is delivered twice
because its record failed) and nothing new is taken from the store meanwhile. An exception of a transport defers.
lifetime and warn_after are judged after each attempt; an attempt is due at those moments too, so they are not missed.
"""

from __future__ import annotations

import random
import traceback
from typing import Any

import gevent
from gevent.event import Event as Signal

from gmta.deliver import bounce
from gmta.deliver.lanes import Health, Lane, Lanes
from gmta.deliver.router import HELD_ROUTE, Router
from gmta.hookspecs import Delivery
from gmta.mail.envelope import DELIVERED, FAILED, HELD, QUEUED, Envelope, RecipientState
from gmta.mail.message import Message
from gmta.mail.session import Recipient, Session, Transaction
from gmta.mail.verdict import Outcome, Status, deferred, failed
from gmta.queue.store import Event, Settlement, Store, StoreError

MAX_RECIPIENTS = 100  # of one delivery
LANE_BACKLOG = 500  # a lane with so many jobs waiting gets no more from the store
MEMORY_BYTES = 32 * 1024 * 1024
_TICK_S = 1.0
_ADOPT_S = 2.0
_OWN = ""  # the lane of recipients that need no transport

_LEFT_OUT = deferred("The transport gave no answer for this recipient", enhanced="4.3.0")
_BROKEN = deferred("The transport failed; see the log", enhanced="4.3.0")


class Job:
    """Recipients of a message that go one way; message None: load it; outcome: known without a transport."""

    __slots__ = ("envelope", "message", "next_hop", "octets", "outcome", "recipients", "transport")

    def __init__(self, envelope: Envelope, recipients: list[RecipientState], message: Message | None, transport: str,
                 next_hop: str, outcome: Outcome | None = None) -> None:
        self.envelope = envelope
        self.recipients = recipients
        self.message = message
        self.transport = transport
        self.next_hop = next_hop
        self.outcome = outcome
        self.octets = 0


class Scheduler:
    """What is due, in a bounded window. `services` needs clock, log, hostname; `ids.new()` makes queue ids."""

    def __init__(self, config: Any, store: Store, plugins: Any, services: Any, ids: Any) -> None:
        self._config = config
        self._store = store
        self._plugins = plugins
        self._services = services
        self._ids = ids
        self._clock = services.clock
        self._log = services.log
        self._retry: list[float] = list(config.queue.retry) or [300.0]
        self._window = int(config.queue.window)
        self._transports: dict[str, Any] = plugins.transports
        self.router = Router(config, plugins)
        self.lanes = Lanes(config, self._transports, self._run, self._postpone, self._retry[0], self._clock)
        self._recipients = 0
        self._octets = 0
        self._left_in_store = False
        self._store_failing = 0
        self._stopping = False
        self._wake = Signal()
        self._loop: gevent.Greenlet | None = None
        self._adopted_at = 0.0

    # --- life -----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Starts taking from the store what is due."""
        self._left_in_store = True
        self._adopted_at = self._clock()  # workers that start beside this one take their shards first
        self._loop = gevent.spawn(self._watch)

    def stop(self, timeout_s: float) -> None:
        """Ends deliveries: those running get timeout_s, those waiting stay queued in the store."""
        self._stopping = True
        if self._loop is not None:
            self._loop.kill()
        self.lanes.stop(timeout_s)

    @property
    def in_memory(self) -> int:
        """Recipients that wait in lanes or are being delivered."""
        return self._recipients

    # --- intake ---------------------------------------------------------------------------------------------------

    def accept(self, envelope: Envelope, message: Message) -> None:
        """Takes a message that `Store.put` (or record, for births) just made durable and left claimed; never blocks long."""
        if self._stopping or self._store_failing or self._recipients > 4 * self._window or self._octets > MEMORY_BYTES:
            self._release(envelope)
            return
        self._dispatch(envelope, message)

    def _release(self, envelope: Envelope) -> None:
        """Gives a message back to the store, to be taken when there is room."""
        self._left_in_store = True
        try:
            self._store.release(envelope)
        except StoreError as error:
            self._log.warning("release failed", id=envelope.id, error=str(error))

    def _dispatch(self, envelope: Envelope, message: Message | None) -> None:
        """Routes the queued recipients of an envelope and puts them in their lanes, in the order received."""
        recipients = envelope.recipients
        octets = message.size if message is not None else 0
        if len(recipients) == 1:
            self._put(self._route(envelope, recipients[0], message), octets)
            return
        open_jobs: dict[tuple[str, str], Job] = {}
        for recipient in recipients:
            if recipient.status != QUEUED:
                continue
            job = self._route(envelope, recipient, message)
            if job.outcome is None and job.transport:
                former = open_jobs.get((job.transport, job.next_hop))
                if former is not None and len(former.recipients) < MAX_RECIPIENTS:
                    former.recipients.append(recipient)
                    continue
                if former is not None:
                    self._put(former, octets)
                open_jobs[job.transport, job.next_hop] = job
            else:
                self._put(job, octets)
        for job in open_jobs.values():
            self._put(job, octets)

    def _route(self, envelope: Envelope, recipient: RecipientState, message: Message | None) -> Job:
        try:
            route = self.router.route(envelope, recipient)
        except Exception:  # a delivery attempt: whatever a route does, the message stays queued
            self._log.error("route failed", id=envelope.id, to=recipient.address, traceback=traceback.format_exc())
            route = _BROKEN
        if isinstance(route, Outcome):
            return Job(envelope, [recipient], message, _OWN, "", route)
        if route is HELD_ROUTE:
            recipient.status = HELD
            return Job(envelope, [recipient], message, _OWN, "")
        recipient.transport, recipient.next_hop = route
        return Job(envelope, [recipient], message, route[0], route[1])

    def _put(self, job: Job, octets: int) -> None:
        job.octets = octets
        self._octets += octets
        self._recipients += len(job.recipients)
        self.lanes.put(job.transport, job.next_hop, job)

    # --- the store's side -----------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Takes from the store what is due, until stopped."""
        while not self._stopping:
            try:
                self._take()
            except StoreError as error:
                self._log.error("store failing", error=str(error))
                self._left_in_store = True
            self.lanes.sweep()
            self._wake.wait(_TICK_S)
            self._wake.clear()

    def _take(self) -> None:
        now = self._clock()
        store = self._store
        if store.changed_outside():
            self.lanes.resume_all()
            self._left_in_store = True
        if now - self._adopted_at >= _ADOPT_S:
            self._adopted_at = now
            found = store.adopt()
            if found:
                self._log.info("adopted", messages=found)
                self._left_in_store = True
        if self._store_failing:
            return
        while self._recipients < self._window and not self._stopping:
            if not self._left_in_store:
                due_at = store.next_due_at()
                if due_at is None or due_at > now:
                    return
            room = min(self._window - self._recipients, 200)
            envelopes = store.due(now, room, self.lanes.busy(LANE_BACKLOG))
            if not envelopes:
                self._left_in_store = False
                return
            self._left_in_store = True
            for envelope in envelopes:
                self._dispatch(envelope, None)

    def _done(self, job: Job) -> None:
        """A job left memory; with room again, what was left in the store is taken at once."""
        self._recipients -= len(job.recipients)
        self._octets -= job.octets
        if self._left_in_store and self._recipients * 2 < self._window:
            self._wake.set()

    # --- a delivery attempt ---------------------------------------------------------------------------------------

    def _run(self, job: Job) -> Health:
        """One attempt, in a lane's worker: deliver, then settle."""
        try:
            return self._attempt(job)
        except gevent.GreenletExit:
            raise
        except Exception:  # the delivery attempt's containment: the lane lives on, the claim is given back
            self._log.error("delivery failed", id=job.envelope.id, traceback=traceback.format_exc())
            self._release(Envelope(job.envelope.id, job.envelope.sender, job.recipients))
            return Health.UNKNOWN
        finally:
            self._done(job)

    def _attempt(self, job: Job) -> Health:
        envelope, recipients = job.envelope, job.recipients
        if recipients[0].status == HELD:
            self._hold(job)
            return Health.UNKNOWN
        if job.outcome is not None:
            self._settle(job, dict.fromkeys((r.number for r in recipients), job.outcome), 0.0)
            return Health.UNKNOWN
        message = job.message
        # only what comes straight from intake is certain not to have been tried by a worker that died since
        first_attempt = message is not None and recipients[0].attempts == 0
        if message is None:
            message = self._load(envelope.id)
            if message is None:
                return Health.UNKNOWN  # an operator deleted it
            job.message = message
        started = self._clock()
        delivery = Delivery(envelope, recipients, message, job.transport, job.next_hop, first_attempt)
        try:
            outcomes = self._transports[job.transport].deliver(delivery)
        except Exception:  # the delivery attempt: a transport that raises defers
            self._log.error("transport failed", transport=job.transport, id=envelope.id, traceback=traceback.format_exc())
            outcomes = {}
            broken = _BROKEN
        else:
            broken = _LEFT_OUT
        if not isinstance(outcomes, dict):
            outcomes = {}
        results = {}
        health = Health.UNKNOWN
        for recipient in recipients:
            outcome = outcomes.get(recipient.number)
            if not isinstance(outcome, Outcome):
                outcome = broken
            elif outcome.status is Status.DEFERRED and not outcome.recipient_fault:
                health = Health.BAD
                self.lanes.lane(job.transport, job.next_hop).last_reply = outcome.reply.text
            elif health is Health.UNKNOWN:
                health = Health.GOOD
            results[recipient.number] = outcome
        self._settle(job, results, self._clock() - started)
        return health

    def _load(self, queue_id: str) -> Message | None:
        """The message's octets, however long the store takes to give them."""
        pause_s = 0.1
        while True:
            try:
                return self._store.message(queue_id)
            except StoreError as error:
                self._log.error("store failing", id=queue_id, error=str(error))
                gevent.sleep(pause_s)
                pause_s = min(5.0, pause_s * 2)

    def _hold(self, job: Job) -> None:
        """Records recipients that the route holds for the operator."""
        event = Event(job.envelope.id, self._clock(), "held", {"to": [str(r.address) for r in job.recipients], "reason": "route"})
        self._record(Settlement(job.envelope, job.recipients, [event]))

    def _postpone(self, lane: Lane, job: Job) -> None:
        """Takes back a job whose lane is closed: no attempt is counted, the time limits are judged."""
        outcome = deferred(f"Delivery suspended, the next hop failed: {lane.last_reply}"[:300], enhanced="4.4.1",
                           retry_after_s=max(0.0, lane.paused_until - self._clock()))
        try:
            self._settle(job, {recipient.number: outcome for recipient in job.recipients}, 0.0, attempted=False)
        finally:
            self._done(job)

    # --- settling -------------------------------------------------------------------------------------------------

    def _settle(self, job: Job, outcomes: dict[int, Outcome], elapsed_s: float, *, attempted: bool = True) -> None:
        """Turns outcomes into states, history and reports, records them, then tells log and hooks."""
        envelope = job.envelope
        now = self._clock()
        events: list[Event] = []
        gave_up: list[tuple[RecipientState, Outcome]] = []
        late: list[tuple[RecipientState, Outcome]] = []
        arrived: list[tuple[RecipientState, Outcome]] = []
        told: list[tuple[RecipientState, Outcome]] = []
        for recipient in job.recipients:
            outcome = outcomes[recipient.number]
            if attempted:
                recipient.attempts += 1
            recipient.last_reply = outcome.reply.text
            status = outcome.status
            if status is Status.DEFERRED:
                status = self._defer(envelope, recipient, outcome, now, late)
            if status is Status.DELIVERED:
                recipient.status = DELIVERED
                # RFC 3461 section 5.2.2: a next hop that took over and knows DSN reports success itself
                if "SUCCESS" in recipient.notify and (outcome.relayed or not outcome.remote):
                    arrived.append((recipient, outcome))
            elif status is Status.FAILED:
                recipient.status = FAILED
                if outcome.status is Status.DEFERRED:
                    outcome = _expired(outcome)
                gave_up.append((recipient, outcome))
            events.append(Event(envelope.id, now, status.value, {
                "to": str(recipient.address), "transport": job.transport, "next_hop": job.next_hop, "remote": outcome.remote,
                "reply": str(outcome.reply), "attempts": recipient.attempts}))
            told.append((recipient, outcome))
        births = self._reports(envelope, job.message, gave_up, late, arrived, events, now) if gave_up or late or arrived else ()
        self._record(Settlement(envelope, job.recipients, events, births))
        self._tell(job, told, elapsed_s, now)
        for born, text in births:
            self.accept(born, text)
        if gave_up and self._plugins.has("on_bounced"):
            self._plugins.on("on_bounced", envelope, [recipient for recipient, _ in gave_up])

    def _defer(self, envelope: Envelope, recipient: RecipientState, outcome: Outcome, now: float,
               late: list[tuple[RecipientState, Outcome]]) -> Status:
        """Sets a deferred recipient's next attempt, or finds its lifetime over; notes who is due a delay notice."""
        queue = self._config.queue
        lifetime = queue.lifetime if envelope.sender else queue.bounce_lifetime
        expires_at = envelope.received_at + lifetime
        if now >= expires_at:
            return Status.FAILED
        gap = outcome.retry_after_s
        if gap is None:
            gap = self._retry[min(max(recipient.attempts, 1), len(self._retry)) - 1]
        at = now + gap * (1 + random.random() * 0.1)
        at = min(at, expires_at)
        if envelope.sender and not recipient.warned and queue.warn_after:
            warn_at = envelope.received_at + queue.warn_after
            if now >= warn_at:
                recipient.warned = True
                if bounce.wants(recipient, "DELAY"):
                    late.append((recipient, outcome))
            else:
                at = min(at, warn_at)
        recipient.status = QUEUED
        recipient.next_attempt_at = at
        return Status.DEFERRED

    def _reports(self, envelope: Envelope, message: Message | None, gave_up: list[tuple[RecipientState, Outcome]],
                 late: list[tuple[RecipientState, Outcome]], arrived: list[tuple[RecipientState, Outcome]],
                 events: list[Event], now: float) -> list[tuple[Envelope, Message]]:
        """The DSNs that an attempt calls for (RFC 3461 section 5.2)."""
        failures = [pair for pair in gave_up if bounce.wants(pair[0], "FAILURE")]
        if not envelope.sender:  # RFC 5321 section 4.5.5: no report about a message with the null sender
            for recipient, outcome in failures:
                self._log.warning("bounce undeliverable", id=envelope.id, to=recipient.address, reply=outcome.reply)
            return []
        births: list[tuple[Envelope, Message]] = []
        if message is None and (failures or late or arrived):
            message = self._load(envelope.id)
        for kind, pairs in ((bounce.FAILED, failures), (bounce.DELAYED, late), (bounce.DELIVERED, arrived)):
            if not pairs:
                continue
            lifetime = self._config.queue.lifetime
            queue_id = self._ids.new()
            text = bounce.build(kind, envelope, pairs, message, hostname=self._services.hostname, queue_id=queue_id, now=now,
                                retry_until=envelope.received_at + lifetime)
            born = bounce.envelope_for(envelope, queue_id, text.size, now)
            self._dress(born, text)
            born.size = text.size
            births.append((born, text))
            events.append(Event(envelope.id, now, "bounced", {"kind": kind, "report": queue_id, "sender": str(envelope.sender),
                                                              "to": [str(recipient.address) for recipient, _ in pairs]}))
            events.append(Event(queue_id, now, "received", {"from": "", "to": [str(envelope.sender)], "about": envelope.id,
                                                            "kind": kind, "size": text.size}))
        return births

    def _dress(self, envelope: Envelope, message: Message) -> None:
        """gmta's own message passes get_headers and get_signatures too, with a local session."""
        plugins = self._plugins
        if not (plugins.has("get_headers") or plugins.has("get_signatures")):
            return
        session = Session(envelope.id, role="local", listener="", relay_network=True, opened_at=envelope.received_at)
        transaction = Transaction(envelope.id, envelope.sender, size=message.size)
        transaction.recipients = [Recipient(recipient.address) for recipient in envelope.recipients]
        transaction.message = message
        for hook in ("get_headers", "get_signatures"):
            if not plugins.has(hook):
                continue
            try:
                for _, fields in plugins.get(hook, session, transaction, message):
                    for name, value in reversed(list(fields or ())):
                        message.prepend(name, value)
            except Exception:  # an unsigned report is better than none, and than an attempt that never settles
                self._log.error("report goes without fields", id=envelope.id, hook=hook, traceback=traceback.format_exc())

    def _record(self, settlement: Settlement) -> None:
        """Records until the store takes it: what was delivered must not be delivered again because its record failed."""
        pause_s = 0.1
        failing = False
        try:
            while True:
                try:
                    self._store.record(settlement)
                    return
                except StoreError as error:
                    if not failing:
                        failing = True
                        self._store_failing += 1
                    self._log.error("record failed", id=settlement.envelope.id, error=str(error), next_try_s=pause_s)
                gevent.sleep(pause_s)
                pause_s = min(5.0, pause_s * 2)
        finally:
            if failing:
                self._store_failing -= 1
                self._left_in_store = True
                self._wake.set()

    def _tell(self, job: Job, told: list[tuple[RecipientState, Outcome]], elapsed_s: float, now: float) -> None:
        """One log line a recipient, and the on_delivery hooks."""
        envelope = job.envelope
        hooks = self._plugins.has("on_delivery")
        for recipient, outcome in told:
            self._log.info(outcome.status.value, id=envelope.id, to=recipient.address, transport=job.transport,
                           next_hop=job.next_hop, remote=outcome.remote, attempts=recipient.attempts, reply=outcome.reply,
                           delay_s=round(now - envelope.received_at, 3))
            if hooks:
                self._plugins.on("on_delivery", envelope, recipient, outcome, elapsed_s)


def _expired(outcome: Outcome) -> Outcome:
    """The failure that a recipient's last deferral becomes when its lifetime is over (RFC 3463: 4.4.7, here permanent)."""
    return failed(f"Delivery time expired; last reply: {outcome.reply}"[:900], enhanced="5.4.7", remote=outcome.remote)
