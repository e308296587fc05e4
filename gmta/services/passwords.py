"""Passwords: how they are hashed, and the file that has users with their hashes.

A line of the file is `ADDRESS ARGON2-HASH SCRAM-VERIFIER`; `#` begins a comment. The hash is argon2id (RFC 9106) in the usual text
form, the verifier that of RFC 5803; neither can be used to log in. `Users` is the file as it is now, `change` writes it anew: whole
or not at all, mode 0600. Hashing takes about 20 ms of a processor, so it belongs into a native thread. Failure: OSError for the
file; a line that can't be read is a user who can't log in, and `damaged` counts them.
"""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Callable
from contextlib import suppress

from argon2 import PasswordHasher
from argon2.exceptions import Argon2Error, InvalidHashError

from gmta.mail.address import AddressError, domain_key, parse_mailbox
from gmta.services.files import sync_directory, write_new
from gmta.smtp.sasl import ScramVerifier, prepared

DEFAULT_FILE = "etc/users"
MAX_SECRET = 1024  # octets: more is no password, but work


def _hasher() -> PasswordHasher:
    """argon2id with 19 MB, two passes and one lane: what OWASP asks for at least, since a login must not cost much."""
    return PasswordHasher(time_cost=2, memory_cost=19456, parallelism=1)


def user_key(name: str) -> str:
    """A user's name in the form that names compare by: the whole in lower case, the domain as domains compare."""
    local, at, domain = name.strip().rpartition("@")
    return f"{local.lower()}@{domain_key(domain)}" if at else domain.lower()


def check_user(name: str) -> str:
    """The name of a new user, which must be an address without blanks; raises ValueError."""
    try:
        parse_mailbox(name)
    except AddressError as error:
        raise ValueError(f"{name} is no address: {error}") from error
    if name.split() != [name] or name.startswith("#") or '"' in name:
        raise ValueError(f"{name} can't be a user's name")
    return user_key(name)


def hash_password(secret: str) -> str:
    """`HASH VERIFIER`, as a line of the file has it behind the address; raises ValueError for an empty or odd password."""
    octets = prepared(secret)
    if not octets or len(octets) > MAX_SECRET or "\0" in secret:
        raise ValueError(f"a password has 1 to {MAX_SECRET} octets")
    return f"{_hasher().hash(octets)} {ScramVerifier.of(secret, secrets.token_bytes(16)).text()}"


def verify(hashed: str, secret: str) -> bool:
    """Whether the password fits the argon2 hash."""
    octets = prepared(secret)
    if len(octets) > MAX_SECRET:
        octets = b""
    try:
        return bool(_hasher().verify(hashed, octets))
    except (Argon2Error, InvalidHashError, UnicodeError):
        return False


def decoy_hash() -> str:
    """A hash that no password fits: checking it takes as long as checking a real one."""
    return _hasher().hash(secrets.token_bytes(32))


class Users:
    """The users of a file, looked up by name; `refresh` reads it again where it has changed."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.damaged = 0
        self._lines: dict[str, list[str]] = {}
        self._stamp: tuple[int, ...] | None = None

    def refresh(self) -> bool:
        """Reads the file if it is another than before; whether it was. Raises OSError, and then keeps what it has."""
        found = os.stat(self.path)
        stamp = (found.st_mtime_ns, found.st_size, found.st_ino)
        if stamp == self._stamp:
            return False
        with open(self.path, encoding="utf-8", errors="surrogateescape") as file:
            text = file.read()
        lines: dict[str, list[str]] = {}
        self.damaged = 0
        for line in text.splitlines():
            words = line.split()
            if not words or words[0].startswith("#"):
                continue
            if len(words) < 2 or not words[1].startswith("$argon2"):
                self.damaged += 1
                continue
            lines[user_key(words[0])] = words
        self._lines, self._stamp = lines, stamp
        return True

    def __len__(self) -> int:
        return len(self._lines)

    def names(self) -> list[str]:
        """All users, in the file's order."""
        return list(self._lines)

    def hashed(self, name: str) -> str | None:
        """The user's argon2 hash."""
        words = self._lines.get(user_key(name))
        return None if words is None else words[1]

    def verifier(self, name: str) -> ScramVerifier | None:
        """The user's SCRAM verifier; None where the line has none that can be read."""
        words = self._lines.get(user_key(name))
        if words is None or len(words) < 3:
            return None
        with suppress(ValueError):
            return ScramVerifier.parse(words[2])
        return None


def change(path: str, edit: Callable[[dict[str, str]], None], owner: tuple[int, int] | None = None) -> None:
    """Writes the file anew with what `edit` makes of {user: its line}; comments and lines that can't be read stay as they are.

    Two who change it at a time come one after the other. owner: (uid, gid) of a new file; an old one keeps its own.
    Raises OSError, and whatever `edit` raises: then the file stays as it was.
    """
    path = os.path.realpath(path)  # a link stays a link
    folder = os.path.dirname(path)
    if not os.path.isdir(folder):
        os.makedirs(folder, mode=0o750, exist_ok=True)
        if owner is not None and os.geteuid() == 0:
            os.chown(folder, *owner)
    held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        lines: list[str] = []
        if os.path.exists(path):
            found = os.stat(path)
            owner = (found.st_uid, found.st_gid)
            with open(path, encoding="utf-8", errors="surrogateescape") as file:
                lines = file.read().splitlines()
        users: dict[str, str] = {}
        kept: list[str | tuple[str]] = []  # a line, or the user whose line stands there
        for line in lines:
            words = line.split()
            if words and not words[0].startswith("#") and user_key(words[0]) not in users:
                users[user_key(words[0])] = line
                kept.append((user_key(words[0]),))
            else:
                kept.append(line)
        edit(users)
        out = [users.pop(one[0], None) if isinstance(one, tuple) else one for one in kept]
        text = "".join(f"{line}\n" for line in (*out, *users.values()) if line is not None)
        _replace(path, text.encode("utf-8", "surrogateescape"), owner)
    finally:
        os.close(held)


def _replace(path: str, octets: bytes, owner: tuple[int, int] | None) -> None:
    """Puts a new file of mode 0600 in the place of `path`."""
    partial = f"{path}.{os.getpid()}.new"
    write_new(partial, octets, owner)
    try:
        os.rename(partial, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(partial)
        raise
    sync_directory(os.path.dirname(path))
