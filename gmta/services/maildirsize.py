"""The quota of a Maildir: the file maildirsize of Maildir++, as Dovecot's and Courier's servers keep it too.

A mailbox is an open directory here, and no name below it is followed where it is a symbolic link or waited for where it is a FIFO: its
owner may have put anything there. Where mailboxes are and who may deliver is left to the transport that asks.

Failure: OSError where a mailbox can't be counted. Nothing else fails: a file that can't be read or written means another count. All
calls block, so they belong into native threads.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
from collections.abc import Callable
from typing import NamedTuple

from gevent.monkey import get_original

from gmta.services.files import write_all

OTHERS = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # how to open what a mailbox's owner may have put there: a link, a FIFO
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_close = get_original("os", "close")  # gevent's looks for watchers first

_SIZE_FILE = "maildirsize"
_SIZE_FILE_MOST = 5120  # octets
_STALE_S = 15 * 60.0
_NUMBER = re.compile(rb"[0-9]{1,18}")
_SIZE_IN_NAME = re.compile(r",S=([0-9]{1,18})(?=[:,]|\Z)")


class Limits(NamedTuple):
    """A mailbox's quota; 0 is none of that kind."""

    octets: int
    messages: int

    def hold(self, used: Usage, size: int = 0, count: int = 0) -> bool:
        """Whether there is room for more."""
        return not ((self.octets and used.octets + size > self.octets) or (self.messages and used.messages + count > self.messages))

    def __str__(self) -> str:
        """The first line of maildirsize."""
        return ",".join([f"{self.octets}S"] * bool(self.octets or not self.messages) + [f"{self.messages}C"] * bool(self.messages))


class Usage(NamedTuple):
    """What is in a mailbox. trusted: good enough to refuse mail by."""

    octets: int
    messages: int
    trusted: bool = True


def read_usage(top: int, limits: Limits, now: float) -> Usage | None:
    """What maildirsize says of the open Maildir; None where it has to be counted anew. now: Unix seconds."""
    try:
        file = os.open(_SIZE_FILE, os.O_RDONLY | OTHERS, dir_fd=top)
    except OSError:
        return None
    try:
        data = os.read(file, _SIZE_FILE_MOST + 1)
        changed_at = os.fstat(file).st_mtime
    except BlockingIOError:  # a FIFO
        return None
    finally:
        _close(file)
    head, _, rest = data.partition(b"\n")
    if len(data) > _SIZE_FILE_MOST or _read_limits(head) != limits:
        return None
    octets = messages = 0
    lines = rest.split(b"\n")[:-1]  # the last may be in the making
    try:
        for line in lines:
            size, count = line.split()
            octets += int(size)
            messages += int(count)
    except ValueError:
        return None
    if not lines or octets < 0 or messages < 0:
        return None
    return Usage(octets, messages, len(lines) == 1 and now - _STALE_S <= changed_at)


def _read_limits(line: bytes) -> Limits | None:
    """The quota in a first line; None where it can't be read."""
    found = {b"S": 0, b"C": 0}
    for word in line.strip().split(b","):
        kind, number = word[-1:], word[:-1]
        if kind not in found or _NUMBER.fullmatch(number) is None:
            return None
        found[kind] = int(number)
    return Limits(found[b"S"], found[b"C"])


def count_usage(top: int, *, courier: bool = False) -> tuple[Usage, dict[str, int]]:
    """What lies in new/ and cur/ of a Maildir and its folders; and when those directories changed last."""
    octets = messages = 0
    stamps: dict[str, int] = {}
    with os.scandir(top) as entries:
        folders = [entry.name for entry in entries
                   if entry.name.startswith(".") and entry.is_dir(follow_symlinks=False) and not (courier and entry.name == ".Trash")]
    for part in [f"{folder}/{part}" for folder in (".", *folders) for part in ("new", "cur")]:
        try:
            directory = os.open(part, _DIRECTORY | os.O_NOFOLLOW, dir_fd=top)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                continue
            raise
        try:
            stamps[part] = os.fstat(directory).st_mtime_ns
            with os.scandir(directory) as entries:
                for entry in entries:
                    name = entry.name
                    if name.startswith(".") or (courier and "T" in name.partition(":2,")[2]):
                        continue
                    match = _SIZE_IN_NAME.search(name)
                    try:
                        octets += int(match[1]) if match else entry.stat(follow_symlinks=False).st_size
                    except FileNotFoundError:  # moved by a reader since
                        continue
                    messages += 1
        finally:
            _close(directory)
    return Usage(octets, messages), stamps


def _stamps_differ(top: int, stamps: dict[str, int]) -> bool:
    """Whether one of the directories changed since it was counted."""
    try:
        return any(os.stat(part, dir_fd=top, follow_symlinks=False).st_mtime_ns != stamp for part, stamp in stamps.items())
    except FileNotFoundError:
        return True


def write_usage(top: int, limits: Limits, used: Usage, stamps: dict[str, int], mode: int, give: Callable[[int, int], None]) -> None:
    """Writes a new maildirsize; where the Maildir changed meanwhile, or it can't be written, there is none until the next count.

    give: sets owner and mode of the new file.
    """
    try:
        if _stamps_differ(top, stamps):
            raise FileExistsError
        temporary = f"{_SIZE_FILE}.new"
        remove(top, temporary)
        file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode, dir_fd=top)
        try:
            give(file, mode)
            write_all(file, f"{limits}\n{used.octets} {used.messages}\n".encode("ascii"))
        finally:
            _close(file)
        os.rename(temporary, _SIZE_FILE, src_dir_fd=top, dst_dir_fd=top)
    except OSError:
        forget_usage(top)


def add_usage(top: int, size: int, count: int) -> None:
    """Adds a line for what came, in one write, where there is a file."""
    try:
        file = os.open(_SIZE_FILE, os.O_WRONLY | os.O_APPEND | OTHERS, dir_fd=top)
    except OSError:
        return  # there is none: the next who asks counts
    try:
        write_all(file, b"%d %d\n" % (size, count))
    except OSError:
        forget_usage(top)
    finally:
        _close(file)


def forget_usage(top: int) -> None:
    """Has the next who asks count anew."""
    remove(top, _SIZE_FILE)


def lock(directory: int, *, exclusive: bool = False) -> None:
    """Locks a mailbox, where its file system can; elsewhere a count may miss what arrives meanwhile, until the next one."""
    _flock(directory, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)


def unlock(directory: int) -> None:
    """Ends a lock."""
    _flock(directory, fcntl.LOCK_UN)


def _flock(directory: int, kind: int) -> None:
    try:
        fcntl.flock(directory, kind)
    except OSError:
        pass


def remove(directory: int, name: str) -> None:
    """Removes a file, if that can be done."""
    try:
        os.unlink(name, dir_fd=directory)
    except OSError:
        pass
