"""Bounds on what one client, network or user may do, counted by all workers together in the shared state.

Hooks: check_connect (connections at a time, new ones a minute), check_mail (messages), permit_rcpt and check_rcpt (recipients, and those
that do not exist), check_message (octets), on_refused, on_session_closed, on_worker_stopping. Stand it first in `[plugins] enable`: what
is over its bound shall not cost the others anything, and learns no more about which recipients exist.

Whose: who has logged in is counted by user, everybody else by address (IPv6: by /64). Networks in `[domains] relay_from` and
`exempt` are not counted by address. An allowance such as `100/h` begins anew with each hour of the clock; `0` is none.

Keys of `[plugin:rate_limit]`: `connections_per_ip` and `connections_per_subnet` (at a time, a /24 or /48; default: those of [limits], which
hold for each worker alone), `new_connections_per_ip = 60/m`, `messages_per_ip = 1000/h`, `recipients_per_ip = 5000/h`,
`messages_per_user = 300/h`, `recipients_per_user = 1000/h`, `octets_per_user = 2GB/d`, `unknown_recipients_per_session = 10`,
`unknown_recipients_per_ip = 50/h`, `exempt`.

Replies: 421 4.7.0 and the end of the connection (connections, unknown recipients), 450 4.7.1 (all else).

No message waits for a disk: a worker adds up what it sees and hands it on once a second, with one question for all. In the last fifth of an
allowance, or the last twenty, and about who was not seen for some seconds it asks each time; so what passes a bound is at most what came to
several workers within one second. Where the state can't be kept each worker counts alone.
"""

from __future__ import annotations

import ipaddress
import re
import secrets
from collections import Counter, OrderedDict
from typing import Annotated, Any, NamedTuple

import gevent
from pydantic import BeforeValidator, Field

from gmta import PluginConfig, Verdict, defer, disconnect, hookimpl
from gmta.config import Network
from gmta.mail.address import client_network
from gmta.mail.message import Message
from gmta.mail.reply import Reply
from gmta.mail.session import Recipient, Session, Transaction

FLUSH_S = 1.0  # between two exchanges with the other workers
STALE_S = 10.0  # a worker that says nothing of its connections for so long has none
IDLE_S = 5.0  # who was not heard of for so long may have been busy at another worker
MOST = 10000  # clients and users remembered by a worker
LAST = 20.0  # of an allowance: from here on every one is asked for
UNKNOWN = frozenset({"5.1.1", "5.1.2", "5.1.6", "5.1.10"})  # RFC 3463 section 3.2: no such mailbox, no such domain, moved; RFC 7505

_ALLOWANCE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:I?B)?\s*/\s*(\d*)\s*([smhd])\w*\Z", re.I)
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


class Allowance(NamedTuple):
    """So much in a window of so many seconds; none where amount is 0."""

    amount: float
    window_s: int

    def __str__(self) -> str:
        return f"{self.amount:g}/{self.window_s}s"


def _allowance(value: Any) -> Any:
    if isinstance(value, Allowance):
        return value
    text = str(value).strip()
    if text in ("", "0"):
        return Allowance(0, 1)
    match = _ALLOWANCE.match(text)
    if match is None or match[3] == "0":
        raise ValueError("an allowance such as 60/m, 1000/h, 20/5m or 2GB/d, or 0 for none")
    return Allowance(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " "), int(match[3] or 1) * _SECONDS[match[4].lower()])


Allowed = Annotated[Allowance, BeforeValidator(_allowance)]


class Config(PluginConfig):
    """Keys of [plugin:rate_limit]."""

    connections_per_ip: int | None = Field(None, ge=0, description="at a time; default: of [limits]")
    connections_per_subnet: int | None = Field(None, ge=0, description="at a time, a /24 or /48; default: of [limits]")
    new_connections_per_ip: Allowed = "60/m"  # type: ignore[assignment]
    messages_per_ip: Allowed = "1000/h"  # type: ignore[assignment]
    recipients_per_ip: Allowed = "5000/h"  # type: ignore[assignment]
    messages_per_user: Allowed = "300/h"  # type: ignore[assignment]
    recipients_per_user: Allowed = "1000/h"  # type: ignore[assignment]
    octets_per_user: Allowed = "2GB/d"  # type: ignore[assignment]
    unknown_recipients_per_session: int = Field(10, ge=0, description="0: no bound")
    unknown_recipients_per_ip: Allowed = "50/h"  # type: ignore[assignment]
    exempt: list[Network] = Field([], description="networks that are not counted by address")


