"""gmta/services/turns.py: whose turn it is, and that none is lost."""

from __future__ import annotations

import gevent
from hypothesis import given, settings
from hypothesis import strategies as st

from gmta.services.turns import MANY, REMEMBERED, WINDOW_S, Turns
from gmta.testing import FakeClock


def order_of(turns: Turns, who: list[tuple[str, str, bool]], cut_off: set[int] = frozenset()) -> list[int]:  # type: ignore[assignment]
    """The order in which they are served, who came while all turns were held."""
    served: list[int] = []
    gate = gevent.event.Event()

    def hold(number: int, ip: str, user: str, known: bool) -> None:
        with turns.turn(ip, user, known):
            served.append(number)
            gate.wait()

    came = []
    for number, (ip, user, known) in enumerate(who):
        came.append(gevent.spawn(hold, number, ip, user, known))
        gevent.sleep(0)
    for number in cut_off:
        came[number].kill()
    gate.set()
    gevent.joinall(came, timeout=5)
    return served


def test_the_fewest_tries_come_first() -> None:
    clock = FakeClock()
    turns = Turns(1, clock)
    guesser, user = ("192.0.2.1", "a", False), ("192.0.2.2", "b", False)
    assert order_of(turns, [guesser] * 4 + [user, ("192.0.2.3", "b", False), ("192.0.2.9", "a", True)]) == [0, 6, 5, 4, 1, 2, 3]
    assert order_of(turns, [user, user, ("2001:db8::1", "c", False), ("2001:db8::2", "d", False)]) == [0, 2, 3, 1]  # a /64 is one
    turns.was_right("192.0.2.1")
    assert order_of(turns, [user, user, guesser]) == [0, 2, 1]
    clock.advance(WINDOW_S)
    assert order_of(turns, [guesser, guesser, user]) == [0, 2, 1]


def test_guesses_at_one_user_hold_up_no_other() -> None:
    """New addresses all; of those that are alike, the last is the first."""
    guessers = [(f"198.51.100.{number}", "a", False) for number in range(MANY + 5)]
    served = order_of(Turns(1, FakeClock()), [*guessers, ("192.0.2.1", "b", False), ("198.51.100.99", "a", False)])
    assert served == [0, MANY + 5, *range(MANY - 1, 0, -1), MANY + 6, *range(MANY + 4, MANY - 1, -1)]


def test_what_is_remembered_is_bounded() -> None:
    turns = Turns(1, FakeClock())
    for number in range(REMEMBERED + 10):
        with turns.turn(f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}", "a", False):
            pass
    assert len(turns._tries) == REMEMBERED


@given(st.integers(1, 3), st.lists(st.tuples(st.sampled_from(["192.0.2.1", "192.0.2.2"]), st.sampled_from("ab"), st.booleans()), max_size=12), st.sets(st.integers(0, 11)))
@settings(max_examples=60, deadline=None)
def test_no_turn_is_lost(at_a_time: int, who: list[tuple[str, str, bool]], cut_off: set[int]) -> None:
    turns = Turns(at_a_time, FakeClock())
    served = order_of(turns, who, {one for one in cut_off if one < len(who)})
    assert set(range(len(who))) - cut_off <= set(served) and len(served) == len(set(served))
    assert turns._free == at_a_time and not turns._waiting


def test_who_is_cut_off_when_its_turn_has_come() -> None:
    turns = Turns(1, FakeClock())
    entered: list[int] = []

    def hold() -> None:
        with turns.turn("192.0.2.1", "a", False):
            entered.append(1)

    with turns.turn("192.0.2.1", "a", False):
        waiting = gevent.spawn(hold)
        gevent.sleep(0)
        waiting.kill(block=False)  # done when the loop runs again: the turn is its own by then
    waiting.join(5)
    assert turns._free == 1 and not entered
