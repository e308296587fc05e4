"""The client's side of SMTP and LMTP, sans-IO: commands to octets, octets to replies, in the order they were asked for.

Commands may be pipelined: each method returns the octets to send and remembers that a reply is due; next_reply hands them out
one by one. The engine decides what to send and what an answer means for a recipient. A reply is cut where it is longer than
anybody will read. A remote that does not speak SMTP, and commands out of order or with line breaks in them, raise ProtocolError.
RFC 5321, 2033, 2920, 3030, 3207, 3461, 4954, 6531, 9422.
"""

from __future__ import annotations

import base64
import re
from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

from gmta.mail.address import Address
from gmta.mail.reply import MAX_LINES, Reply, parse_line
from gmta.smtp.commands import encode_xtext
from gmta.smtp.lines import ProtocolError

MAX_REPLY = 1024 * 1024  # octets of one reply; who says more is not talking to us
MAX_REPLY_LINE = 4096  # octets kept of a line; RFC 5321 section 4.5.3.1.5 has 512

_UNSAFE = re.compile("[\x00-\x1f\x7f]")
_LINE = re.compile(rb"[2-5][0-9][0-9](?:[ -]|\Z)")

_GREETING = "greeting"
_END = "end of data"


class ClientProtocol:
    """One connection's state. extensions: EHLO keyword in upper case -> its parameters as text, empty before EHLO."""

    __slots__ = ("_buffer", "_due", "_lines", "_recipients", "_size", "_tls_next", "extensions", "greeted", "in_data",
                 "last_command", "lmtp")

    def __init__(self, *, greeted: bool = False) -> None:
        """greeted: the banner has been read already, as after STARTTLS."""
        self.extensions: dict[str, str] = {}
        self.greeted = False
        self.lmtp = False
        self.in_data = False
        self.last_command = ""
        self._buffer = bytearray()
        self._due: deque[str] = deque(() if greeted else (_GREETING,))
        self._lines: list[bytes] = []
        self._size = 0
        self._recipients = 0
        self._tls_next = False

    # --- octets in -------------------------------------------------------------------------------------------------

    def receive_data(self, data: bytes) -> None:
        """Takes what the remote sent."""
        if data:
            self._buffer += data

    def next_reply(self) -> Reply | None:
        """The next reply, or None when more octets are needed; `last_command` then names what it answers.

        Lines past MAX_LINES and octets past MAX_REPLY_LINE are dropped. Raises ProtocolError for what is no reply, for one over
        MAX_REPLY, and for one that nothing asked for (421 apart).
        """
        buffer = self._buffer
        while True:
            end = buffer.find(b"\n")
            if end < 0:
                excess = len(buffer) - MAX_REPLY_LINE - 1
                if excess > 0:  # the end of the line is yet to come; the last octet may be its CR
                    del buffer[MAX_REPLY_LINE:-1]
                    self._size += excess
                    if self._size > MAX_REPLY:
                        raise ProtocolError("reply is too long")
                return None
            # A bare LF ends a line too: nothing that a remote says is obeyed, so this can't be used to smuggle
            line = bytes(buffer[:end]).removesuffix(b"\r")[:MAX_REPLY_LINE]
            del buffer[:end + 1]
            self._size += end + 1
            if self._size > MAX_REPLY:
                raise ProtocolError("reply is too long")
            if _LINE.match(line) is None:
                raise ProtocolError(f"malformed reply line {line[:80]!r}")
            more = line[3:4] == b"-"
            if len(self._lines) < MAX_LINES:
                self._lines.append(line)
            elif not more:
                self._lines[-1] = line  # the last line's code counts
            if more:
                continue
            lines, self._lines, self._size = self._lines, [], 0
            try:
                reply = parse_line(line) if len(lines) == 1 else Reply.parse(lines)
            except ValueError as error:
                raise ProtocolError(str(error)) from error
            self._answered(reply, lines)
            return reply

    def _answered(self, reply: Reply, lines: list[bytes]) -> None:
        if not self._due:
            if reply.code == 421:  # RFC 5321 section 3.8: may come at any time
                self.last_command = ""
                return
            raise ProtocolError(f"reply that nothing asked for: {reply.code}")
        command = self.last_command = self._due.popleft()
        if command in ("EHLO", "LHLO", "HELO"):
            if reply.code == 250:
                self.greeted = True
                self.extensions = parse_ehlo(lines) if command != "HELO" else {}
        elif command == "RCPT":
            if reply.code < 300:
                self._recipients += 1
        elif command in ("MAIL", "RSET"):
            if reply.code < 300:  # a MAIL within a transaction is refused and ends nothing (RFC 5321 section 4.1.4)
                self._recipients = 0
        elif command == "DATA":
            self.in_data = reply.code == 354
            if self.in_data:
                replies = self._recipients if self.lmtp else 1  # RFC 2033 section 4.2: one for each accepted recipient
                self._due.extendleft([_END] * replies)
                self.in_data = replies > 0
        elif command == _END:
            self.in_data = False
            self._recipients = 0
        elif command == "STARTTLS":
            self._tls_next = reply.code == 220

    @property
    def awaiting(self) -> int:
        """How many replies are due."""
        return len(self._due)

    @property
    def recipients(self) -> int:
        """How many recipients of the transaction were accepted: LMTP answers the end of data once for each."""
        return self._recipients

    def tls_started(self) -> None:
        """TLS is up: extensions and greeting are forgotten (RFC 3207 section 4.2).

        Raises ProtocolError where STARTTLS was not granted or the remote sent more in clear text behind its 220.
        """
        if not self._tls_next:
            raise ProtocolError("STARTTLS was not granted")
        if len(self._buffer) or self._due:
            raise ProtocolError("clear text behind the reply to STARTTLS")  # injected replies (CVE-2021-38371 and alike)
        self._tls_next = False
        self.greeted = False
        self.extensions = {}

    # --- commands out ----------------------------------------------------------------------------------------------

    def _command(self, verb: str, argument: str = "", *, greeted: bool = True) -> bytes:
        if self.in_data:
            raise ProtocolError(f"{verb} within the message")
        if self._tls_next:
            raise ProtocolError(f"{verb} in clear text after STARTTLS was granted")
        if greeted and not self.greeted:
            raise ProtocolError(f"{verb} before the greeting")
        if argument:
            if _UNSAFE.search(argument):
                raise ProtocolError(f"control character in the argument of {verb}")
            line = f"{verb} {argument}\r\n"
        else:
            line = verb + "\r\n"
        try:
            octets = line.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ProtocolError(f"argument of {verb} can't be encoded") from error
        self._due.append(verb)
        return octets

    def ehlo(self, name: str) -> bytes:
        """EHLO."""
        return self._command("EHLO", name, greeted=False)

    def helo(self, name: str) -> bytes:
        """HELO, for remotes that refuse EHLO."""
        return self._command("HELO", name, greeted=False)

    def lhlo(self, name: str) -> bytes:
        """LHLO: the session speaks LMTP (RFC 2033 section 4.1)."""
        self.lmtp = True
        return self._command("LHLO", name, greeted=False)

    def mail(self, sender: Address | str, size: int | None = None, body: str | None = None, smtputf8: bool = False,
             ret: str = "", envid: str = "", auth: str | None = None, requiretls: bool = False) -> bytes:
        """MAIL. Parameters are sent as given: whether the remote offers them is the caller's to look up in `extensions`.

        envid is plain text and is sent as xtext; auth "" is sent as <>.
        """
        words = [f"FROM:<{sender}>"]
        if size is not None:
            words.append(f"SIZE={size}")
        if body:
            words.append(f"BODY={body}")
        if smtputf8:
            words.append("SMTPUTF8")
        if ret:
            words.append(f"RET={ret}")
        if envid:
            words.append(f"ENVID={encode_xtext(envid)}")
        if requiretls:
            words.append("REQUIRETLS")
        if auth is not None:
            words.append(f"AUTH={encode_xtext(auth) or '<>'}")
        return self._command("MAIL", " ".join(words))

    def rcpt(self, recipient: Address | str, notify: Iterable[str] = (), orcpt: str = "") -> bytes:
        """RCPT. orcpt is "type;plain address" and is sent as xtext, or for the type utf-8 as RFC 6533 has it."""
        words = [f"TO:<{recipient}>"]
        notified = ",".join(sorted(notify))
        if notified:
            words.append(f"NOTIFY={notified}")
        if orcpt:
            kind, _, address = orcpt.partition(";")
            words.append(f"ORCPT={kind};{_utf8_xtext(address) if kind.lower() == 'utf-8' else encode_xtext(address)}")
        return self._command("RCPT", " ".join(words))

    def data(self) -> bytes:
        """DATA. After a 354 the message goes out through a Stuffer; its final replies are then due by themselves."""
        return self._command("DATA")

    def bdat(self, octets: int, last: bool) -> bytes:
        """The line before a chunk of `octets` (RFC 3030 section 2); with LMTP the last one waits for the replies to RCPT."""
        line = self._command("BDAT", f"{octets} LAST" if last else str(octets))
        if last and self.lmtp:
            self._due.pop()
            self._due.extend(["BDAT"] * self._recipients)
        return line

    def rset(self) -> bytes:
        """RSET."""
        return self._command("RSET", greeted=False)

    def noop(self) -> bytes:
        """NOOP."""
        return self._command("NOOP", greeted=False)

    def quit(self) -> bytes:
        """QUIT."""
        return self._command("QUIT", greeted=False)

    def starttls(self) -> bytes:
        """STARTTLS: must be the last command of a group (RFC 2920 section 3.1)."""
        return self._command("STARTTLS")

    def auth(self, mechanism: str, initial: bytes | None = None) -> bytes:
        """AUTH, with the initial response where the mechanism has one (RFC 4954 section 4)."""
        if initial is None:
            return self._command("AUTH", mechanism)
        return self._command("AUTH", f"{mechanism} {base64.b64encode(initial).decode('ascii') or '='}")

    def auth_response(self, data: bytes | None) -> bytes:
        """The answer to a 334 challenge; None cancels the exchange (RFC 4954 section 4)."""
        self._due.append("AUTH")
        return b"*\r\n" if data is None else base64.b64encode(data) + b"\r\n"


