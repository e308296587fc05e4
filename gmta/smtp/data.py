"""Message data on the wire: the scanners that find its end and undo dots, what its octets have to be, and the stuffing of dots.

Server and client share it. Only CRLF.CRLF ends the data (RFC 5321 section 4.1.1.4, 4.5.2); bare CR, bare LF and NUL are
noticed and read on over, so that what hides behind them is never taken for commands. Nothing here raises on any input.
"""

from __future__ import annotations

import re
from io import IncrementalNewlineDecoder

_DOT = b"\r\n."
_CRLF_END = re.compile(rb"\r\n(\.\r\n)")
_LF_END = re.compile(rb"\n(\.\r?\n)")
_OPEN = re.compile(rb"(?:\r?\n(?:\.\r?)?|\r)\Z")  # a line end, or an end of data, that may go on


class TextCheck:
    """Looks at message octets as they come, in any pieces (RFC 5321 sections 2.3.8 and 4.5.3.1.6, RFC 6152 section 3).

    bare: a bare CR or LF was seen.  nul: a NUL was seen.  too_long: a line had more than `line_limit` octets without its CRLF.
    """

    __slots__ = ("_ends", "_limit", "_line", "bare", "nul", "too_long")

    def __init__(self, line_limit: int = 64 * 1024) -> None:
        self._limit = line_limit
        self._ends = IncrementalNewlineDecoder(None, False)  # one pass in C tells which line ends there are
        self._line = 0
        self.bare = False
        self.nul = False
        self.too_long = False

    def check(self, data: bytes) -> None:
        """Takes the next octets."""
        if not self.bare:
            self._ends.decode(data.decode("latin-1"))
            self.bare = self._ends.newlines not in (None, "\r\n")
        if not self.nul and b"\0" in data:
            self.nul = True
        self._measure(data)

    def finish(self) -> None:
        """There are no more: a CR at the very end is a bare one."""
        self._ends.decode("", True)
        self.bare = self.bare or self._ends.newlines not in (None, "\r\n")

    def _measure(self, data: bytes) -> None:
        """Line lengths, cheaply: from line end to the last line end that a line at its limit may have."""
        start = -self._line
        octets, limit = len(data), self._limit
        while octets - start > limit:
            end = data.rfind(b"\n", max(start, 0), start + limit + 2)
            if end < 0:
                self.too_long = self.too_long or octets - start > limit + 1 or not data.endswith(b"\r")
                break
            start = end + 1
        end = data.rfind(b"\n", max(start, 0))
        self._line = octets - (start if end < 0 else end + 1)


class DataScanner(TextCheck):
    """Reads message data in any pieces. `feed` gives the octets with dots undone; `rest` is what follows the end.

    ended: the final CRLF.CRLF was seen.  Memory: at most 4 octets are held back.
    """

    __slots__ = ("_held", "_virtual", "ended", "rest")

    def __init__(self, line_limit: int = 64 * 1024) -> None:
        super().__init__(line_limit)
        self._held = b"\r\n"  # the data starts as if behind a line end, so that a first dot counts
        self._virtual = 2  # octets of that line end still to be left out
        self.ended = False
        self.rest = b""

    def feed(self, piece: bytes) -> bytes:
        """Takes the next octets; gives the message octets that are certain by now."""
        held = self._held
        buffer = held + piece
        out: list[bytes] = []
        position = 0
        while True:
            found = buffer.find(_DOT, position)
            if found < 0:
                break
            after = buffer[found + 3:found + 5]
            if after == b"\r\n":  # RFC 5321 section 4.1.1.4: the end of data
                out.append(buffer[position:found + 2])
                self.rest = buffer[found + 5:]
                self.ended = True
                self._held = b""
                return self._check(b"".join(out))
            if len(after) == 2 or (len(after) == 1 and after != b"\r"):
                out.append(buffer[position:found + 2])  # RFC 5321 section 4.5.2: the first dot of a line is removed
                position = found + 3
                continue
            break
        tail = buffer[position:]
        keep = found - position if found >= 0 else _overlap(tail)
        if found < 0:
            keep = len(tail) - keep
        out.append(tail[:keep])
        self._held = tail[keep:]
        return self._check(b"".join(out))

    def _check(self, data: bytes) -> bytes:
        """Notes what is wrong with the octets, and drops the line end that the scanner started with."""
        if self._virtual:
            drop = min(self._virtual, len(data))
            self._virtual -= drop
            data = data[drop:]
        if data:
            self.check(data)
        return data


