"""One greenlet a connection: socket <-> protocol <-> reception, with deadlines, TLS and budgets.

The loop: receive; while there is an event: answer; flush when no further complete input is at hand, so that pipelined commands are
answered in one write (RFC 2920). Whatever goes wrong here ends this connection only. RFC 5321 section 4.5.3.2.
"""

from __future__ import annotations

import socket
import time
from typing import Any

import gevent
from gevent import ssl as gevent_ssl

from gmta.mail import reply as replies
from gmta.mail.reply import Reply
from gmta.mail.session import Session
from gmta.receive.limits import ConnectionLimits
from gmta.receive.pipeline import Pipeline, Reception
from gmta.services.tls import tls_info
from gmta.smtp import events
from gmta.smtp.server import Extensions, ServerProtocol

RECEIVE = 64 * 1024
RECEIVE_DATA = 256 * 1024
LINGER_S = 2.0


class Hangup(Exception):
    """The connection is over; the reason goes to the log."""


class Connection:
    """Serves one accepted socket until it is over."""

    __slots__ = ("_clock", "_data_since", "_errors", "_limits", "_listener", "_out", "_pipeline", "_protocol", "_reception", "_socket",
                 "_tls", "busy", "session")

    def __init__(self, sock: Any, session: Session, listener: Any, pipeline: Pipeline, tls: Any, limits: ConnectionLimits) -> None:
        self._socket = sock
        self.session = session
        self._listener = listener
        self._pipeline = pipeline
        self._tls = tls
        self._limits = limits
        self._clock = time.monotonic
        self._errors = 0
        self._data_since = 0.0
        self._out: list[bytes] = []
        self._reception = Reception(pipeline, session)
        self.busy = False
        self._protocol: ServerProtocol | None = None

    def run(self, admitted: bool) -> str:
        """The whole life of the connection; gives the reason for its end."""
        reason = "lost"
        try:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if not admitted:
                self._last_word(replies.TOO_MANY_CONNECTIONS)
                return "refused"
            if self._listener.tls == "implicit":
                self._handshake()
            refusal = self._reception.connected()
            if refusal is not None:
                self._last_word(refusal)
                return "refused"
            self._protocol = self._new_protocol()
            self._socket.sendall(Reply(220, None, f"{self._pipeline.hostname} ESMTP gmta").wire())
            reason = self._talk(self._protocol)
        except Hangup as over:
            reason = str(over)
        except (OSError, gevent.Timeout) as error:
            reason = f"lost ({type(error).__name__})"
        finally:
            self._reception.forget()
            self._close()
            if self._pipeline.plugins.has("on_session_closed"):
                self._pipeline.plugins.on("on_session_closed", self.session, reason)
        return reason

    def shut_down(self) -> bool:
        """Asks for the end: True where the client is idle and was told 421, False where a message is on its way."""
        if self.busy:
            return False
        try:
            self._socket.send(replies.SHUTTING_DOWN.wire())
        except OSError:
            pass
        return True

    def _new_protocol(self) -> ServerProtocol:
        listener, session = self._listener, self.session
        auth = ("PLAIN", "LOGIN") if self._pipeline.plugins.has("permit_auth") else ()
        clear = session.tls is None and not session.peer_ip.startswith("127.")
        extensions = Extensions(size=self._pipeline.size_limit(session), starttls=self._tls is not None and session.tls is None,
                                auth=() if clear else auth, rcpt_max=self._pipeline.recipients)
        return ServerProtocol(extensions, self._pipeline.hostname, require_auth=bool(listener.auth_required))

    def _talk(self, protocol: ServerProtocol) -> str:
        reception, out, limits = self._reception, self._out, self._pipeline.config.limits
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
            if type(event) is events.Fault:
                reply, close = event.reply, event.close
            else:
                reply, close = reception.answer(event), reception.closing
            if type(event) is events.StartTls:
                out.append(protocol.reply(reply))
                self._flush()
                self._handshake()
                protocol.tls_started()
                protocol.extensions.starttls = False
                protocol.extensions.auth = ("PLAIN", "LOGIN") if self._pipeline.plugins.has("permit_auth") else ()
                continue
            out.append(protocol.reply(reply))
            if reply.code >= 400:
                close = self._count_error(reply, limits) or close
            if close:
                self._flush()
                self._linger()
                return "quit" if reply.code == 221 else f"closed after {reply.code}"

    def _count_error(self, reply: Reply, limits: Any) -> bool:
        """Counts a refused command; True when it was one too many (the last word is then in the output)."""
        self._errors += 1
        if reply.transient and reply.code != 421:
            self._errors -= 1  # not the client's doing
            return False
        if self._errors >= limits.errors_per_session:
            self._out.append(replies.TOO_MANY_ERRORS.wire())
            return True
        if self._errors > limits.error_delay_from > 0:
            self._flush()
            gevent.sleep(limits.error_delay)
        return False

    def _receive(self, protocol: ServerProtocol, limits: Any) -> bytes:
        """The next octets within the deadline of the phase; raises Hangup."""
        now = self._clock()
        if protocol.in_data:
            if not self._data_since:
                self._data_since = now
            left = self._data_since + limits.data_timeout - now
            timeout = min(left, limits.command_timeout, limits.data_timeout)
            size = RECEIVE_DATA
        else:
            self._data_since = 0.0
            timeout = limits.command_timeout_pressure if self._limits.pressed else limits.command_timeout
            if protocol.buffered:  # a command begun: its deadline is a whole one, not one an octet
                return self._receive_rest(protocol, timeout)
            left, size = timeout, RECEIVE
        try:
            self._socket.settimeout(max(0.001, min(left, timeout)))
            data: bytes = self._socket.recv(size)
        except TimeoutError:
            self._last_word(replies.TIMED_OUT)
            raise Hangup("timeout") from None
        if not data:
            raise Hangup("lost")
        return data

    def _receive_rest(self, protocol: ServerProtocol, timeout: float) -> bytes:
        """The rest of a command line that came in part; all of it within one deadline."""
        end = self._clock() + timeout
        got = b""
        while b"\n" not in got and len(got) < RECEIVE:
            try:
                self._socket.settimeout(max(0.001, end - self._clock()))
                data: bytes = self._socket.recv(RECEIVE)
            except TimeoutError:
                self._last_word(replies.TIMED_OUT)
                raise Hangup("timeout") from None
            if not data:
                raise Hangup("lost")
            got += data
        return got

    def _flush(self) -> None:
        data = b"".join(self._out)
        self._out.clear()
        self._socket.settimeout(60)
        self._socket.sendall(data)

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
            self._socket.shutdown(socket.SHUT_WR)
            end = self._clock() + LINGER_S
            while (left := end - self._clock()) > 0:
                self._socket.settimeout(left)
                if not self._socket.recv(RECEIVE):
                    return
        except (OSError, ValueError):
            pass

    def _handshake(self) -> None:
        self._socket = gevent_ssl.SSLSocket(sock=self._socket, server_side=True, do_handshake_on_connect=False, _context=self._tls) \
            if not hasattr(self._tls, "wrap_socket") else self._tls.wrap_socket(self._socket, server_side=True, do_handshake_on_connect=False)
        with gevent.Timeout(self._pipeline.config.limits.tls_timeout):
            self._socket.do_handshake()
        self.session.tls = tls_info(self._socket)

    def _close(self) -> None:
        try:
            self._socket.close()
        except OSError:
            pass
