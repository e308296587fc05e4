"""Command lines out of a stream of octets, bounded; and the one exception that the protocol may raise.

RFC 5321 section 2.3.8: only CRLF ends a line. A bare LF or CR is reported, never obeyed.
"""

from __future__ import annotations

MAX_WITHOUT_LF = 64 * 1024


class ProtocolError(Exception):
    """The caller broke the protocol of these classes (a reply when none is due), or the remote broke SMTP's."""


class LineTooLong(Exception):
    """A line over its limit, read to its end and dropped; internal to gmta.smtp."""


class NoLineEnd(Exception):
    """64 KiB without LF; internal to gmta.smtp."""


class BareNewline(Exception):
    """A line with a bare CR or LF; internal to gmta.smtp."""


def take_line(buffer: bytearray, limit: int, *, normalize: bool = False) -> bytes | None:
    """Removes one line from the buffer and gives it without CRLF, or None if it is not whole yet.

    normalize: a bare LF ends a line too.  Raises LineTooLong (line dropped), NoLineEnd or BareNewline (RFC 5321 section 2.3.8).
    """
    end = buffer.find(b"\n")
    if (len(buffer) if end < 0 else end) > MAX_WITHOUT_LF:
        raise NoLineEnd
    if end < 0:
        return None
    whole = end > 0 and buffer[end - 1] == 13
    line = bytes(buffer[:end - 1 if whole else end])
    del buffer[:end + 1]
    if b"\r" in line or not (whole or normalize):
        raise BareNewline
    if len(line) + 2 > limit:
        raise LineTooLong
    return line
