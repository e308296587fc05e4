"""The maildrop: a directory where local programs leave messages for gmta, with the server up or down.

`{data_dir}/maildrop` belongs to the workers' account; its group may create files in it but neither list it nor touch what
others left (mode 3730). `Sender` writes a file and gives it its name only when it is on disk; gmta/receive/pickup.py takes it
from there. A file is one line of JSON (the envelope, ASCII, blank-padded) and the message with CRLF line ends:

    {"gmta": 1, "sender": "a@b", "recipients": ["c@d"], "notify": ["FAILURE"], "ret": "HDRS", "envid": "x", "body": "8BITMIME"}

Names: ID.tmp while it is written, ID.mail when complete; `taken/QUEUEID` belongs to the worker that has it in hand, `odd/` holds
what was no such file. Evolution is additive: unknown keys are ignored. No gevent here; all calls block.
Failure: OSError where the directory can't be written; BadDrop for a file that was not written by `Sender`.
"""

from __future__ import annotations

import errno
import json
import os
import pwd
import re
import stat
from dataclasses import dataclass
from typing import Any, BinaryIO

from gmta.mail.address import Address, AddressError, parse_path
from gmta.services.files import sync_directory, write_all

DIRECTORY = "maildrop"
COMPLETE = ".mail"
UNFINISHED = ".tmp"
TAKEN = "taken"
ODD = "odd"
MODE = 0o3730  # group: create, not list; sticky: only one's own can be removed; set-group-id: the workers can read what is left
FILE_MODE = 0o640
MAX_ENVELOPE = 1024 * 1024  # octets
NOTIFY = frozenset({"SUCCESS", "FAILURE", "DELAY"})
BODIES = ("7BIT", "8BITMIME")

ENVID = re.compile(r"[!-~]{0,100}\Z")  # RFC 3461 section 4.4


class BadDrop(Exception):
    """The file is no message for gmta; the text says why."""


@dataclass(slots=True)
class Drop:
    """What the sender of a dropped message said about it. notify, ret, envid, body: as in RFC 3461 and RFC 6152."""

    sender: Address
    recipients: list[Address]
    notify: frozenset[str] = frozenset()
    ret: str = ""
    envid: str = ""
    body: str = "8BITMIME"

    @property
    def smtputf8(self) -> bool:
        """Whether an address needs SMTPUTF8 (RFC 6531)."""
        return not (self.sender.is_ascii and all(recipient.is_ascii for recipient in self.recipients))

    def line(self, width: int = 0) -> bytes:
        """The first line of its file, padded to `width` octets."""
        text = json.dumps({"gmta": 1, "sender": str(self.sender), "recipients": [str(one) for one in self.recipients],
                           "notify": sorted(self.notify), "ret": self.ret, "envid": self.envid, "body": self.body})
        return text.encode("ascii").ljust(width - 1) + b"\n"

    @classmethod
    def parse(cls, line: bytes) -> Drop:
        """The envelope of a file's first line; raises BadDrop."""
        try:
            data = json.loads(line)
        except ValueError as error:
            raise BadDrop("the first line is not JSON") from error
        if not isinstance(data, dict) or data.get("gmta") != 1:
            raise BadDrop("the first line is no envelope of a kind known here")
        recipients, notify = _texts(data, "recipients"), frozenset(_texts(data, "notify"))
        ret, envid, body = (_text(data, name) for name in ("ret", "envid", "body"))
        if not recipients:
            raise BadDrop("it has no recipients")
        if not (notify <= NOTIFY or notify == {"NEVER"}) or ret not in ("", "FULL", "HDRS") or body not in ("", *BODIES):
            raise BadDrop("notify, ret or body has an unknown value")
        if ENVID.match(envid) is None:
            raise BadDrop("envid can't be sent on")
        try:
            sender = parse_path(f"<{_text(data, 'sender')}>", null=True, smtputf8=True)
            found = [parse_path(f"<{one}>", postmaster=True, smtputf8=True) for one in recipients]
        except AddressError as error:
            raise BadDrop(f"bad address: {error}") from error
        if any(rest for _, rest in (sender, *found)):
            raise BadDrop("bad address")
        return cls(sender[0], [address for address, _ in found], notify, ret, envid, body or "8BITMIME")


def _text(data: dict[str, Any], name: str) -> str:
    return _checked(data.get(name, ""), name)


