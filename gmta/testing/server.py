"""A server in memory: the connection loop, protocol, pipeline and plugins as a worker has them, on a socket that a dialogue plays.

No sockets, greenlets, files (but for messages past 64 KiB) or waiting; the clock stands still but for WAIT. What a client says can be
cut in four ways, and a server must answer the same to all: `run` plays them all and compares. A TLS handshake is only pretended;
what it must forget is real. Raises DialogueFailed where the server does otherwise than the dialogue says.
"""

from __future__ import annotations

import contextlib
import random
import socket
import ssl
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from gmta.config import Config, Section
from gmta.hookspecs import PluginConfig
from gmta.mail.envelope import Envelope
from gmta.mail.message import Message
from gmta.mail.session import Session
from gmta.plugins import FoundPlugin, PluginManager
from gmta.queue.ids import IdSource
from gmta.receive.connection import Connection
from gmta.receive.limits import ConnectionLimits
from gmta.receive.pipeline import Pipeline
from gmta.services.deadlines import NEVER
from gmta.testing import stand_in
from gmta.testing.dialogue import GREETING, Close, Dialogue, Eof, Expect, Judge, Send, StartTls, Wait
from gmta.testing.fakes import FakeClock, MemoryLog, MemoryStore, ini_text, load_module, make_config, make_services

WHOLE, LINE, BYTE, RANDOM = "whole", "line", "byte", "random"
CHUNKINGS = (WHOLE, LINE, BYTE, RANDOM)
_SINGLE = 3000  # octets at either end of one SEND that come one by one; what is between them comes at once
STAND_IN = "stand_in"

Plugin = str | Path | ModuleType | type | object


@dataclass(frozen=True, slots=True)
class Played:
    """What came of a play. replies: lines of each, as "250 2.1.0 Sender OK".  octets: as sent.  reason: why the connection ended.

    queued: (envelope, octets) of what went to the queue.  log: as a MemoryLog keeps it.
    """

    replies: list[list[str]]
    octets: bytes
    queued: list[tuple[Envelope, bytes]]
    reason: str
    session: Session
    log: MemoryLog


