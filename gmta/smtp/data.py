"""Message data on the wire: the scanner that finds CRLF.CRLF and undoes dots, and the stuffing that does them.

Server and client share it. Only CRLF.CRLF ends the data (RFC 5321 section 4.1.1.4, 4.5.2); bare CR, bare LF and NUL are
noticed and read on over, so that what hides behind them is never taken for commands. Nothing here raises on any input.
"""

from __future__ import annotations

from io import IncrementalNewlineDecoder

_DOT = b"\r\n."


class DataScanner:
    """Reads message data in any pieces. `feed` gives the octets with dots undone; `rest` is what follows the end.

    ended: the final CRLF.CRLF was seen.  bare: a bare CR or LF was seen.  nul: a NUL was seen.  too_long: a line had more
    than `line_limit` octets without its CRLF.  Memory: at most 4 octets are held back.
    """

    __slots__ = ("_ends", "_held", "_limit", "_line", "_virtual", "bare", "ended", "nul", "rest", "too_long")

    def __init__(self, line_limit: int = 64 * 1024) -> None:
        self._limit = line_limit
        self._ends = IncrementalNewlineDecoder(None, False)  # one pass in C tells which line ends there are
        self._held = b"\r\n"  # the data starts as if behind a line end, so that a first dot counts
        self._virtual = 2  # octets of that line end still to be left out
        self._line = 0
        self.ended = False
        self.bare = False
        self.nul = False
        self.too_long = False
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
            if not self.bare:
                self._ends.decode(data.decode("latin-1"))
                self.bare = self._ends.newlines not in (None, "\r\n")
            if not self.nul and b"\0" in data:
                self.nul = True
            self._measure(data)
        return data

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