def parse_ehlo(lines: list[bytes]) -> dict[str, str]:
    """Keyword in upper case -> parameters, from the lines of a positive EHLO reply (RFC 5321 section 4.1.1.1)."""
    found: dict[str, str] = {}
    for line in lines[1:]:
        text = line[4:].decode("utf-8", "replace").strip()
        if text[:5].upper() == "AUTH=":
            text = "AUTH " + text[5:]  # an old form beside the standard one
        keyword, _, parameters = text.partition(" ")
        if keyword:
            found.setdefault(keyword.upper(), parameters.strip())
    return found


def _utf8_xtext(address: str) -> str:
    """An address as utf-8-addr-xtext, which every remote can take (RFC 6533 section 3)."""
    return "".join(char if "!" <= char <= "~" and char not in "+=\\" else f"\\x{{{ord(char):02X}}}" for char in address)


class Limits(NamedTuple):
    """What a remote says with LIMITS (RFC 9422 section 4); 0 where it says nothing."""

    mail: int = 0  # transactions in a session
    rcpt: int = 0  # recipients in a transaction
    rcpt_domain: int = 0  # domains among them


def parse_limits(parameters: str) -> Limits:
    """The limits of the LIMITS keyword's parameters; unknown and malformed ones are passed over (RFC 9422 section 3)."""
    found: dict[str, int] = {}
    for word in parameters.upper().split():
        name, _, value = word.partition("=")
        if value.isdigit() and len(value) <= 6 and int(value):  # RFC 9422 section 4: six digits at most
            found.setdefault(name, int(value))
    return Limits(found.get("MAILMAX", 0), found.get("RCPTMAX", 0), found.get("RCPTDOMAINMAX", 0))
