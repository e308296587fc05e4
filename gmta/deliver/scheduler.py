"""The scheduler: takes messages from intake and from the store, has them delivered, and settles what came of it.

A message just queued goes to its lane from memory; past the window (recipients and octets in memory), and where its lane is
closed or full, it is given back to the store, which hands it out again when it is due and its lane has room. `_settle` turns
Outcomes into recipient states, history, reports to the sender and hook calls, in one record of the store. Routing, lanes,
transports and the report's text are left to their modules.

Time: after an attempt the next one is due by `retry` (of [queue], or of [queue:DOMAIN]), at most at the moment when a delay
notice or the end of its lifetime is. What waits behind a closed lane is not tried, and no attempt is counted; a timer judges it.
Failure: where the store can't record, the worker that waits for it tries again until it can (nothing is delivered twice
because its record failed) and nothing new is taken from the store meanwhile. An exception of a transport defers.
"""

from __future__ import annotations

import math
import random
import traceback
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import gevent
from gevent.event import Event as Signal

from gmta.deliver import bounce
from gmta.deliver.bounce import Notice
from gmta.deliver.lanes import TICK_S, Health, Lane, Lanes
from gmta.deliver.router import HELD_ROUTE, Router
from gmta.hookspecs import Delivery
from gmta.mail.address import Address, domains_above
from gmta.mail.envelope import DELIVERED, FAILED, HELD, QUEUED, Envelope, RecipientState, stored_address
from gmta.mail.message import Message
from gmta.mail.reply import Reply
from gmta.mail.session import Recipient, Session, Transaction
from gmta.mail.verdict import Outcome, Status, deferred, delivered, failed
from gmta.queue.store import Event, Settlement, Store, StoreError

if TYPE_CHECKING:
    from gmta.deliver.shares import LaneShares

SORTED_A_TICK = 1000  # recipients that the store gives out a second only to hear that their lane takes none
MAX_RECIPIENTS = 100  # of one delivery
MAX_SAID = 1000  # characters of what was said that a recipient's state keeps
MEMORY_BYTES = 32 * 1024 * 1024
_ADOPT_S = 2.0
_PUBLISH_S = 5.0  # at least so often while something is under way
_PUBLISHED = 500  # attempts and closed lanes
_JUDGED = 200  # recipients that wait behind closed lanes, judged at a time
_OWN = ""  # the lane of recipients that need no transport

_LEFT_OUT = deferred("The transport gave no answer for this recipient", enhanced="4.3.0")
_BROKEN = deferred("The transport failed; see the log", enhanced="4.3.0")
_LOOP = failed("Too many Received fields: the message goes round in circles", enhanced="5.4.6", code=554)
_OPERATOR = failed("Mail for this recipient is not delivered", enhanced="5.7.1", code=550)


class Times(NamedTuple):
    """When mail is tried again and for how long, in seconds."""

    retry: list[float]
    lifetime: float
    warn_after: float


class Job:
    """Recipients of a message that go one way.

    message None: load it.  outcomes: known without a transport.  attempted: that counts as an attempt.  again: mail that was tried before.
    """

    __slots__ = ("again", "attempted", "attempts", "envelope", "message", "next_hop", "octets", "outcomes", "recipients", "transport")

    def __init__(self, envelope: Envelope, recipients: list[RecipientState], message: Message | None, transport: str,
                 next_hop: str, outcomes: dict[int, Outcome] | None = None, *, attempted: bool = True) -> None:
        self.envelope = envelope
        self.recipients = recipients
        self.message = message
        self.transport = transport
        self.next_hop = next_hop
        self.outcomes = outcomes
        self.attempted = attempted
        self.attempts: list[Outcome] = []
        self.again = recipients[0].attempts > 0
        self.octets = 0


