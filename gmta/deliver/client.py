"""The sending side of SMTP and LMTP over a gevent socket: one `SmtpClient` a connection, a `Pool` of kept ones.

smtp/client.py knows the protocol; here are sockets, deadlines, TLS and what replies mean for each recipient. Which hosts
to try and in what order is the transport's business. Every phase has a deadline as a whole, so a remote that drips octets
gains nothing. Failure: `ConnectionFailed` carries the Outcome for all recipients; `stale` says that a kept connection died
before the remote answered anything, so that trying on a new one can't deliver twice.
RFC 5321 sections 3.3, 4.5.3.2; RFC 2033 (LMTP); RFC 2920 (pipelining); RFC 3207; RFC 3461; RFC 6152; RFC 6531.
"""

from __future__ import annotations

import socket as plain_socket
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gevent
from gevent import socket

from gmta.mail.address import Address
from gmta.mail.envelope import Envelope, RecipientState
from gmta.mail.message import Message
from gmta.mail.reply import Reply
from gmta.mail.verdict import Outcome, Status, deferred, failed, outcome_of
from gmta.services.deadlines import NEVER, Deadlines
from gmta.smtp.client import ClientProtocol
from gmta.smtp.data import Stuffer
from gmta.smtp.lines import ProtocolError

SLOWEST = 8192  # octets a second that the data phase may sink to past its timeout
MESSAGES_A_CONNECTION = 100
_RECEIVE = 65536
_SMALL = 256 * 1024  # up to this a message goes in one write


@dataclass(slots=True)
class Settings:
    """How to talk to a next hop; times in seconds. tls: opportunistic, required or off."""

    hostname: str
    lmtp: bool = False
    tls: str = "opportunistic"
    username: str = ""
    password: str = ""
    connect_timeout: float = 30.0
    greeting_timeout: float = 300.0  # RFC 5321 section 4.5.3.2.1
    command_timeout: float = 300.0
    data_timeout: float = 600.0  # RFC 5321 section 4.5.3.2.6
    idle_timeout: float = 5.0


class ConnectionFailed(Exception):
    """No (more) conversation with this host; `outcome` is for every recipient without one of its own."""

    def __init__(self, outcome: Outcome, *, stale: bool = False) -> None:
        super().__init__(str(outcome.reply))
        self.outcome = outcome
        self.stale = stale


class TlsFailed(ConnectionFailed):
    """The remote offered STARTTLS and the handshake failed: opportunistic callers may try again in clear."""


class _Deadline(gevent.Timeout):
    """Our own timer, told apart from those of callers."""


