"""What stands in for the world in a test: clock, log, store, and makers of the values that hooks are given.

`make_services` gives the real Services on a real, checked configuration; only clock, log and resolver are a test's own. The
store is whole, but in memory: `full` and `failing` make it refuse. Nothing here waits or touches the network.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from gmta.config import Config, ConfigError, Section, load
from gmta.hookspecs import PluginConfig
from gmta.mail.address import Address
from gmta.mail.envelope import DELIVERED, FAILED, QUEUED, Envelope, RecipientState
from gmta.mail.message import FileBody, Message
from gmta.mail.session import Recipient, Session, TlsInfo, Transaction
from gmta.plugins import find
from gmta.queue.store import Event, Settlement, StoreError, StoreFull
from gmta.services import Services
from gmta.services.log import Log
from gmta.services.metrics import Metrics
from gmta.services.state import MemoryState

START_AT = 1767607200.0  # 2026-01-05 10:00:00 UTC: what a FakeClock shows first

_BASE = """
[gmta]
include = own.ini
hostname = mx.example.test
workers = 1
[listener:mx]
address = 127.0.0.1:2525
[listener:submission]
address = 127.0.0.1:2587
role = submission
[domains]
local = example.test
[limits]
error_delay = 0s
[transport:mailbox]
type = memory
[route]
local = mailbox
* = mailbox
"""


class FakeClock:
    """A clock that stands still: call it for Unix seconds, `advance` it."""

    def __init__(self, now: float = START_AT) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        """Lets time pass."""
        self.now += seconds


class FakeDeadlines:
    """What gmta.services.deadlines is, without a sweeper: whoever sets the clock expires what is late."""

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock
        self.watched: list[Any] = []

    def watch(self, one: Any) -> None:
        """Begins to look at one's deadline."""
        self.watched.append(one)

    def forget(self, one: Any) -> None:
        """Looks at it no more."""
        self.watched.remove(one)


class FakeServices(Services):
    """Services whose deadlines are a FakeClock's, with state in memory."""

    def __init__(self, config: Config, log: Log, clock: FakeClock, resolver: Any) -> None:
        super().__init__(config, log, Metrics(), clock=clock, resolver=resolver)
        self._still = FakeDeadlines(clock)
        self._state = MemoryState(clock)

    @property
    def deadlines(self) -> Any:
        """The deadlines of this server's connections."""
        return self._still


class MemoryLog(Log):
    """A Log that keeps its lines: (level, event, fields)."""

    def __init__(self, level: str = "debug") -> None:
        super().__init__(level)
        self.lines: list[tuple[str, str, dict[str, Any]]] = []

    def _write(self, level: str, event: str, fields: dict[str, Any]) -> None:
        self.lines.append((level, event, fields))

    def of(self, event: str) -> list[dict[str, Any]]:
        """The fields of every line about that event."""
        return [fields for _, found, fields in self.lines if found == event]


