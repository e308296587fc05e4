"""The message as bytes: a raw header section and a body in memory or in a file.

Nothing is ever re-serialised: fields are found in place, dropped whole or prepended. `Message.split` finds where the
header section ends; a first line that is no field starts the body (RFC 5322 section 2.1, 3.5).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from io import IncrementalNewlineDecoder

CHUNK = 256 * 1024

_FIELD_START = re.compile(rb"[!-9;-~]+[ \t]*:")
_NAME = re.compile(r"[!-9;-~]+\Z")
_FIELD = re.compile(rb"^([!-9;-~]+)[ \t]*:(?:.*?)(?:\r\n|\n|\Z)(?:[ \t].*?(?:\r\n|\n|\Z))*", re.S | re.M)


class MemoryBody:
    """A body held in memory."""

    __slots__ = ("data", "size")

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.size = len(data)

    def chunks(self, size: int = CHUNK) -> Iterator[bytes]:
        """The octets in one piece (none for an empty body)."""
        if self.data:
            yield self.data


class FileBody:
    """A body in a file from `offset` on; reading may block, so big ones are read in native threads."""

    __slots__ = ("offset", "path", "size")

    def __init__(self, path: str, offset: int, size: int) -> None:
        self.path = path
        self.offset = offset
        self.size = size

    def chunks(self, size: int = CHUNK) -> Iterator[bytes]:
        """The octets in pieces of up to `size`; raises OSError."""
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.offset)
            left = self.size
            while left > 0:
                piece = file.read(min(size, left))
                if not piece:
                    raise OSError(f"{os.path.basename(self.path)} is shorter than it was")
                left -= len(piece)
                yield piece


Body = MemoryBody | FileBody


class Message:
    """`header`: raw header section, each field ending in CRLF, without the blank line.  `separator`: CRLF or empty.

    What goes out is header + separator + body. `prepend` puts a field on top; `drop` removes whole fields.
    """

    __slots__ = ("_prepended", "_raw_header", "body", "separator")

    def __init__(self, header: bytes, separator: bytes, body: Body) -> None:
        self._raw_header = header
        self.separator = separator
        self.body = body
        self._prepended: list[bytes] = []

    @property
    def header(self) -> bytes:
        """The header section as it goes out now."""
        if self._prepended:
            self._raw_header = b"".join(reversed(self._prepended)) + self._raw_header
            self._prepended.clear()
        return self._raw_header

    @property
    def size(self) -> int:
        """Octets of the whole message."""
        return sum(map(len, self._prepended)) + len(self._raw_header) + len(self.separator) + self.body.size

    def prepend(self, name: str, value: str | bytes) -> None:
        """Puts `name: value` on top; value may be folded with CRLF + blank; raises ValueError if it could break out."""
        raw = value.encode("utf-8", "surrogateescape") if isinstance(value, str) else value
        unfolded = raw.replace(b"\r\n\t", b"?").replace(b"\r\n ", b"?")
        if b"\r" in unfolded or b"\n" in unfolded or b"\0" in unfolded or not _NAME.match(name):
            raise ValueError(f"field {name!r} can't be written")
        if not self.separator and self.body.size:
            self.separator = b"\r\n"  # RFC 5322 section 2.1: a body without header needs its blank line now
        self._prepended.append(name.encode("ascii") + b": " + raw + b"\r\n")

    def fields(self) -> Iterator[tuple[str, bytes]]:
        """(name, raw octets of the whole field with its CRLF), from the top."""
        for match in _FIELD.finditer(self.header):
            yield match[1].decode("ascii"), match[0]

    def values(self, name: str) -> list[bytes]:
        """Raw values of all fields of that name, from the top, still folded, without the final CRLF."""
        header = self.header
        key = b"\n" + name.lower().encode("ascii")
        lower = b"\n" + header.lower()  # so that an index in it is that of the field in `header`
        found = []
        at = lower.find(key)
        while at >= 0:
            match = _FIELD.match(header, at)
            if match is not None and len(match[1]) == len(key) - 1:
                found.append(match[0].partition(b":")[2].strip(b"\r\n").lstrip(b" \t"))
            at = lower.find(key, at + 1)
        return found

    def count(self, name: str) -> int:
        """How many fields have that name, without splitting the rest."""
        lower = self.header.lower()
        key = name.lower().encode("ascii")
        return lower.count(b"\n" + key + b":") + lower.startswith(key + b":")

    def drop(self, doomed: frozenset[tuple[str, bytes]]) -> None:
        """Removes the given (name, raw) fields whole."""
        header, kept, at = self.header, [], 0
        for match in _FIELD.finditer(header):
            if (match[1].decode("ascii"), match[0]) in doomed:
                kept.append(header[at:match.start()])
                at = match.end()
        self._raw_header = b"".join(kept) + header[at:]

    def chunks(self, size: int = CHUNK) -> Iterator[bytes]:
        """The whole message in pieces; raises OSError where the body is a file that can't be read."""
        yield self.header + self.separator
        yield from self.body.chunks(size)

    @classmethod
    def from_bytes(cls, raw: bytes) -> Message:
        """A message in memory."""
        header, separator = split_header(raw)
        return cls(raw[:header], raw[header:header + separator], MemoryBody(raw[header + separator:]))


def split_header(raw: bytes) -> tuple[int, int]:
    """(length of the header section, length of the separator) at the start of `raw`.

    The section ends at the first empty line, or before the first line that is neither a field nor its continuation.
    """
    if raw.startswith(b"\r\n"):
        return 0, 2
    end = raw.find(b"\r\n\r\n")
    length, separator = (end + 2, 2) if end >= 0 else (len(raw), 0)
    if _FIELD_START.match(raw) is None:
        return 0, 0
    return length, separator


def with_lf(pieces: Iterable[bytes], top: bytes = b"") -> Iterator[bytes]:
    """The octets with every CRLF made LF, below `top`; a bare CR stays."""
    held = b""  # a CR at the end of a piece waits for its LF
    for piece in pieces:
        if held:
            piece = held + piece
            held = b""
        if piece.endswith(b"\r"):
            piece, held = piece[:-1], b"\r"
        piece = top + _with_lf(piece)
        top = b""
        if piece:
            yield piece
    if held:
        yield held


def _with_lf(piece: bytes) -> bytes:
    """Dropping every CR is ten times as fast where all of them are of line ends."""
    ends = IncrementalNewlineDecoder(None, False)
    ends.decode(piece.decode("latin-1"), final=True)
    return piece.replace(b"\r", b"") if ends.newlines == "\r\n" else piece.replace(b"\r\n", b"\n")
