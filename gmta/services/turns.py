"""Whose password is checked next where more come than can be checked: checks cost, and whoever guesses brings many.

At most `at_a_time` hold a turn. Who waits is served by rank, and the last who came first within one: those first whose address is
known to be the user's, then addresses with the fewest tries lately, and of those users whom not many try to be. So the first try of an
address comes before the second of all others, however many guess, and those at one account hold up no other; and where more come than can ever be served, some are served at once in place of all too late. Tries are
counted for this process alone, they decide on order, not on locking out. Failure: none of its own; who is interrupted while it
waits gives its place on.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from gevent.event import Event

from gmta.mail.address import client_network

WINDOW_S = 900.0  # how long a try counts
REMEMBERED = 20_000
MANY = 10  # tries at a user


class Turns:
    """Turns for one kind of check, in one worker."""

    def __init__(self, at_a_time: int, clock: Callable[[], float]) -> None:
        self._free = at_a_time
        self._clock = clock
        self._waiting: list[tuple[int, bool, int, Event]] = []  # a heap: tries of the address, whether many are at the user, the later the less, who
        self._came = 0
        self._tries: OrderedDict[str, tuple[int, float]] = OrderedDict()  # by network, and by user: how many, until when

    @contextmanager
    def turn(self, ip: str, user: str, known: bool) -> Iterator[None]:
        """Waits for a turn and holds it. ip: of the client.  known: the user has logged in from there before."""
        rank = (0, False) if known else (self._count(client_network(ip)), self._count(f"user {user}") > MANY)
        if self._free:
            self._free -= 1
        else:
            self._wait(*rank)
        try:
            yield
        finally:
            self._next()

    def was_right(self, ip: str) -> None:
        """The check was passed: the address is no guesser's."""
        self._tries.pop(client_network(ip), None)

    def _count(self, who: str) -> int:
        now = self._clock()
        count, until = self._tries.pop(who, (0, 0.0))
        if until <= now:
            count, until = 0, now + WINDOW_S
        self._tries[who] = (count + 1, until)
        if len(self._tries) > REMEMBERED:
            self._tries.popitem(last=False)
        return count + 1

    def _wait(self, tries: int, attacked: bool) -> None:
        self._came += 1
        entry = (tries, attacked, -self._came, Event())
        heapq.heappush(self._waiting, entry)
        try:
            entry[-1].wait()
        except BaseException:
            if entry[-1].is_set():
                self._next()  # it was our turn already
            else:
                self._waiting.remove(entry)
                heapq.heapify(self._waiting)
            raise

    def _next(self) -> None:
        """One is done: its place is the next one's."""
        if self._waiting:
            heapq.heappop(self._waiting)[-1].set()
        else:
            self._free += 1