class MemoryStore:
    """The Store in memory.

    full, failing: while set, `put` and `record` raise StoreFull or StoreError.  messages: queue id -> Envelope, in the order they
    came; a message leaves when its recipients are settled.  history: all Events.  published: what `publish` was last given.
    """

    def __init__(self) -> None:
        self.full = False
        self.failing = False
        self.messages: dict[str, Envelope] = {}
        self.history: list[Event] = []
        self.published: dict[str, Any] | None = None
        self._octets: dict[str, bytes] = {}
        self._claimed: set[tuple[str, int]] = set()
        self._directory = ""

    def _judge(self) -> None:
        if self.full:
            raise StoreFull("the store is full")
        if self.failing:
            raise StoreError("the store fails")

    def put(self, envelope: Envelope, message: Message, events: Sequence[Event] = ()) -> None:
        """Takes the message."""
        self._judge()
        self._octets[envelope.id] = b"".join(message.chunks())
        self.messages[envelope.id] = replace(envelope, recipients=[replace(state) for state in envelope.recipients])
        self._claimed |= {(envelope.id, state.number) for state in envelope.recipients}
        self.history += events

    def record(self, settlement: Settlement) -> None:
        """Writes an attempt's results."""
        self._judge()
        queue_id = settlement.envelope.id
        kept = self.messages.get(queue_id)
        for state in settlement.changed:
            self._claimed.discard((queue_id, state.number))
            if kept is not None:
                kept.recipients[state.number] = replace(state)
        self.history += settlement.events
        for envelope, message in settlement.births:
            self.put(envelope, message)
        if kept is not None and all(state.status in (DELIVERED, FAILED) for state in kept.recipients):
            del self.messages[queue_id], self._octets[queue_id]

    def due(self, now: float, limit: int, busy_lanes: Iterable[str] = (), probed_lanes: Iterable[str] = (),
            lane_limit: int | None = None) -> list[Envelope]:
        """Claims what is due."""
        room = dict.fromkeys(busy_lanes, 0) | dict.fromkeys(probed_lanes, 1)
        ready: list[tuple[float, str, int]] = []
        for at, queue_id, number, lane in sorted((state.next_attempt_at, queue_id, state.number, f"{state.transport}:{state.next_hop}")
                                                 for queue_id, state in self._waiting() if state.next_attempt_at <= now):
            left = room.get(lane, limit if lane == ":" or lane_limit is None else lane_limit)
            if left > 0 and len(ready) < limit:
                room[lane] = left - 1
                ready.append((at, queue_id, number))
        return self._claim(ready)

    def _claim(self, rows: Iterable[tuple[float, str, int]]) -> list[Envelope]:
        found: dict[str, Envelope] = {}
        for _, queue_id, number in rows:
            self._claimed.add((queue_id, number))
            envelope = found.setdefault(queue_id, replace(self.messages[queue_id], recipients=[]))
            envelope.recipients.append(replace(self.messages[queue_id].recipients[number]))
        return list(found.values())

    def overdue(self, now: float, unwarned_before: float, before: float, reports_before: float, limit: int) -> list[Envelope]:
        """Claims what is due, was not taken, and is old."""
        over = []
        for queue_id, state in self._waiting():
            envelope = self.messages[queue_id]
            at = envelope.received_at
            if state.next_attempt_at <= now and (at <= before or (at <= unwarned_before and not state.warned)
                                                 or (at <= reports_before and not envelope.sender)):
                over.append((at, queue_id, state.number))
        return self._claim(over[:limit])

    def publish(self, state: dict[str, Any] | None) -> None:
        """Keeps it as `published`."""
        self.published = state

    def _waiting(self) -> list[tuple[str, RecipientState]]:
        return [(queue_id, state) for queue_id, envelope in self.messages.items() for state in envelope.recipients
                if state.status == QUEUED and (queue_id, state.number) not in self._claimed]

    def next_due_at(self) -> float | None:
        """When the earliest unclaimed recipient falls due."""
        return min((state.next_attempt_at for _, state in self._waiting()), default=None)

    def release(self, envelope: Envelope) -> None:
        """Gives back claims."""
        for state in envelope.recipients:
            self._claimed.discard((envelope.id, state.number))
            if state.transport and envelope.id in self.messages:
                kept = self.messages[envelope.id].recipients[state.number]
                kept.transport, kept.next_hop, kept.last_reply = state.transport, state.next_hop, state.last_reply

    def holds(self, queue_id: str) -> bool:
        """Whether any recipient is claimed."""
        return any(claimed == queue_id for claimed, _ in self._claimed)

    def message(self, queue_id: str) -> Message | None:
        """A queued message."""
        raw = self._octets.get(queue_id)
        return None if raw is None else Message.from_bytes(raw)

    def all_recipients(self, queue_id: str) -> list[RecipientState]:
        """Every recipient of a queued message."""
        envelope = self.messages.get(queue_id)
        return [] if envelope is None else [replace(state) for state in envelope.recipients]

    def changed_outside(self) -> bool:
        """Nobody else has this store."""
        return False

    def adopt(self) -> int:
        """Nobody died."""
        return 0

    def new_spool_file(self, queue_id: str) -> str:
        """A path in a directory of this store's, which `close` removes."""
        if not self._directory:
            self._directory = tempfile.mkdtemp(prefix="gmta-")
        return os.path.join(self._directory, queue_id)

    def has_room(self, size_bytes: int) -> bool:
        """False while `full`."""
        return not self.full

    def listen(self, wake: Callable[[], None]) -> None:
        """Nobody else has this store."""

    def close(self) -> None:
        """Removes the spool."""
        self._claimed.clear()
        if self._directory:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = ""


# --- values -----------------------------------------------------------------------------------------------------


def make_session(*, role: str = "mx", peer_ip: str = "192.0.2.1", peer_name: str = "", helo: str = "client.example.com", esmtp: bool = True,
                 user: str | None = None, tls: bool = False, trusted: bool = False) -> Session:
    """A Session as hooks see it. trusted: the client is in [domains] relay_from."""
    session = Session("s1", role=role, listener=role, peer_ip=peer_ip, peer_port=40000, relay_network=trusted, opened_at=START_AT)
    session.peer_name = peer_name
    session.helo, session.esmtp, session.user = helo, esmtp, user
    session.tls = TlsInfo("TLSv1.3", "TLS_AES_256_GCM_SHA384", 256) if tls else None
    return session


