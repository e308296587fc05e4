"""The server side of SMTP, sans-IO: octets in, events out, replies back in, octets to send out.

`receive_data`, then `next_event` until it gives None; answer each event (but Body) with `reply`, and send what that returns. The
sequence of commands is judged here (RFC 5321 section 4.1.4), what they ask for is not. Input never raises; ProtocolError is for a
caller that answers when nothing was asked. Memory: one command line, or what was received and not yet consumed.
"""

from __future__ import annotations

from enum import Enum
from functools import lru_cache
from typing import NamedTuple

from gmta.mail import reply as replies
from gmta.mail.message import split_header
from gmta.mail.reply import Reply
from gmta.smtp import events
from gmta.smtp.commands import (
    XCLIENT,
    XFORWARD,
    BadChunk,
    Refused,
    decode_base64,
    parse_attributes,
    parse_auth,
    parse_bdat,
    parse_hello,
    parse_mail,
    parse_rcpt,
)
from gmta.smtp.data import ChunkScanner, DataScanner, NormalizingScanner, TextCheck
from gmta.smtp.lines import BareNewline, LineTooLong, NoLineEnd, ProtocolError, take_line

AUTH_LINE = 12288  # RFC 4954 section 4
_NUL = Reply(550, "5.5.2", "Message contains a NUL octet")
# What can be wrong with a message, the gravest first: how it came in pieces must not decide which of them is told
_FAULTS = (replies.BARE_NEWLINE, _NUL, replies.TEXT_LINE_TOO_LONG, replies.SIZE_EXCEEDED, replies.HEADER_TOO_LARGE)
_OTHER_PROTOCOLS = (b"GET ", b"POST ", b"PUT ", b"HEAD ", b"CONNECT ", b"OPTIONS ", b"DELETE ", b"PATCH ", b"TRACE ", b"PRI ",
                    b"SSH-", b"\x16\x03")


class State(Enum):
    """Where the session stands (RFC 5321 section 4.1.4)."""

    COMMAND = "command"
    DATA = "data"
    CHUNK = "chunk"
    DROP = "drop"
    AUTH = "auth"
    TLS = "tls"
    CLOSED = "closed"


class Bounds(NamedTuple):
    """What input may be: octets of a command line, of a line and of the header section of a message, and its fields."""

    command_line: int = 2048
    text_line: int = 64 * 1024
    header_size: int = 1024 * 1024
    header_fields: int = 2000


class Extensions:
    """What EHLO offers. size: octets, 0 for no limit; auth: mechanisms in order, () for none."""

    __slots__ = ("auth", "auth_needs_tls", "chunking", "dsn", "eightbitmime", "enhancedstatuscodes", "etrn", "limits", "pipelining", "rcpt_max",
                 "requiretls", "size", "smtputf8", "starttls", "xclient")

    def __init__(self, *, size: int = 0, starttls: bool = False, auth: tuple[str, ...] = (), auth_needs_tls: bool = False,
                 pipelining: bool = True, eightbitmime: bool = True, smtputf8: bool = True, dsn: bool = True, chunking: bool = True,
                 enhancedstatuscodes: bool = True, limits: bool = True, rcpt_max: int = 1000) -> None:
        self.size = size
        self.starttls = starttls
        self.auth = auth
        self.auth_needs_tls = auth_needs_tls
        self.pipelining = pipelining
        self.eightbitmime = eightbitmime
        self.smtputf8 = smtputf8
        self.dsn = dsn
        self.chunking = chunking
        self.enhancedstatuscodes = enhancedstatuscodes
        self.limits = limits
        self.rcpt_max = rcpt_max
        self.etrn = False
        self.requiretls = False
        self.xclient = False

    def keywords(self) -> list[str]:
        """The EHLO lines behind the greeting (RFC 5321 section 4.1.1.1)."""
        out = []
        if self.pipelining:
            out.append("PIPELINING")
        out.append(f"SIZE {self.size}" if self.size else "SIZE")
        if self.eightbitmime:
            out.append("8BITMIME")
        if self.smtputf8:
            out.append("SMTPUTF8")
        if self.enhancedstatuscodes:
            out.append("ENHANCEDSTATUSCODES")
        if self.dsn:
            out.append("DSN")
        if self.chunking:
            out.append("CHUNKING")
        if self.etrn:
            out.append("ETRN")  # RFC 1985 section 4
        if self.starttls:
            out.append("STARTTLS")
        if self.requiretls:
            out.append("REQUIRETLS")  # RFC 8689 section 2: under TLS only
        if self.auth:
            out.append("AUTH " + " ".join(self.auth))
        if self.xclient:
            out += (f"XCLIENT {' '.join(XCLIENT)}", f"XFORWARD {' '.join(XFORWARD)}")
        if self.limits:
            out.append(f"LIMITS RCPTMAX={self.rcpt_max}")  # RFC 9422 section 4
        return out