def pieces(octets: bytes, chunking: str, rng: random.Random) -> Iterator[bytes]:
    """What a client sends, cut: not at all, behind each LF, behind each octet, or anywhere."""
    if chunking == WHOLE:
        yield octets
    elif chunking == LINE:
        *lines, rest = octets.split(b"\n")
        yield from (line + b"\n" for line in lines)
        if rest:
            yield rest
    elif chunking == BYTE:
        head, tail = octets[:_SINGLE], octets[max(_SINGLE, len(octets) - _SINGLE):]
        yield from (bytes([octet]) for octet in head)
        if len(octets) > len(head) + len(tail):
            yield octets[len(head):-len(tail)]
        yield from (bytes([octet]) for octet in tail)
    else:
        position, most = 0, max(9, len(octets) // 50)
        while position < len(octets):
            end = position + rng.randint(1, most)
            yield octets[position:end]
            position = end


class _Player:
    """The socket: what the server reads is the next step of the dialogue, and where it reads, all replies so far must have come."""

    def __init__(self, dialogue: Dialogue, chunking: str, rng: random.Random, clock: FakeClock) -> None:
        self.judge = Judge(dialogue)
        self._steps = list(dialogue.steps)
        self._chunking = chunking
        self._rng = rng
        self._clock = clock
        self._pieces: Iterator[bytes] = iter(())
        self._piece = b""
        self._pending: list[Expect] = []
        self._waited_s = 0.0
        self._line = dialogue.steps[0].line
        self.connection: Any = None
        self._read_event = None  # what a deadline ends the wait for
        self.shut = False  # the server says no more
        self.deaf = False  # it hears no more
        self.left = False  # the client is gone

    # -- what the server calls --------------------------------------------------------------------------------------

    def recv(self, size: int) -> bytes:
        """The client's next octets; none when it goes away."""
        while not self._piece:
            self._piece = next(self._pieces, b"")
            if not self._piece and not self._go_on():
                return b""
        data, self._piece = self._piece[:size], self._piece[size:]
        return data

    def _go_on(self) -> bool:
        """Takes steps until there is something to read; False where the client is gone."""
        if self.shut or self.deaf or self.left:
            return False
        self._read_replies()
        step = self._steps[0] if self._steps else None
        if isinstance(step, Send):
            self._send()
            return True
        self._settle()
        if step is None or isinstance(step, Close):
            self._steps.clear()
            self.left = True
            return False
        self._line = step.line
        if isinstance(step, Wait):
            self._wait(step)
            return True
        word = "the end of the connection" if isinstance(step, Eof) else "a TLS handshake"
        raise self.judge.failed(step.line, f"expected {word}, but the server waits for more")

    def _read_replies(self) -> None:
        """Judges the replies that must have come by now; when everything is sent at once, they are judged later."""
        while self._steps and isinstance(self._steps[0], Expect):
            step = self._steps.pop(0)
            assert isinstance(step, Expect)
            self._line = step.line
            self._pending.append(step)
        if self._chunking != WHOLE:
            self._settle()

    def _settle(self) -> None:
        for step in self._pending:
            self.judge.judge(step)
        self._pending.clear()
        self.judge.silence(self._line)

    def _send(self) -> None:
        """Sends what comes next: up to the next reply, or all there is where everything is sent at once."""
        octets = b""
        while self._steps:
            step = self._steps[0]
            if isinstance(step, Send):
                octets += step.octets
                self._line = step.line
            elif isinstance(step, Expect) and self._chunking == WHOLE:
                self._pending.append(step)
            else:
                break
            self._steps.pop(0)
        self.judge.said(octets)
        self._pieces = pieces(octets, self._chunking, self._rng)

    def _wait(self, step: Wait) -> None:
        """Silence: the server's patience ends first, or the client's."""
        until = self._clock.now + step.seconds - self._waited_s
        deadline: float = self.connection.deadline
        if deadline <= until:
            self._waited_s += deadline - self._clock.now
            self._clock.now = deadline
            self.connection.expire()
            self.deaf = self.connection.deadline == NEVER
        else:
            self._clock.now = until
            self._waited_s = 0.0
            self._steps.pop(0)

    def sendall(self, data: bytes) -> None:
        """The server's answer."""
        if self.left:
            raise BrokenPipeError
        self.judge.heard(data, self._line)

    def send(self, data: bytes) -> int:
        """The same."""
        self.sendall(data)
        return len(data)

    def settimeout(self, _: float | None) -> None:
        """Nothing."""

    def setsockopt(self, *_: Any) -> None:
        """Nothing."""

    def shutdown(self, how: int) -> None:
        """The server has said its last."""
        self.shut = self.shut or how != socket.SHUT_RD

    def close(self) -> None:
        """The same."""
        self.shut = True

    # -- TLS, as far as a server sees it ----------------------------------------------------------------------------

    def wrap_socket(self, sock: _Player, **_: Any) -> _Player:
        """A context's wrap_socket: what the client sent in clear and was not read goes into the handshake."""
        self._piece, self._pieces = b"", iter(())
        return sock

    def do_handshake(self) -> None:
        """The step STARTTLS; a client that says something else is no TLS client."""
        self._read_replies()
        self._settle()
        if self._steps and isinstance(self._steps[0], StartTls):
            self._steps.pop(0)
            return
        while self._steps and isinstance(self._steps[0], Send):
            self._steps.pop(0)
        if self._steps:
            raise ssl.SSLError(1, "not a TLS hello")

    def cipher(self) -> tuple[str, str, int]:
        """What every test client speaks."""
        return "TLS_AES_256_GCM_SHA384", "TLSv1.3", 256

    def version(self) -> str:
        """The same."""
        return "TLSv1.3"

    # -- the end ----------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """The connection is over: what is left of the dialogue may only be what the server has said already, and EOF."""
        for step in self._steps:
            if isinstance(step, Expect):
                self._line = step.line
                self._pending.append(step)
            elif isinstance(step, Wait):
                continue
            elif not isinstance(step, Eof):
                self._settle()
                raise self.judge.failed(step.line, "the server has ended the connection")
        self._settle()


class MemoryServer:
    """A worker's receiving half. plugins: asked in this order, before those of [plugins] enable; the stand-in is asked last.

    A plugin is a name, the path of its file, its module, its class, or an object with hooks. keys: those of the first one's section.
    given: configuration as for make_config.  tls: whether STARTTLS is offered where the listener has it.
    """

    def __init__(self, plugins: Plugin | Iterable[Plugin] = (), given: str | Path | Mapping[str, Mapping[str, Any]] | Config = "", *,
                 clock: FakeClock | None = None, resolver: Any = None, tls: bool = True, peer_ip: str = "192.0.2.1",
                 keys: Mapping[str, Any] | None = None) -> None:
        config = given if isinstance(given, Config) else make_config(given)
        self.clock = clock or FakeClock()
        self.log = MemoryLog()
        self.services = make_services(config, clock=self.clock, resolver=resolver, log=self.log)
        self.config = config
        self.peer_ip = peer_ip
        self._tls = tls
        first = [plugins] if isinstance(plugins, str) or not isinstance(plugins, Iterable) else list(plugins)
        found = [_found(plugin) for plugin in first]
        if keys:
            section = f"plugin:{found[0].name}"
            config.plugin[found[0].name] = Section(section, values={key: ini_text(value) for key, value in keys.items()})
        names = [plugin.name for plugin in found]
        enable = [*names, *(name for name in config.plugins.enable if name not in (*names, STAND_IN)), STAND_IN]
        config.plugins = config.plugins.model_copy(update={"enable": enable})
        found.append(FoundPlugin(STAND_IN, "gmta.testing", lambda: stand_in))
        self.plugins = _Plugins(found, config, self.services, self.log)
        self.limits = ConnectionLimits(config.limits, config.domains.relay_from)

    @property
    def keywords(self) -> list[str]:
        """The EHLO lines, for `Dialogue.missing`."""
        return [line[4:] for line in self.play(Dialogue.parse(GREETING)).replies[1][1:]]

    def play(self, dialogue: Dialogue | str | Path, chunking: str = WHOLE, seed: int = 7, *, store: MemoryStore | None = None) -> Played:
        """Plays one dialogue on a connection of its own; raises DialogueFailed.  store: default one that is empty."""
        dialogue = read(dialogue)
        queue = store or MemoryStore()
        accepted: list[tuple[Envelope, bytes]] = []
        player = _Player(dialogue, chunking, random.Random(seed), self.clock)
        connection = self.connect(player, dialogue.listener, tls=player if self._tls else None, store=queue,
                                  accept=lambda envelope, message: accepted.append((envelope, b"".join(message.chunks()))))
        player.connection = connection
        try:
            reason = connection.run(True)
            player.finish()
            player.judge.check_queue([(envelope.sender, [state.address for state in envelope.recipients], raw) for envelope, raw in accepted])
        finally:
            if store is None:
                queue.close()
        return Played(player.judge.replies, player.judge.octets, accepted, reason, connection.session, self.log)

    def connect(self, sock: Any, listener: str = "mx", *, tls: Any = None, store: MemoryStore | None = None,
                accept: Callable[[Envelope, Message], None] = lambda envelope, message: None) -> Connection:
        """A connection on any socket, not begun. tls: context for STARTTLS.  accept: takes what was queued."""
        role = self.config.listeners[listener]
        session = Session("s1", role=role.role, listener=listener, peer_ip=self.peer_ip, peer_port=40000,
                          relay_network=self.limits.is_relay_network(self.peer_ip), opened_at=self.clock())
        pipeline = Pipeline(self.config, self.plugins, store or MemoryStore(), self.services, IdSource(self.clock, "TESTS"), accept)
        return Connection(sock, session, role, pipeline, None if role.tls == "off" else tls, self.limits)

    def close(self) -> None:
        """Ends what plugins and services have started."""
        self.plugins.close()
        self.services.close()


class _Plugins(PluginManager):
    """The plugin manager, with plugins that no search would find."""

    def __init__(self, found: list[FoundPlugin], config: Config, services: Any, log: Any) -> None:
        self._more = found
        super().__init__(config, services, log)

    def _enable(self, errors: list[str]) -> None:
        self._found.update((plugin.name, plugin) for plugin in self._more)
        super()._enable(errors)


def _found(plugin: Plugin) -> FoundPlugin:
    """Whatever names a plugin, as the plugin manager knows it."""
    if isinstance(plugin, (str, Path)):
        module = load_module(plugin)
        return FoundPlugin(Path(plugin).stem, str(plugin), lambda: module)
    if isinstance(plugin, ModuleType):
        return FoundPlugin(plugin.__name__.rpartition(".")[2], plugin.__name__, lambda: plugin)
    if isinstance(plugin, type):
        config = getattr(plugin, "Config", PluginConfig)
        made: Any = SimpleNamespace(Plugin=plugin, Config=config, __doc__=plugin.__doc__)
    else:  # an object: it is there already, and needs no making
        made = SimpleNamespace(Plugin=type("Plugin", (), {"__new__": lambda cls, config, services: plugin}), __doc__=plugin.__doc__)
    return FoundPlugin("plugin", "a test", lambda: made)


def read(dialogue: Dialogue | str | Path) -> Dialogue:
    """A dialogue from its file (a Path) or its text."""
    if isinstance(dialogue, Path):
        return Dialogue.load(dialogue)
    return Dialogue.parse(dialogue) if isinstance(dialogue, str) else dialogue


def run(plugins: Plugin | Iterable[Plugin], dialogue: Dialogue | str | Path, *, given: str | Path | Mapping[str, Mapping[str, Any]] = "",
        resolver: Any = None, peer_ip: str = "192.0.2.1", chunkings: Iterable[str] = CHUNKINGS, seed: int = 7, **keys: Any) -> Played:
    """Plays a dialogue against a server with these plugins, each chunking on a server of its own; gives the last play.

    keys: of the first plugin's section.  Raises DialogueFailed where the dialogue is not kept to, or where the answers or what
    was queued depend on how the octets were cut.
    """
    dialogue = read(dialogue)
    first: Played | None = None
    for chunking in chunkings:
        with contextlib.closing(MemoryServer(plugins, given, resolver=resolver, peer_ip=peer_ip, keys=keys)) as server:
            played = server.play(dialogue, chunking, seed)
        first = first or played
        compare(dialogue, first, played, chunking)
    assert first is not None, "no chunking"
    return played


def compare(dialogue: Dialogue, one: Played, other: Played, chunking: str) -> None:
    """Raises DialogueFailed where two plays differ."""
    judge, line = Judge(dialogue), dialogue.steps[0].line
    if one.octets != other.octets:
        raise judge.failed(line, f"other replies when sent by {chunking}: {other.octets!r}, not {one.octets!r}")
    if [raw for _, raw in one.queued] != [raw for _, raw in other.queued]:
        raise judge.failed(line, f"another message when sent by {chunking}: {other.queued!r}, not {one.queued!r}")
