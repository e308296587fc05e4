"""The sending side of SMTP and LMTP over a gevent socket: one `SmtpClient` a connection, a `Pool` of kept ones.

smtp/client.py knows the protocol; here are sockets, deadlines, TLS and what replies mean for each recipient. Which hosts to try and in
what order is the transport's business, which TLS there must be tlspolicy's. Every phase has a deadline as a whole, so a remote that
drips octets gains nothing, and so has the attempt; nothing hangs for ever.

A message goes in one write with its envelope where the remote takes that (PIPELINING and CHUNKING), else after a reply to the
envelope. Failure: `ConnectionFailed` carries the Outcome for all recipients that have none of their own yet (`outcomes`), and tells
by `certain` whether the remote can't have taken the message, so that trying elsewhere at once can't deliver it twice.

RFC 5321 sections 3.3, 3.8, 4.5.3.2, 4.5.4.1; RFC 1870 (SIZE); RFC 2033 (LMTP); RFC 2920 (pipelining); RFC 3030 (BDAT); RFC 3207;
RFC 3461; RFC 4954; RFC 6152; RFC 6531; RFC 9422 (LIMITS).
"""

from __future__ import annotations

import base64
import errno
import os
import socket as plain_socket
import ssl
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import gevent
from gevent import socket
from gevent.monkey import get_original

from gmta.deliver.tlspolicy import Contexts, TlsRejected, TlsRule, failure_result, judge
from gmta.mail.address import Address
from gmta.mail.envelope import Envelope, RecipientState
from gmta.mail.message import MemoryBody, Message
from gmta.mail.reply import Reply
from gmta.mail.verdict import Outcome, Status, deferred, failed, outcome_of
from gmta.services.deadlines import NEVER, Deadlines
from gmta.services.tls import TlsError
from gmta.smtp.client import ClientProtocol, Limits, parse_limits
from gmta.smtp.data import Stuffer
from gmta.smtp.lines import ProtocolError
from gmta.smtp.sasl_client import choose

SLOWEST = 8192  # octets a second that the data phase may sink to past its timeout
MESSAGES_A_CONNECTION = 100
ONE_WRITE = 64 * 1024  # up to this a message goes out with its envelope: what a refusal wastes is not worth a round trip
_RECEIVE = 65536
_SMALL = 256 * 1024  # up to this a message goes in one write
_poll = get_original("select", "poll")
_READABLE = 1 | 16  # POLLIN, POLLHUP
_UNDER_WAY = (errno.EINPROGRESS, errno.EWOULDBLOCK, errno.EINTR)
_NO_BDAT = (500, 502, 503)  # what a host says that shows CHUNKING and does not know BDAT, often since a firewall stands between


@dataclass(slots=True)
class Settings:
    """How to talk to a next hop; times in seconds. source: our addresses, one a family; helo: our name in EHLO."""

    helo: str
    lmtp: bool = False
    username: str = ""
    password: str = ""
    connect_timeout: float = 30.0
    greeting_timeout: float = 300.0  # RFC 5321 section 4.5.3.2.1
    command_timeout: float = 300.0
    data_timeout: float = 600.0  # RFC 5321 section 4.5.3.2.6
    attempt_timeout: float = 3600.0
    source: tuple[str, ...] = ()


class ConnectionFailed(Exception):
    """No (more) conversation with this host; `outcome` is for every recipient without one of its own in `outcomes`.

    certain: the remote can't have taken the message, so that another connection may be tried at once.  connected: somebody was
    there.  again: a new connection to the same host may well do.  no_bdat: if BDAT is not used there.
    """

    def __init__(self, outcome: Outcome, *, certain: bool = True) -> None:
        super().__init__(str(outcome.reply))
        self.outcome = outcome
        self.certain = certain
        self.connected = True
        self.again = False
        self.no_bdat = False
        self.outcomes: dict[int, Outcome] = {}