class ServerProtocol:
    """One session's protocol state; see the module's docstring for how it is driven."""

    __slots__ = ("_bounds", "_buffer", "_chunk_failed", "_chunk_last", "_chunk_left", "_chunk_refusal", "_direct", "_fault", "_fresh", "_header", "_header_done",
                 "_lf_line", "_normalize", "_pending", "_queue", "_scanner", "_size", "_smtputf8", "_state", "authenticated", "esmtp",
                 "extensions", "greeted", "hostname", "in_transaction", "recipients", "require_auth", "require_tls", "tls")

    def __init__(self, extensions: Extensions, hostname: str, *, require_tls: bool = False, require_auth: bool = False,
                 bounds: Bounds = Bounds(), normalize: bool = False) -> None:  # noqa: B008
        """normalize: a bare LF ends a line too, and is made CRLF; else it ends the session (RFC 5321 section 2.3.8)."""
        self.extensions = extensions
        self._normalize = normalize
        self._lf_line = False
        self._bounds = bounds
        self.hostname = hostname
        self.require_tls = require_tls
        self.require_auth = require_auth
        self.authenticated = False
        self.tls = False
        self.greeted = False
        self.esmtp = False
        self.in_transaction = False
        self.recipients = 0
        self._smtputf8 = False
        self._buffer = bytearray()
        self._direct = b""
        self._state = State.COMMAND
        self._pending: events.Event | None = None
        self._queue: list[events.Event] = []
        self._fresh = True
        self._scanner: TextCheck | None = None
        self._size = 0
        self._header: bytearray | None = None
        self._header_done = False
        self._fault: Reply | None = None
        self._chunk_left = 0
        self._chunk_last = False
        self._chunk_failed = False
        self._chunk_refusal: Reply | None = None

    # -- in ---------------------------------------------------------------------------------------------------------

    def receive_data(self, data: bytes) -> None:
        """Takes octets from the client."""
        if self._state is State.DATA and not self._buffer and not self._direct:
            self._direct = data  # message octets need no gathering
        elif self._state is not State.CLOSED:
            self._buffer += self._direct + data if self._direct else data
            self._direct = b""

    @property
    def in_data(self) -> bool:
        """True while message octets are expected."""
        state = self._state
        return state is not State.COMMAND and state in (State.DATA, State.CHUNK, State.DROP)

    @property
    def buffered(self) -> int:
        """Octets received and not consumed yet."""
        return len(self._buffer) + len(self._direct)

    def next_event(self) -> events.Event | None:
        """The next event, or None until more octets come; raises ProtocolError while an answer is due."""
        if self._pending is not None:
            raise ProtocolError(f"{type(self._pending).__name__} has no reply yet")
        if self._queue:
            event: events.Event | None = self._queue.pop(0)
        elif self._state is State.COMMAND:
            event = self._command() if self._buffer else None
        elif self._state is State.DATA:
            event = self._data()
        elif self._state in (State.CHUNK, State.DROP):
            event = self._chunk()
        elif self._state is State.AUTH:
            event = self._auth_line()
        else:
            event = None
        if event is not None and type(event) is not events.Body:
            self._pending = event
        return event

    def _line(self, limit: int) -> bytes | events.Fault | None:
        if self._normalize:
            end = self._buffer.find(b"\n")
            self._lf_line = self._buffer[max(0, end - 1):end] != b"\r"
        try:
            return take_line(self._buffer, limit, normalize=self._normalize)
        except LineTooLong:
            return events.Fault(replies.LINE_TOO_LONG, False)
        except BareNewline:
            self._state = State.CLOSED
            return events.Fault(replies.BARE_NEWLINE, True)  # RFC 5321 section 2.3.8
        except NoLineEnd:
            return self._give_up()

    def _command(self) -> events.Event | None:
        if self._fresh and self._buffer:
            head = bytes(self._buffer[:8])
            if head.startswith(_OTHER_PROTOCOLS):  # a browser made to post, a TLS hello: end before the rest reads as commands
                self._state = State.CLOSED
                return events.Fault(replies.NOT_SMTP, True)
            if len(head) >= 8 or b"\n" in head:
                self._fresh = False
        line = self._line(AUTH_LINE if self._buffer[:5].upper() == b"AUTH " else self._bounds.command_line)
        if line is None:
            return None
        if isinstance(line, events.Fault):
            return line
        try:
            event = self._parse(line)
        except BadChunk as bad:
            if self._endless(bad.octets):
                return self._give_up()
            self._chunk_failed = self._chunk_failed or self.in_transaction
            self._drop(bad.octets, bad.reply)
            return self._drop_on()
        except Refused as refused:
            return events.Fault(refused.reply, False)
        return self._chunk() if event is None else event

    def _parse(self, raw: bytes) -> events.Event | None:
        """The event of a command; None where a chunk goes on."""
        if b"\0" in raw:
            raise Refused(replies.BAD_OCTET)
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise Refused(Reply(501, "5.5.2", "Command is not valid UTF-8")) from error
        verb, _, argument = text.partition(" ")
        argument = argument.strip(" \t")
        verb = verb.strip().upper()
        method = _VERBS.get(verb)
        if method is None:
            raise Refused(replies.UNRECOGNIZED)
        return method(self, argument)

    def _ready(self) -> None:
        """MAIL and what follows need a greeting, and TLS or AUTH where the listener asks for them."""
        if not self.greeted:
            raise Refused(replies.HELO_FIRST)
        self._not_in_clear()
        if self.require_auth and not self.authenticated:
            raise Refused(replies.AUTH_REQUIRED)

    def _not_in_clear(self) -> None:
        """What tells or does something needs TLS where the listener asks for it (RFC 3207 section 4)."""
        if self.require_tls and not self.tls:
            raise Refused(replies.TLS_REQUIRED)

    def _ehlo(self, argument: str) -> events.Event:
        return parse_hello(argument, esmtp=True)

    def _helo(self, argument: str) -> events.Event:
        return parse_hello(argument, esmtp=False)

    def _mail(self, argument: str) -> events.Event:
        self._ready()
        if self.in_transaction:
            raise Refused(replies.NESTED_MAIL)
        offered = self.extensions
        return parse_mail(argument, size_limit=offered.size, smtputf8=offered.smtputf8 and self.esmtp, dsn=offered.dsn, esmtp=self.esmtp,
                          requiretls=offered.requiretls)

    def _rcpt(self, argument: str) -> events.Event:
        self._ready()
        if not self.in_transaction:
            raise Refused(replies.MAIL_FIRST)
        if self._header is not None or self._chunk_failed:
            raise Refused(replies.BAD_SEQUENCE)  # RFC 3030 section 2: the recipients are settled once a chunk came
        offered = self.extensions
        return parse_rcpt(argument, smtputf8=self._smtputf8, smtputf8_offered=offered.smtputf8 and self.esmtp, dsn=offered.dsn,
                          esmtp=self.esmtp)

    def _data_command(self, argument: str) -> events.Event:
        if argument:
            raise Refused(replies.NO_ARGUMENT_ALLOWED)
        self._ready()
        if not self.in_transaction:
            raise Refused(replies.MAIL_FIRST)
        if self._header is not None or self._chunk_failed:
            raise Refused(replies.BAD_SEQUENCE)  # RFC 3030 section 2: DATA and BDAT do not mix
        if not self.recipients:
            raise Refused(replies.NO_RECIPIENTS)
        return events.Data()

    def _bdat(self, argument: str) -> events.Event | None:
        if not self.extensions.chunking:
            raise Refused(replies.UNRECOGNIZED)
        octets, last = parse_bdat(argument)
        refusal = None
        if not self.greeted:
            refusal = replies.HELO_FIRST
        elif not self.in_transaction:
            refusal = replies.MAIL_FIRST
        elif self._chunk_failed:
            refusal = replies.BAD_SEQUENCE  # RFC 3030 section 2: after a failed chunk only RSET leads on
        elif not self.recipients:
            refusal = replies.NO_RECIPIENTS
        if refusal is not None:
            raise BadChunk(refusal, octets)
        if self._endless((self._size if self._header is not None else 0) + octets):
            return self._give_up()
        self._chunk_left, self._chunk_last = octets, last
        if self._header is None:
            return events.BdatStart()
        self._state = State.CHUNK
        return None

    def _endless(self, octets: int) -> bool:
        """Whether a message of so many octets is not worth being read to its end."""
        return 0 < 4 * self.extensions.size < octets

    def _give_up(self) -> events.Fault:
        self._state = State.CLOSED
        return events.Fault(replies.NO_END, True)

    def _drop(self, octets: int, reply: Reply) -> None:
        """Reads and drops the octets of a refused chunk: the count frames them (RFC 3030 section 4.1)."""
        self._chunk_left, self._chunk_refusal = octets, reply
        self._state = State.DROP

    def _rset(self, argument: str) -> events.Event:
        return events.Reset()

    def _quit(self, argument: str) -> events.Event:
        return events.Quit()

    def _noop(self, argument: str) -> events.Event:
        return events.Noop()

    def _vrfy(self, argument: str) -> events.Event:
        self._not_in_clear()
        if not argument:
            raise Refused(replies.SYNTAX)
        return events.Vrfy(argument)

    def _expn(self, argument: str) -> events.Event:
        self._not_in_clear()
        if not argument:
            raise Refused(replies.SYNTAX)
        return events.Expn(argument)

    def _etrn(self, argument: str) -> events.Event:
        if not self.extensions.etrn:
            raise Refused(replies.NOT_IMPLEMENTED)
        self._not_in_clear()
        if not self.greeted:
            raise Refused(replies.HELO_FIRST)
        if not argument or " " in argument:
            raise Refused(replies.ETRN_BAD_NODE)
        return events.Etrn(argument)

    def _xclient(self, argument: str) -> events.Event:
        return events.XClient(self._attributes(argument, XCLIENT))

    def _xforward(self, argument: str) -> events.Event:
        if not self.greeted:
            raise Refused(replies.HELO_FIRST)
        return events.XForward(self._attributes(argument, XFORWARD))

    def _attributes(self, argument: str, known: tuple[str, ...]) -> dict[str, str]:
        """Those of XCLIENT or XFORWARD, outside transactions, from clients that may."""
        if not self.extensions.xclient:
            raise Refused(replies.UNRECOGNIZED)
        if self.in_transaction:
            raise Refused(replies.BAD_SEQUENCE)
        return parse_attributes(argument, known)

    def _help(self, argument: str) -> events.Event:
        return events.Help(argument)

    def _starttls(self, argument: str) -> events.Event:
        if argument:
            raise Refused(replies.NO_ARGUMENT_ALLOWED)  # RFC 3207 section 4
        if self.tls:
            raise Refused(replies.ALREADY_TLS)
        if not self.extensions.starttls:
            raise Refused(replies.TLS_UNAVAILABLE)
        return events.StartTls()

    def _auth(self, argument: str) -> events.Event:
        if self.extensions.auth_needs_tls and not self.tls:
            raise Refused(replies.AUTH_NEEDS_TLS)
        if not self.extensions.auth:
            raise Refused(replies.AUTH_UNAVAILABLE)
        if not self.greeted:
            raise Refused(replies.HELO_FIRST)
        if self.authenticated:
            raise Refused(replies.AUTH_ALREADY)  # RFC 4954 section 4
        if self.in_transaction:
            raise Refused(replies.BAD_SEQUENCE)
        return parse_auth(argument, self.extensions.auth)

    def _auth_line(self) -> events.Event | None:
        line = self._line(AUTH_LINE)
        if line is None or isinstance(line, events.Fault):
            if line is not None and self._state is State.AUTH:
                self._state = State.COMMAND
            return line
        if line == b"*":  # RFC 4954 section 4: the client cancels
            self._state = State.COMMAND
            return events.Fault(replies.AUTH_CANCELLED, False)
        try:
            return events.AuthResponse(decode_base64(line))
        except Refused as refused:
            self._state = State.COMMAND
            return events.Fault(refused.reply, False)

    # -- message octets ---------------------------------------------------------------------------------------------

    def _begin_message(self) -> None:
        self._size = 0
        self._header = bytearray()
        self._header_done = False
        self._fault = None

    def _data(self) -> events.Event | None:
        scanner = self._scanner
        if not isinstance(scanner, DataScanner) or not (self._direct or self._buffer):
            return None
        if self._direct:
            piece, self._direct = self._direct, b""
        else:
            piece = bytes(self._buffer)
            self._buffer.clear()
        data = scanner.feed(piece)
        self._account(data, scanner, last=scanner.ended)
        if self._endless(self._size):
            return self._give_up()
        if scanner.ended:
            self._buffer += scanner.rest
            self._scanner = None
            end = events.BodyEnd(self._size, self._fault, self._fault is replies.BARE_NEWLINE)
            self._state = State.COMMAND
            if data and self._fault is None:
                self._queue.append(end)
                return events.Body(data)
            return end
        if data and self._fault is None:
            return events.Body(data)
        return None

    def _note(self, fault: Reply) -> None:
        """What refuses the message at its end, where nothing graver does; never stops the reading."""
        if self._fault is None or _FAULTS.index(fault) < _FAULTS.index(self._fault):
            self._fault = fault

    def _account(self, data: bytes, scanner: TextCheck, *, last: bool) -> None:
        """Judges octets, size and header section as far as they are in. last: the message is whole."""
        if scanner.bare:
            self._note(replies.BARE_NEWLINE)
        elif scanner.nul:
            self._note(_NUL)
        elif scanner.too_long:
            self._note(replies.TEXT_LINE_TOO_LONG)
        self._size += len(data)
        if 0 < self.extensions.size < self._size:
            self._note(replies.SIZE_EXCEEDED)
        header = self._header
        if header is None or self._header_done or self._fault is not None:
            return
        overlap = max(0, len(header) - 3)
        header += data
        end = header.find(b"\r\n\r\n", overlap)
        if end >= 0:
            del header[end + 2:]
        elif header.startswith(b"\r\n"):
            header.clear()
        elif len(header) <= self._bounds.header_size and not last:
            return
        self._header_done = True
        fields = header.count(b"\n") - header.count(b"\n ") - header.count(b"\n\t")
        if ((fields > self._bounds.header_fields or len(header) > self._bounds.header_size)
                and split_header(bytes(header))[0]):  # text without a header section is all body
            self._note(replies.HEADER_TOO_LARGE)
        header.clear()

    def _chunk(self) -> events.Event | None:
        if self._state is State.DROP:
            return self._drop_on()
        scanner = self._scanner
        assert isinstance(scanner, ChunkScanner)
        data = b""
        if self._chunk_left and self._buffer:
            piece = bytes(self._buffer[:self._chunk_left])
            del self._buffer[:len(piece)]
            self._chunk_left -= len(piece)
            data = scanner.feed(piece)
        ended = not self._chunk_left
        last = ended and self._chunk_last
        if last:
            scanner.finish()
        self._account(data, scanner, last=last)
        if ended:
            self._queue.append(self._chunk_end())
        if data and self._fault is None:
            return events.Body(data)
        return self._queue.pop(0) if ended else None

    def _chunk_end(self) -> events.Event:
        self._state = State.COMMAND
        if self._chunk_last:
            return events.BodyEnd(self._size, self._fault, False)  # the count has framed it: nothing is out of step
        if self._fault is not None:
            self._chunk_failed = True
            return events.Fault(self._fault, False)
        return events.ChunkEnd()

    def _drop_on(self) -> events.Event | None:
        """Drops what is in of a refused chunk; its refusal once all is."""
        dropped = min(self._chunk_left, len(self._buffer))
        del self._buffer[:dropped]
        self._chunk_left -= dropped
        if self._chunk_left:
            return None
        self._state = State.COMMAND
        refusal = self._chunk_refusal
        self._chunk_refusal = None
        return events.Fault(refusal or replies.BAD_SEQUENCE, False)

    # -- out --------------------------------------------------------------------------------------------------------

    def reply(self, reply: Reply) -> bytes:
        """Answers the pending event and moves the state; gives the octets to send (none for a BdatStart)."""
        event = self._pending
        if event is None:
            raise ProtocolError("no reply is due")
        self._pending = None
        kind = type(event)
        positive = reply.code < 400
        if kind is events.Hello and positive:
            assert isinstance(event, events.Hello)
            self.greeted = True
            self.esmtp = event.esmtp
            self._end_transaction()  # RFC 5321 section 4.1.4
            return self._hello(event)
        if kind is events.Mail and positive:
            assert isinstance(event, events.Mail)
            self.in_transaction = True
            self._smtputf8 = event.smtputf8
        elif kind is events.Rcpt and positive:
            self.recipients += 1
        elif kind is events.Data and reply.code == 354:
            self._begin_message()
            limit = self._bounds.text_line
            self._scanner = NormalizingScanner(limit, lf_ends=self._lf_line) if self._normalize else DataScanner(limit)
            self._state = State.DATA
        elif kind is events.BdatStart:
            if positive:
                self._begin_message()
                self._scanner = ChunkScanner(self._bounds.text_line, normalize=self._normalize)
                self._state = State.CHUNK
            else:
                self._chunk_failed = True
                self._drop(self._chunk_left, reply)
            return b""
        elif kind in (events.BodyEnd, events.Reset):
            self._end_transaction()
        elif kind is events.ChunkEnd and not positive:
            self._chunk_failed = True
        elif kind is events.Quit:
            self._state = State.CLOSED
        elif kind is events.StartTls and reply.code == 220:
            self._state = State.TLS
            self._buffer.clear()  # RFC 3207 section 4.2, CVE-2011-0411: nothing sent in clear counts inside TLS
        elif kind in (events.Auth, events.AuthResponse):
            self._state = State.AUTH if reply.code == 334 else State.COMMAND
            self.authenticated = self.authenticated or reply.code == 235
        if isinstance(event, (events.Fault, events.BodyEnd)) and event.close:
            self._state = State.CLOSED
        return reply.wire()

    def _hello(self, event: events.Hello) -> bytes:
        if not event.esmtp:
            return Reply(250, None, self.hostname).wire()
        first = Reply(250, None, f"{self.hostname} greets {event.name}"[:200]).wire()
        return b"250-" + first[4:] + _keyword_lines(tuple(self.extensions.keywords()))

    def _end_transaction(self) -> None:
        self.in_transaction = False
        self.recipients = 0
        self._smtputf8 = False
        self._header = None
        self._scanner = None
        self._chunk_failed = False

    def tls_started(self) -> None:
        """The handshake is done: all that came before is forgotten (RFC 3207 section 4.2)."""
        self._buffer.clear()
        self._queue.clear()
        self.tls = True
        self.begin_anew()
        self._fresh = True

    def begin_anew(self) -> None:
        """The client has to greet again."""
        self.greeted = False
        self.esmtp = False
        self._end_transaction()
        self._state = State.COMMAND


@lru_cache(maxsize=64)
def _keyword_lines(keywords: tuple[str, ...]) -> bytes:
    """The EHLO lines behind the first: the same for most sessions."""
    return Reply(250, None, *keywords).wire()


_VERBS = {
    "EHLO": ServerProtocol._ehlo, "HELO": ServerProtocol._helo, "MAIL": ServerProtocol._mail, "RCPT": ServerProtocol._rcpt,
    "DATA": ServerProtocol._data_command, "BDAT": ServerProtocol._bdat, "RSET": ServerProtocol._rset, "QUIT": ServerProtocol._quit,
    "NOOP": ServerProtocol._noop, "VRFY": ServerProtocol._vrfy, "EXPN": ServerProtocol._expn, "ETRN": ServerProtocol._etrn, "HELP": ServerProtocol._help,
    "STARTTLS": ServerProtocol._starttls, "AUTH": ServerProtocol._auth, "XCLIENT": ServerProtocol._xclient,
    "XFORWARD": ServerProtocol._xforward,
}
