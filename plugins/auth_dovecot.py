"""Asks Dovecot who may log in, over the socket of its auth service.

Hooks: permit_auth, get_auth_mechanisms (of PLAIN, LOGIN, OAUTHBEARER, XOAUTH2 those that Dovecot has).  Keys: socket, service.
Replies: none of its own; 454 4.7.0 from the core where Dovecot can't be asked.

Dovecot needs `service auth { unix_listener /path { mode = 0660 user = … } }`. The user is whom Dovecot names. Each login has a connection
of its own, so that one that hangs holds up nobody else. Protocol: Dovecot's "Auth Protocol" 1.2, client's side.
"""

from __future__ import annotations

import base64
import os
import secrets
import socket
from typing import Any

from pydantic import Field

from gmta import Credentials, PluginConfig, Session, Verdict, accept, hookimpl

FRESH_S = 60.0
ANSWER_S = 25.0
LONGEST = 64 * 1024
SINGLE = {"PLAIN": "PLAIN", "LOGIN": "PLAIN", "OAUTHBEARER": "OAUTHBEARER", "XOAUTH2": "XOAUTH2"}  # ours, by what Dovecot is told


class Config(PluginConfig):
    """[plugin:auth_dovecot]"""

    socket: str = Field("/run/dovecot/auth-client", description="the unix_listener of Dovecot's service auth")
    service: str = Field("smtp", pattern=r"^[A-Za-z0-9_-]+$", description="what Dovecot is told that the login is for")


class DovecotError(Exception):
    """Dovecot can't be asked, or does not know now."""


class _Dialogue:
    """One connection, past its handshake. mechanisms: those that Dovecot offers."""

    def __init__(self, path: str) -> None:
        self._buffer = b""
        self.mechanisms: set[str] = set()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(ANSWER_S)
        try:
            self._socket.connect(path)
            # the id has to differ from that of every other connection there is
            self._socket.sendall(f"VERSION\t1\t1\nCPID\t{secrets.randbits(31) or os.getpid()}\n".encode())
            while (words := self.words())[0] != "DONE":
                if words[0] == "MECH":
                    self.mechanisms.add(words[1].upper())
                elif words[0] == "VERSION" and words[1] != "1":
                    raise DovecotError(f"Dovecot speaks version {words[1]} of its protocol")
        except (OSError, IndexError) as error:
            self.close()
            raise DovecotError(f"{path}: {error or 'odd answer'}") from error
        except DovecotError:
            self.close()
            raise

    def words(self) -> list[str]:
        """The next line; raises DovecotError where there is none."""
        while b"\n" not in self._buffer:
            piece = self._socket.recv(8192)
            if not piece or len(self._buffer) > LONGEST:
                raise DovecotError("Dovecot has ended the connection")
            self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line.decode("utf-8", "replace").split("\t")

    def ask(self, line: str) -> list[str]:
        """The answer to a request; raises DovecotError."""
        try:
            self._socket.sendall(line.encode())
            while (words := self.words())[0] not in ("OK", "FAIL", "CONT"):
                pass
        except OSError as error:
            raise DovecotError(str(error)) from error
        return words

    def close(self) -> None:
        """Ends it."""
        self._socket.close()


class Plugin:
    """A client of one Dovecot."""

    def __init__(self, config: Config, services: Any) -> None:
        self._config = config
        self._services = services
        self._mechanisms: list[str] = ["PLAIN", "LOGIN"]
        self._asked_at = 0.0

    @hookimpl
    def get_auth_mechanisms(self) -> list[str]:
        """What Dovecot offers, as far as it can be passed on; while it is down what it offered last."""
        now = self._services.clock()
        if not 0 <= now - self._asked_at < FRESH_S:
            self._asked_at = now
            try:
                dialogue = _Dialogue(self._config.socket)
            except DovecotError as error:
                self._services.log.warning("Dovecot can't be asked", reason=str(error))
            else:
                dialogue.close()
                self._mechanisms = [ours for ours, theirs in SINGLE.items() if theirs in dialogue.mechanisms]
        return self._mechanisms

    @hookimpl
    def permit_auth(self, session: Session, credentials: Credentials) -> Verdict | None:
        """accept() for OK, None for FAIL; raises DovecotError where Dovecot does not know now."""
        if credentials.mechanism not in SINGLE:
            return None
        mechanism = SINGLE[credentials.mechanism]
        words = ["AUTH", "1", mechanism, f"service={self._config.service}", "nologin", f"rip={session.peer_ip}", f"rport={session.peer_port}",
                 f"session={session.id}"]
        if session.tls is not None:
            words.append("secured=tls")
        words.append("resp=" + base64.b64encode(_response(mechanism, credentials)).decode("ascii"))  # last: the protocol asks for it
        dialogue = _Dialogue(self._config.socket)
        try:
            answer = dialogue.ask("\t".join(words) + "\n")
        finally:
            dialogue.close()
        if answer[0] == "OK":
            named = next((word[5:] for word in answer if word.startswith("user=")), "")
            credentials.user = named or credentials.user
            return accept()
        if answer[0] == "FAIL" and "temp" in answer:
            raise DovecotError("a temporary failure in Dovecot")
        return None


def _response(mechanism: str, credentials: Credentials) -> bytes:
    """The client's one message."""
    user, secret = credentials.user, credentials.secret
    if mechanism == "PLAIN":
        return f"\0{user}\0{secret}".encode()
    if mechanism == "XOAUTH2":
        return f"user={user}\x01auth=Bearer {secret}\x01\x01".encode()
    name = user.replace("=", "=3D").replace(",", "=2C")
    return f"n,{'a=' + name if name else ''},\x01auth=Bearer {secret}\x01\x01".encode()
