"""Queue ids: 16 characters, sortable by time, unique across workers, restarts and machines, safe in a file name.

Nine characters of milliseconds, two of a sequence within the millisecond, five of a random tag a process, all base32hex
(RFC 4648 section 7: its order is the numbers' order). A clock that steps back only stops the time part until it has caught up.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable

DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUV"
ID = re.compile(r"[0-9A-V]{16}\Z")
TAG_LENGTH = 5
_PAIRS = tuple(high + low for high in DIGITS for low in DIGITS)


def encode(number: int, length: int) -> str:
    """`number` in `length` base32hex digits."""
    out = []
    for _ in range(length):
        out.append(DIGITS[number & 31])
        number >>= 5
    return "".join(reversed(out))


def time_prefix(at: float) -> str:
    """The nine characters that ids made at `at` (Unix seconds) start with: smaller ones are older."""
    return encode(max(0, int(at * 1000)), 9)


class IdSource:
    """Makes ids; `tag` is this process's part of them."""

    __slots__ = ("_clock", "_ms", "_prefix", "_sequence", "tag")

    def __init__(self, clock: Callable[[], float], tag: str | None = None) -> None:
        self._clock = clock
        self.tag = encode(secrets.randbits(25), TAG_LENGTH) if tag is None else tag
        self._ms = -1
        self._prefix = ""
        self._sequence = 0

    def new(self) -> str:
        """The next id."""
        ms = int(self._clock() * 1000)
        if ms > self._ms:
            self._ms, self._sequence, self._prefix = ms, 0, encode(ms, 9)
        elif self._sequence < 1023:
            self._sequence += 1
        else:  # more than 1,024 in a millisecond: borrow from the next
            self._ms, self._sequence, self._prefix = self._ms + 1, 0, encode(self._ms + 1, 9)
        return self._prefix + _PAIRS[self._sequence] + self.tag
