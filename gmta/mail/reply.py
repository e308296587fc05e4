"""Replies: the one value that every SMTP answer is, whoever gives it.

A Reply is a code, an enhanced status code (RFC 3463) or None, and one or more lines of text. It knows its
wire form and can be parsed from one. The table at the end is the only place where gmta's own protocol
answers are worded. Malformed input to `parse` raises ValueError; constructors raise ValueError for a code
and an enhanced code that disagree (RFC 2034 section 4) and for text that could break a reply line.
RFC 5321 section 4.2, RFC 2034, RFC 3463, RFC 5248.
"""

from __future__ import annotations

import re
from functools import lru_cache

MAX_LINE = 512  # RFC 5321 section 4.5.3.1.5, octets of a reply line with its CRLF
MAX_LINES = 100

_ENHANCED = re.compile(r"^([245])\.(\d{1,3})\.(\d{1,3})$")
_LINE = re.compile(rb"^([2-5][0-9]{2})(?:([ -])(.*))?$", re.S)
_LEADING_ENHANCED = re.compile(r"^([245]\.\d{1,3}\.\d{1,3})(?:\s+|$)")
_UNSAFE = re.compile(r"[\x00-\x1f\x7f]")


class Reply:
    """One SMTP reply: `code` 200..599, `enhanced` like "5.7.1" or None, `lines` of text without CR or LF."""

    __slots__ = ("_said", "_wire", "code", "enhanced", "lines")

    def __init__(self, code: int, enhanced: str | None, *lines: str) -> None:
        if not 200 <= code <= 599:
            raise ValueError(f"reply code {code} is outside 200..599")
        if enhanced is not None:
            match = _ENHANCED.match(enhanced)
            if match is None:
                raise ValueError(f"enhanced status code {enhanced!r} is not of the form 5.7.1")
            if match[1] != str(code)[0]:  # RFC 2034 section 4
                raise ValueError(f"reply code {code} and enhanced code {enhanced} are of different classes")
        for line in lines:
            if _UNSAFE.search(line):
                raise ValueError("reply text contains a control character")
        self.code = code
        self.enhanced = enhanced
        self.lines: tuple[str, ...] = lines or ("",)
        self._wire: bytes | None = None
        self._said = ""  # what a remote's lines said behind the code, where that is more than `lines` tell

    @property
    def positive(self) -> bool:
        """True for 2xx and 3xx."""
        return self.code < 400

    @property
    def transient(self) -> bool:
        """True for 4xx: try again later (RFC 5321 section 4.2.1)."""
        return 400 <= self.code < 500

    @property
    def permanent(self) -> bool:
        """True for 5xx."""
        return self.code >= 500

    @property
    def text(self) -> str:
        """The text lines joined by blanks, for logs and reports."""
        return " ".join(line for line in self.lines if line)

    def wire(self) -> bytes:
        """The octets to send: every line with the code, the enhanced code and CRLF, at most 512 octets each."""
        wire = self._wire
        if wire is None:
            wire = self._wire = self._build()
        return wire

    def _build(self) -> bytes:
        prefix = f"{self.enhanced} " if self.enhanced else ""
        room = MAX_LINE - 6 - len(prefix)
        if len(self.lines) == 1 and len(self.lines[0]) <= room and self.lines[0].isascii():
            return f"{self.code} {prefix}{self.lines[0]}\r\n".encode("ascii")
        lines: list[bytes] = []
        for line in self.lines[:MAX_LINES]:
            text = line.encode("ascii", "backslashreplace")
            while len(text) > room:
                cut = text.rfind(b" ", 1, room)
                cut = cut if cut > 0 else room
                lines.append(text[:cut])
                text = text[cut:].lstrip(b" ")
            lines.append(text)
        head = prefix.encode("ascii")
        code = b"%d" % self.code
        last = len(lines) - 1
        return b"".join(code + (b" " if n == last else b"-") + head + text + b"\r\n" for n, text in enumerate(lines))

    def __str__(self) -> str:
        if self._said:
            return f"{self.code} {self._said}"
        return f"{self.code} {self.enhanced + ' ' if self.enhanced else ''}{self.text}"

    def __repr__(self) -> str:
        return f"Reply({self.code}, {self.enhanced!r}, {', '.join(map(repr, self.lines))})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Reply):
            return NotImplemented
        return (self.code, self.enhanced, self.lines) == (other.code, other.enhanced, other.lines)

    def __hash__(self) -> int:
        return hash((self.code, self.enhanced, self.lines))

    @classmethod
    def parse(cls, lines: list[bytes]) -> Reply:
        """A Reply from a remote's lines (without CRLF); raises ValueError when they are not one reply.

        Text is decoded as UTF-8 with replacement, control characters become blanks; an enhanced code
        of another class than the code is dropped, as remotes do send such.
        """
        if not lines:
            raise ValueError("empty reply")
        code = 0
        enhanced: str | None = None
        texts: list[str] = []
        said: list[str] = []
        for number, raw in enumerate(lines):
            match = _LINE.match(raw)
            if match is None:
                raise ValueError(f"malformed reply line {raw[:80]!r}")
            if number == 0:
                code = int(match[1])
            # RFC 5321 section 4.2.1: the codes of one reply are equal; the last one is taken where they are not
            code = int(match[1])
            text = _UNSAFE.sub(" ", (match[3] or b"").decode("utf-8", "replace"))
            said.append(text)
            found = _LEADING_ENHANCED.match(text)
            if found is not None and found[1][0] == str(code)[0]:
                enhanced = enhanced or found[1]
                text = text[found.end():]
            texts.append(text)
        if enhanced is not None and enhanced[0] != str(code)[0]:
            enhanced = None
        reply = cls(code, enhanced, *texts)
        if len(lines) > 1:
            reply._said = " ".join(filter(None, said))
        return reply


