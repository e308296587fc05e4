"""Knows users from a file: name, argon2id hash and SCRAM verifier, as `gmta user add` writes them.

Hooks: permit_auth, get_auth_mechanisms (SCRAM-SHA-256, PLAIN, LOGIN).  Keys: users_file, mechanisms.  Replies: none of its own; a user whom no
plugin permits gets 535 5.7.8.

The file is read again when it changes. Passwords are hashed in a native thread, a few at a time; where many wait, those come first
who have logged in from their address before, then addresses with the fewest tries lately, so that a crowd of guessers keeps nobody
out (gmta/services/turns.py). Who does not exist takes as long as who has another password, and a password that was tried, right or
wrong, is not hashed again for some minutes. A missing file is no user; the log says so.
"""

from __future__ import annotations

import hmac
import secrets
from collections import OrderedDict
from typing import Any, Literal

from pydantic import Field

from gmta import Credentials, PluginConfig, Session, Verdict, accept, hookimpl
from gmta.config import Path
from gmta.services.passwords import DEFAULT_FILE, Users, decoy_hash, user_key, verify
from gmta.services.turns import Turns

AT_A_TIME = 2  # hashes that are on their way to the thread
LOOK_S = 1.0  # how often the file is looked at
REMEMBERED = 10_000
REMEMBER_S = 600.0
KNOWN_S = 30 * 86400.0


class Config(PluginConfig):
    """[plugin:auth_file]"""

    users_file: Path = Field(DEFAULT_FILE, description="what gmta user add writes")
    mechanisms: list[Literal["SCRAM-SHA-256", "PLAIN", "LOGIN"]] = Field(["SCRAM-SHA-256", "PLAIN", "LOGIN"], min_length=1,
                                                                         description="what is offered for these users")


class Plugin:
    """The users of one file."""

    def __init__(self, config: Config, services: Any) -> None:
        self._config = config
        self._services = services
        self._users = Users(config.users_file)
        self._looked_at = 0.0
        self._trouble = ""
        self._decoy: str | None = None
        self._turns = Turns(AT_A_TIME, services.clock)
        self._secret = secrets.token_bytes(32)
        # keyed hash of user, hash and password -> until when; apart, so that guesses drive out nothing that was right
        self._right: OrderedDict[bytes, float] = OrderedDict()
        self._wrong: OrderedDict[bytes, float] = OrderedDict()
        self._look()

    def _look(self) -> None:
        """Reads the file where it has changed; an unreadable one leaves the users as they were."""
        now = self._services.clock()
        if 0 <= now - self._looked_at < LOOK_S:
            return
        self._looked_at = now
        log, trouble = self._services.log, ""
        try:
            if self._users.refresh() and self._users.damaged:
                log.warning("lines of the users file can't be read", file=self._users.path, lines=self._users.damaged)
        except OSError as error:
            trouble = f"{error.strerror}"
        if trouble and trouble != self._trouble:
            log.warning("the users file can't be read", file=self._users.path, reason=trouble)
        self._trouble = trouble

    @hookimpl
    def get_auth_mechanisms(self) -> list[str]:
        """Those of the key `mechanisms`."""
        return list(self._config.mechanisms)

    @hookimpl
    def permit_auth(self, session: Session, credentials: Credentials) -> Verdict | None:
        """accept() where the password is right, or for SCRAM where the user has a verifier."""
        self._look()
        user = user_key(credentials.user)
        if credentials.mechanism.startswith("SCRAM-"):
            credentials.verifier = self._users.verifier(user)
            if credentials.verifier is None:
                return None
            credentials.user = user
            return accept()
        if credentials.mechanism not in ("PLAIN", "LOGIN"):
            return None
        hashed = self._users.hashed(user)
        if self._is_right(hashed, user, credentials.secret, session.peer_ip):
            credentials.user = user
            return accept()
        return None

    def _is_right(self, hashed: str | None, user: str, secret: str, ip: str) -> bool:
        """Whether the password is the user's. hashed None: there is no such user.  ip: of the client."""
        now = self._services.clock()
        key = hmac.digest(self._secret, f"{user}\0{hashed}\0{secret}".encode("utf-8", "surrogateescape"), "sha256")
        if hashed is not None and self._right.get(key, 0.0) > now:
            return True
        if self._wrong.get(key, 0.0) > now:
            return False
        state, place = self._services.state, f"auth_file:{ip} {user}"
        known = bool(state.get(place))
        with self._turns.turn(ip, user, known):
            right = self._services.batch("passwords", max_items=AT_A_TIME).submit(lambda: self._check(hashed, secret)) and hashed is not None
        if right:
            self._turns.was_right(ip)
            if not known:
                state.set(place, True, KNOWN_S)
        judged = self._right if right else self._wrong
        judged[key] = now + REMEMBER_S
        if len(judged) > REMEMBERED:
            judged.popitem(last=False)
        return bool(right)

    def _check(self, hashed: str | None, secret: str) -> bool:
        """In the thread."""
        if hashed is None:
            self._decoy = hashed = self._decoy or decoy_hash()
        return verify(hashed, secret)
