"""Lines of a command stream, bounded: what has come in, cut at LF, with what is wrong about each line.

LineBuffer keeps octets that are not consumed yet; past `limit` a line's octets are dropped but its end is still found, so
that the session stays in step. It judges nothing beyond line ends: its users decide what a bare newline or a long line is
answered with. RFC 5321 section 2.3.8 and 4.5.3.1.4.
"""

from __future__ import annotations

from enum import Enum

MAX_COMMAND = 2048  # octets with CRLF; RFC 5321 section 4.5.3.1.4 asks for 512 and extensions for more
MAX_AUTH = 12288  # RFC 4954 section 4
MAX_ENDLESS = 65536  # octets without LF after which nothing sensible is to be expected


class ProtocolError(Exception):
    """The only exception that leaves this package: misuse of the API, or a remote that does not speak SMTP."""


class LineFault(Enum):
    """Why a line can't be taken."""

    LONG = "long"
    BARE = "bare"
    ENDLESS = "endless"


class LineBuffer:
    """Octets received and not consumed: `data` from `start` on. `dropped` counts octets of an over-long line."""

    __slots__ = ("_last", "data", "dropped", "start")

    def __init__(self) -> None:
        self.data = b""
        self.start = 0
        self.dropped = 0
        self._last = b""

    def __len__(self) -> int:
        return len(self.data) - self.start

    def append(self, data: bytes) -> None:
        """Adds what was received."""
        if self.start == len(self.data):
            self.data = data
        else:
            self.data = self.data[self.start:] + data
        self.start = 0

    def take_all(self) -> bytes:
        """Consumes and returns everything."""
        data = self.data[self.start:] if self.start else self.data
        self.data = b""
        self.start = 0
        return data

    def take(self, count: int) -> bytes:
        """Consumes and returns up to `count` octets."""
        if self.start == 0 and count >= len(self.data):
            return self.take_all()
        data = self.data[self.start:self.start + count]
        self.start += len(data)
        return data

    def give_back(self, data: bytes) -> None:
        """Puts octets back in front."""
        self.data = data + self.data[self.start:]
        self.start = 0

    def clear(self) -> None:
        """Forgets everything."""
        self.data = b""
        self.start = self.dropped = 0

    def line(self, limit: int, *, lenient: bool = False) -> bytes | LineFault | None:
        """The next line without its CRLF, or what is wrong with it, or None if it is not complete.

        lenient: a bare LF ends a line too. A line over `limit` octets is LONG once its end is in; ENDLESS comes at once.
        """
        data, start = self.data, self.start
        end = data.find(b"\n", start)
        if end < 0:
            waiting = len(data) - start
            if self.dropped + waiting > MAX_ENDLESS:
                return LineFault.ENDLESS
            if waiting > limit or (self.dropped and waiting):
                self._last = data[-1:]
                self.dropped += waiting
                self.data = b""
                self.start = 0
            return None
        length = end + 1 - start
        if self.dropped or length > limit:
            before = data[end - 1:end] if end > start else self._last
            total = self.dropped + length
            self.start = end + 1
            self.dropped = 0
            if total > MAX_ENDLESS:
                return LineFault.ENDLESS
            return LineFault.LONG if before == b"\r" or lenient else LineFault.BARE
        self.start = end + 1
        if data.startswith(b"\r", end - 1) and end > start:
            line = data[start:end - 1]
        elif lenient:
            line = data[start:end]
        else:
            return LineFault.BARE
        if b"\r" in line and not lenient:
            return LineFault.BARE  # RFC 5321 section 2.3.8
        return line