@lru_cache(maxsize=256)
def parse_line(line: bytes) -> Reply:
    """Reply.parse of one line: remotes say the same few lines over and over."""
    return Reply.parse([line])


# --- gmta's own answers: code, enhanced code (RFC 3463, RFC 5248) and text, all in one place --------------------

OK = Reply(250, "2.0.0", "OK")
MAIL_OK = Reply(250, "2.1.0", "Sender OK")
RCPT_OK = Reply(250, "2.1.5", "Recipient OK")
RESET_OK = Reply(250, "2.0.0", "Reset OK")
CHUNK_OK = Reply(250, "2.0.0", "Chunk OK")
CLOSING = Reply(221, "2.0.0", "Bye")
START_MAIL_INPUT = Reply(354, None, "End data with <CR><LF>.<CR><LF>")
READY_FOR_TLS = Reply(220, "2.0.0", "Ready to start TLS")
AUTH_OK = Reply(235, "2.7.0", "Authentication successful")
CANNOT_VRFY = Reply(252, "2.5.2", "Cannot verify the user, but will take a message and try to deliver it")
HELP = Reply(214, "2.0.0", "Commands: EHLO HELO MAIL RCPT DATA BDAT RSET NOOP QUIT VRFY EXPN HELP STARTTLS AUTH",
             "See RFC 5321")

NO_SUCH_LIST = Reply(550, "5.1.1", "No such list or user here")
ETRN_DENIED = Reply(459, "4.7.1", "Mail for that domain is not sent on request of this client")  # RFC 1985 section 5.3
ETRN_FAILED = Reply(458, "4.3.0", "The queue can't be asked now, try again later")
ETRN_BAD_NODE = Reply(501, "5.5.4", "A domain, or @domain with all below it, is required")