class SmtpClient:
    """One connection to `host`:`port`. connect() first; send() any number of messages; quit() or close()."""

    def __init__(self, settings: Settings, host: str, port: int, deadlines: Deadlines, *, name: str = "",
                 context: ssl.SSLContext | None = None) -> None:
        self.settings = settings
        self.host = host
        self.port = port
        self.remote = f"{name}[{host}]:{port}" if name and name != host else f"{host}:{port}"
        self._name = name or host
        self._context = context
        self._socket: Any = None
        self._protocol = ClientProtocol()
        self.sent = 0
        self.used_at = 0.0
        self.usable = False
        self.tls = False
        self.deadline = NEVER  # of the wait for the socket
        self._deadlines = deadlines
        self._expired = False

    # --- opening --------------------------------------------------------------------------------------------------

    def connect(self, *, clear: bool = False) -> None:
        """Connects, greets, starts TLS and authenticates. clear: no STARTTLS. Raises ConnectionFailed."""
        settings = self.settings
        with self._deadline(settings.connect_timeout, "connecting"):
            try:
                self._socket = socket.create_connection((self.host, self.port), timeout=None)
            except OSError as error:
                raise self._lost(f"Connection to {self.remote} failed: {error.strerror or error}", "4.4.1") from error
        self._deadlines.watch(self)
        try:
            self._socket.setsockopt(plain_socket.IPPROTO_TCP, plain_socket.TCP_NODELAY, 1)
            greeting = self._read(settings.greeting_timeout, "the greeting")
            if greeting.code != 220:
                raise self._refused(greeting)
            self._hello()
            if not clear and settings.tls != "off":
                self._start_tls()
            if settings.username:
                self._authenticate()
        except BaseException:
            self.close()
            raise
        self.usable = True

    def _hello(self) -> None:
        """EHLO, else HELO (RFC 5321 section 3.2); LHLO for LMTP (RFC 2033 section 4.1)."""
        name = self.settings.hostname
        if self.settings.lmtp:
            reply = self._command(self._protocol.lhlo(name))
        else:
            reply = self._command(self._protocol.ehlo(name))
            if reply.permanent:
                reply = self._command(self._protocol.helo(name))
        if reply.code >= 300:
            raise self._refused(reply)

    def _start_tls(self) -> None:
        """STARTTLS where it is offered (RFC 3207 section 4), then hello anew."""
        required = self.settings.tls == "required"
        if "STARTTLS" not in self._protocol.extensions or self._context is None:
            if required:
                raise self._lost(f"{self.remote} offers no TLS, which is required", "4.7.10")
            return
        reply = self._command(self._protocol.starttls())
        if reply.code != 220:
            if required:
                raise self._refused(reply)
            return
        with self._deadline(self.settings.command_timeout, "TLS"):
            try:
                self._socket = self._context.wrap_socket(self._socket, server_hostname=self._name)
            except (OSError, ssl.SSLError) as error:
                outcome = self._lost(f"TLS handshake with {self.remote} failed: {error}"[:300], "4.7.5").outcome
                raise TlsFailed(outcome) from error
        self.tls = True
        try:
            self._protocol.tls_started()
        except ProtocolError as error:
            raise self._lost(f"{self.remote}: {error}", "4.7.0") from error
        self._hello()

    def _authenticate(self) -> None:
        """AUTH PLAIN (RFC 4616), only under TLS or to a loopback host."""
        if "PLAIN" not in self._protocol.extensions.get("AUTH", "").upper().split():
            raise self._lost(f"{self.remote} offers no AUTH PLAIN", "4.7.0")
        if not self.tls and not self.host.startswith("127.") and self.host != "::1":
            raise self._lost(f"No TLS with {self.remote}: the password is not sent in clear", "4.7.0")
        reply = self._command(self._protocol.auth("PLAIN", f"\0{self.settings.username}\0{self.settings.password}".encode()))
        if reply.code != 235:  # a wrong password is the postmaster's to mend, the mail waits (RFC 4954 section 6)
            raise ConnectionFailed(deferred(f"Authentication refused: {reply}"[:300], enhanced="4.7.0", remote=self.remote,
                                            recipient_fault=False))

    # --- a transaction --------------------------------------------------------------------------------------------

    def send(self, envelope: Envelope, recipients: Sequence[RecipientState], message: Message) -> dict[int, Outcome]:
        """One mail transaction; an Outcome a recipient. Raises ConnectionFailed where the remote left before any answer."""
        refusal = self._unfit(envelope, recipients, message)
        if refusal is not None:
            return {recipient.number: refusal for recipient in recipients}
        commands = self._envelope_commands(envelope, recipients, message)
        outcomes: dict[int, Outcome] = {}
        heard = False
        try:
            if "PIPELINING" in self._protocol.extensions:
                # RFC 2920 section 3.1: MAIL, RCPT and DATA in one write, DATA last
                self._write(b"".join(commands) + self._protocol.data(), self.settings.command_timeout)
                replies = []
                for _ in commands:
                    replies.append(self._read(self.settings.command_timeout, "a reply to the envelope"))
                    heard = True
                accepted = self._judge(replies, recipients, outcomes)
                go_on = self._read(self.settings.data_timeout, "the reply to DATA")
            else:
                replies = []
                for command in commands:
                    replies.append(self._command(command))
                    heard = True
                    if len(replies) == 1 and not replies[0].positive:
                        break
                accepted = self._judge(replies, recipients, outcomes)
                if not accepted:
                    self._reset()
                    return outcomes
                go_on = self._command(self._protocol.data())
            if go_on.code != 354:
                self._all(accepted, outcome_of(go_on, remote=self.remote) if go_on.code >= 400
                          else deferred("Unexpected reply to DATA", remote=self.remote), outcomes)
                self._reset()
                return outcomes
            if not accepted:
                self._write(b".\r\n", self.settings.command_timeout)  # RFC 2920 section 3.1: nobody takes it
                for _ in range(0 if self.settings.lmtp else 1):
                    self._read(self.settings.data_timeout, "the reply to an empty message")
                return outcomes
            self._send_data(message)
            self._conclude(accepted, outcomes)
            self.sent += 1
            if self.sent >= MESSAGES_A_CONNECTION:
                self.quit()
        except ConnectionFailed as failure:
            self.close()
            if not heard:
                failure.stale = self.sent > 0
                raise
            for recipient in recipients:
                outcomes.setdefault(recipient.number, failure.outcome)
        except BaseException:
            self.close()
            raise
        return outcomes

    def _unfit(self, envelope: Envelope, recipients: Sequence[RecipientState], message: Message) -> Outcome | None:
        """The failure of a message that this remote can't take, before it is tried."""
        extensions = self._protocol.extensions
        limit = extensions.get("SIZE", "").strip()
        if limit.isdigit() and 0 < int(limit) < message.size:  # RFC 1870 section 6.1
            return failed(f"Message of {message.size} octets is larger than {self.remote} takes ({limit})", enhanced="5.3.4",
                          code=552, remote=self.remote)
        if "8BITMIME" not in extensions and envelope.body != "7BIT" and not all(map(bytes.isascii, message.chunks())):
            return failed(f"{self.remote} does not take 8-bit messages", enhanced="5.6.3", code=554,
                          remote=self.remote)  # RFC 6152 section 3
        if envelope.smtputf8 and "SMTPUTF8" not in extensions:
            plain = message.header.isascii() and envelope.sender.local.isascii()
            if not plain or not all(recipient.address.local.isascii() for recipient in recipients):
                return failed(f"{self.remote} does not take internationalized mail", enhanced="5.6.7", code=553,
                              remote=self.remote)  # RFC 6531 section 3.2
        return None

    def _envelope_commands(self, envelope: Envelope, recipients: Sequence[RecipientState], message: Message) -> list[bytes]:
        """MAIL and one RCPT a recipient, with the parameters that the remote knows."""
        protocol = self._protocol
        extensions = protocol.extensions
        dsn = "DSN" in extensions
        utf8 = envelope.smtputf8 and "SMTPUTF8" in extensions
        body = envelope.body if envelope.body != "7BIT" and "8BITMIME" in extensions else None
        if body == "BINARYMIME":
            body = "8BITMIME"
        commands = [protocol.mail(_wire(envelope.sender, utf8), size=message.size if "SIZE" in extensions else None, body=body,
                                  smtputf8=utf8, ret=envelope.ret if dsn else "", envid=envelope.envid if dsn else "")]
        for recipient in recipients:
            if dsn:
                # RFC 3461 section 5.2.1: NOTIFY and ORCPT go on unchanged
                commands.append(protocol.rcpt(_wire(recipient.address, utf8), notify=sorted(recipient.notify), orcpt=recipient.orcpt))
            else:
                commands.append(protocol.rcpt(_wire(recipient.address, utf8)))
        return commands

    def _judge(self, replies: list[Reply], recipients: Sequence[RecipientState], outcomes: dict[int, Outcome]) -> list[RecipientState]:
        """Recipients whose RCPT was accepted; the others get their Outcome."""
        if not replies[0].positive:
            self._all(recipients, outcome_of(replies[0], remote=self.remote), outcomes)
            return []
        accepted = []
        for recipient, reply in zip(recipients, replies[1:], strict=True):
            if reply.positive:
                accepted.append(recipient)
            elif reply.code == 552 and reply.enhanced is None:  # RFC 5321 section 4.5.3.1.10: too many recipients, old style
                outcomes[recipient.number] = deferred(reply.text[:300] or "Too many recipients", code=452, enhanced="4.5.3",
                                                      remote=self.remote)
            else:
                outcomes[recipient.number] = outcome_of(reply, remote=self.remote)
        return accepted

    def _send_data(self, message: Message) -> None:
        """The octets, dot-stuffed (RFC 5321 section 4.5.2), in few writes."""
        timeout_s = self.settings.data_timeout + message.size / SLOWEST
        pending = bytearray()
        stuffer = Stuffer()
        self.deadline = self._deadlines.clock() + timeout_s
        for piece in message.chunks():
            pending += stuffer.feed(piece)
            if len(pending) >= _SMALL:
                self._send(bytes(pending), "sending the message", lane=False)
                pending.clear()
        pending += stuffer.finish()
        self._send(bytes(pending), "sending the message", lane=False)
        self.deadline = NEVER

    def _conclude(self, accepted: list[RecipientState], outcomes: dict[int, Outcome]) -> None:
        """The final reply, or with LMTP one a recipient in the order of RCPT (RFC 2033 section 4.2)."""
        relayed = "DSN" not in self._protocol.extensions
        reply: Reply | None = None
        for recipient in accepted:
            if reply is None or self.settings.lmtp:
                reply = self._read(self.settings.data_timeout, "the final reply")
            outcome = outcome_of(reply, remote=self.remote)
            outcome.relayed = relayed and outcome.status is Status.DELIVERED
            outcomes[recipient.number] = outcome

    def _all(self, recipients: Sequence[RecipientState], outcome: Outcome, outcomes: dict[int, Outcome]) -> None:
        for recipient in recipients:
            outcomes[recipient.number] = outcome
        if outcome.reply.code == 421:  # RFC 5321 section 3.8: it is closing
            outcome.recipient_fault = False
            self.close()

    def _reset(self) -> None:
        """RSET, so that the connection can be kept; one that does not answer is not."""
        if not self.usable:
            return
        try:
            if self._command(self._protocol.rset()).positive:
                return
        except ConnectionFailed:
            pass
        self.close()

    # --- octets ---------------------------------------------------------------------------------------------------

    def _deadline(self, seconds: float, what: str) -> _Timer:
        return _Timer(self, seconds, what)

    def _write(self, data: bytes, timeout_s: float) -> None:
        self.deadline = self._deadlines.clock() + timeout_s
        self._send(data, "sending a command")
        self.deadline = NEVER

    def _send(self, data: bytes, what: str, *, lane: bool = True) -> None:
        try:
            sent = self._socket.send(data)  # sendall would ask the kernel for its buffer size each time
            while sent < len(data):
                data = data[sent:]
                sent = self._socket.send(data)
        except (OSError, ssl.SSLError) as error:
            raise self._broken(what, error, lane=lane) from error

    def expire(self) -> None:
        """A wait has taken too long: shuts the socket down under whoever waits for it."""
        self.deadline, self._expired = NEVER, True
        try:
            self._socket._sock.shutdown(plain_socket.SHUT_RDWR)
        except OSError:
            pass

    def _broken(self, what: str, error: Exception | None = None, *, lane: bool = True) -> ConnectionFailed:
        """What ended the connection: our deadline, an error of the socket, or the remote."""
        if self._expired:
            return self._lost(f"Timeout while {what} ({self.remote})", "4.4.2", lane=lane)
        if error is not None:
            return self._lost(f"Connection to {self.remote} lost while {what}: {error}"[:300], "4.4.2", lane=lane)
        return self._lost(f"{self.remote} closed the connection while {what}", "4.4.2", lane=lane)

    def _command(self, data: bytes) -> Reply:
        """Sends a command and returns its reply."""
        self._write(data, self.settings.command_timeout)
        return self._read(self.settings.command_timeout, "a reply")

    def _read(self, timeout_s: float, what: str) -> Reply:
        """The next reply; raises ConnectionFailed."""
        protocol = self._protocol
        try:
            reply = protocol.next_reply()
            if reply is None:
                self.deadline = self._deadlines.clock() + timeout_s
                while reply is None:
                    data = self._socket.recv(_RECEIVE)
                    if not data:
                        raise self._broken(f"waiting for {what}")
                    protocol.receive_data(data)
                    reply = protocol.next_reply()
                self.deadline = NEVER
        except (OSError, ssl.SSLError) as error:
            raise self._broken(f"waiting for {what}", error) from error
        except (ProtocolError, ValueError) as error:
            raise self._lost(f"{self.remote} does not speak SMTP: {error}"[:300], "4.5.0") from error
        if reply.code == 421:  # RFC 5321 section 3.8
            raise self._refused(reply)
        return reply

    def _lost(self, text: str, enhanced: str, *, lane: bool = True) -> ConnectionFailed:
        clean = "".join(char if char.isprintable() else " " for char in text)
        return ConnectionFailed(deferred(clean, enhanced=enhanced, code=451, remote=self.remote, recipient_fault=not lane))

    def _refused(self, reply: Reply) -> ConnectionFailed:
        """The remote does not want to talk: a 5xx greeting too only sends us to another host or another time."""
        if reply.transient:
            return ConnectionFailed(deferred("", reply=reply, remote=self.remote, recipient_fault=False))
        return self._lost(f"{self.remote} refused: {reply}"[:300], "4.4.0")

    def quit(self) -> None:
        """QUIT without waiting for the answer, then close."""
        if self.usable:
            try:
                self._write(self._protocol.quit(), 1.0)
            except (ConnectionFailed, ProtocolError):
                pass
        self.close()

    def close(self) -> None:
        """Closes the socket."""
        self.usable = False
        self._deadlines.forget(self)
        if self._socket is not None:
            try:
                self._socket.close()
            except OSError:
                pass
            self._socket = None