class TlsFailed(ConnectionFailed):
    """There is no TLS as the rule asks for it. result: as in a TLS report (RFC 8460 section 4.3)."""

    def __init__(self, outcome: Outcome, result: str) -> None:
        super().__init__(outcome)
        self.result = result


class _Deadline(gevent.Timeout):
    """Our own timer, told apart from those of callers."""


def on_this_machine(host: str) -> bool:
    """Whether nobody can listen between us and that address: a socket's path, or loopback."""
    return host.startswith(("/", "127.")) or host == "::1"


class SmtpClient:
    """One connection to an address. connect() first; send() any number of messages; quit() or close().

    name: the host's, where it has one.  contexts: of TLS; without them there is none.  clock: Unix seconds, for certificates.
    chunking: whether BDAT may be used where it is offered.
    """

    def __init__(self, settings: Settings, host: str, port: int, deadlines: Deadlines, *, name: str = "", rule: TlsRule | None = None,
                 contexts: Contexts | None = None, clock: Callable[[], float] = time.time, chunking: bool = True) -> None:
        self.settings = settings
        self.host = host
        self.port = port
        self.remote = f"{name}[{host}]:{port}" if name and name != host else host if host.startswith("/") else f"{host}:{port}"
        self.rule = rule or TlsRule("may" if contexts is not None else "none")
        self._contexts = contexts
        self._clock = clock
        self._chunking = chunking
        self._socket: Any = None
        self._protocol = ClientProtocol()
        self._limits = Limits()
        self._poll: Any = None
        self.sent = 0  # transactions
        self.deferred: tuple[str, ...] = ()  # queue ids of messages that it was not to have yet
        self.sender_deferred = False  # the last MAIL was answered by 4xx
        self.used_at = 0.0
        self.single = False  # for one message only: not to be kept
        self.usable = False
        self.tls = ""  # facts of the session, for the log
        self.verified = False  # the certificate was judged, and is right
        self.trouble: tuple[str, str] | None = None  # why there is no TLS, as in a TLS report, and in words
        self.deadline = NEVER  # of the wait for the socket
        self._limit = NEVER  # of the attempt
        self._deadlines = deadlines
        self._expired = False
        self._speaking = False  # the remote listens to us still
        self._unclean = False  # a transaction is open that came to nothing
        self._handed_over = False  # all of a message is on its way
        self._heard = False  # the remote has said something in this transaction

    # --- opening --------------------------------------------------------------------------------------------------

    def connect(self, timeout_s: float | None = None) -> None:
        """Connects, greets, starts TLS and authenticates; timeout_s: for the TCP connection. Raises ConnectionFailed."""
        settings = self.settings
        self._open_socket(settings.connect_timeout if timeout_s is None else timeout_s)
        self._limit = self._deadlines.clock() + settings.attempt_timeout
        self._deadlines.watch(self)
        try:
            if not self.host.startswith("/"):
                self._socket.setsockopt(plain_socket.IPPROTO_TCP, plain_socket.TCP_NODELAY, 1)
            self._poll = _poll()
            self._poll.register(self._socket.fileno(), _READABLE)
            greeting = self._greeting()
            if greeting.code != 220:
                raise self._refused(greeting)
            self._hello()
            if self.rule.level != "none":
                self._start_tls()
            if settings.username:
                self._authenticate()
            self._limits = parse_limits(self._protocol.extensions.get("LIMITS", ""))
        except ConnectionFailed:
            self.quit()
            raise
        except BaseException:
            self.close()
            raise
        self.usable = True

    def _greeting(self) -> Reply:
        """What the remote says first; one that says nothing counts as not there."""
        try:
            return self._read(self.settings.greeting_timeout, "the greeting")
        except ConnectionFailed as failure:
            failure.connected = self._heard
            raise

    def _open_socket(self, timeout_s: float) -> None:
        """The TCP connection, from our address of the family where we have one; or one to a socket of this machine, by its path."""
        local = self.host.startswith("/")
        six = ":" in self.host
        sock = socket.socket(socket.AF_UNIX if local else socket.AF_INET6 if six else socket.AF_INET, socket.SOCK_STREAM)
        try:
            for source in () if local else self.settings.source:
                if (":" in source) == six:
                    sock.bind((source, 0))
            error = sock._sock.connect_ex(self.host if local else (self.host, self.port))  # gevent's connect would resolve the address in a thread
            if error in _UNDER_WAY:
                socket.wait_write(sock.fileno(), timeout_s)
                error = sock.getsockopt(plain_socket.SOL_SOCKET, plain_socket.SO_ERROR)
            if error:
                raise OSError(error, os.strerror(error))
        except TimeoutError as late:
            sock.close()
            raise self._unreached(f"Timeout while connecting ({self.remote})") from late
        except OSError as fault:
            sock.close()
            raise self._unreached(f"Connection to {self.remote} failed: {fault.strerror or fault}") from fault
        except BaseException:
            sock.close()
            raise
        self._socket = sock

    def _unreached(self, text: str) -> ConnectionFailed:
        failure = self._lost(text, "4.4.1")
        failure.connected = False
        return failure

    def _hello(self) -> None:
        """EHLO, else HELO (RFC 5321 section 3.2); LHLO for LMTP (RFC 2033 section 4.1)."""
        name = self.settings.helo
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
        rule = self.rule
        if "STARTTLS" not in self._protocol.extensions or self._contexts is None:
            self._no_tls(f"{self.remote} offers no TLS, which is required")
            return
        reply = self._command(self._protocol.starttls())
        if reply.code != 220:
            self._no_tls(f"{self.remote} refuses TLS, which is required: {reply}")
            return
        try:
            context = self._contexts.of(rule)
            with _Deadline(self.settings.command_timeout) as late:
                self._socket = context.wrap_socket(self._socket, server_hostname=rule.server_name or None)
            how = judge(rule, self._socket, self._clock())
        except _Deadline as timeout:
            if timeout is not late:
                raise
            raise self._tls_failed(f"Timeout in the TLS handshake with {self.remote}", "validation-failure") from timeout
        except (OSError, ssl.SSLError, TlsError) as error:  # SSLError is an OSError; both are named for the reader
            words = getattr(error, "verify_message", "") or getattr(error, "reason", "") or str(error)
            raise self._tls_failed(f"TLS handshake with {self.remote} failed: {words}", failure_result(error)) from error
        except TlsRejected as rejected:
            raise self._tls_failed(f"TLS with {self.remote} refused: {rejected}", rejected.result) from rejected
        self.verified = bool(how)
        version, cipher = self._socket.version() or "TLS", (self._socket.cipher() or ("",))[0]
        self.tls = f"{version} {cipher} {'verified:' + (rule.source if how == 'pki' else how) if how else 'unverified'}"
        try:
            self._protocol.tls_started()
        except ProtocolError as error:
            raise self._lost(f"{self.remote}: {error}", "4.7.0") from error
        self._hello()

    def _no_tls(self, text: str) -> None:
        """The remote won't: on in clear text, where the rule lets us in the end; raises TlsFailed."""
        if not self.rule.clear_allowed:
            raise TlsFailed(self._lost(text[:300], "4.7.10", speaking=True).outcome, "starttls-not-supported")
        self.trouble = ("starttls-not-supported", text)

    def _tls_failed(self, text: str, result: str) -> TlsFailed:
        return TlsFailed(self._lost(text[:300], "4.7.5").outcome, result)

    def _authenticate(self) -> None:
        """AUTH with the best mechanism on offer (RFC 4954), a secret in clear only under TLS or to a loopback host."""
        settings, protocol = self.settings, self._protocol
        private = bool(self.tls) or on_this_machine(self.host)
        try:
            chosen = choose(protocol.extensions.get("AUTH", ""), settings.username, settings.password, os.urandom(18).hex(), private=private)
            if chosen is None:
                where = "" if private else " that can do without TLS"
                raise self._lost(f"{self.remote} offers no AUTH mechanism that is known here{where}", "4.7.0", speaking=True)
            mechanism, exchange = chosen
            reply = self._command(protocol.auth(mechanism, exchange.first))
            while reply.code == 334:
                try:
                    # SCRAM's key takes up to 0.1 s, however many iterations the server likes
                    answer: bytes | None = gevent.get_hub().threadpool.apply(exchange.answer, (_challenge(reply),))
                except ValueError as error:
                    self._command(protocol.auth_response(None))
                    raise self._lost(f"Authentication with {self.remote} broken off: {error}"[:300], "4.7.0", speaking=True) from error
                reply = self._command(protocol.auth_response(answer))
        except ValueError as error:
            raise self._lost(f"No credentials for {self.remote}: {error}"[:300], "4.7.0", speaking=True) from error
        if reply.code != 235 or not exchange.finished():  # what is wrong is the postmaster's to mend, the mail waits (RFC 4954 section 6)
            raise self._lost(f"Authentication refused by {self.remote}: {reply}"[:300], "4.7.0", speaking=True)

    # --- a message ------------------------------------------------------------------------------------------------

    def send(self, envelope: Envelope, recipients: Sequence[RecipientState], message: Message) -> dict[int, Outcome]:
        """One message, in as many transactions as the remote's limits ask for; an Outcome a recipient. Raises ConnectionFailed."""
        now = self._deadlines.clock()
        self._limit = now + self.settings.attempt_timeout + message.size / SLOWEST
        refusal = self._unfit(envelope, recipients, message)
        if refusal is not None:
            return {recipient.number: refusal for recipient in recipients}
        outcomes: dict[int, Outcome] = {}
        try:
            waiting: Sequence[RecipientState] = recipients
            limited = self._limits.rcpt or self._limits.rcpt_domain
            if "requiretls" in envelope.facts and ("REQUIRETLS" not in self._protocol.extensions or not self.verified) \
                    and not (self.settings.lmtp and on_this_machine(self.host)):  # there it goes over no network
                raise self._no_requiretls()
            while waiting:
                part, rest = self._portion(waiting) if limited else (waiting, ())
                waiting = [*self._transaction(envelope, part, message, outcomes), *rest]
                if waiting and not self.usable:
                    failure = self._lost(f"{self.remote} takes no more in this session", "4.5.3")
                    failure.again = True
                    raise failure
        except ConnectionFailed as failure:
            self.quit()
            failure.outcomes = outcomes
            raise
        except BaseException:
            self.close()
            raise
        return outcomes

    def _no_requiretls(self) -> ConnectionFailed:
        """The remote can't promise what the sender asked for (RFC 8689 section 4.2.1); another one may."""
        return ConnectionFailed(failed(f"{self.remote} does not support REQUIRETLS", enhanced="5.7.30", remote=self.remote))

    def _portion(self, recipients: Sequence[RecipientState]) -> tuple[Sequence[RecipientState], Sequence[RecipientState]]:
        """(recipients of the next transaction, the rest), as LIMITS asks for (RFC 9422 section 4)."""
        most, domains = self._limits.rcpt or len(recipients), self._limits.rcpt_domain
        if not domains:
            return recipients[:most], recipients[most:]
        part: list[RecipientState] = []
        rest: list[RecipientState] = []
        seen: set[str] = set()
        for recipient in recipients:
            host = recipient.address.host
            if len(part) < most and (host in seen or len(seen) < domains):
                seen.add(host)
                part.append(recipient)
            else:
                rest.append(recipient)
        return part, rest

    def _transaction(self, envelope: Envelope, recipients: Sequence[RecipientState], message: Message,
                     outcomes: dict[int, Outcome]) -> list[RecipientState]:
        """One mail transaction; returns the recipients that the remote wants in another one."""
        protocol, settings = self._protocol, self.settings
        extensions = protocol.extensions
        self._handed_over = False
        self._heard = self.sender_deferred = False
        if self._unclean:
            self._reset()
        limits = self._limits.mail or MESSAGES_A_CONNECTION
        self.sent += 1
        commands = self._envelope_commands(envelope, recipients, message)
        chunking = self._chunking and "CHUNKING" in extensions
        pipelining = "PIPELINING" in extensions
        final: Reply | None = None
        self._unclean = True
        if not pipelining:
            replies = []
            for command in commands:
                replies.append(self._command(command))
                if replies[0].code >= 300:
                    break
            accepted, again = self._judge(replies, recipients, outcomes)
        else:
            group = list(commands)
            whole = chunking and not settings.lmtp and message.size <= ONE_WRITE
            if whole:
                # RFC 3030 section 4.2: BDAT may follow RCPT in one group; where no recipient is accepted the remote refuses it
                group.append(protocol.bdat(message.size, True))
                group.extend(message.chunks())
                self._handed_over = True
            elif not chunking:
                group.append(protocol.data())  # RFC 2920 section 3.1: the last of its group
            self._write(b"".join(group), settings.command_timeout)
            replies = [self._read(settings.command_timeout, "a reply to the envelope") for _ in range(len(recipients) + 1)]
            accepted, again = self._judge(replies, recipients, outcomes)
            if whole:
                self._handed_over = bool(accepted)
                final = self._read(settings.data_timeout, "the final reply")
        if final is None:
            if not chunking:
                accepted = self._send_text(message, accepted, outcomes, asked=pipelining)
            elif accepted:
                self._send_chunk(message)
        if accepted:
            self._conclude(accepted, outcomes, final, chunking=chunking)
        if self.sent >= limits:
            self.quit()
        return again

    def _unfit(self, envelope: Envelope, recipients: Sequence[RecipientState], message: Message) -> Outcome | None:
        """The failure of a message that this remote can't take, before it is tried."""
        extensions = self._protocol.extensions
        limit = extensions.get("SIZE", "").strip()
        if limit.isdigit() and 0 < int(limit) < message.size:  # RFC 1870 section 6.1
            return failed(f"Message of {message.size} octets is larger than {self.remote} takes ({limit})", enhanced="5.3.4",
                          code=552, remote=self.remote)
        if envelope.body == "BINARYMIME" and ("BINARYMIME" not in extensions or "CHUNKING" not in extensions or not self._chunking):
            return failed(f"{self.remote} does not take binary messages", enhanced="5.6.3", code=554,
                          remote=self.remote)  # RFC 3030 section 3
        if "8BITMIME" not in extensions and not all(map(bytes.isascii, message.chunks())):
            return failed(f"{self.remote} does not take 8-bit messages", enhanced="5.6.3", code=554,
                          remote=self.remote)  # RFC 6152 section 3
        if envelope.smtputf8 and "SMTPUTF8" not in extensions:
            plain = message.header.isascii() and envelope.sender.local.isascii()
            if not plain or not all(recipient.address.local.isascii() for recipient in recipients):
                return failed(f"{self.remote} does not take internationalized mail", enhanced="5.6.7", code=553,
                              remote=self.remote)  # RFC 6531 section 3.2
        return None

    def _envelope_commands(self, envelope: Envelope, recipients: Sequence[RecipientState], message: Message) -> Iterator[bytes]:
        """MAIL and one RCPT a recipient, with the parameters that the remote knows; each is to be sent when it is taken."""
        protocol = self._protocol
        extensions = protocol.extensions
        dsn = "DSN" in extensions
        utf8 = envelope.smtputf8 and "SMTPUTF8" in extensions
        body: str | None = None
        if "8BITMIME" in extensions:
            body = envelope.body
            if body == "7BIT":  # RFC 6152 section 3: whatever was said when it came, what is in it has to be declared
                memory = type(message.body) is MemoryBody
                body = None if not memory or (message.header.isascii() and message.body.data.isascii()) else "8BITMIME"  # type: ignore[union-attr]
        yield protocol.mail(_wire(envelope.sender, utf8), size=message.size if "SIZE" in extensions else None, body=body,
                            smtputf8=utf8, ret=envelope.ret if dsn else "", envid=envelope.envid if dsn else "",
                            requiretls="requiretls" in envelope.facts and "REQUIRETLS" in extensions)
        for recipient in recipients:
            if dsn:
                # RFC 3461 section 5.2.1: NOTIFY and ORCPT go on unchanged
                yield protocol.rcpt(_wire(recipient.address, utf8), notify=recipient.notify, orcpt=recipient.orcpt)
            else:
                yield protocol.rcpt(_wire(recipient.address, utf8))

    def _judge(self, replies: list[Reply], recipients: Sequence[RecipientState],
               outcomes: dict[int, Outcome]) -> tuple[list[RecipientState], list[RecipientState]]:
        """(recipients whose RCPT was accepted, those that were one too many for it); the others get their Outcome."""
        if replies[0].code >= 300:
            self.sender_deferred = not replies[0].permanent
            for recipient in recipients:
                outcomes[recipient.number] = self._outcome(replies[0])
            return [], []
        accepted: list[RecipientState] = []
        again: list[RecipientState] = []
        for recipient, reply in zip(recipients, replies[1:], strict=True):
            if reply.code < 300:
                accepted.append(recipient)
                continue
            if _too_many(reply):
                again.append(recipient)
                if reply.permanent:  # RFC 5321 section 4.5.3.1.10: the old way to say it
                    reply = Reply(452, "4.5.3", *reply.lines)
            outcomes[recipient.number] = self._outcome(reply)
        if not accepted:
            return [], []
        for recipient in again:
            del outcomes[recipient.number]
        return accepted, again

    def _outcome(self, reply: Reply) -> Outcome:
        """What a reply means for a recipient."""
        outcome = outcome_of(reply, remote=self.remote)
        outcome.tls = self.tls
        return outcome

    def _send_text(self, message: Message, accepted: list[RecipientState], outcomes: dict[int, Outcome], *,
                   asked: bool) -> list[RecipientState]:
        """The message after a 354, dot-stuffed; returns those who wait for the final reply. asked: DATA is under way already."""
        if not asked and not accepted:
            return []
        go_on = self._read(self.settings.data_timeout, "the reply to DATA") if asked else self._command(self._protocol.data())
        if go_on.code != 354:
            for recipient in accepted:
                outcomes[recipient.number] = (self._outcome(go_on) if go_on.code >= 400 else
                                              deferred("Unexpected reply to DATA", remote=self.remote))
            return []
        if accepted:
            self._send_data(message)
            return accepted
        self._write(b".\r\n", self.settings.command_timeout)  # RFC 2920 section 3.1: nobody takes it
        for _ in range(0 if self.settings.lmtp else 1):
            self._read(self.settings.data_timeout, "the reply to an empty message")
        return []

    def _send_data(self, message: Message) -> None:
        """The octets, dot-stuffed (RFC 5321 section 4.5.2), in few writes."""
        pending = bytearray()
        stuffer = Stuffer()
        self._begin_data(message)
        for piece in message.chunks():
            pending += stuffer.feed(piece)
            if len(pending) >= _SMALL:
                self._send(bytes(pending), "sending the message")
                pending.clear()
        pending += stuffer.finish()
        self._handed_over = True
        self._send(bytes(pending), "sending the message")

    def _send_chunk(self, message: Message) -> None:
        """The octets as they are, as one chunk (RFC 3030 section 2)."""
        pending = bytearray(self._protocol.bdat(message.size, True))
        self._begin_data(message)
        left = message.size
        for piece in message.chunks():
            pending += piece
            left -= len(piece)
            if len(pending) >= _SMALL or not left:
                self._handed_over = not left
                self._send(bytes(pending), "sending the message")
                pending.clear()
        if left:  # the remote waits for octets that are not there
            raise OSError("the message is shorter than it was")

    def _begin_data(self, message: Message) -> None:
        self.deadline = min(self._deadlines.clock() + self.settings.data_timeout + message.size / SLOWEST, self._limit)

    def _conclude(self, accepted: list[RecipientState], outcomes: dict[int, Outcome], reply: Reply | None, *, chunking: bool) -> None:
        """The final reply, or with LMTP one a recipient in the order of RCPT (RFC 2033 section 4.2)."""
        relayed = "DSN" not in self._protocol.extensions
        positive = True
        for recipient in accepted:
            if reply is None or self.settings.lmtp:
                reply = self._read(self.settings.data_timeout, "the final reply")
            if chunking and reply.code in _NO_BDAT:
                self._handed_over = False
                failure = ConnectionFailed(deferred(f"{self.remote} offers CHUNKING and refuses BDAT: {reply}"[:300], remote=self.remote))
                failure.again = failure.no_bdat = True
                self._speaking = False
                raise failure
            outcome = self._outcome(reply)
            outcome.relayed = relayed and outcome.status is Status.DELIVERED
            outcomes[recipient.number] = outcome
            positive = positive and reply.code < 300
        self._handed_over = False
        self._unclean = not positive and chunking  # RFC 3030 section 4.2: after a refused chunk RSET has to come

    def _reset(self) -> None:
        """RSET, before the next transaction."""
        self._command(self._protocol.rset())
        self._unclean = False

    # --- octets ---------------------------------------------------------------------------------------------------

    def _write(self, data: bytes, timeout_s: float) -> None:
        self.deadline = min(self._deadlines.clock() + timeout_s, self._limit)
        self._send(data, "sending a command")

    def _send(self, data: bytes, what: str) -> None:
        try:
            sent = self._socket.send(data)  # sendall would ask the kernel for its buffer size each time
            while sent < len(data):
                data = data[sent:]
                sent = self._socket.send(data)
        except OSError as error:
            self._handed_over = False  # what was not sent can't have been taken
            raise self._broken(what, error) from error

    def expire(self) -> None:
        """A wait has taken too long: shuts the socket down under whoever waits for it."""
        self.deadline, self._expired = NEVER, True
        try:
            self._socket._sock.shutdown(plain_socket.SHUT_RDWR)
        except OSError:
            pass

    def _broken(self, what: str, error: Exception | None = None) -> ConnectionFailed:
        """What ended the connection: our deadline, an error of the socket, or the remote."""
        if self._expired:
            return self._lost(f"Timeout while {what} ({self.remote})", "4.4.2")
        if error is not None:
            return self._lost(f"Connection to {self.remote} lost while {what}: {error}", "4.4.2")
        return self._lost(f"{self.remote} closed the connection while {what}", "4.4.2")

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
                self.deadline = min(self._deadlines.clock() + timeout_s, self._limit)
                while reply is None:
                    data = self._socket.recv(_RECEIVE)
                    if not data:
                        raise self._broken(f"waiting for {what}")
                    protocol.receive_data(data)
                    reply = protocol.next_reply()
                self.deadline = NEVER
        except OSError as error:
            raise self._broken(f"waiting for {what}", error) from error
        except (ProtocolError, ValueError) as error:
            raise self._lost(f"{self.remote} does not speak SMTP: {error}", "4.5.0") from error
        self._heard = self._speaking = True
        if reply.code == 421:  # RFC 5321 section 3.8
            raise self._refused(reply)
        return reply

    def _lost(self, text: str, enhanced: str, *, speaking: bool = False) -> ConnectionFailed:
        """There is no going on with this connection; speaking: but for QUIT."""
        self._speaking = speaking and self._speaking
        clean = "".join(char if char.isprintable() else " " for char in text[:300])
        outcome = deferred(clean, enhanced=enhanced, code=451, remote=self.remote, recipient_fault=False)
        outcome.tls = self.tls
        # What a kept connection has not answered at all was closed before it could take anything
        return ConnectionFailed(outcome, certain=not self._handed_over or (self.sent > 1 and not self._heard))

    def _refused(self, reply: Reply) -> ConnectionFailed:
        """The remote does not want to talk: 421 now, any other code as the greeting or to EHLO."""
        self._speaking = reply.code != 421  # RFC 5321 section 3.8: it is closing
        outcome = outcome_of(reply, remote=self.remote, recipient_fault=False)
        if outcome.status is Status.DELIVERED:  # a positive code that has no meaning here
            return self._lost(f"{self.remote} answers {reply}", "4.5.0", speaking=True)
        outcome.tls = self.tls
        return ConnectionFailed(outcome)

    # --- the end --------------------------------------------------------------------------------------------------

    @property
    def source(self) -> str:
        """Our address of this connection, for reports; "" where it is gone."""
        try:
            return "" if self.host.startswith("/") else str(self._socket.getsockname()[0])
        except (AttributeError, OSError):
            return ""

    def closed_by_remote(self) -> bool:
        """Whether the remote has closed this idle connection, or said something, which can only be 421."""
        return bool(self._poll.poll(0))

    def quit(self) -> None:
        """QUIT without waiting for the answer, where the remote still listens, then close."""
        if self._speaking and self._socket is not None:
            try:
                self._limit = NEVER
                self._write(self._protocol.quit(), 1.0)
            except (ConnectionFailed, ProtocolError):
                pass
        self.close()

    def close(self) -> None:
        """Closes the socket."""
        self.usable = self._speaking = False
        self._deadlines.forget(self)
        if self._socket is not None:
            try:
                self._socket.close()
            except OSError:
                pass
            self._socket = None


