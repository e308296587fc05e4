"""One greenlet a connection: socket <-> protocol <-> reception, with deadlines, TLS and budgets.

The loop: receive; while there is an event: answer; flush when no further complete input is at hand, so that pipelined commands are
answered in one write (RFC 2920). Whatever goes wrong here ends this connection only. RFC 5321 section 4.5.3.2.
"""

from __future__ import annotations

import socket
from typing import Any

import gevent

from gmta.mail import reply as replies
from gmta.mail.reply import Reply
from gmta.mail.session import AuthResult, Session
from gmta.receive.limits import ConnectionLimits, within
from gmta.receive.pipeline import Pipeline, Reception
from gmta.services.deadlines import NEVER, Deadlines
from gmta.services.tls import close_notify, tls_info
from gmta.smtp import events
from gmta.smtp.server import Extensions, ServerProtocol

RECEIVE = 64 * 1024
RECEIVE_DATA = 256 * 1024
LINGER_S = 2.0
WRITE_S = 60.0
SILENT_S = 1.0  # a client silent for so long, outside a message, is cut when the worker leaves


class Hangup(Exception):
    """The connection is over; the reason goes to the log."""


class Connection:
    """Serves one accepted socket until it is over."""

    __slots__ = ("_auth_failures", "_clock", "_cut", "_data_octets", "_data_since", "_deadlines", "_errors", "_heard_at", "_limits",
                 "_listener", "_may_xclient", "_out", "_phase_ends", "_pipeline", "_reception", "_socket", "_tls", "_writing", "busy", "deadline", "session")

    def __init__(self, sock: Any, session: Session, listener: Any, pipeline: Pipeline, tls: Any, limits: ConnectionLimits) -> None:
        self._socket = sock
        self.session = session
        self._listener = listener
        self._pipeline = pipeline
        self._tls = tls
        self._limits = limits
        self._deadlines: Deadlines = pipeline.services.deadlines
        self._clock = self._deadlines.clock
        self._errors = 0
        self._auth_failures = 0
        self._data_since = 0.0
        self._data_octets = 0
        self._phase_ends = 0.0  # when the command, or the message, has to be complete
        self.deadline = NEVER  # of the wait for the socket
        self._writing = False
        self._cut: Reply | None = None  # why a deadline ended the connection
        self._heard_at = self._clock()
        self._out: list[bytes] = []
        self._may_xclient = bool(listener.xclient_from) and within(session.peer_ip, listener.xclient_from)
        self._reception = Reception(pipeline, session)
        self.busy = False

    def run(self, admitted: bool) -> str:
        """The whole life of the connection; gives the reason for its end."""
        reason = "lost"
        plugins = self._pipeline.plugins
        opened = False
        self._deadlines.watch(self)
        try:
            if not admitted:
                self._last_word(replies.TOO_MANY_CONNECTIONS)
                return "refused"
            if self._listener.banner_delay and self._talks_early():
                reason = "pregreet"
                self._last_word(replies.TALKS_EARLY)
                return reason
            if self._listener.tls == "implicit":
                self._handshake()
            opened = True
            if self._listener.reverse_lookup:
                result, self.session.peer_name = self._pipeline.services.resolver.iprev(self.session.peer_ip)
                self.session.iprev = AuthResult("iprev", result, (("policy.iprev", self.session.peer_ip),))
            refusal = self._reception.connected()
            if refusal is not None:
                reason = "refused"
                self._last_word(refusal)
                return reason
            self._out.append(Reply(220, None, f"{self._pipeline.hostname} ESMTP gmta").wire())
            reason = self._talk(self._new_protocol())
        except Hangup as over:
            reason = str(over)
        except (OSError, gevent.Timeout) as error:
            reason = f"lost ({type(error).__name__})"
        finally:
            self._deadlines.forget(self)
            self._reception.forget()
            self._close()
            if opened and plugins.has("on_session_closed"):
                plugins.on("on_session_closed", self.session, reason)
        return reason

    def shut_down(self) -> bool:
        """Asks for the end: True where the client is silent and was told 421, False where it is in the middle of something."""
        if self.busy or self._clock() - self._heard_at < SILENT_S:
            return False
        try:
            self._socket.send(replies.SHUTTING_DOWN.wire())
            if self.session.tls is not None:
                close_notify(self._socket)
            self._socket.shutdown(socket.SHUT_WR)
        except OSError:
            pass
        return True

    def _new_protocol(self) -> ServerProtocol:
        pipeline = self._pipeline
        extensions = Extensions(rcpt_max=pipeline.recipients)
        protocol = ServerProtocol(extensions, pipeline.hostname, require_auth=bool(self._listener.auth_required), bounds=pipeline.bounds,
                                  normalize=self._listener.bare_newline == "normalize")
        protocol.require_tls = self._listener.tls == "required"
        if self.session.tls is not None:
            protocol.tls = True
            self._trust_certificate(protocol)
        return protocol

    def _trust_certificate(self, protocol: ServerProtocol) -> None:
        """A client whose certificate may relay needs no password. Asked after the handshake only: XCLIENT names another client."""
        tls, names = self.session.tls, self._listener.client_names
        if tls is not None and tls.client_name and names and ("*" in names or tls.client_name.lower() in map(str.lower, names)):
            self.session.relay_network = True
            protocol.require_auth = False

    def _offer(self, extensions: Extensions) -> None:
        """Sets what depends on how far the session has come: size limit, STARTTLS, AUTH (under TLS only: RFC 4954 section 4)."""
        clear = self.session.tls is None
        auth = self._pipeline.mechanisms.any
        extensions.size = self._pipeline.size_limit(self.session)
        extensions.starttls = clear and self._tls is not None
        clear_auth = auth and clear and self._listener.allow_plain_on_loopback and _is_loopback(self.session.peer_ip)
        extensions.auth_needs_tls = auth and not clear_auth
        extensions.etrn = self._pipeline.may_etrn(self.session.peer_ip)
        extensions.requiretls = not clear
        extensions.xclient = self._may_xclient
        extensions.auth = self._pipeline.mechanisms.of(self.session) if auth and (clear_auth or not clear) else ()

    def _talk(self, protocol: ServerProtocol) -> str:
        reception, out, limits = self._reception, self._out, self._pipeline.config.limits
        self._offer(protocol.extensions)
        while True:
            event = protocol.next_event()
            if event is None:
                if out:
                    self._flush()
                self.busy = protocol.in_data or protocol.in_transaction
                protocol.receive_data(self._receive(protocol, limits))
                continue
            if type(event) is events.Body:
                reception.body(event.data)
                continue
            self.busy = True
            self._phase_ends = 0.0  # the next command has a deadline of its own, even where its first octets came with this one
            if type(event) is events.Mail and self._limits.draining:
                reply, close = replies.SHUTTING_DOWN, True  # RFC 5321 section 3.8
            elif type(event) is events.Fault:
                reply, close = event.reply, event.close
            else:
                reply, close = reception.answer(event), reception.closing
            out.append(protocol.reply(reply))
            if reply.code == 220:
                if type(event) is events.StartTls:
                    self._flush()
                    self._handshake()
                    protocol.tls_started()
                    self.session.user, protocol.authenticated = None, False  # RFC 3207 section 4.2
                    self._trust_certificate(protocol)
                elif (refusal := self._become(protocol)) is not None:
                    out[-1] = refusal.wire()
                    self._flush()
                    self._linger()
                    return "refused"
                self._offer(protocol.extensions)
                continue
            if type(event) is events.BodyEnd:
                self._data_since = 0.0  # the next message has a deadline of its own, pipelined or not
            if reply.code == 235:
                self._offer(protocol.extensions)
            elif reply.code >= 400:
                close = self._count_error(reply, limits) or close
            if close:
                self._flush()
                if reply.code == 221 and not protocol.buffered:
                    return "quit"  # nothing follows QUIT, so nothing can make a reset of our end
                self._linger()
                return "quit" if reply.code == 221 else f"closed after {reply.code}"

    def _count_error(self, reply: Reply, limits: Any) -> bool:
        """Counts a refused command; True when it was one too many (the last word is then in the output)."""
        if reply.transient and reply.code != 421:
            return False  # not the client's doing
        self._errors += 1
        self._auth_failures += reply.code == 535
        if self._errors >= limits.errors_per_session or self._auth_failures >= limits.auth_failures:
            self._out.append(replies.TOO_MANY_ERRORS.wire())
            return True
        if self._errors > limits.error_delay_from > 0:
            self._flush()
            gevent.sleep(limits.error_delay)
        return False

    def _become(self, protocol: ServerProtocol) -> Reply | None:
        """XCLIENT has made it another client's session, which begins anew: the refusal of check_connect, or None."""
        session = self.session
        session.relay_network = self._limits.is_relay_network(session.peer_ip)
        protocol.require_auth = bool(self._listener.auth_required)
        protocol.authenticated = session.user is not None
        protocol.begin_anew()
        return self._reception.connected()

    def _talks_early(self) -> bool:
        """Waits with the banner: whether the client, against RFC 5321 section 3.1, does not. Networks in relay_from need not wait."""
        if self.session.relay_network or self._listener.tls == "implicit":  # a TLS client has to talk first
            return False
        self._socket.settimeout(self._listener.banner_delay)
        try:
            early = bool(self._socket.recv(1, socket.MSG_PEEK))
        except TimeoutError:
            return False
        finally:
            self._socket.settimeout(None)
        if not early:
            raise Hangup("lost")
        return True

    def _receive(self, protocol: ServerProtocol, limits: Any) -> bytes:
        """The next octets within the deadline of the phase; raises Hangup.

        A command has one deadline as a whole, and so has a message; a message has a least rate besides (RFC 5321 section 4.5.3.2).
        """
        now = self._clock()
        if protocol.in_data:
            if not self._data_since:
                self._data_since, self._data_octets = now, 0
                self._phase_ends = now + limits.data_timeout
            if self._slow(now):
                self._cut = replies.TOO_SLOW
            wait_s = limits.data_rate_after  # to look at the rate again
            size = RECEIVE if self._data_octets < RECEIVE else RECEIVE_DATA  # a buffer past 128 KiB is mapped anew each time
        else:
            wait_s, size = limits.command_timeout_pressure if self._limits.pressed else limits.command_timeout, RECEIVE
            if self._data_since or not self._phase_ends or not protocol.buffered:
                self._data_since, self._phase_ends = 0.0, now + wait_s
        if self._cut is None:
            self.deadline = min(now + wait_s, self._phase_ends)
            try:
                data: bytes = self._socket.recv(size)
            except TimeoutError:  # from expire
                data = b""
            self.deadline = NEVER
            if data:
                self._data_octets += len(data)
                self._heard_at = self._clock()
                return data
        if self._cut is not None:  # by expire, or here
            self._last_word(self._cut)
            raise Hangup("too slow" if self._cut is replies.TOO_SLOW else "timeout")
        raise Hangup("lost")

    def _slow(self, now: float) -> bool:
        """Whether the message comes in below the least rate."""
        limits = self._pipeline.config.limits
        elapsed_s = now - self._data_since
        return bool(elapsed_s > limits.data_rate_after and self._data_octets < elapsed_s * limits.data_rate)

    def expire(self) -> None:
        """The wait for the socket has taken too long: ends it, or grants more to a message that comes fast enough."""
        now = self._clock()
        if self._writing:
            self.deadline = NEVER
            try:
                self._socket._sock.shutdown(socket.SHUT_RDWR)  # below TLS and gevent
            except OSError:
                pass
            return
        if now >= self._phase_ends:
            self._cut = replies.TIMED_OUT
        elif self._slow(now):
            self._cut = replies.TOO_SLOW
        else:
            self.deadline = min(now + self._pipeline.config.limits.data_rate_after, self._phase_ends)
            return
        self.deadline = NEVER
        # Not by shutting the socket: TLS would take that for a broken stream, and could not say the last word
        gevent.get_hub().cancel_wait(self._socket._read_event, TimeoutError())

    def _flush(self) -> None:
        data = b"".join(self._out)
        self._out.clear()
        self._writing, self.deadline = True, self._clock() + WRITE_S
        sent = self._socket.send(data)  # sendall would ask the kernel for its buffer size each time
        while sent < len(data):
            sent += self._socket.send(data[sent:])
        self._writing, self.deadline = False, NEVER

    def _last_word(self, reply: Reply) -> None:
        try:
            self._out.append(reply.wire())
            self._flush()
            self._linger()
        except OSError:
            pass

    def _linger(self) -> None:
        """Ends our side and reads what is still on its way, so that the last reply is not lost to a reset."""
        try:
            if self.session.tls is not None:
                close_notify(self._socket)
            self._socket.shutdown(socket.SHUT_WR)
            end = self._clock() + LINGER_S
            while (left := end - self._clock()) > 0:
                self._socket.settimeout(left)
                if not self._socket.recv(RECEIVE):
                    return
        except (OSError, ValueError):
            pass

    def _handshake(self) -> None:
        self._socket = self._tls.wrap_socket(self._socket, server_side=True, do_handshake_on_connect=False)
        with gevent.Timeout(self._pipeline.config.limits.tls_timeout):
            self._socket.do_handshake()
        self.session.tls = tls_info(self._socket)

    def _close(self) -> None:
        try:
            if self.session.tls is not None:
                close_notify(self._socket)
            self._socket.close()
        except OSError:
            pass


def _is_loopback(ip: str) -> bool:
    """Whether nobody can listen between that address and us."""
    return ip == "::1" or ip.startswith("127.")