class _Timer:
    """A deadline of one phase as a context manager; its end is a ConnectionFailed."""

    __slots__ = ("_client", "_timeout", "_what")

    def __init__(self, client: SmtpClient, seconds: float, what: str) -> None:
        self._client = client
        self._timeout = _Deadline(seconds)
        self._what = what

    def __enter__(self) -> None:
        self._timeout.start()

    def __exit__(self, kind: Any, value: Any, trace: Any) -> None:
        self._timeout.close()
        if value is self._timeout:
            raise self._client._lost(f"Timeout while {self._what} ({self._client.remote})", "4.4.2") from None


class Pool:
    """Kept connections by key; `take` one, `keep` it afterwards. Idle ones are closed by `sweep` or when taken too late."""

    def __init__(self, idle_timeout_s: float, clock: Callable[[], float], spawn: Callable[..., Any]) -> None:
        self._idle_timeout_s = idle_timeout_s
        self._clock = clock
        self._spawn = spawn
        self._idle: dict[Any, list[SmtpClient]] = {}
        self._sweeper: Any = None

    def take(self, key: Any) -> SmtpClient | None:
        """The connection of that key that was used last, if one is fresh enough."""
        oldest = self._clock() - self._idle_timeout_s
        clients = self._idle.get(key)
        while clients:
            client = clients.pop()
            if client.used_at >= oldest:
                return client
            client.quit()
        return None

    def keep(self, key: Any, client: SmtpClient) -> None:
        """Takes a connection back."""
        if not client.usable:
            return
        if self._idle_timeout_s <= 0:
            client.quit()
            return
        client.used_at = self._clock()
        self._idle.setdefault(key, []).append(client)
        if self._sweeper is None or self._sweeper.dead:
            self._sweeper = self._spawn(self._sweep)

    def _sweep(self) -> None:
        """Closes what idles, until nothing is left."""
        while self._idle:
            gevent.sleep(self._idle_timeout_s)
            oldest = self._clock() - self._idle_timeout_s
            for key, clients in list(self._idle.items()):
                late = [client for client in clients if client.used_at <= oldest]
                clients[:] = [client for client in clients if client.used_at > oldest]
                if not clients:
                    del self._idle[key]
                for client in late:
                    client.quit()

    def close(self) -> None:
        """Closes all."""
        if self._sweeper is not None:
            self._sweeper.kill(block=False)
        for clients in self._idle.values():
            for client in clients:
                client.quit()
        self._idle.clear()


def _wire(address: Address, utf8: bool) -> Address:
    """The address as it goes out: without SMTPUTF8 its domain is in A-labels (RFC 6531 section 3.2)."""
    if utf8 or address.domain.isascii():
        return address
    return Address(address.local, address.host)
