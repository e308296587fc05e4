"""The server's side of SMTP, sans-IO: octets in, events out, replies to octets.

The engine calls receive_data, then next_event until None, and answers each event but Body by reply(). Syntax and order of
commands, framing of DATA and BDAT, dots, line ends and bounds are settled here; policy, limits on recipients and errors,
and deadlines are the engine's. Input can't raise; misuse raises ProtocolError. RFC 5321 and the extensions that
`Extensions` names.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

from gmta.mail.reply import (
    ALREADY_TLS,
    AUTH_ALREADY,
    AUTH_CANCELLED,
    AUTH_MECHANISM,
    AUTH_NEEDS_TLS,
    AUTH_REQUIRED,
    AUTH_SYNTAX,
    AUTH_UNAVAILABLE,
    BAD_HELO,
    BAD_OCTET,
    BAD_RECIPIENT_SYNTAX,
    BAD_SENDER_SYNTAX,
    BARE_NEWLINE,
    HEADER_TOO_LARGE,
    LINE_TOO_LONG,
    NO_ARGUMENT_ALLOWED,
    NO_END,
    NOT_IMPLEMENTED,
    NOT_SMTP,
    SIZE_EXCEEDED,
    SYNTAX,
    TEXT_LINE_TOO_LONG,
    TLS_REQUIRED,
    TLS_UNAVAILABLE,
    UNRECOGNIZED,
    Reply,
)
from gmta.smtp import sasl
from gmta.smtp.commands import parse_bdat, parse_hello, parse_mail, parse_rcpt
from gmta.smtp.data import _SMALL, DataScanner, HeaderMeter
from gmta.smtp.events import (
    Auth,
    AuthResponse,
    BdatStart,
    Body,
    BodyEnd,
    ChunkEnd,
    Data,
    Event,
    Expn,
    Fault,
    Hello,
    Help,
    Mail,
    Noop,
    Quit,
    Rcpt,
    Reset,
    StartTls,
    Vrfy,
)
from gmta.smtp.lines import MAX_AUTH, MAX_COMMAND, LineBuffer, LineFault, ProtocolError
from gmta.smtp.state import REFUSED, Mode, State

NUL_IN_TEXT = Reply(550, "5.5.2", "Message contains a NUL octet")  # RFC 5321 section 4.1.1.4 and 2.3.1

# A browser can be made to post SMTP commands to us: its request line ends the session before they are read.
_HTTP = re.compile(rb"(?:GET|POST|PUT|HEAD|OPTIONS|CONNECT|DELETE|PATCH|TRACE|PRI) |Host:|SSH-", re.I)
_CONTROL = re.compile("[\x00-\x08\x0a-\x1f\x7f]")
_CLEAR_NEEDS_TLS = frozenset({"MAIL", "RCPT", "DATA", "BDAT", "AUTH", "VRFY", "EXPN"})  # RFC 3207 section 4


class Extensions(NamedTuple):
    """What EHLO offers. size: octets, 0 for no limit.  auth: mechanism names in upper case.  Change by _replace."""

    size: int = 0
    starttls: bool = False
    auth: tuple[str, ...] = ()
    pipelining: bool = True
    eightbitmime: bool = True
    smtputf8: bool = True
    dsn: bool = True
    chunking: bool = True
    enhancedstatuscodes: bool = True
    limits: bool = True
    rcpt_max: int = 1000


@lru_cache(maxsize=256)
def ehlo_answer(extensions: Extensions, hostname: str, tls: bool) -> bytes:
    """The positive answer to EHLO (RFC 5321 section 4.1.1.1)."""
    lines = [hostname]
    if extensions.pipelining:
        lines.append("PIPELINING")  # RFC 2920
    lines.append(f"SIZE {extensions.size}")  # RFC 1870 section 4
    if extensions.starttls and not tls:
        lines.append("STARTTLS")  # RFC 3207 section 4.2: not offered again within TLS
    if extensions.auth:
        lines.append("AUTH " + " ".join(extensions.auth))  # RFC 4954 section 3
    if extensions.enhancedstatuscodes:
        lines.append("ENHANCEDSTATUSCODES")  # RFC 2034
    if extensions.eightbitmime:
        lines.append("8BITMIME")  # RFC 6152
    if extensions.smtputf8:
        lines.append("SMTPUTF8")  # RFC 6531
    if extensions.dsn:
        lines.append("DSN")  # RFC 3461
    if extensions.chunking:
        lines.append("CHUNKING")  # RFC 3030
    if extensions.limits:
        lines.append(f"LIMITS RCPTMAX={extensions.rcpt_max}")  # RFC 9422
    lines.append("HELP")
    return Reply(250, None, *lines).wire()


class ServerProtocol:
    """One connection's protocol state. `extensions` may be replaced at any time; it is read at each command."""

    __slots__ = ("_buffer", "_chunk_last", "_chunk_left", "_chunk_refusal", "_ended", "_meter", "_mode", "_pending",
                 "_received", "_scanner", "_size", "_smtputf8", "_state", "authenticated", "bare_newline", "esmtp",
                 "extensions", "hostname", "require_auth", "require_tls", "tls")

    def __init__(self, extensions: Extensions, hostname: str, *, bare_newline: str = "reject", require_tls: bool = False,
                 require_auth: bool = False) -> None:
        self.extensions = extensions
        self.hostname = hostname
        self.bare_newline = bare_newline
        self.require_tls = require_tls
        self.require_auth = require_auth
        self.tls = False
        self.authenticated = False
        self.esmtp = False
        self._buffer = LineBuffer()
        self._mode = Mode.COMMAND
        self._state = State.START
        self._pending: Event | None = None
        self._smtputf8 = False
        self._scanner: DataScanner | None = None
        self._meter: HeaderMeter | None = None
        self._ended = False
        self._size = 0  # octets of the message that comes in chunks
        self._received = 0  # octets taken for the chunk that is coming in
        self._chunk_left = 0
        self._chunk_last = False
        self._chunk_refusal: Reply | None = None

    # --- what the engine may ask ---------------------------------------------------------------------------------

    @property
    def greeted(self) -> bool:
        """EHLO or HELO was accepted."""
        return self._state is not State.START

    @property
    def in_transaction(self) -> bool:
        """Between an accepted MAIL and the end of its transaction."""
        return self._state >= State.MAIL

    @property
    def in_data(self) -> bool:
        """The next octets belong to a message, not to a command."""
        return self._mode is Mode.DATA or self._mode is Mode.CHUNK

    @property
    def buffered(self) -> int:
        """Octets received and not consumed."""
        return len(self._buffer)

    # --- octets in -------------------------------------------------------------------------------------------------

    def receive_data(self, data: bytes) -> None:
        """Takes what the peer sent. After a fault that closes, and between 220 and TLS, it is dropped."""
        if data and self._mode < Mode.TLS:
            self._buffer.append(data)

    def next_event(self) -> Event | None:
        """The next event, or None when more octets are needed (or the session is over)."""
        if self._pending is not None:
            raise ProtocolError("the pending event has no reply yet")
        mode = self._mode
        event: Event | None
        if mode is Mode.DATA:
            event = self._text()
        elif mode is Mode.CHUNK:
            event = self._chunk()
        elif mode is Mode.COMMAND:
            event = self._command()
        elif mode is Mode.AUTH:
            event = self._auth_line()
        else:
            return None
        if event is not None and type(event) is not Body:
            self._pending = event
        return event

    def tls_started(self) -> None:
        """TLS is up: all that came before it is forgotten, the greeting too (RFC 3207 section 4.2)."""
        self.tls = True
        self.esmtp = False
        self.authenticated = False
        self._buffer.clear()
        self._pending = None
        self._mode = Mode.COMMAND
        self._state = State.START
        self._end_transaction()

    # --- replies out -----------------------------------------------------------------------------------------------

    def reply(self, reply: Reply, *, reset: bool = False) -> bytes:
        """The octets that answer the pending event, after which the session is where that answer leads.

        reset: the transaction ends too.  A BdatStart's octets are empty: its refusal comes as a Fault once the chunk is in.
        Raises ProtocolError if no event is pending.
        """
        event = self._pending
        if event is None:
            raise ProtocolError("no event is pending")
        self._pending = None
        kind = type(event)
        positive = reply.code < 400
        if kind is Mail:
            if positive:
                self._state = State.MAIL
                self._smtputf8 = event.smtputf8  # type: ignore[union-attr]
        elif kind is Rcpt:
            if positive:
                self._state = State.RCPT
        elif kind is Data:
            if positive:
                self._mode = Mode.DATA
                self._scanner = DataScanner(normalize=self.bare_newline == "normalize")
        elif kind is BodyEnd:
            self._end_transaction()
            if event.close:  # type: ignore[union-attr]
                self._close()
        elif kind is Hello:
            if positive:
                self._end_transaction()
                self._state = State.GREETED
                self.esmtp = event.esmtp  # type: ignore[union-attr]
                if self.esmtp:
                    return ehlo_answer(self.extensions, self.hostname, self.tls)
                return b"250 " + self.hostname.encode("ascii", "backslashreplace") + b"\r\n"
        elif kind is Fault:
            if event.close:  # type: ignore[union-attr]
                self._close()
        elif kind is Reset:
            self._end_transaction()
        elif kind is Quit:
            self._close()
        elif kind is BdatStart:
            if not positive:
                self._chunk_refusal = reply
                if reset:
                    self._end_transaction()
            return b""
        elif kind is ChunkEnd:
            self._state = State.CHUNKED if positive else State.FAILED
        elif kind is StartTls:
            if positive:
                # Octets behind STARTTLS in clear text must not be obeyed within TLS (CVE-2011-0411)
                self._buffer.clear()
                self._mode = Mode.TLS
        elif kind is Auth or kind is AuthResponse:
            self._mode = Mode.AUTH if reply.code == 334 else Mode.COMMAND
            if reply.code == 235:
                self.authenticated = True
        if reset:
            self._end_transaction()
        return reply.wire()

    def _end_transaction(self) -> None:
        if self._state > State.GREETED:
            self._state = State.GREETED
        self._scanner = None
        self._meter = None
        self._ended = False
        self._size = 0
        self._smtputf8 = False

    def _close(self) -> None:
        self._mode = Mode.CLOSED
        self._buffer.clear()

    # --- commands --------------------------------------------------------------------------------------------------

    def _line(self, limit: int) -> bytes | Fault | None:
        buffer = self._buffer
        line = buffer.line(MAX_AUTH, lenient=self.bare_newline == "normalize")
        if type(line) is bytes:
            if len(line) + 2 > limit and line[:5].upper() != b"AUTH ":
                return Fault(LINE_TOO_LONG, False)
            return line
        if line is None:
            return None
        if line is LineFault.LONG:
            return Fault(LINE_TOO_LONG, False)
        if line is LineFault.ENDLESS:
            return Fault(NO_END, True)
        return Fault(BARE_NEWLINE, True)

    def _command(self) -> Event | None:
        buffer = self._buffer
        start = buffer.start
        if start == len(buffer.data):
            return None
        if not buffer.dropped:
            if self._state is State.START and buffer.data.startswith(b"\x16", start):
                return Fault(NOT_SMTP, True)  # a TLS hello on a port that starts in clear text
            if buffer.data.find(b"\n", start) >= 0 and _HTTP.match(buffer.data, start):
                return Fault(NOT_SMTP, True)
        line = self._line(MAX_COMMAND)
        if type(line) is not bytes:
            return line  # type: ignore[return-value]
        line = line.rstrip(b" \t")
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError:
            return self._bad_octets(line)
        verb, _, argument = text.partition(" ")
        verb = verb.upper()
        parse = _PARSERS.get(verb)
        if parse is None:
            return Fault(UNRECOGNIZED, False)
        if verb != "BDAT":
            refusal = REFUSED[self._state].get(verb)
            if refusal is None and self.require_tls and not self.tls and verb in _CLEAR_NEEDS_TLS:
                refusal = TLS_REQUIRED
            if refusal is not None:
                return Fault(refusal, False)
        if _CONTROL.search(argument):
            return Fault(_SYNTAX_OF.get(verb, SYNTAX), False)
        found = parse(self, argument)
        return Fault(found, False) if type(found) is Reply else found  # type: ignore[return-value]

    def _bad_octets(self, line: bytes) -> Event:
        verb = line[:4].upper().decode("latin-1")
        refusal = _SYNTAX_OF.get(verb, BAD_OCTET)
        if verb in ("MAIL", "RCPT"):
            refusal = REFUSED[self._state].get(verb, refusal)
        return Fault(refusal, False)

    def _ehlo(self, argument: str) -> Event | Reply:
        return parse_hello(argument, esmtp=True)

    def _helo(self, argument: str) -> Event | Reply:
        return parse_hello(argument, esmtp=False)

    def _mail(self, argument: str) -> Event | Reply:
        if self.require_auth and not self.authenticated:
            return AUTH_REQUIRED
        offered = self.extensions
        return parse_mail(argument, size_limit=offered.size, eightbitmime=offered.eightbitmime,
                          smtputf8=offered.smtputf8, dsn=offered.dsn)

    def _rcpt(self, argument: str) -> Event | Reply:
        return parse_rcpt(argument, smtputf8=self._smtputf8, dsn=self.extensions.dsn)

    def _data(self, argument: str) -> Event | Reply:
        return NO_ARGUMENT_ALLOWED if argument else Data()

    def _rset(self, argument: str) -> Event | Reply:
        return NO_ARGUMENT_ALLOWED if argument else Reset()

    def _quit(self, argument: str) -> Event | Reply:
        return NO_ARGUMENT_ALLOWED if argument else Quit()

    def _noop(self, argument: str) -> Event | Reply:
        return Noop()

    def _help(self, argument: str) -> Event | Reply:
        return Help(argument)

    def _vrfy(self, argument: str) -> Event | Reply:
        return Vrfy(argument.strip()) if argument.strip() else SYNTAX

    def _expn(self, argument: str) -> Event | Reply:
        return Expn(argument.strip()) if argument.strip() else SYNTAX

    def _starttls(self, argument: str) -> Event | Reply:
        if argument:
            return NO_ARGUMENT_ALLOWED
        if self.tls:
            return ALREADY_TLS
        return StartTls() if self.extensions.starttls else TLS_UNAVAILABLE

    # --- AUTH ------------------------------------------------------------------------------------------------------

    def _auth(self, argument: str) -> Event | Reply:
        if self.authenticated:
            return AUTH_ALREADY
        offered = self.extensions
        if not offered.auth:
            return AUTH_NEEDS_TLS if offered.starttls and not self.tls else AUTH_UNAVAILABLE
        words = argument.split()
        if not words or len(words) > 2:
            return SYNTAX
        mechanism = words[0].upper()
        if mechanism not in offered.auth:
            return AUTH_MECHANISM
        if len(words) == 1:
            return Auth(mechanism, None)
        try:
            return Auth(mechanism, sasl.decode(words[1].encode()))
        except ValueError:
            return AUTH_SYNTAX

    def _auth_line(self) -> Event | None:
        line = self._line(MAX_AUTH)
        if line is None:
            return None
        self._mode = Mode.COMMAND  # until a further challenge
        if type(line) is not bytes:
            return line  # type: ignore[return-value]
        if line == b"*":
            return Fault(AUTH_CANCELLED, False)  # RFC 4954 section 4
        try:
            return AuthResponse(b"" if not line else sasl.decode(line.rstrip(b" \t")))
        except ValueError:
            return Fault(AUTH_SYNTAX, False)

    # --- DATA ------------------------------------------------------------------------------------------------------

    def _text(self) -> Event | None:
        scanner = self._scanner
        assert scanner is not None
        if not self._ended:
            buffer = self._buffer
            if not len(buffer):
                return None
            data = buffer.take_all()
            first = not scanner.raw
            piece = scanner.feed(data)
            limit = self.extensions.size
            if limit and scanner.raw > 4 * limit:
                return Fault(NO_END, True)
            if scanner.ended:
                if scanner.rest:
                    buffer.give_back(scanner.rest)
                    scanner.rest = b""
                self._ended = True
            if not (first and scanner.ended and len(piece) < _SMALL):
                meter = self._meter
                if meter is None:
                    meter = self._meter = HeaderMeter()
                meter.feed(piece)
            if piece and self._text_fault(scanner) is None:
                return Body(piece)
            if not self._ended:
                return None
        fault = self._text_fault(scanner)
        self._mode = Mode.COMMAND
        return BodyEnd(scanner.size, fault, fault is BARE_NEWLINE)

    def _text_fault(self, scanner: DataScanner) -> Reply | None:
        if scanner.bare:
            return BARE_NEWLINE
        if scanner.nul:
            return NUL_IN_TEXT
        limit = self.extensions.size
        if limit and scanner.size > limit:
            return SIZE_EXCEEDED
        if self._meter is not None and self._meter.over:
            return HEADER_TOO_LARGE
        if scanner.long_line:
            return TEXT_LINE_TOO_LONG
        return None

    # --- BDAT ------------------------------------------------------------------------------------------------------

    def _bdat(self, argument: str) -> Event | Reply | None:
        found = parse_bdat(argument)
        if found is None:
            return SYNTAX
        octets, last, valid = found
        refusal: Reply | None = None
        if not self.extensions.chunking:
            refusal = NOT_IMPLEMENTED
        elif not valid:
            refusal = SYNTAX
        elif self.require_tls and not self.tls:
            refusal = TLS_REQUIRED
        else:
            refusal = REFUSED[self._state].get("BDAT")
        # RFC 3030 section 2: the octets come whatever the answer is, so they are read in any case
        self._chunk_left = octets
        self._chunk_last = last
        self._chunk_refusal = refusal
        self._received = 0
        self._ended = False
        self._mode = Mode.CHUNK
        if refusal is None and self._state is State.RCPT:
            self._size = 0
            self._meter = HeaderMeter()
            return BdatStart()
        return self._chunk()

    def _chunk(self) -> Event | None:
        if self._chunk_left:
            if not len(self._buffer):
                return None
            data = self._buffer.take(self._chunk_left)
            self._chunk_left -= len(data)
            self._received += len(data)
            limit = self.extensions.size
            if limit and self._received + (self._size if self._chunk_refusal is None else 0) > 4 * limit:
                return Fault(NO_END, True)
            if self._chunk_refusal is None:
                self._size += len(data)
                self._received = 0
                meter = self._meter
                assert meter is not None
                meter.feed(data)
                if self._chunk_fault() is None:
                    return Body(data)
            if self._chunk_left:
                return None
        self._mode = Mode.COMMAND
        refusal = self._chunk_refusal
        if refusal is not None:
            self._chunk_refusal = None
            if self._state is State.RCPT and refusal is not SYNTAX:
                self._state = State.FAILED
                if self._chunk_last:
                    self._end_transaction()
            return Fault(refusal, False)
        if self._chunk_last:
            return BodyEnd(self._size, self._chunk_fault(), False)
        return ChunkEnd()

    def _chunk_fault(self) -> Reply | None:
        limit = self.extensions.size
        if limit and self._size > limit:
            return SIZE_EXCEEDED
        if self._meter is not None and self._meter.over:
            return HEADER_TOO_LARGE
        return None


_SYNTAX_OF = {"MAIL": BAD_SENDER_SYNTAX, "RCPT": BAD_RECIPIENT_SYNTAX, "EHLO": BAD_HELO, "HELO": BAD_HELO}

_PARSERS: dict[str, Callable[[ServerProtocol, str], Event | Reply | None]] = {
    "EHLO": ServerProtocol._ehlo, "HELO": ServerProtocol._helo, "MAIL": ServerProtocol._mail,
    "RCPT": ServerProtocol._rcpt, "DATA": ServerProtocol._data, "BDAT": ServerProtocol._bdat,
    "RSET": ServerProtocol._rset, "NOOP": ServerProtocol._noop, "QUIT": ServerProtocol._quit,
    "VRFY": ServerProtocol._vrfy, "EXPN": ServerProtocol._expn, "HELP": ServerProtocol._help,
    "STARTTLS": ServerProtocol._starttls, "AUTH": ServerProtocol._auth,
}
