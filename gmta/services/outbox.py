"""Small things that are to be sent and may not be lost when the process dies: kept in a file until they are done.

    outbox = Outbox(directory, services.batch, services.clock)
    outbox.keep("06C0…_delivered-1", b"{…}")        outbox.done("06C0…_delivered-1")
    found = outbox.take_over()                      outbox.release(found)

A process appends to a file of its own, which it holds a lock on; who finds one without a lock takes over what is not done in it. What
happened in the last moments of a process that was killed may not have come into its file: `Found.since` says from when on one has to
look elsewhere, `Found.known` what they knew, and `known()` what others do. An entry is written by a native thread, in batches, not synced: it outlives the
process, and after a power cut `since` is earlier. Keys hold no blank and entries no line end.

Failure: `keep` with wait, `take_over`, `known` and `release` raise OSError; all else that can't be written is remembered as `trouble`.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from gmta.services.files import write_all

LARGE = 8 * 1024 * 1024  # octets from which a file is begun anew
KEPT_S = 120.0  # how long the file before it, and one taken over, is kept for those that have to know what it held
OLD = ".old"  # the end of the name of a file that was taken over
MARGIN_S = 15.0  # `since` is so much before the last sign of life: three beats

_LINE = re.compile(rb"\+(\S+) ([0-9]{1,15}\.[0-9]{3}) ([0-9]{1,9}) (.*)\Z|-(\S+)\Z", re.S)
_END = b".\n"  # of a file whose process left in order


@dataclass(slots=True)
class Found:
    """What dead processes left.

    entries: what is not done, key -> (Unix seconds, octets).  known: keys of that and of what is done.  since: from when on more may have
    happened, None: nothing.
    """

    entries: dict[str, tuple[float, bytes]] = field(default_factory=dict)
    known: set[str] = field(default_factory=set)
    since: float | None = None
    files: list[tuple[str, int]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.files)


class Outbox:
    """One process's file in `directory`, begun at the first need. batch: services.batch.  clock: Unix seconds."""

    def __init__(self, directory: str, batch: Callable[..., Any], clock: Callable[[], float]) -> None:
        self._directory = directory
        self._clock = clock
        self._batch = batch(f"outbox:{os.path.basename(directory)}", self._work, max_items=256)
        self._file = -1
        self._path = ""
        self._size = 0
        self._former: list[tuple[float, str, int]] = []
        self._broken = False  # the last line may be cut
        self.trouble = ""  # why nothing can be kept now

    def keep(self, key: str, octets: bytes, *, wait: bool = False) -> None:
        """Keeps an entry. wait: until it is written; else the caller goes on at once."""
        self._put(_entry(key, self._clock(), octets), wait)

    def done(self, key: str) -> None:
        """The entry is not to be sent any more."""
        self._put(b"-%s\n" % key.encode("utf-8", "replace"), False)

    def beat(self, entries: Callable[[], Iterable[tuple[str, float, bytes]]]) -> None:
        """A sign of life, due every five seconds; begins another file where this one is large. entries: what is not done."""
        self._batch.post(lambda: self._beat(entries))

    def take_over(self) -> Found:
        """Everything that dead processes left. Nobody else finds it until `release`, or the end of this process."""
        found: Found = self._batch.submit(self._take_over)
        return found

    def known(self) -> set[str]:
        """The keys in all files: what processes that live have to do, or have done lately."""
        found: set[str] = self._batch.submit(self._known)
        return found

    def release(self, found: Found) -> None:
        """Nobody is to take this over any more: it is kept here or done. For a while it stays, for those who have to know what it held."""
        self._batch.submit(lambda: self._release(found))

    def close(self) -> None:
        """Leaves in order: what is not done is for the next process, and nothing is missing."""
        self._batch.submit(self._end)

    def _put(self, line: bytes, wait: bool) -> None:
        if wait:
            self._batch.submit(line)
        else:
            self._batch.post(line)

    # --- in the native thread ---------------------------------------------------------------------------------------

    def _work(self, items: list[Any]) -> list[Any]:
        """Lines together in one write, calls one after another; an OSError for what could not be done."""
        results: list[Any] = [None] * len(items)
        lines: list[tuple[int, bytes]] = []
        for number, item in enumerate(items):
            if isinstance(item, bytes):
                lines.append((number, item))
                continue
            self._write(lines, results)
            try:
                results[number] = item()
            except OSError as error:
                results[number] = error
                self.trouble = str(error)
        self._write(lines, results)
        return results

    def _write(self, lines: list[tuple[int, bytes]], results: list[Any]) -> None:
        if not lines:
            return
        try:
            self._append(b"".join(line for _, line in lines))
            self.trouble = ""
        except OSError as error:
            self.trouble = str(error)
            for number, _ in lines:
                results[number] = error
        lines.clear()

    def _append(self, data: bytes) -> None:
        if self._file < 0:
            self._begin()
        if self._broken:
            data = b"\n" + data
        self._broken = True
        write_all(self._file, data)
        self._broken = False
        self._size += len(data)

    def _begin(self) -> None:
        """Makes a file and locks it before anybody sees it under its name."""
        os.makedirs(self._directory, mode=0o700, exist_ok=True)
        path = os.path.join(self._directory, f"{os.getpid()}-{os.urandom(6).hex()}")
        file = os.open(f"{path}.new", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            os.rename(f"{path}.new", f"{path}.log")
        except BaseException:
            _remove(f"{path}.new")
            os.close(file)
            raise
        self._file, self._path, self._size, self._broken = file, f"{path}.log", 0, False

    def _beat(self, entries: Callable[[], Iterable[tuple[str, float, bytes]]]) -> None:
        now = self._clock()
        if self._file < 0:
            self._begin()
        os.utime(self._file)
        if self._size > LARGE:
            self._begin_anew(now, entries())
        while self._former and self._former[0][0] <= now:
            _, path, file = self._former.pop(0)
            _remove(path)
            os.close(file)
        for entry in os.scandir(self._directory):
            try:
                if entry.name.endswith(OLD) and entry.stat(follow_symlinks=False).st_mtime < now - KEPT_S:
                    os.unlink(entry.path)
            except FileNotFoundError:  # another process was sooner
                continue

    def _begin_anew(self, now: float, entries: Iterable[tuple[str, float, bytes]]) -> None:
        """Another file with what is not done; where it can't be written, the one that there is stays. Raises OSError."""
        former = self._file, self._path, self._size, self._broken
        self._file = -1
        try:
            self._append(b"".join(_entry(*entry) for entry in entries))
        except OSError:
            if self._file >= 0:
                _remove(self._path)
                os.close(self._file)
            self._file, self._path, self._size, self._broken = former
            raise
        self._former.append((now + KEPT_S, former[1], former[0]))

    def _take_over(self) -> Found:
        found = Found()
        done: set[str] = set()
        try:
            names = [name for name in sorted(os.listdir(self._directory)) if name.endswith(".log")]
        except FileNotFoundError:
            return found
        ours = {self._path, *(path for _, path, _ in self._former)}
        for path in [os.path.join(self._directory, name) for name in names]:
            if path in ours:
                continue
            file = _lock(path)
            if file < 0:
                continue
            found.files.append((path, file))
            data = _read(file)
            for key, at, octets in _entries(data):
                if octets is None:
                    done.add(key)
                else:
                    found.entries[key] = (at, octets)
            if not data.endswith(_END):
                since = os.fstat(file).st_mtime - MARGIN_S
                found.since = since if found.since is None else min(found.since, since)
        found.known = done.union(found.entries)
        found.entries = {key: entry for key, entry in found.entries.items() if key not in done}
        return found

    def _known(self) -> set[str]:
        return {key for name in os.listdir(self._directory) if name.endswith((".log", OLD)) for key in _keys(os.path.join(self._directory, name))}

    def _release(self, found: Found) -> None:
        for path, file in found.files:
            os.rename(path, f"{path}{OLD}")
            os.close(file)
        found.files.clear()

    def _end(self) -> None:
        if self._file >= 0:
            self._append(_END)
            os.close(self._file)
            self._file = -1
        for _, _, file in self._former:
            os.close(file)
        self._former.clear()


def _entry(key: str, at: float, octets: bytes) -> bytes:
    return b"+%s %.3f %d %s\n" % (key.encode("utf-8", "replace"), at, len(octets), octets)


def _entries(data: bytes) -> Iterator[tuple[str, float, bytes | None]]:
    """(key, Unix seconds, octets or None for one that is done); lines that were cut by a full disk or a death are passed over."""
    for line in data.split(b"\n"):
        match = _LINE.match(line)
        if match is None:
            continue
        if match[5] is not None:
            yield match[5].decode("utf-8", "replace"), 0.0, None
        elif len(match[4]) == int(match[3]):
            yield match[1].decode("utf-8", "replace"), float(match[2]), match[4]


def _lock(path: str) -> int:
    """The file, open and locked; -1 where it is somebody's, or gone."""
    try:
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return -1
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(file), os.lstat(path)):  # else somebody took it over meanwhile
            return file
    except OSError:
        pass
    os.close(file)
    return -1


def _read(file: int) -> bytes:
    with open(os.dup(file), "rb") as reader:
        return reader.read()


def _keys(path: str) -> set[str]:
    """The keys of a file that others write to."""
    try:
        with open(path, "rb") as file:
            return {key for key, _, _ in _entries(file.read())}
    except OSError:
        return set()


def _remove(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
