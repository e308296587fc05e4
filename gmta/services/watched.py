"""Files that are read again when they have changed, looked at once a second at most.

What is read from them is the caller's business, as is the log. Failure: what `load` raises passes through, for a file that is not there too, and
the files are not read again until they change once more.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

CHECK_INTERVAL_S = 1.0


class Watched:
    """Reads with `load` at once, and at `refresh` where a file has another time, size or inode.

    paths: `load` may change what is in it.  clock: any seconds.
    """

    def __init__(self, paths: Sequence[str], load: Callable[[], None], clock: Callable[[], float]) -> None:
        self._paths = paths
        self._load = load
        self._clock = clock
        self._stamp = self._look()
        load()
        self._checked_at = clock()

    def _look(self) -> list[tuple[int, int, int]]:
        return [_stamp(path) for path in self._paths]

    def refresh(self) -> None:
        """Reads the files again where they have changed."""
        now = self._clock()
        if 0 <= now - self._checked_at < CHECK_INTERVAL_S:
            return
        self._checked_at = now
        stamp = self._look()
        if stamp != self._stamp:
            self._stamp = stamp
            self._load()


def _stamp(path: str) -> tuple[int, int, int]:
    """What tells a file from another one of that name; one that is not there is told apart too: `load` says what is wrong with that."""
    try:
        found = os.stat(path)
    except OSError:
        return 0, 0, 0
    return found.st_mtime_ns, found.st_size, found.st_ino