def make_transaction(sender: str = "sender@example.com", recipients: Iterable[str] = ("user@example.test",), **facts: Any) -> Transaction:
    """A Transaction. facts: size, body, smtputf8, ret, envid, auth."""
    transaction = Transaction("Q1", Address.parse(sender), **facts)
    transaction.recipients += (Recipient(Address.parse(recipient)) for recipient in recipients)
    return transaction


def make_message(text: str | bytes = "From: sender@example.com\nSubject: a test\n\nHello\n") -> Message:
    """A Message; in a text the line ends are made CRLF, octets are taken as they are."""
    if isinstance(text, str):
        text = text.replace("\r\n", "\n").replace("\n", "\r\n").encode()
    return Message.from_bytes(text)


def make_envelope(sender: str = "sender@example.com", recipients: Iterable[str] = ("user@example.test",), **facts: Any) -> Envelope:
    """An Envelope whose recipients are all queued and due. facts: Envelope's other fields."""
    states = [RecipientState(number, Address.parse(recipient), next_attempt_at=START_AT) for number, recipient in enumerate(recipients)]
    return Envelope("Q1", Address.parse(sender), states, received_at=START_AT, **facts)


def make_file_message(path: str | Path, raw: bytes) -> Message:
    """A Message whose body is in a file, as one that was too big for memory; the file is written."""
    plain = Message.from_bytes(raw)
    Path(path).write_bytes(raw)
    start = len(plain.header) + len(plain.separator)
    return Message(plain.header, plain.separator, FileBody(str(path), start, len(raw) - start))


# --- configuration and services ---------------------------------------------------------------------------------


def ini_text(value: Any) -> str:
    """A Python value as an ini file has it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple, set, frozenset)):
        return ", ".join(map(ini_text, value))
    return str(value)


def make_config(given: str | Path | Mapping[str, Mapping[str, Any]] = "") -> Config:
    """A checked Config: host mx.example.test, local domain example.test, two listeners, all mail to the transport `mailbox`.

    given: more of an ini file, as text, path or {section: {key: value}}; its keys go before those. Raises ConfigError.
    """
    if isinstance(given, Mapping):
        given = "\n".join(f"[{section}]\n" + "\n".join(f"{key} = {ini_text(value)}" for key, value in keys.items())
                          for section, keys in given.items())
    with tempfile.TemporaryDirectory(prefix="gmta-") as folder:
        own = Path(folder, "own.ini")
        if isinstance(given, Path):
            base = _BASE.replace("own.ini", str(given.resolve()))
        else:
            base = _BASE
            own.write_text(given, encoding="utf-8")
        file = Path(folder, "base.ini")
        file.write_text(base, encoding="utf-8")
        return load(str(file))


def make_services(given: str | Path | Mapping[str, Mapping[str, Any]] | Config = "", *, clock: FakeClock | None = None,
                  resolver: Any = None, log: Log | None = None) -> FakeServices:
    """Services on `make_config(given)`; its `log` is a MemoryLog and its `clock` a FakeClock unless others are given."""
    config = given if isinstance(given, Config) else make_config(given)
    return FakeServices(config, log or MemoryLog(), clock or FakeClock(), resolver)


def load_module(name: str | Path) -> ModuleType:
    """A plugin's module: by path of its file, or by the name of one that is bundled or installed. Raises what its import raises."""
    path = Path(name)
    folder = [str(path.resolve().parent)] if path.suffix == ".py" else []
    found = find(folder).get(path.stem)
    if found is None:
        raise ConfigError([f"no plugin is named {path.stem}"])
    return found.module


def load_plugin(name: str | Path, services: Services | None = None, **keys: Any) -> Any:
    """A plugin, made as a worker makes it: `load_plugin("size_limit", mx="10MB")`.

    name: as in load_module.  keys: of its section, as text or as Python values.  services: default make_services().
    Raises ConfigError as a start would.
    """
    module = load_module(name)
    services = services or make_services()
    kind = Path(name).stem
    section = Section(f"plugin:{kind}", values={key: ini_text(value) for key, value in keys.items()})
    return module.Plugin(services.config.validate(getattr(module, "Config", PluginConfig), section), services)