class NormalizingScanner(DataScanner):
    """The same for clients that end lines in a bare LF: what comes out has CRLF. A bare CR ends no line here either.

    A dot alone between other line ends than CRLF is no end of data but for lf_ends, which is for a client that ends its
    commands in a bare LF too: what a relay in front of us takes for text is never an end here (CVE-2023-51764), since a relay
    speaks CRLF itself.
    """

    __slots__ = ("_end",)

    def __init__(self, line_limit: int = 64 * 1024, *, lf_ends: bool = False) -> None:
        super().__init__(line_limit)
        self._end = _LF_END if lf_ends else _CRLF_END

    def feed(self, piece: bytes) -> bytes:
        """Takes the next octets; gives the message octets that are certain by now."""
        buffer = self._held + piece
        end = self._end.search(buffer)
        if end is not None:
            text, self.rest, self._held = buffer[:end.start(1)], buffer[end.end():], b""
            self.ended = True
        else:
            open_end = _OPEN.search(buffer[-4:])
            certain = len(buffer) - (0 if open_end is None else len(open_end[0]))
            text, self._held = buffer[:certain], buffer[certain:]
        lines = text.replace(b"\r\n", b"\n")
        return self._check(lines.replace(b"\n.", b"\n").replace(b"\n", b"\r\n"))  # RFC 5321 section 4.5.2


class ChunkScanner(TextCheck):
    """Reads the octets of BDAT chunks, which a count frames: no dots, no end (RFC 3030 section 2).

    normalize: a bare LF comes out as CRLF; a CR at the end of a piece is held back until it is clear what it is.
    """

    __slots__ = ("_held", "_normalize")

    def __init__(self, line_limit: int = 64 * 1024, *, normalize: bool = False) -> None:
        super().__init__(line_limit)
        self._held = b""
        self._normalize = normalize

    def feed(self, piece: bytes) -> bytes:
        """Takes the next octets; gives the message octets that are certain by now."""
        if self._normalize:
            piece = self._held + piece
            self._held = b"\r" if piece.endswith(b"\r") else b""
            piece = piece.removesuffix(b"\r").replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
        self.check(piece)
        return piece

    def finish(self) -> None:
        """The last chunk is in."""
        if self._held:
            self.check(self._held)
        super().finish()


def _overlap(tail: bytes) -> int:
    """How many octets at the end of `tail` could begin CRLF-dot."""
    if tail.endswith(b"\r\n"):
        return 2
    if tail.endswith(b"\r"):
        return 1
    return 0


class Stuffer:
    """Dot-stuffs a message sent in any pieces (RFC 5321 section 4.5.2); `finish` gives the end of data."""

    __slots__ = ("_tail",)

    def __init__(self) -> None:
        self._tail = b"\r\n"

    def feed(self, piece: bytes) -> bytes:
        """The octets to send for this piece."""
        if not piece:
            return b""
        joined = self._tail + piece
        stuffed = joined.replace(b"\r\n.", b"\r\n..")
        out = stuffed[len(self._tail):]
        self._tail = joined[-2:]
        return out

    def finish(self) -> bytes:
        """The final CRLF.CRLF; the first CRLF is the message's own where it has one (RFC 5321 section 4.1.1.4)."""
        return b".\r\n" if self._tail == b"\r\n" else b"\r\n.\r\n"


def stuff(message: bytes) -> bytes:
    """The whole wire form of a message, end of data included."""
    stuffer = Stuffer()
    return stuffer.feed(message) + stuffer.finish()


def unstuff(wire: bytes) -> bytes:
    """The message in a wire form that ends in CRLF.CRLF; raises ValueError where it does not."""
    scanner = DataScanner()
    message = scanner.feed(wire)
    if not scanner.ended or scanner.rest:
        raise ValueError("not one message")
    return message
