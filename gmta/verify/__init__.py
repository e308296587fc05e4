"""Who sent this: evaluators of SPF, DKIM, DMARC and ARC, as mechanism without policy.

Each takes a message, addresses and something with `look_up` (the resolver, or `Lookups` around it) and returns results that
explain themselves; what a result does to mail is the plugins' business. None of them raises for anything that a message or
the DNS may hold.

`Lookups` bounds what one message may cost in DNS: a question is asked once, there are at most `limit` questions, and they wait
at most `seconds` in all; past that every answer is "temporary". `lookups_of` keeps one a transaction, so that the plugins share
the bound.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from gmta.mail.session import Transaction
from gmta.services.dns import Answer, Status

MAX_QUERIES = 30  # questions one message may cost
MAX_SECONDS = 20.0  # and how long they may take in all (RFC 7208 section 4.6.4 asks to allow 20)
RESERVED = 10  # of these for DMARC, which is asked last: eight of a tree walk (RFC 9989 section 4.10), np=, one more walk's first

_NOTE = "lookups"


class Asks(Protocol):
    """What evaluators ask: the resolver or a `Lookups`."""

    def look_up(self, name: str, kind: str, *, timeout_s: float | None = None) -> Answer:
        """The answer, after timeout_s at the latest; never raises."""


class Lookups:
    """The questions of one message: each asked once, at most `limit` of them, `seconds` of waiting in all."""

    __slots__ = ("_answers", "_clock", "_left", "_limit", "_resolver")

    def __init__(self, resolver: Asks, *, limit: int = MAX_QUERIES, seconds: float = MAX_SECONDS,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self._resolver = resolver
        self._limit = limit
        self._clock = clock
        self._answers: dict[tuple[str, str], Answer] = {}
        self._left = [seconds]  # shared with what `leaving` gives

    def leaving(self, reserve: int) -> Lookups:
        """The same questions and time, but the last `reserve` questions are left to others."""
        other = Lookups(self._resolver, limit=self._limit - reserve, clock=self._clock)
        other._answers = self._answers
        other._left = self._left
        return other

    def look_up(self, name: str, kind: str, *, timeout_s: float | None = None) -> Answer:
        """The answer to a question, from before where it was asked before."""
        key = (name, kind)
        answer = self._answers.get(key)
        if answer is not None:
            return answer
        if len(self._answers) >= self._limit:
            return Answer(name, kind, Status.TEMPORARY, reason=f"more than {self._limit} DNS questions for one message")
        left = self._left[0]
        if left <= 0:
            return Answer(name, kind, Status.TEMPORARY, reason="the time for DNS questions is over")
        began = self._clock()
        answer = self._answers[key] = self._resolver.look_up(name, kind, timeout_s=left if timeout_s is None else min(left, timeout_s))
        self._left[0] = left - (self._clock() - began)
        return answer


def lookups_of(transaction: Transaction, resolver: Asks) -> Lookups:
    """The one Lookups of a transaction."""
    found: Lookups | None = transaction.notes.get(_NOTE)
    if found is None:
        found = transaction.notes[_NOTE] = Lookups(resolver)
    return found