# --- counters -----------------------------------------------------------------------------------------------------


class Tally:
    """What one client or user has used of one kind. window: its number.  shared: what all workers had when they were last asked, at
    heard_at.  since: what this one has counted after that.  key: in the state, without the window."""

    __slots__ = ("heard_at", "key", "shared", "since", "window")

    def __init__(self, key: str, window: int, shared: float, heard_at: float) -> None:
        self.key = key
        self.window = window
        self.shared = shared
        self.since = 0.0
        self.heard_at = heard_at


class Ledger:
    """The clients and users that this worker has seen, and the exchange with the others through the state."""

    def __init__(self, services: Any) -> None:
        self._state = services.state
        self._clock = services.clock
        self._spawn = services.spawn
        self._known: OrderedDict[str, dict[str, Tally]] = OrderedDict()
        self._waiting: dict[str, tuple[Tally, int]] = {}
        self._sleeps = False

    def spend(self, name: str, kind: str, amount: float, allowance: Allowance) -> bool:
        """Counts `amount` where the allowance has room for it; False, and nothing is counted, where it has none."""
        most, window_s = allowance
        if not most:
            return True
        now = self._clock()
        tally = self._tally(name, kind, window_s, now)
        left = most - tally.shared - tally.since - amount
        if left < 0:
            return False
        tally.since += amount
        if left >= max(LAST * amount, most / 5) and now - tally.heard_at <= IDLE_S:
            self._later(tally, window_s)
            return True
        self._exchange([(tally, window_s)])
        if tally.shared <= most:
            return True
        tally.since -= amount  # others were first
        self._later(tally, window_s)
        return False

    def count(self, name: str, kind: str, allowance: Allowance) -> None:
        """Counts one, whether there is room for it or not."""
        if allowance.amount:
            tally = self._tally(name, kind, allowance.window_s, self._clock())
            tally.since += 1
            self._later(tally, allowance.window_s)

    def has_room(self, name: str, kind: str, allowance: Allowance) -> bool:
        """Whether the allowance is not used up."""
        if not allowance.amount:
            return True
        now = self._clock()
        tally = self._tally(name, kind, allowance.window_s, now)
        if now - tally.heard_at >= FLUSH_S:
            found = self._state.get(f"{tally.key}:{tally.window}", 0)
            tally.shared, tally.heard_at = max(tally.shared, found if isinstance(found, (int, float)) else 0), now
        return tally.shared + tally.since < allowance.amount

    def _tally(self, name: str, kind: str, window_s: int, now: float) -> Tally:
        """What `name` has used in the window of now; who was not seen yet is learned from the state, all kinds with one question."""
        window = int(now // window_s)
        kinds = self._known.get(name)
        if kinds is None:
            kinds = self._learn(name, now)
        tally = kinds.get(kind)
        if tally is None:
            tally = kinds[kind] = Tally(f"rate:{name}:{kind}", window, 0.0, now)
        elif tally.window != window:
            tally.window, tally.shared, tally.since, tally.heard_at = window, 0.0, 0.0, now
        return tally

    def _learn(self, name: str, now: float) -> dict[str, Tally]:
        kinds: dict[str, Tally] = {}
        prefix = f"rate:{name}:"
        for key, value in self._state.scan(prefix, 100):
            kind, _, window = key[len(prefix):].rpartition(":")
            if window.isdigit() and isinstance(value, (int, float)) and (kind not in kinds or kinds[kind].window < int(window)):
                kinds[kind] = Tally(prefix + kind, int(window), float(value), now)
        kinds = self._known.setdefault(name, kinds)  # another session of the same client may have asked meanwhile
        if len(self._known) > MOST:
            self.flush()
            while len(self._known) > MOST * 9 // 10:
                self._known.popitem(last=False)
        return kinds

    def _later(self, tally: Tally, window_s: int) -> None:
        self._waiting[tally.key] = (tally, window_s)
        if not self._sleeps:
            self._sleeps = True
            self._spawn(self._flush_soon)

    def _flush_soon(self) -> None:
        gevent.sleep(FLUSH_S)
        self._sleeps = False
        self.flush()

    def flush(self) -> None:
        """Tells the other workers what this one has counted, and learns what they have."""
        waiting, self._waiting = self._waiting, {}
        if waiting:
            self._exchange(list(waiting.values()))

    def _exchange(self, tallies: list[tuple[Tally, int]]) -> None:
        windows, amounts = [], []
        for tally, window_s in tallies:
            windows.append(tally.window)
            amounts.append((f"{tally.key}:{tally.window}", tally.since, float(window_s)))
            tally.shared += tally.since  # counts while the answer is under way
            tally.since = 0.0
        for (tally, _), window, total in zip(tallies, windows, self._state.add_all(amounts), strict=True):
            if tally.window == window:
                tally.shared, tally.heard_at = total, self._clock()


class Presence:
    """How many connections each client and network has at this moment: this worker's, and what the others last said of theirs."""

    def __init__(self, services: Any, per_ip: int, per_subnet: int) -> None:
        self._state = services.state
        self._clock = services.clock
        self._spawn = services.spawn
        self._most = (per_ip, per_subnet)
        self._key = f"connections:{secrets.token_hex(8)}"
        workers = services.config.gmta.workers
        self._untold = 0.5 / workers  # of a bound: what a worker has before it asks, so that half of the bound is the most they don't know
        self._told_from = tuple(max(1, most // (8 * workers)) for most in self._most)  # fewer are not worth a word
        self._own: Counter[str] = Counter()
        self._others: Counter[str] = Counter()
        self._told: dict[str, int] = {}
        self._told_at = 0.0
        self._watching = False

    def enter(self, ip: str) -> bool:
        """Counts one more; False, and nothing is counted, where that is too many."""
        names = (ip, subnet(ip))
        for name in names:
            self._own[name] += 1
        bounds = [(name, most) for name, most in zip(names, self._most, strict=True) if most]
        too_many = any(self._own[name] > most for name, most in bounds)
        if not too_many and any(self._own[name] + self._others[name] > most * self._untold for name, most in bounds):
            self.exchange()
            too_many = any(self._own[name] + self._others[name] > most for name, most in bounds)
        if too_many:
            self.leave(ip)
            return False
        if not self._watching:
            self._watching = True
            self._spawn(self._watch)
        return True

    def leave(self, ip: str) -> None:
        """Counts one less."""
        for name in (ip, subnet(ip)):
            self._own[name] -= 1
            if self._own[name] <= 0:
                del self._own[name]

    def _watch(self) -> None:
        """Goes on while there are connections, or the others believe so."""
        while True:
            gevent.sleep(FLUSH_S)
            self.exchange()
            if not self._own and not self._told:
                self._watching = False
                return

    def exchange(self) -> None:
        """Tells the other workers what has changed, and hears of theirs."""
        now = self._clock()
        tell = {name: count for name, count in self._own.items() if count >= self._told_from["/" in name]}
        if tell != self._told or now - self._told_at > STALE_S / 3:
            self._told, self._told_at = tell, now
            self._state.set(self._key, tell, STALE_S)
        others: Counter[str] = Counter()
        for key, counts in self._state.scan("connections:", 1024):
            if key != self._key and isinstance(counts, dict):
                others.update({name: count for name, count in counts.items() if isinstance(count, int)})
        self._others = others


def subnet(ip: str) -> str:
    """The /24 or /48 of an address."""
    if ":" in ip:
        return str(ipaddress.ip_network(f"{ip}/48", strict=False))
    return f"{ip.rpartition('.')[0]}.0/24"


# --- the plugin ---------------------------------------------------------------------------------------------------


class Plugin:
    """Asks ledger and presence; what is known of a session besides is how many recipients were unknown."""

    def __init__(self, config: Config, services: Any) -> None:
        self._config = config
        limits = services.config.limits
        self._ledger = Ledger(services)
        self._presence = Presence(services, limits.connections_per_ip if config.connections_per_ip is None else config.connections_per_ip,
                                  limits.connections_per_subnet if config.connections_per_subnet is None else config.connections_per_subnet)
        self._inside: dict[str, str] = {}  # session id -> the address that it counts for, which a proxy may replace later
        self._unknown: dict[str, int] = {}  # recipients of a session that do not exist

    def _counted(self, session: Session) -> bool:
        """Whether the address is counted."""
        if session.relay_network or session.role == "local":
            return False
        networks = self._config.exempt
        return not networks or not any(ipaddress.ip_address(session.peer_ip) in network for network in networks)

    def _whose(self, session: Session) -> tuple[str, bool] | None:
        """(account, whether it is a user's), or None for who is not counted."""
        if session.user is not None:
            return f"user {session.user.lower()}", True
        return (client_network(session.peer_ip), False) if self._counted(session) else None

    @hookimpl
    def check_connect(self, session: Session) -> Verdict | None:
        """421 for too many connections, at a time or a minute, and for who has tried too many recipients that do not exist."""
        self._leave(session)
        if not self._counted(session):
            return None
        config, name = self._config, client_network(session.peer_ip)
        if not self._ledger.has_room(name, "unknown", config.unknown_recipients_per_ip):
            return disconnect("Too many unknown recipients, try again later", 421, "4.7.0")
        if not self._ledger.spend(name, "connections", 1, config.new_connections_per_ip):
            return disconnect("Too many new connections, try again later", 421, "4.7.0")
        if not self._presence.enter(session.peer_ip):
            return disconnect("Too many connections, try again later", 421, "4.7.0")
        self._inside[session.id] = session.peer_ip
        return None

    def _leave(self, session: Session) -> None:
        ip = self._inside.pop(session.id, None)
        if ip is not None:
            self._presence.leave(ip)

    @hookimpl
    def on_session_closed(self, session: Session) -> None:
        """The connection counts no more."""
        self._unknown.pop(session.id, None)
        self._leave(session)

    @hookimpl
    def check_mail(self, session: Session, transaction: Transaction) -> Verdict | None:
        """450 past the messages, or the octets, that a client or user may send; 421 past the unknown recipients of a session."""
        if self._harvests(session):
            return disconnect("Too many unknown recipients, closing", 421, "4.7.0")
        whose = self._whose(session)
        if whose is None:
            return None
        name, user = whose
        config = self._config
        if user and not self._ledger.has_room(name, "octets", config.octets_per_user):
            return defer("Too much mail by size, try again later", 450, "4.7.1")
        if not self._ledger.spend(name, "messages", 1, config.messages_per_user if user else config.messages_per_ip):
            return defer("Too many messages, try again later", 450, "4.7.1")
        return None

    @hookimpl
    def permit_rcpt(self, session: Session, transaction: Transaction, recipient: Recipient) -> Verdict | None:
        """450 for every recipient once a session has named too many that do not exist; grants nothing."""
        return defer("Too many unknown recipients, try again later", 450, "4.7.1") if self._harvests(session) else None

    @hookimpl
    def check_rcpt(self, session: Session, transaction: Transaction, recipient: Recipient) -> Verdict | None:
        """450 past the recipients that a client or user may have."""
        whose = self._whose(session)
        if whose is None:
            return None
        name, user = whose
        if self._ledger.spend(name, "recipients", 1, self._config.recipients_per_user if user else self._config.recipients_per_ip):
            return None
        return defer("Too many recipients, try again later", 450, "4.7.1")

    @hookimpl
    def check_message(self, session: Session, transaction: Transaction, message: Message) -> Verdict | None:
        """450 past the octets that a user may send."""
        whose = self._whose(session)
        if whose is None or not whose[1] or self._ledger.spend(whose[0], "octets", message.size, self._config.octets_per_user):
            return None
        return defer("Too much mail by size, try again later", 450, "4.7.1")

    @hookimpl
    def on_refused(self, session: Session, transaction: Transaction | None, stage: str, reply: Reply) -> None:
        """Counts recipients that do not exist."""
        if stage in ("rcpt", "vrfy", "expn") and reply.enhanced in UNKNOWN and session.user is None and self._counted(session):
            self._unknown[session.id] = self._unknown.get(session.id, 0) + 1
            self._ledger.count(client_network(session.peer_ip), "unknown", self._config.unknown_recipients_per_ip)

    def _harvests(self, session: Session) -> bool:
        most = self._config.unknown_recipients_per_session
        return bool(most) and self._unknown.get(session.id, 0) >= most

    @hookimpl
    def on_worker_stopping(self) -> None:
        """Hands on what is counted so far."""
        self._ledger.flush()