class Pool:
    """Kept connections by key; `take` one, `keep` it afterwards. Idle ones are closed by a sweep, or when taken too late."""

    def __init__(self, idle_timeout_s: float, clock: Callable[[], float], spawn: Callable[..., Any]) -> None:
        self._idle_timeout_s = idle_timeout_s
        self._clock = clock
        self._spawn = spawn
        self._idle: dict[Any, list[SmtpClient]] = {}
        self._sweeper: Any = None

    def take(self, key: Any) -> SmtpClient | None:
        """The connection of that key that was used last, if one is fresh enough."""
        clients = self._idle.get(key)
        if not clients:
            return None
        oldest = self._clock() - self._idle_timeout_s
        while clients:
            client = clients.pop()
            if client.closed_by_remote():
                client.close()
            elif client.used_at >= oldest:
                return client
            else:
                client.quit()
        return None

    def keep(self, key: Any, client: SmtpClient) -> None:
        """Takes a connection back."""
        if not client.usable:
            return
        if self._idle_timeout_s <= 0 or client.single:
            client.quit()
            return
        client.used_at = self._clock()
        self._idle.setdefault(key, []).append(client)
        if self._sweeper is None or self._sweeper.dead:
            self._sweeper = self._spawn(self._sweep)

    def let_go(self, key: Any) -> None:
        """Closes the idle ones of a key."""
        clients = self._idle.get(key, [])
        while clients:
            clients.pop().quit()

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


def _too_many(reply: Reply) -> bool:
    """Whether a RCPT was refused since there are too many in this transaction (RFC 5321 section 4.5.3.1.10)."""
    if reply.enhanced is None:
        return reply.code in (452, 552)
    return reply.enhanced[2:] == "5.3"


def _challenge(reply: Reply) -> bytes:
    """The octets of a 334 reply; raises ValueError."""
    return base64.b64decode(reply.text, validate=True)
