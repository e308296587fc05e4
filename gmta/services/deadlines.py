"""Deadlines of many waiting things, looked at a few times a second: a timer for each wait would cost more than the wait.

Who waits sets `deadline` (monotonic seconds, NEVER while it does not wait) and is told by `expire` when that has passed, at most
a tick late. `expire` must not block and must not raise: it ends the wait, by cancelling it or by shutting the socket down.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Protocol

import gevent

NEVER = math.inf
TICK_S = 0.25


class Watched(Protocol):
    """What can wait too long."""

    deadline: float

    def expire(self) -> None:
        """The deadline has passed."""


class Deadlines:
    """All that is watched in a worker; a greenlet sweeps while there is something to watch."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._watched: set[Watched] = set()
        self._sweeper: gevent.Greenlet | None = None

    def watch(self, one: Watched) -> None:
        """Begins to look at one's deadline."""
        self._watched.add(one)
        if self._sweeper is None:
            self._sweeper = gevent.spawn(self._sweep_on)

    def forget(self, one: Watched) -> None:
        """Looks at it no more."""
        self._watched.discard(one)

    def sweep(self) -> None:
        """Expires everything that is late by now."""
        now = self.clock()
        for one in [one for one in self._watched if one.deadline <= now]:
            one.expire()

    def _sweep_on(self) -> None:
        while self._watched:
            gevent.sleep(TICK_S)
            self.sweep()
        self._sweeper = None