class Scheduler:
    """What is due, in a bounded window. `services` needs clock, log, hostname; `ids.new()` makes queue ids; shares: with several nodes."""

    def __init__(self, config: Any, store: Store, plugins: Any, services: Any, ids: Any, shares: LaneShares | None = None) -> None:
        self._config = config
        self._store = store
        self._plugins = plugins
        self._services = services
        self._ids = ids
        self._clock = services.clock
        self._log = services.log
        queue = config.queue
        self._times = Times(queue.retry, queue.lifetime, queue.warn_after)
        self._times_of = {domain: self._times._replace(**other.model_dump(exclude_none=True))
                          for domain, other in config.queue_domains.items()}
        self._double_bounce = Address.parse(queue.double_bounce) if queue.double_bounce else None
        self._hops: int = config.limits.hops
        self._window = int(queue.window)
        self._transports: dict[str, Any] = plugins.transports
        self.router = Router(config, plugins)
        self.lanes = Lanes(config, self._transports, self._run, self._give_back, self.look, self._clock, self._exchangers,
                           shares=shares)
        self._shares = shares
        self._waiting = 0  # recipients in lanes
        self._stored = 0  # those of them that the store gave
        self._running = 0  # recipients being delivered
        self._octets = 0
        self._left_in_store = False
        self._taken = 0  # recipients that the store gave last time
        self._done_since = 0  # and how many have left memory since
        self._published_at = 0.0
        self._published: Any = None
        self._store_failing = 0
        self._stopping = False
        self._sorted = 0  # recipients taken since the last tick and given back, their lanes being full
        self._wake = Signal()
        self._loop: gevent.Greenlet | None = None
        self._adopted_at = 0.0

    # --- life -----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Starts taking from the store what is due."""
        self._left_in_store = True
        self._adopted_at = self._clock()  # workers that start beside this one take their shards first
        if self._shares is not None:
            self._shares.start(self.lanes)
        self._loop = gevent.spawn(self._watch)

    def stop(self, timeout_s: float) -> None:
        """Ends deliveries: those running get timeout_s, those waiting stay queued in the store."""
        self._stopping = True
        if self._loop is not None:
            self._loop.kill()
        self.lanes.stop(timeout_s)
        if self._shares is not None:
            self._shares.stop()

    @property
    def in_memory(self) -> int:
        """Recipients that wait in lanes or are being delivered."""
        return self._waiting + self._running

    # --- intake ---------------------------------------------------------------------------------------------------

    def accept(self, envelope: Envelope, message: Message) -> None:
        """Takes a message that `Store.put` (or record, for births) just made durable and left claimed; never blocks long."""
        if "expanded" in envelope.facts:
            self._report_expansion(envelope, message)
        if self._stopping or self._store_failing or self._waiting > 4 * self._window or self._octets > MEMORY_BYTES:
            self._left_in_store = True
            if not self._plugins.has("get_route"):  # a hook may take its time, and is asked when there is room
                for recipient in envelope.recipients:
                    self._route(envelope, recipient, message)  # the store finds what is due lane by lane, where it knows them
            self._release(envelope)
            return
        self._dispatch(envelope, message)

    def _release(self, envelope: Envelope) -> None:
        """Gives a message back to the store, to be taken when there is room."""
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
        jobs: dict[tuple[str, str], Job] = {}
        for recipient in recipients:
            if recipient.status != QUEUED:
                continue
            job = self._route(envelope, recipient, message)
            key = ("held" if recipient.status == HELD else job.transport, job.next_hop)
            former = jobs.get(key)
            if former is not None and len(former.recipients) < MAX_RECIPIENTS:
                former.recipients.append(recipient)
                if former.outcomes is not None and job.outcomes is not None:
                    former.outcomes.update(job.outcomes)
                continue
            if former is not None:
                self._put(former, octets)
            jobs[key] = job
        for job in jobs.values():
            self._put(job, octets)

    def _route(self, envelope: Envelope, recipient: RecipientState, message: Message | None) -> Job:
        if recipient.refused:
            return Job(envelope, [recipient], message, _OWN, "", {recipient.number: _refusal(recipient)})
        try:
            route = self.router.route(envelope, recipient)
        except Exception:  # a delivery attempt: whatever a route does, the message stays queued
            self._log.error("route failed", id=envelope.id, to=recipient.address, traceback=traceback.format_exc())
            route = _BROKEN
        if isinstance(route, Outcome):
            return Job(envelope, [recipient], message, _OWN, "", {recipient.number: route})
        if route is HELD_ROUTE:
            recipient.status = HELD
            return Job(envelope, [recipient], message, _OWN, "")
        recipient.transport, recipient.next_hop = route
        return Job(envelope, [recipient], message, route[0], route[1])

    def _put(self, job: Job, octets: int) -> None:
        """Puts a job into its lane; where the lane takes none, back into the store."""
        if job.transport == _OWN:
            most = math.inf
        elif job.message is not None:
            most = 3 * (4 * self._window - self._waiting)  # fresh mail need not go by way of the store while there is memory
        else:
            most = self._most()
        lane = self.lanes.put(job.transport, job.next_hop, job, most)
        if lane is None:
            job.octets = octets
            self._octets += octets
            self._waiting += len(job.recipients)
            if job.message is None:
                self._stored += len(job.recipients)
        else:
            self._left_in_store = True
            if job.message is None:
                self._sorted += len(job.recipients)
            self._hand_back(lane, job)

    def _most(self) -> int:
        """Jobs that may wait in one lane: many while memory is free, few when it is not, so that there is room for other lanes."""
        return max(2, (self._window - self._stored) // 2)

    def _give_back(self, lane: Lane, job: Job) -> None:
        """Takes a job out of memory whose lane was closed: no attempt is counted."""
        self._leave(job)
        self._octets -= job.octets
        self._hand_back(lane, job)

    def _leave(self, job: Job) -> None:
        """A job waits no more."""
        self._waiting -= len(job.recipients)
        if job.message is None:
            self._stored -= len(job.recipients)

    def _hand_back(self, lane: Lane, job: Job) -> None:
        reason = self.lanes.reason(lane)
        if reason:
            for recipient in job.recipients:
                recipient.last_reply = reason[:MAX_SAID]
        self._release(Envelope(job.envelope.id, job.envelope.sender, job.recipients))

    def look(self) -> None:
        """Looks at once for what the store has: a lane takes jobs again, or another node has given something back."""
        self._left_in_store = True
        self._wake.set()

    def _exchangers(self, domain: str) -> list[str]:
        """Names of a domain's MX hosts, most preferred first; none where they can't be told."""
        resolver = self._services.resolver
        return [] if resolver is None else [str(record.exchange) for record in resolver.mx(domain).records]

    # --- the store's side -----------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Takes from the store what is due, until stopped."""
        ticked_at = 0.0
        while not self._stopping:
            now = self._clock()
            if now >= ticked_at + TICK_S or now < ticked_at:
                ticked_at = now
                self._tick()
            try:
                self._take()
            except StoreError as error:
                self._log.error("store failing", error=str(error))
                self._left_in_store = True
                gevent.sleep(TICK_S)
            self._wake.wait(TICK_S)
            self._wake.clear()

    def _tick(self) -> None:
        """What is to be done every second."""
        self._sorted = 0
        self.lanes.tick()
        try:
            if self._store.changed_outside():
                self.lanes.resume_all()
                self._left_in_store = True
            if self._clock() - self._adopted_at >= _ADOPT_S:
                self._adopted_at = self._clock()
                found = self._store.adopt()
                if found:
                    self._log.info("adopted", messages=found)
                    self._left_in_store = True
            self._judge()
            self._publish()
        except StoreError as error:
            self._log.error("store failing", error=str(error))

    def _take(self) -> None:
        """Takes what is due while there is room for it."""
        now = self._clock()
        store = self._store
        self._taken = self._done_since = 0
        if self._store_failing:
            return
        while self._stored < self._window and not self._stopping:  # what is fresh holds up nothing here
            if not self._left_in_store:
                due_at = store.next_due_at()
                if due_at is None or due_at > now:
                    return
            most = self._most()
            busy, probing, full = self.lanes.rooms(most)
            envelopes = store.due(now, min(self._window - self._stored, 200), busy, probing, most)
            self._left_in_store = full or bool(envelopes)
            if not envelopes:
                return
            before = self._stored
            for envelope in envelopes:
                self._dispatch(envelope, None)
            self._taken += max(0, self._stored - before)
            if self._sorted >= SORTED_A_TICK and self._waiting:
                return  # the rest learns its lanes later: those that have room are at work meanwhile

    def _done(self, job: Job) -> None:
        """A job left memory; when half of what was taken is done, more is taken at once, but not for a few recipients each time."""
        self._running -= len(job.recipients)
        self._octets -= job.octets
        if self._left_in_store:
            self._done_since += len(job.recipients)
            # where the store gave nothing last time, and fresh mail fills the window, the next tick is soon enough
            soon = self._taken or self._waiting < self._window
            if soon and self._done_since * 2 >= self._taken and self._done_since * 8 >= self._window:
                self._wake.set()

    def _judge(self) -> None:
        """Sees that what waits behind closed and full lanes, and is not tried, gets its delay notice and its end."""
        busy, probing, _ = self.lanes.rooms(self._most())
        if not (busy or probing) or self._store_failing:
            return
        now = self._clock()
        queue = self._config.queue
        times = (self._times, *self._times_of.values())
        warn_after = min((one.warn_after for one in times if one.warn_after), default=math.inf)
        lifetime = min(one.lifetime for one in times)
        for envelope in self._store.overdue(now, now - warn_after, now - lifetime, now - queue.bounce_lifetime, _JUDGED):
            over: list[RecipientState] = []
            rest: list[RecipientState] = []
            for recipient in envelope.recipients:
                (over if self._is_over(envelope, recipient, now) else rest).append(recipient)
            if rest:
                self._release(Envelope(envelope.id, envelope.sender, rest))
            if over:
                outcomes = {recipient.number: _last(recipient) for recipient in over}
                self._put(Job(envelope, over, None, _OWN, "", outcomes, attempted=False), 0)

    def _is_over(self, envelope: Envelope, recipient: RecipientState, now: float) -> bool:
        """Whether something is due by time alone."""
        times = self._times_for(envelope, recipient)
        age_s = now - envelope.received_at
        return age_s >= times.lifetime or (0 < times.warn_after <= age_s and bool(envelope.sender) and not recipient.warned)

    def _publish(self) -> None:
        """Shows operators what is under way and which lanes are closed, where that has changed."""
        now = self._clock()
        lanes = self.lanes
        state: dict[str, Any] | None = None
        if lanes.under_way or any(lanes.closed()):
            attempts = [{"id": job.envelope.id, "to": [str(recipient.address) for recipient in job.recipients],
                         "transport": job.transport, "next_hop": job.next_hop, "since": began}
                        for job, (_, began) in list(lanes.under_way.items())[:_PUBLISHED] if began <= now - TICK_S]
            closed = [{"lane": lane.name, "until": until, "reason": lanes.reason(lane)}
                      for (lane, until), _ in zip(lanes.closed(), range(_PUBLISHED), strict=False)]
            state = {"under_way": len(lanes.under_way), "attempts": attempts, "closed": closed}
        if state != self._published or (state and now - self._published_at >= _PUBLISH_S):
            self._published, self._published_at = state, now
            self._store.publish(state)

    # --- a delivery attempt ---------------------------------------------------------------------------------------

    def _run(self, lane: Lane, job: Job) -> Health:
        """One attempt, on behalf of its lane: deliver, then settle."""
        self._leave(job)
        self._running += len(job.recipients)
        try:
            return self._attempt(lane, job)
        except gevent.GreenletExit:
            raise
        except Exception:  # the delivery attempt's containment: the lane lives on, the claim is given back
            self._log.error("delivery failed", id=job.envelope.id, traceback=traceback.format_exc())
            self._left_in_store = True
            self._release(Envelope(job.envelope.id, job.envelope.sender, job.recipients))
            return Health.UNKNOWN
        finally:
            self._done(job)

    def _attempt(self, lane: Lane, job: Job) -> Health:
        envelope, recipients = job.envelope, job.recipients
        if recipients[0].status == HELD:
            self._hold(job)
            return Health.UNKNOWN
        if job.outcomes is not None:
            self._settle(job, job.outcomes, 0.0)
            return Health.UNKNOWN
        if not self._is_ours(envelope.id):
            self._log.warning("claim was taken over, not tried", id=envelope.id, recipients=len(recipients))
            self._release(Envelope(envelope.id, envelope.sender, recipients))
            return Health.UNKNOWN
        message = job.message
        # only what comes straight from intake is certain not to have been tried by a worker that died since
        first_attempt = message is not None and not job.again
        if message is None:
            message = self._load(envelope.id)
            if message is None:
                return Health.UNKNOWN  # an operator deleted it
            job.message = message
        if not job.again and message.count("Received") > self._hops:  # RFC 5321 section 6.3
            self._settle(job, dict.fromkeys((recipient.number for recipient in recipients), _LOOP), 0.0)
            return Health.UNKNOWN
        started = self._clock()
        delivery = Delivery(envelope, recipients, message, job.transport, job.next_hop, first_attempt, job.attempts)
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
                lane.last_reply = outcome.words[:200]
            elif health is Health.UNKNOWN:
                health = Health.GOOD
            results[recipient.number] = outcome
        if lane.gate is not None and lane.gate.rules:
            self._heed(lane, (*job.attempts, *results.values()))
        self._settle(job, results, self._clock() - started)
        return health

    def _heed(self, lane: Lane, outcomes: Iterable[Outcome]) -> None:
        """Lets `on_reply` judge what a remote said; what is deferred waits as long as its lane does."""
        pauses: dict[Reply, float] = {}  # one answer for many recipients is judged once
        for outcome in outcomes:
            if outcome.own or outcome.status is Status.DELIVERED:
                continue
            reply = outcome.reply
            pause_s = pauses.get(reply)
            if pause_s is None:
                pause_s = pauses[reply] = self.lanes.heard(lane, reply)
                if pause_s:
                    self._log.warning("lane suspended", lane=lane.name, pause_s=round(pause_s), reply=reply)
            if pause_s and outcome.status is Status.DEFERRED:
                outcome.retry_after_s = max(outcome.retry_after_s or 0.0, pause_s)

    def _is_ours(self, queue_id: str) -> bool:
        """Whether no other node has taken the message over meanwhile, however long the store takes to tell."""
        return bool(self._insist(self._store.holds, queue_id))

    def _load(self, queue_id: str) -> Message | None:
        """The message's octets, however long the store takes to give them."""
        message: Message | None = self._insist(self._store.message, queue_id)
        return message

    def _insist(self, question: Callable[[str], Any], queue_id: str) -> Any:
        pause_s = 0.1
        while True:
            try:
                return question(queue_id)
            except StoreError as error:
                self._log.error("store failing", id=queue_id, error=str(error))
                gevent.sleep(pause_s)
                pause_s = min(5.0, pause_s * 2)

    def _hold(self, job: Job) -> None:
        """Records recipients that the route holds for the operator."""
        event = Event(job.envelope.id, self._clock(), "held", {"to": [str(r.address) for r in job.recipients], "reason": "route"})
        self._record(Settlement(job.envelope, job.recipients, [event]))

    # --- settling -------------------------------------------------------------------------------------------------

    def _settle(self, job: Job, outcomes: dict[int, Outcome], elapsed_s: float) -> None:
        """Turns outcomes into states, history and reports, records them, then tells log and hooks."""
        envelope = job.envelope
        now = self._clock()
        events: list[Event] = []
        gave_up: list[Notice] = []
        late: list[Notice] = []
        arrived: list[Notice] = []
        told: list[tuple[RecipientState, Outcome, str, str, str]] = []
        for outcome in job.attempts:
            events.append(Event(envelope.id, now, "attempt", {
                "transport": job.transport, "next_hop": job.next_hop, "remote": outcome.remote, "reply": str(outcome.reply)[:MAX_SAID]}))
        for recipient in job.recipients:
            outcome = outcomes[recipient.number]
            said = str(outcome.reply)[:MAX_SAID]
            if job.attempted:
                recipient.attempts += 1
                recipient.last_reply = outcome.words[:MAX_SAID] if outcome.own else said
            status = outcome.status
            if status is Status.DEFERRED:
                status = self._defer(job, recipient, outcome, now, late)
                if status is Status.DEFERRED and not job.attempted:
                    continue
            if status is Status.DELIVERED:
                recipient.status = DELIVERED
                # RFC 3461 section 5.2.2: a next hop that took over and knows DSN reports success itself
                if "SUCCESS" in recipient.notify and (outcome.relayed or not outcome.remote):
                    arrived.append(Notice(recipient, outcome))
            elif status is Status.FAILED:
                recipient.status = FAILED
                gave_up.append(Notice(recipient, outcome, bounce.EXPIRED if outcome.status is Status.DEFERRED else "", job.attempted))
            to = str(recipient.address)
            data = {"to": to, "transport": job.transport, "next_hop": job.next_hop, "remote": outcome.remote,
                    "reply": said, "attempts": recipient.attempts}
            if outcome.tls:
                data["tls"] = outcome.tls
            if status is not outcome.status:
                data["reason"] = "expired"
            events.append(Event(envelope.id, now, status.value, data))
            told.append((recipient, outcome, status.value, to, said))
        births = self._reports(job, gave_up, late, arrived, events, now) if gave_up or late or arrived else ()
        self._record(Settlement(envelope, job.recipients, events, births))
        self._tell(job, told, elapsed_s, now)
        for born, text in births:
            self.accept(born, text)
        if gave_up and self._plugins.has("on_bounced"):
            self._plugins.on("on_bounced", envelope, [notice.recipient for notice in gave_up])

    def _times_for(self, envelope: Envelope, recipient: RecipientState) -> Times:
        """[queue] as it is for a recipient: its domain's own section, or that of the nearest domain above with a dot before it."""
        times = self._times
        if self._times_of:
            host = recipient.address.host
            above = (f".{parent}" for parent in domains_above(host))
            times = next((self._times_of[name] for name in (host, *above) if name in self._times_of), times)
        if not envelope.sender:
            return times._replace(lifetime=min(times.lifetime, self._config.queue.bounce_lifetime))
        return times

    def _defer(self, job: Job, recipient: RecipientState, outcome: Outcome, now: float, late: list[Notice]) -> Status:
        """Sets a deferred recipient's next attempt, or finds its lifetime over; notes who is due a delay notice."""
        envelope = job.envelope
        retry, lifetime, warn_after = self._times_for(envelope, recipient)
        expires_at = envelope.received_at + lifetime
        if now >= expires_at:
            return Status.FAILED
        at = recipient.next_attempt_at
        if job.attempted:
            gap = retry[min(recipient.attempts, len(retry)) - 1] if outcome.retry_after_s is None else outcome.retry_after_s
            at = min(now + gap * (1 + random.random() * 0.1), expires_at)
        if envelope.sender and not recipient.warned and warn_after:
            warn_at = envelope.received_at + warn_after
            if now >= warn_at:
                recipient.warned = True
                if bounce.wants(recipient, "DELAY"):
                    late.append(Notice(recipient, outcome, tried=job.attempted))
            else:
                at = min(at, warn_at)
        recipient.status = QUEUED
        recipient.next_attempt_at = at
        return Status.DEFERRED

    def _reports(self, job: Job, gave_up: list[Notice], late: list[Notice], arrived: list[Notice], events: list[Event],
                 now: float) -> list[tuple[Envelope, Message]]:
        """The DSNs that an attempt calls for (RFC 3461 section 5.2)."""
        envelope = job.envelope
        if not envelope.sender:  # RFC 5321 section 4.5.5: no report about a message with the null sender
            for recipient, outcome, *_ in gave_up:
                self._log.warning("bounce undeliverable", id=envelope.id, to=recipient.address, reply=outcome.reply)
            if not gave_up or self._double_bounce is None or "double_bounce" in envelope.facts:
                return []
            return [self._report(bounce.FAILED, job, gave_up, self._double_bounce, events, now)]
        failures = [notice for notice in gave_up if bounce.wants(notice.recipient, "FAILURE")]
        return [self._report(kind, job, notices, envelope.sender, events, now)
                for kind, notices in ((bounce.FAILED, failures), (bounce.DELAYED, late), (bounce.DELIVERED, arrived)) if notices]

    def _report(self, kind: str, job: Job, notices: list[Notice], to: Address, events: list[Event], now: float) -> tuple[Envelope, Message]:
        """One report, with its events."""
        envelope = job.envelope
        if job.message is None:
            job.message = self._load(envelope.id)
        queue_id = self._ids.new()
        lifetime = min(self._times_for(envelope, notice.recipient).lifetime for notice in notices)
        text = bounce.build(kind, envelope, notices, job.message, hostname=self._services.hostname, queue_id=queue_id, now=now,
                            retry_until=envelope.received_at + lifetime, to=to,
                            whole=bounce.returns_whole(envelope, self._config.queue.return_message))
        born = bounce.envelope_for(envelope, to, queue_id, text.size, now)
        if not envelope.sender:
            born.facts["double_bounce"] = True  # it is not to be reported in its turn
        self._dress(born, text)
        born.size = text.size
        events.append(Event(envelope.id, now, "bounced", {"kind": kind, "report": queue_id, "sender": str(to),
                                                          "to": [str(notice.recipient.address) for notice in notices]}))
        events.append(Event(queue_id, now, "received", {"from": "", "to": [str(to)], "about": envelope.id, "kind": kind, "size": text.size}))
        return born, text

    def _report_expansion(self, envelope: Envelope, message: Message) -> None:
        """Tells a sender who asked for it that aliases were reached and expanded (RFC 3461 section 5.2.7.3)."""
        now = self._clock()
        notices = [Notice(RecipientState(number, stored_address(address), orcpt=orcpt), delivered())
                   for number, (address, orcpt) in enumerate(envelope.facts.pop("expanded"))]
        if not envelope.sender:
            return
        events: list[Event] = []
        birth = self._report(bounce.EXPANDED, Job(envelope, [notice.recipient for notice in notices], message, _OWN, ""), notices,
                             envelope.sender, events, now)
        self._record(Settlement(envelope, (), events, [birth]))
        self.accept(*birth)

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

    def _tell(self, job: Job, told: list[tuple[RecipientState, Outcome, str, str, str]], elapsed_s: float, now: float) -> None:
        """One log line a recipient, and the on_delivery hooks."""
        envelope = job.envelope
        hooks = self._plugins.has("on_delivery")
        for outcome in job.attempts:
            self._log.info("attempt", id=envelope.id, transport=job.transport, next_hop=job.next_hop, remote=outcome.remote,
                           reply=outcome.reply)
        for recipient, outcome, event, to, said in told:
            self._log.info(event, id=envelope.id, to=to, transport=job.transport, next_hop=job.next_hop, remote=outcome.remote,
                           attempts=recipient.attempts, reply=said, delay_s=round(now - envelope.received_at, 3), tls=outcome.tls or None)
            if hooks:
                self._plugins.on("on_delivery", envelope, recipient, outcome, elapsed_s)


def _refusal(recipient: RecipientState) -> Outcome:
    """The failure of a recipient that is not to be delivered, in the words of who said so."""
    reply = _parsed(recipient.refused)
    return _OPERATOR if reply is None or not reply.permanent else Outcome(Status.FAILED, reply)


def _last(recipient: RecipientState) -> Outcome:
    """What a recipient was told last, as the deferral that it waits with."""
    reply = _parsed(recipient.last_reply)
    if reply is not None and reply.transient:
        return Outcome(Status.DEFERRED, reply, own=False)
    return deferred(recipient.last_reply or "There was no chance to try", enhanced="4.4.1")


def _parsed(text: str) -> Reply | None:
    try:
        return Reply.parse([text.encode()])
    except ValueError:
        return None
