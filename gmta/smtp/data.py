r"""The text after DATA: its end, its dots, and the shapes it must not have; used by both sides.

Only CRLF . CRLF ends it, so that a bare LF or CR never does (the smuggling attack); a message with one is told
apart by `bare`. DataScanner takes any chunking and gives the same octets and flags for each. Nothing here raises.
RFC 5321 section 2.3.8, 4.1.1.4 and 4.5.2.
"""

from __future__ import annotations

import re

END = b"\r\n.\r\n"
MAX_LINE = 65536  # octets of a text line; longer ones are refused, never split
MAX_HEADER = 1024 * 1024
MAX_FIELDS = 2000
_SMALL = 3 * MAX_FIELDS  # a message below this can't break a header bound

_NEWLINE = re.compile(rb"\r\n|\r|\n")


class HeaderMeter:
    """Counts octets and fields of the header section as it streams by; `over` once a bound is passed."""

    __slots__ = ("_tail", "done", "fields", "max_fields", "max_size", "over", "size")

    def __init__(self, max_size: int = MAX_HEADER, max_fields: int = MAX_FIELDS) -> None:
        self.max_size = max_size
        self.max_fields = max_fields
        self.size = 0
        self.fields = 0
        self.done = False
        self.over = False
        self._tail = b"\r\n"  # the start counts as the start of a line

    def feed(self, data: bytes) -> None:
        """Takes the next octets of the message."""
        if self.done:
            return
        tail = self._tail
        text = tail + data
        end = text.find(b"\r\n\r\n")
        if end >= 0:
            self.done = True
            text = text[:end + 2]
        self.size += max(len(text) - len(tail), 0)
        seen = text[len(tail) - 1:] if len(text) >= len(tail) else b""
        # A field starts behind each LF that no blank follows (RFC 5322 section 2.2.3)
        self.fields += seen.count(b"\n") - seen.endswith(b"\n") - seen.count(b"\n ") - seen.count(b"\n\t")
        self._tail = text[-3:]
        if self.size > self.max_size or self.fields > self.max_fields:
            self.over = True
            self.done = True


class DataScanner:
    """One message's text. feed() gives the unstuffed octets; `ended` with `rest` behind the end.

    bare, nul, long_line: what was seen in it.  size: octets unstuffed.  raw: octets taken from the wire.
    normalize: bare CR and LF become CRLF instead of setting `bare`; they still never end the text.
    """

    __slots__ = ("_held", "_line", "_normalize", "_pending_cr", "_skip", "bare", "ended", "long_line", "nul", "raw",
                 "rest", "size")

    def __init__(self, *, normalize: bool = False) -> None:
        self._held = b"\r\n"  # the text begins at the start of a line, so ".CRLF" at once ends it
        self._skip = 2
        self._line = 0
        self._normalize = normalize
        self._pending_cr = False
        self.bare = self.nul = self.long_line = self.ended = False
        self.rest = b""
        self.size = 0
        self.raw = 0

    def feed(self, data: bytes) -> bytes:
        """Takes octets from the wire; returns the message octets that are certain now."""
        work = self._held + data
        end = work.find(END)
        if end >= 0:
            text = work[:end + 2]
            self.rest = work[end + 5:]
            self.raw += len(data) - len(self.rest)
            self.ended = True
            self._held = b""
        else:
            self.raw += len(data)
            keep = _held_back(work)
            if keep == len(work):
                self._held = work
                return b""
            text = work[:len(work) - keep]
            self._held = work[len(work) - keep:]
        # `text` never parts a CRLF from itself nor from the dot behind it, so each piece can be judged alone.
        pairs = text.count(b"\r\n")
        if (text.count(b"\n") != pairs or text.count(b"\r") != pairs) and not self._normalize:
            self.bare = True  # RFC 5321 section 2.3.8
        if b"\0" in text:
            self.nul = True
        skip = self._skip
        self._measure(text, skip)
        if b"\r\n." in text:
            text = text.replace(b"\r\n.", b"\r\n")  # RFC 5321 section 4.5.2
        if skip:
            text = text[skip:]
            self._skip = 0
        if self._normalize:
            text = _NEWLINE.sub(b"\r\n", text)
        self.size += len(text)
        return text

    def _measure(self, text: bytes, start: int) -> None:
        first = text.find(b"\n", start)
        if first < 0:
            self._line += len(text) - start
            if self._line > MAX_LINE:
                self.long_line = True
            return
        if self._line + first - start > MAX_LINE:
            self.long_line = True
        last = text.rfind(b"\n")
        while last - first > MAX_LINE + 1:
            following = text.rfind(b"\n", first + 1, first + MAX_LINE + 2)
            if following < 0:
                self.long_line = True
                break
            first = following
        self._line = len(text) - last - 1
        if self._line > MAX_LINE:
            self.long_line = True


def _held_back(work: bytes) -> int:
    """How many octets at the end could belong to the end of data."""
    for length in (4, 3, 2, 1):
        if work.endswith(END[:length]):
            return length
    return 0


class Stuffer:
    """Doubles the leading dots of a message that comes in pieces; `finish` ends it (RFC 5321 section 4.5.2)."""

    __slots__ = ("_tail",)

    def __init__(self) -> None:
        self._tail = b"\r\n"

    def feed(self, data: bytes) -> bytes:
        """The octets to send for the next piece."""
        if not data:
            return b""
        tail = self._tail
        out = data
        if b"\n." in out:
            out = out.replace(b"\n.", b"\n..")  # behind a bare LF too: a careless reader may end a line there
        if tail.endswith(b"\n") and data.startswith(b"."):
            out = b"." + out
        self._tail = (tail + data)[-2:]
        return out

    def finish(self) -> bytes:
        """The end of data, with the CRLF that the message may lack."""
        return END if self._tail != b"\r\n" else END[2:]


def stuff(message: bytes) -> bytes:
    """The whole text to send for a message, its end included."""
    stuffer = Stuffer()
    return stuffer.feed(message) + stuffer.finish()


def unstuff(text: bytes) -> bytes:
    """The message within a complete text; what comes behind its end is ignored."""
    return DataScanner().feed(text)