UNRECOGNIZED = Reply(500, "5.5.2", "Command unrecognized")
NOT_IMPLEMENTED = Reply(502, "5.5.1", "Command not implemented")
LINE_TOO_LONG = Reply(500, "5.5.2", "Line too long")
BARE_NEWLINE = Reply(550, "5.5.2", "Lines must end in CRLF: bare CR or LF received")  # RFC 5321 section 2.3.8
BAD_OCTET = Reply(500, "5.5.2", "Command contains an octet that is not allowed")
SYNTAX = Reply(501, "5.5.4", "Syntax error in parameters or arguments")
BAD_SENDER_SYNTAX = Reply(501, "5.1.7", "Bad sender address syntax")
BAD_RECIPIENT_SYNTAX = Reply(501, "5.1.3", "Bad recipient address syntax")
BAD_HELO = Reply(501, "5.5.4", "A host name or address literal is required")
NO_ARGUMENT_ALLOWED = Reply(501, "5.5.4", "No argument is allowed")
UNKNOWN_PARAMETER = Reply(555, "5.5.4", "Parameter not recognized or not implemented")  # RFC 5321 section 4.1.1.11
BAD_SEQUENCE = Reply(503, "5.5.1", "Bad sequence of commands")
HELO_FIRST = Reply(503, "5.5.1", "Send EHLO or HELO first")
MAIL_FIRST = Reply(503, "5.5.1", "Send MAIL first")
NESTED_MAIL = Reply(503, "5.5.1", "Sender already given")
NO_RECIPIENTS = Reply(554, "5.5.1", "No valid recipients")  # RFC 5321 section 3.3
ALREADY_TLS = Reply(503, "5.5.1", "TLS is already active")
TLS_UNAVAILABLE = Reply(502, "5.5.1", "TLS is not available")
TLS_REQUIRED = Reply(530, "5.7.0", "Issue a STARTTLS command first")  # RFC 3207 section 4
AUTH_REQUIRED = Reply(530, "5.7.0", "Authentication required")  # RFC 4954 section 6
AUTH_UNAVAILABLE = Reply(502, "5.5.1", "Authentication is not available")
AUTH_NEEDS_TLS = Reply(538, "5.7.11", "Encryption is required for the requested authentication mechanism")
AUTH_MECHANISM = Reply(504, "5.5.4", "Authentication mechanism not recognized")
AUTH_ALREADY = Reply(503, "5.5.1", "Already authenticated")
AUTH_CANCELLED = Reply(501, "5.7.0", "Authentication cancelled")
AUTH_SYNTAX = Reply(501, "5.5.2", "Cannot decode the response")
AUTH_FAILED = Reply(535, "5.7.8", "Authentication credentials invalid")
AUTH_TEMPORARY = Reply(454, "4.7.0", "Temporary authentication failure")
NEEDS_SMTPUTF8 = Reply(553, "5.6.7", "Address needs the SMTPUTF8 parameter")  # RFC 6531 section 3.5
SIZE_EXCEEDED = Reply(552, "5.3.4", "Message size exceeds the limit")  # RFC 1870 section 6
HEADER_TOO_LARGE = Reply(552, "5.3.4", "Message header section is too large")
TEXT_LINE_TOO_LONG = Reply(552, "5.6.0", "Message contains a line that is too long")
TOO_MANY_RECIPIENTS = Reply(452, "4.5.3", "Too many recipients")  # RFC 5321 section 4.5.3.1.10
RECIPIENT_FLOOD = Reply(421, "4.5.3", "Too many recipients, closing")
TOO_MANY_ERRORS = Reply(421, "4.7.0", "Too many errors, closing")
TOO_MANY_CONNECTIONS = Reply(421, "4.7.0", "Too many connections, try again later")
TALKS_EARLY = Reply(554, "5.5.1", "You talk before the banner")  # RFC 5321 section 3.1
NO_PROXY = Reply(421, "4.7.0", "This address is for a proxy")
NOT_SMTP = Reply(421, "4.7.0", "This is an SMTP server, closing")
TIMED_OUT = Reply(421, "4.4.2", "Timeout, closing")
TOO_SLOW = Reply(421, "4.4.2", "Data arrives too slowly, closing")
NO_END = Reply(421, "4.7.0", "No end of input within the bound, closing")
SHUTTING_DOWN = Reply(421, "4.3.2", "Service is shutting down, try again")
STORE_FULL = Reply(452, "4.3.1", "Insufficient system storage, try again later")
LOCAL_ERROR = Reply(451, "4.3.0", "Local error in processing, try again later")
NOT_PERMITTED = Reply(550, "5.7.1", "Relaying denied")
