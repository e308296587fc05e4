"""Makes guessing passwords slow and short: failed logins are answered late and counted, and who fails too often is locked out.

Hooks: permit_auth (place it before those that know users), on_refused, on_session_closed, check_mail, check_connect.  Keys: address_failures,
user_failures, window, lockout, delay, known_for.  Replies: 454 4.7.0 to AUTH of one who is locked out, whatever the password, and 421
4.7.0 to the next AUTH of that session; 421 4.7.0 in place of the banner, on listeners with the role submission.

Counted are an address (an IPv6 one by its /64) and a user, by all workers together. A user cannot be locked out by others: while
somebody guesses at an account from many addresses, new addresses have one try each, and one from which the user has logged in
before counts for itself. No more tries of an address are under way at a time than it has left. RFC 4954 section 6 lets a server say 454 so.
"""

from __future__ import annotations

from typing import Any

import gevent
from pydantic import Field

from gmta import Credentials, Duration, PluginConfig, Reply, Session, Transaction, Verdict, defer, disconnect, hookimpl
from gmta.mail.address import client_network
from gmta.services.passwords import user_key

NAME = "auth_guard"
WAITS, WAIT_S = 50, 0.1  # until as many tries of an address are decided as it has left
KNOWN_FACTOR = 5  # how many more failures an address is granted for a user that it belongs to


class Config(PluginConfig):
    """[plugin:auth_guard]"""

    address_failures: int = Field(10, ge=1, description="failed logins of an address within the window, before it is locked out")
    user_failures: int = Field(20, ge=1, description="failed logins of a user within it, after which new addresses have one try")
    window: Duration = Field("15m", gt=0, description="how long a failure counts")  # type: ignore[assignment]
    lockout: Duration = Field("15m", gt=0, description="how long an address is locked out")  # type: ignore[assignment]
    delay: Duration = Field("1s", le=20, description="how late a failed login is answered")  # type: ignore[assignment]
    known_for: Duration = Field("30d", description="how long an address belongs to a user who sent mail from it")  # type: ignore[assignment]


class _Note:
    """What is known of a session: the user that was asked for, whether its success is noted, whether a try was put off already."""

    __slots__ = ("noted", "put_off", "user")

    def __init__(self, user: str) -> None:
        self.user = user
        self.noted = False
        self.put_off = False


class Plugin:
    """Counts in the shared state, under keys that begin with `auth:`."""

    def __init__(self, config: Config, services: Any) -> None:
        self._config = config
        self._services = services
        self._trying: dict[str, dict[str, Session]] = {}  # by address and session id: who was let through to the others
        self._address: dict[str, str] = {}  # of those, which a proxy may replace meanwhile

    @hookimpl
    def check_connect(self, session: Session) -> Verdict | None:
        """Turns away an address that is locked out and that no user is known at."""
        if session.role != "submission" or session.relay_network:
            return None
        state, address = self._services.state, client_network(session.peer_ip)
        if state.get(f"auth:lock:{address}") and not state.get(f"auth:friend:{address}"):
            return disconnect("Too many failed logins, try again later")
        return None

    @hookimpl
    def permit_auth(self, session: Session, credentials: Credentials) -> Verdict | None:
        """A deferral where no more tries are granted, and the end of the session at the second; else None, and others decide."""
        user = user_key(credentials.user)
        before = session.notes.get(NAME)
        note = session.notes[NAME] = _Note(user)
        state, config, address = self._services.state, self._config, client_network(session.peer_ip)
        if state.get(f"auth:known:{address} {user}"):
            locked = state.get(f"auth:pair:{address} {user}", 0) >= config.address_failures * KNOWN_FACTOR
        else:
            for _ in range(WAITS):
                locked = bool(state.get(f"auth:lock:{address}"))
                failures = state.get(f"auth:address:{address}", 0)
                if not locked and failures >= 1:
                    locked = state.get(f"auth:user:{user}", 0) >= config.user_failures
                if locked or failures + self._undecided(address) < config.address_failures:
                    break
                gevent.sleep(WAIT_S)  # or who tries many passwords at a time would have them all before the first one counts
            else:
                locked = True
        if not locked:
            self._decided(session)
            self._trying.setdefault(address, {})[session.id] = session
            self._address[session.id] = address
            return None
        self._wait()
        if before is not None and before.put_off:  # or guessers would hold all connections that their network has
            return defer("Too many failed logins, try again later", 421, "4.7.0")
        note.put_off = True
        return defer("Too many failed logins, try again later", 454, "4.7.0")

    @hookimpl
    def on_refused(self, session: Session, transaction: Transaction | None, stage: str, reply: Reply) -> None:
        """Counts a failed login, and has its answer wait."""
        if stage != "auth":
            return
        self._decided(session)
        if reply.code != 535:
            return
        state, config, address = self._services.state, self._config, client_network(session.peer_ip)
        note = session.notes.get(NAME)
        failures = state.add(f"auth:address:{address}", 1, config.window)
        if note is not None:
            state.add(f"auth:user:{note.user}", 1, config.window)
            state.add(f"auth:pair:{address} {note.user}", 1, config.window)
        if failures >= config.address_failures:
            if failures == config.address_failures:
                self._services.log.warning("locked out", ip=address, failures=int(failures), seconds=config.lockout)
            state.set(f"auth:lock:{address}", True, config.lockout)
        self._wait()

    @hookimpl
    def check_mail(self, session: Session, transaction: Transaction) -> Verdict | None:
        """Notes once a session from where a user sends mail; has no objection."""
        note = session.notes.get(NAME) if session.user is not None else None
        if note is None or note.noted or not self._config.known_for:
            return None
        note.noted = True
        state, address = self._services.state, client_network(session.peer_ip)
        for user in {note.user, user_key(session.user or "")} - {""}:  # as it was typed, and as the back end names it
            state.set(f"auth:known:{address} {user}", True, self._config.known_for)
        state.set(f"auth:friend:{address}", True, self._config.known_for)
        return None

    @hookimpl
    def on_session_closed(self, session: Session) -> None:
        """Forgets it."""
        self._decided(session)

    def _undecided(self, address: str) -> int:
        """How many logins from an address other plugins think about now, or the client has not brought to an end."""
        return sum(session.user is None for session in self._trying.get(address, {}).values())

    def _decided(self, session: Session) -> None:
        address = self._address.pop(session.id, None)
        if address is not None:
            del self._trying[address][session.id]
            if not self._trying[address]:
                del self._trying[address]

    def _wait(self) -> None:
        if self._config.delay:
            gevent.sleep(self._config.delay)
