"""Transport `mbox`: appends messages to the files that aliases name by `/path`.

Hooks: get_transports.  Keys of [transport:NAME]: aliases_file, user.  Replies: 250 2.0.0 appended, or thrown away where the file is
/dev/null; 550 5.1.1 no alias names such a file; 550 5.2.0 what is there is no plain file, or has a second name; 552 5.2.2 larger than a quota or
limit allows; 450 4.2.0 locked by another program; 452 4.3.1 no room, 451 4.3.0 any other fault (all deferred).

A message stands below `From sender date`, Return-Path and Delivered-To, with LF line ends, `>` in front of lines that would look like such a
line (mboxrd), and an empty line behind it, which is made good where who wrote the message before died. The file is locked (fcntl), synced,
and cut back to what it was where writing fails. Its last
name is not followed where it is a symbolic link, nor waited for where it is a FIFO. A message goes at least once: a crash before its outcome
is recorded appends it again. With `user` it is written as that account, by the delivery agent; never as root.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from gevent.monkey import get_original
from pydantic import Field

import gmta
from gmta import PluginConfig, hookimpl
from gmta.config import ExistingFile
from gmta.mail.address import Address
from gmta.mail.envelope import stored_address
from gmta.mail.message import with_lf
from gmta.mail.trace import delivered_to
from gmta.services.accounts import find_account
from gmta.services.aliases import FILE, Specials
from gmta.services.files import NO_ROOM, sync_directory, write_all

_OPEN = os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_close = get_original("os", "close")
_NOWHERE = "/dev/null"
_FROM = re.compile(rb"(?m)^(?=>*From )")
_DONE = gmta.delivered("Appended to file", enhanced="2.0.0")
_LOOP = gmta.failed("The message was delivered to this address before: it goes round in circles", enhanced="5.4.6", code=554)
_NO_FILE = gmta.failed("This is no file that mail can be appended to", enhanced="5.2.0", code=550)
_LOCKED = gmta.deferred("The file is locked", enhanced="4.2.0", code=450)


class Config(PluginConfig):
    """[plugin:mbox] has no keys of its own."""


class TransportConfig(PluginConfig):
    """[transport:NAME] of type mbox."""

    aliases_file: ExistingFile = Field(description="whose targets /path may be written to")
    user: str = Field("", description="account that writes; needs a start as root")


class Mbox:
    """The transport."""

    Config = TransportConfig
    concurrency = 1  # they wait for one another's locks

    def __init__(self, name: str, config: TransportConfig, services: Any) -> None:
        self.name = name
        self._config = config
        self._services = services
        self._uid = os.geteuid()
        if config.user:
            account = find_account(config.user)
            if account is None:
                raise ValueError(f"user: there is no account {config.user}")
            self._uid = account.uid
        if not self._uid:
            raise ValueError("user: expected an account, since files of aliases are never written as root")
        self._aliases = Specials(config.aliases_file, FILE, services.clock)

    def user_of(self, address: Address) -> str:
        """The account that writes."""
        return self._config.user

    def deliver(self, delivery: Any) -> dict[int, gmta.Outcome]:
        """Appends for each recipient."""
        return {recipient.number: self._attempt(delivery, recipient) for recipient in delivery.recipients}

    def _attempt(self, delivery: Any, recipient: Any) -> gmta.Outcome:
        if os.geteuid() != self._uid:
            return gmta.deferred(f"Files are written as {self._config.user} only, for which gmta has to be started as root", enhanced="4.3.5")
        path = self._aliases.get(recipient.address.mailbox)
        if path is None and self._aliases.trouble:
            return gmta.deferred("The aliases can't be read", enhanced="4.3.0")
        if path is None:
            return gmta.failed("The alias names no such file", enhanced="5.1.1", code=550)
        alias = stored_address(recipient.original or str(recipient.address))
        if alias.key in delivered_to(delivery.message):
            return _LOOP
        sender = str(delivery.envelope.sender)
        when = time.asctime(time.gmtime(delivery.envelope.received_at))
        top = f"Return-Path: <{sender}>\nDelivered-To: {alias}\n".encode("utf-8", "surrogateescape")
        first = f"From {re.sub(r'[^!-~]', '_', sender) or 'MAILER-DAEMON'} {when}\n".encode("ascii")
        message = delivery.message
        if not message.separator and not message.header and message.body.size:
            top += b"\n"
        try:
            outcome: gmta.Outcome = self._services.batch(f"mbox:{self.name}").submit(lambda: self._append(path, first, with_lf(message.chunks(), top)))
            return outcome
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
                return _NO_FILE
            if error.errno == errno.EFBIG:
                return gmta.failed("The file is too large", enhanced="5.2.2", code=552)
            code, enhanced = (452, "4.3.1") if error.errno in NO_ROOM else (451, "4.3.0")
            return gmta.deferred(f"The file can't be written: {error.strerror or 'I/O error'}", code=code, enhanced=enhanced)

    def _append(self, path: str, first: bytes, pieces: Iterator[bytes]) -> gmta.Outcome:
        """In a native thread; raises OSError."""
        if path == _NOWHERE:
            return _DONE
        try:
            file = os.open(path, _OPEN | os.O_RDWR, 0o600)
        except PermissionError:
            file = os.open(path, _OPEN | os.O_WRONLY, 0o600)
        try:
            found = os.fstat(file)
            if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:  # a second name may be one that others have given it
                return _NO_FILE
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return _LOCKED
            size = os.fstat(file).st_size
            try:
                write_all(file, _missing_end(file, size) + first)
                for piece in quoted(pieces):
                    write_all(file, piece)
                os.fsync(file)
                if not size:
                    with suppress(PermissionError):  # a directory may be one that nobody is to list
                        sync_directory(os.path.dirname(path))
            except OSError:
                os.ftruncate(file, size)
                raise
            return _DONE
        finally:
            _close(file)


def _missing_end(file: int, size: int) -> bytes:
    """What lacks of the empty line that ends the last message: who wrote it may have died, and its reader would take ours for its rest."""
    try:
        end = os.pread(file, 2, max(0, size - 2))
    except OSError:  # it may not be read
        return b""
    return b"" if not end or end == b"\n\n" else b"\n" if end.endswith(b"\n") else b"\n\n"


def quoted(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """A message's octets as they stand in an mbox file: `>` before lines that begin with From, after any number of `>`; two line ends last."""
    line = b""  # the unfinished last one
    end = b""
    for piece in pieces:
        whole, newline, line = (line + piece).rpartition(b"\n")
        if newline:
            out = _FROM.sub(b">", whole + newline)
            end = out[-2:]
            yield out
    if line:
        yield _FROM.sub(b">", line) + b"\n"
        end = b"x\n"
    yield b"" if end == b"\n\n" else b"\n"


class Plugin:
    """Offers the transport type."""

    def __init__(self, config: Config, services: Any) -> None:
        pass

    @hookimpl
    def get_transports(self, config: Any) -> dict[str, Any]:
        """{type name: transport class}."""
        return {"mbox": Mbox}
