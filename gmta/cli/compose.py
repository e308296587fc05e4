"""From the text that a local program pipes in to a message: line ends, the header section, the recipients named in it, what is missing.

Lines end in LF or CRLF and come out with CRLF; a CR within the header becomes a blank (it must not make a field), within the body a
line end, as in the output of programs that redraw a line; NULs are dropped. A mailbox line ("From x Mon ...") on top goes away.
Failure: AddressError for an address list that can't be read, TooLarge for a header section past its limit. RFC 5322 section 3.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from email.header import Header
from typing import BinaryIO, NamedTuple

from gmta.mail.address import Address, AddressError, parse_path

PIECE = 256 * 1024  # octets of one read; a longer line comes in pieces
TO = ("to", "cc", "bcc")
RESENT_TO = ("resent-to", "resent-cc", "resent-bcc")
HIDDEN = ("bcc", "resent-bcc")
WITH_ADDRESSES = frozenset({"from", "sender", "reply-to", *TO, *(f"resent-{name}" for name in ("from", "sender", "reply-to")), *RESENT_TO})

_FIELD = re.compile(rb"([!-9;-~]+)[ \t]*:")
_MAILBOX_LINE = re.compile(rb">?From ")
_ROUTE = re.compile(r"@[^<>:]*:")
_ATOM = re.compile(r"[^ \t()<>\[\]:;,\"]+")
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"', re.S)
_LITERAL = re.compile(r"\[[^\[\]]*\]")
_PHRASE = re.compile(r"[A-Za-z0-9!#$%&'*+\-/=?^_`{|}~ ]*\Z")


class TooLarge(Exception):
    """The header section is larger than it may be."""


# --- lines ------------------------------------------------------------------------------------------------------


class Text:
    """A text read line by line; dot_ends: a line that is a dot alone is the end."""

    def __init__(self, stream: BinaryIO, *, dot_ends: bool) -> None:
        self._stream = stream
        self._dot_ends = dot_ends
        self._at_start = True
        self._carry = b""
        self._over = False

    def next(self) -> tuple[bytes, bool] | None:
        """(octets, whether the line ends with them), without the line end and NULs; None at the end."""
        if self._over:
            return None
        raw = self._stream.readline(PIECE)
        line = self._carry + raw
        self._carry = b""
        if not line:
            self._over = True
            return None
        ended = raw.endswith(b"\n") or len(raw) < PIECE
        content = line.rstrip(b"\r\n") if ended else line
        if not ended and content.endswith(b"\r"):  # a line end may have been cut in two
            content = content.rstrip(b"\r")
            self._carry = line[len(content):]
        if self._dot_ends and self._at_start and ended and content == b".":
            self._over = True
            return None
        self._at_start = ended
        return content.replace(b"\0", b""), ended

    def body(self, first: tuple[bytes, bool] | None = None) -> Iterator[bytes]:
        """What is left, `first` before it, as message octets."""
        piece = first or self.next()
        last = True
        while piece is not None:
            content, last = piece
            yield content.replace(b"\r", b"\r\n") + (b"\r\n" if last else b"")
            piece = self.next()
        if not last:
            yield b"\r\n"


# --- header -----------------------------------------------------------------------------------------------------


class Field:
    """A header field; raw: all its octets, line ends CRLF."""

    __slots__ = ("name", "raw")

    def __init__(self, name: str, raw: bytes) -> None:
        self.name = name
        self.raw = raw

    @property
    def value(self) -> str:
        """The text behind the colon, unfolded; octets that are not UTF-8 as surrogates."""
        return self.raw.partition(b":")[2].replace(b"\r\n", b"").decode("utf-8", "surrogateescape").strip(" \t")


def read_header(text: Text, limit: int) -> tuple[list[Field], tuple[bytes, bool] | None]:
    """(the fields, the first line of the body where no blank line parts them); raises TooLarge past `limit` octets."""
    fields: list[Field] = []
    size = 0
    first = True
    while (line := text.next()) is not None:
        content, ended = line
        if first and _MAILBOX_LINE.match(content):
            continue
        first = False
        if not content:
            return fields, None
        match = _FIELD.match(content)
        goes_on = content[:1] in (b" ", b"\t") and bool(fields)
        if match is None and not goes_on:
            return fields, line
        while not ended and (more := text.next()) is not None:  # a field longer than a piece
            content, ended = content + more[0], more[1]
            if size + len(content) > limit:
                raise TooLarge
        raw = content.replace(b"\r", b" ") + b"\r\n"
        if match is not None:
            fields.append(Field(match[1].decode("ascii").lower(), raw))
        elif raw.strip():
            fields[-1].raw += raw
        size += len(raw)
        if size > limit:
            raise TooLarge
    return fields, None


class Found(NamedTuple):
    """An address in a list: its text, and where it ends in the list."""

    text: str
    end: int


def addresses(text: str) -> Iterator[Found]:
    """The addresses of a list with names, comments, groups and old routes (RFC 5322 section 3.4, 4.4); raises AddressError."""
    words: list[tuple[str, bool]] = []  # (word, whether a blank or comment came before it)
    angle: Found | None = None
    gap = False
    end = position = 0
    while position <= len(text):
        char = text[position:position + 1]
        if char in ("", ",", ";"):
            if angle is not None:
                yield angle
            elif words:
                yield Found(_joined(words), end)
            words, angle = [], None
            position += 1
        elif char in " \t":
            gap = True
            position += 1
        elif char == "(":
            gap = True
            position = _after_comment(text, position)
        elif char == "<":
            angle, position = _in_brackets(text, position)
        elif char == ":":
            if angle is not None or any("@" in word for word, _ in words):
                raise AddressError("a colon behind an address")
            words = []  # the name of a group
            position += 1
        else:
            match = (_QUOTED if char == '"' else _LITERAL if char == "[" else _ATOM).match(text, position)
            if match is None:
                raise AddressError(f"{char} without an end, or alone")
            words.append((match[0], gap and bool(words)))
            gap = False
            end = position = match.end()


def _joined(words: list[tuple[str, bool]]) -> str:
    """Words as one address: blanks are nothing around dots and at signs only."""
    out = words[0][0]
    for word, gap in words[1:]:
        if gap and not (out.endswith((".", "@")) or word.startswith((".", "@"))):
            raise AddressError("words that are no address")
        out += word
    return out


def _after_comment(text: str, position: int) -> int:
    """The place behind a comment, which may hold others; at the end of the text where it has no end."""
    depth = 0
    while position < len(text):
        char = text[position]
        position += 2 if char == "\\" else 1
        depth += (char == "(") - (char == ")")
        if not depth:
            break
    return position


def _in_brackets(text: str, position: int) -> tuple[Found, int]:
    """The address in <>, and the place behind them."""
    start = position = position + 1
    while position < len(text) and text[position] != ">":
        match = _QUOTED.match(text, position)
        position = match.end() if match is not None else position + 1
    if position >= len(text):
        raise AddressError("< without >")
    inner = text[start:position].strip(" \t")
    route = _ROUTE.match(inner)
    return Found(inner[route.end():] if route is not None else inner, start + len(text[start:position].rstrip(" \t"))), position + 1


def is_bare(text: str) -> bool:
    """Whether an address has no domain."""
    return "@" not in text.rpartition('"')[2]


def qualified(text: str, origin: str) -> Address:
    """The Address of a text that may lack its domain, which is `origin` then; raises AddressError."""
    if text.startswith("<") and text.endswith(">"):
        text = text[1:-1]
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise AddressError("not UTF-8") from error
    address, rest = parse_path(f"<{text}@{origin}>" if is_bare(text) else f"<{text}>", smtputf8=True)
    if rest:
        raise AddressError("more than an address")
    return address


def recipients(fields: Iterable[Field], origin: str) -> list[Address]:
    """Whom the header names: To, Cc and Bcc, or the Resent- ones where there are any (RFC 5322 section 3.6.6); raises AddressError."""
    fields = list(fields)
    names = RESENT_TO if any(field.name in RESENT_TO for field in fields) else TO
    return list(dict.fromkeys(qualified(found.text, origin) for field in fields if field.name in names
                              for found in addresses(field.value) if found.text))


def complete(fields: list[Field], *, author: Address, full_name: str, origin: str, hostname: str, message_id: str, date: str) -> bytes:
    """The header section: without Bcc, with From, Date and Message-ID where they are missing, and a domain for bare names in address
    fields (RFC 6409 section 8)."""
    out = []
    for field in fields:
        if field.name in HIDDEN:
            continue  # RFC 5322 section 3.6.3
        out.append(_with_domains(field, origin) if field.name in WITH_ADDRESSES else field.raw)
    have = {field.name for field in fields}
    if "from" not in have:
        out.append(f"From: {phrase(full_name)}<{author}>\r\n".encode())
    if "date" not in have:
        out.append(f"Date: {date}\r\n".encode("ascii"))
    if "message-id" not in have:
        out.append(f"Message-ID: <{message_id}@{hostname}>\r\n".encode("ascii"))
    return b"".join(out)


def _with_domains(field: Field, origin: str) -> bytes:
    """A field whose bare names got the domain; one that can't be read stays as it is."""
    value = field.value
    try:
        bare = [found.end for found in addresses(value) if found.text and is_bare(found.text)]
    except AddressError:
        return field.raw
    if not bare:
        return field.raw
    for end in reversed(bare):
        value = f"{value[:end]}@{origin}{value[end:]}"
    return field.raw.partition(b":")[0] + b": " + value.encode("utf-8", "surrogateescape") + b"\r\n"


def phrase(name: str) -> str:
    """A display name with the blank behind it, quoted or encoded as it needs (RFC 5322 section 3.2.5, RFC 2047 section 5); "" for none."""
    name = re.sub(r"[\x00-\x1f\x7f]+", " ", name).strip()
    if not name:
        return ""
    if not name.isascii():
        return Header(name.encode("utf-8", "replace").decode(), "utf-8", maxlinelen=10_000).encode() + " "
    if _PHRASE.match(name) is not None:
        return name + " "
    return '"' + re.sub(r'(["\\])', r"\\\1", name) + '" '