def _texts(data: dict[str, Any], name: str) -> list[str]:
    value = data.get(name, [])
    if not isinstance(value, list):
        raise BadDrop(f"{name} is no list")
    return [_checked(one, name) for one in value]


def _checked(value: Any, name: str) -> str:
    """A text of the envelope; JSON can hold lone surrogates, which nothing else takes."""
    if not isinstance(value, str) or any("\ud800" <= char <= "\udfff" for char in value):
        raise BadDrop(f"{name} is no text")
    return value


class Sender:
    """A file on its way into the maildrop: `write` the message's octets, then `commit`; `abandon` whatever was not committed.

    name: 16 characters that are unique (an IdSource's). All methods raise OSError.
    """

    def __init__(self, directory: str, name: str, drop: Drop) -> None:
        self._directory = directory
        self._name = os.path.join(directory, name)
        self._drop = drop
        self._width = 0
        self._eight_bit = False
        self.size = 0
        self._file = os.open(self._name + UNFINISHED, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            os.fchmod(self._file, FILE_MODE)  # whatever the umask
            drop.body = "8BITMIME"
            line = drop.line()
            self._width = len(line)
            write_all(self._file, line)
        except OSError:
            self.abandon()
            raise

    def write(self, octets: bytes) -> None:
        """Takes a piece of the message."""
        self._eight_bit = self._eight_bit or not octets.isascii()
        self.size += len(octets)
        write_all(self._file, octets)

    def commit(self) -> None:
        """Makes the file durable, then gives it its name: from then on it is gmta's."""
        if not self._eight_bit:
            self._drop.body = "7BIT"
            os.pwrite(self._file, self._drop.line(self._width), 0)
        os.fsync(self._file)
        os.rename(self._name + UNFINISHED, self._name + COMPLETE)
        try:
            sync_directory(self._directory)
        except PermissionError:  # who may only create can't open it; a renamed file's own sync takes its name along
            os.fsync(self._file)
        os.close(self._file)
        self._file = -1

    def abandon(self) -> None:
        """Removes what is not committed."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
            try:
                os.unlink(self._name + UNFINISHED)
            except OSError:
                pass  # swept a day later


@dataclass(slots=True)
class Opened:
    """A dropped file, open. start: where the message begins; size: its octets; uid: who left it; at: when, Unix seconds."""

    drop: Drop
    file: BinaryIO
    start: int
    size: int
    uid: int
    at: float


def open_drop(path: str) -> Opened:
    """Opens a file that anybody in the group may have made; raises BadDrop, OSError."""
    try:
        # O_NONBLOCK: a named pipe must not stop us
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):  # a symbolic link, a socket
            raise BadDrop("no regular file") from error
        raise
    facts = os.fstat(descriptor)
    if not stat.S_ISREG(facts.st_mode) or facts.st_nlink > 1:  # another name: somebody's file, linked here to be read by us
        os.close(descriptor)
        raise BadDrop("no regular file with one name")
    file = os.fdopen(descriptor, "rb")
    try:
        line = file.readline(MAX_ENVELOPE + 1)
        if not line.endswith(b"\n"):
            raise BadDrop("the first line has no end")
        return Opened(Drop.parse(line), file, len(line), facts.st_size - len(line), facts.st_uid, facts.st_mtime)
    except BaseException:
        file.close()
        raise


def prepare(data_dir: str, account: pwd.struct_passwd | None = None) -> str:
    """Makes the maildrop under data_dir where it is not there, `account`'s own; returns its path. Raises OSError.

    One that is there keeps the mode that an administrator gave it.
    """
    directory = os.path.join(data_dir, DIRECTORY)
    for path, mode in ((directory, MODE), (os.path.join(directory, TAKEN), 0o700), (os.path.join(directory, ODD), 0o700)):
        try:
            os.mkdir(path, 0o700)
            fresh = True
        except FileExistsError:
            fresh = False
        if account is not None:
            os.chown(path, account.pw_uid, account.pw_gid)
        if fresh:
            os.chmod(path, mode)
    return directory


def waiting(data_dir: str) -> int:
    """How many messages lie in the maildrop of data_dir, 0 where it is not there. Raises PermissionError."""
    directory = os.path.join(data_dir, DIRECTORY)
    try:
        return sum(name.endswith(COMPLETE) for name in os.listdir(directory)) + len(os.listdir(os.path.join(directory, TAKEN)))
    except FileNotFoundError:
        return 0
